"""Table of lora_glue_fl's runs: per setting and rule, mean and standard deviation over seeds.

    python plots/glue_table.py --data-dir out_fedavg
    python plots/glue_table.py --data-dir out_fedavg --markdown --wide
    python plots/glue_table.py --data-dir out_fedavg --against svd

One table per task and federation. Metrics are those of the last round on the validation examples, times 100; `best` is
the headline metric's best round, chosen on those same examples. `+-` is the sample standard deviation over seeds (n - 1
in the denominator). `vs central` is the difference in the headline metric, in points, taken seed by seed over the seeds
that both have; --against takes another row instead: two rules of one seed have the same shards and the same start, so
that spread is the one to judge a difference by. `error %` is ||served - mean(BA)|| / ||mean(BA)|| and `discarded %` the
share of the energy that svd cut off, means over the rounds. --wide prints one table of headline metrics, a row per
task and federation.
"""

import numpy as np

from common.cli import Parser, run_main
from plots.alike import kind_order, like_with_like, usual
from plots.glue_drawing import add_tasks, metric_label, seeds_range
from plots.glue_runs import (
    FIGURE,
    METRICS,
    RULES,
    Panel,
    central_curves,
    describe,
    figures_of,
    find_runs,
    mean_over_rounds,
    set_titles,
)
from plots.summarize import spread
from plots.vit_table import layout


def build_parser():
    parser = Parser("Prints what lora_glue_fl's runs reached, mean and standard deviation over seeds.")
    parser.add_argument("--data-dir", default="results", help="folder with run folders, searched with all below it")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--wide", action="store_true", help="headline metrics only, a row per task and federation")
    parser.add_argument(
        "--against", choices=["central", *RULES], default="central", help="the row that differences are taken to"
    )
    add_tasks(parser)
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    return parser


def main(args):
    print(report(args.data_dir, args.markdown, args.wide, args.against, args.tasks, args.unfinished))


def report(data_dir, markdown=False, wide=False, against="central", tasks=None, unfinished=False):
    """The tables of all runs in `data_dir` as one text, with notes on the runs that were left out."""
    runs, notes = find_runs(data_dir, unfinished, tasks)
    figures = figures_of(runs, notes) + central_only(runs, notes)
    parts = []
    for setting, panels in figures:
        if wide:
            about = describe(setting) + "; validation metric of the last round, mean +- standard deviation over seeds"
            parts += [("### " if markdown else "") + about, layout(wide_rows(panels), markdown)]
            continue
        for panel in panels:
            curves = [*panel.references, *panel.curves]
            keys = ("task", *FIGURE, "clients", "shards", "rounds", "local_epochs", "learning_rate", "examples")
            about = describe(panel.setting, keys)
            shared = usual(curves)
            parts.append(("### " if markdown else "") + about)
            parts += [f"Unless said otherwise: {shared}."] if shared else []
            metrics = metrics_of(curves)
            head = ["rule", *(f"{metric_label(name)}" for name in metrics), "best", f"vs {against}"]
            head += ["error %", "discarded %", "MB up", "MB down", "rounds", "minutes", "seeds"]
            base = base_of(curves, against)
            parts.append(layout([head, *(row(curve, metrics, panel.metric, base) for curve in curves)], markdown))
    return "\n\n".join(parts + notes)


def central_only(runs, notes):
    """Tables of central runs whose data no federated run has."""
    groups = [(setting, members) for setting, members in like_with_like(runs) if all(run.central for run in members)]
    panels = [Panel(setting, [], central_curves(members, notes)) for setting, members in groups]
    set_titles(panels)
    return [({key: p.setting[key] for key in FIGURE if key in p.setting}, [p]) for p in panels]


def metrics_of(curves):
    """The fields with the task's metrics that a curve has, the headline first: ["val_accuracy", "val_f1"]."""
    fields = [f"val_{name}" for name in METRICS]  # a headline is before the others of its task there
    return [field for field in fields if any(np.isfinite(curve.results(field)).any() for curve in curves)]


def base_of(curves, kind):
    """The curve of this kind that differences are taken to, the usual variant; None without one."""
    return next((curve for curve in curves if curve.kind == kind), None)


def row(curve, metrics, metric, base):
    percents = [100 * curve.results(name) for name in (*metrics, f"best_{metric}")]
    rounds = curve.results("rounds")
    megabytes = ["-" if curve.central else sent(curve.results(f"bytes_{way}")) for way in ("up", "down")]
    return [
        curve.label,
        *(spread(values, digits=2) for values in percents),
        "-" if base is curve else difference(curve, base, metric),
        small(100 * mean_over_rounds(curve, "aggregation_error")),
        small(100 * mean_over_rounds(curve, "discarded_energy")),
        *megabytes,
        f"{rounds.mean():,.0f}" if np.isfinite(rounds).all() else "-",
        spread(curve.results("seconds") / 60, digits=1),
        str(len(curve.runs)),
    ]


def sent(values):
    """Bytes in MB: one number where all seeds sent as much."""
    return spread(values[:1] / 1e6 if np.ptp(values) == 0 else values / 1e6)


def small(values):
    """`41.2 +- 0.8`; `<0.01` for what rounds to nothing, such as an exact rule's error."""
    if np.isfinite(values).all() and 0 < values.max(initial=0.0) < 0.01:
        return "<0.01"
    return spread(values, digits=2)


def difference(curve, base, metric):
    """`-1.20 +- 0.30`: points of the last metric to `base`, over the seeds that both have; `-` without any."""
    if base is None:
        return "-"
    last = [dict(zip([run.seed for run in c.runs], 100 * c.results(metric), strict=True)) for c in (curve, base)]
    text = spread(np.array([last[0][seed] - last[1][seed] for seed in last[0] if seed in last[1]]), digits=2)
    return text if text.startswith("-") else "+" + text


def wide_rows(panels):
    """Rows of cells, the head first: a row per panel, a column per rule."""
    kinds = {curve.label: kind_order(curve) for panel in panels for curve in (*panel.references, *panel.curves)}
    labels = sorted(kinds, key=kinds.get)
    rows = [["setting", "metric", *labels, "seeds"]]
    for panel in panels:
        there = {curve.label: curve for curve in (*panel.references, *panel.curves)}
        cells = [spread(100 * there[name].results(panel.metric), digits=1) if name in there else "-" for name in labels]
        rows.append([panel.title, metric_label(panel.metric), *cells, seeds_range(there.values())])
    return rows


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
