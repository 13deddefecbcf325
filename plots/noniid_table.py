"""Table of llm_noniid's runs: per method and setting, mean and standard deviation over seeds.

    python plots/noniid_table.py --data-dir results
    python plots/noniid_table.py --data-dir results --markdown

One table per group of runs on the same texts and model with the same number of clients and rounds. A row is one
algorithm with the settings and arguments that set it apart; what most rows share is said above the table. Losses are in
nats per token, after the last round. `+-` is the sample standard deviation over seeds (n - 1 in the denominator).
`vs FedAvg` is the difference in validation loss to FedAvg in the same setting, taken seed by seed: two runs of one seed
have the same clients and the same start, so that spread is the one to judge a difference by. `mean client` and `worst
client` are losses on the clients' own held-out texts. `drift` is the relative drift of the updates, the mean over the
evaluated rounds. `alarms` are the detectors that spoke, with the number of seeds where not all had one. --target adds
the first evaluated round whose validation loss is at most that.
"""

import numpy as np

from common.cli import Parser, positive_float, run_main
from common.curves import number
from plots.alike import curves_of, like_with_like, setting_of, usual
from plots.glue_runs import mean_over_rounds
from plots.noniid_runs import FACTORS, PLACE, describe, find_runs, first_alarms
from plots.summarize import spread
from plots.vit_table import layout

FREE = tuple(dict.fromkeys((*PLACE, *FACTORS)))  # what the rows of one table may differ in
HEAD = ("method", "val loss", "best", "vs FedAvg", "val ppl", "test ppl", "bits/byte", "mean client", "worst client")
HEAD += ("drift", "alarms", "MB up", "rounds", "minutes", "seeds")


def build_parser():
    parser = Parser("Prints what llm_noniid's runs reached, mean and standard deviation over seeds.")
    parser.add_argument("--data-dir", default="results", help="folder with run folders, searched with all below it")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--target", type=positive_float, metavar="LOSS", help="say how many rounds a run took to it")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    return parser


def main(args):
    print(report(args.data_dir, args.markdown, args.unfinished, args.target))


def report(data_dir, markdown=False, unfinished=False, target=None):
    """The tables of all groups of runs in `data_dir` as one text, with notes on the runs that were left out."""
    runs, notes = find_runs(data_dir, unfinished)
    parts = []
    for setting, members in like_with_like(runs, FREE):
        curves = curves_of(members, FREE, notes=notes)
        shared = usual(curves)
        parts.append(("### " if markdown else "") + describe(setting_of(setting, curves)))
        parts += [f"Unless said otherwise: {shared}."] if shared else []
        rows = [list(HEAD), *(row(curve, fedavg_of(curve, curves)) for curve in curves)]
        if target is not None:
            rows = [
                [*cells, more] for cells, more in zip(rows, [f"to {target:g}", *reached(curves, target)], strict=True)
            ]
        parts.append(layout(rows, markdown))
    return "\n\n".join(parts + notes)


def row(curve, base):
    """The cells of a curve; base: the FedAvg curve of its setting, or None."""
    rounds, sent = curve.results("rounds"), curve.results("bytes_up") / 1e6
    alone = curve.central or curve.kind == "local"
    return [
        curve.label,
        spread(curve.results("val_loss"), digits=3),
        spread(np.array([best(run) for run in curve.runs]), digits=3),
        difference(curve, base),
        *(spread(curve.results(name)) for name in ("val_ppl", "test_ppl")),
        *(spread(curve.results(name), digits=3) for name in ("val_bits_per_byte", "mean_client_val_loss")),
        spread(curve.results("worst_client_val_loss"), digits=3),
        "-" if curve.central else spread(mean_over_rounds(curve, "relative_drift"), digits=2),
        alarms(curve),
        "-" if alone else spread(sent[:1] if np.ptp(sent) == 0 else sent),
        f"{rounds.mean():,.0f}" if np.isfinite(rounds).all() else "-",
        spread(curve.results("seconds") / 60, digits=1),
        str(len(curve.runs)),
    ]


def best(run):
    """The lowest finite validation loss of a run's evaluations; nan without one."""
    found = [number(line.get("val_loss")) for line in run.rows]
    return min((value for value in found if np.isfinite(value)), default=np.nan)


def reached(curves, target):
    """Cells: the rounds to a validation loss of `target`, `>40` where a seed never had it."""
    cells = []
    for curve in curves:
        first = [
            next((r["round"] for r in run.rows if number(r.get("val_loss")) <= target), None) for run in curve.runs
        ]
        longest = max(run.rows[-1]["round"] for run in curve.runs)
        cells.append(f">{longest}" if None in first else spread(np.array(first, dtype=float), digits=1))
    return cells


def alarms(curve):
    """`diverged, slow 2/3`: the detectors that spoke; `-` for none."""
    n = len(curve.runs)
    found = {name.replace("_", " "): len(times) for name, times in first_alarms(curve).items()}
    return ", ".join(name + (f" {count}/{n}" if count < n else "") for name, count in found.items()) or "-"


def fedavg_of(curve, curves):
    """The FedAvg curve in the setting of `curve` that shares most arguments with it; None for itself and central."""
    place = {key: curve.args.get(key) for key in FREE}
    there = [c for c in curves if c.kind == "fedavg" and {key: c.args.get(key) for key in FREE} == place]
    base = max(there, key=lambda c: sum(curve.args.get(k) == v for k, v in c.args.items()), default=None)
    return None if base is curve or curve.central else base


def difference(curve, base):
    """`-0.120 +- 0.030`: nats of the last validation loss to `base`, over the seeds that both have."""
    if base is None:
        return "-"
    last = [dict(zip([run.seed for run in c.runs], c.results("val_loss"), strict=True)) for c in (curve, base)]
    text = spread(np.array([last[0][seed] - last[1][seed] for seed in last[0] if seed in last[1]]), digits=3)
    return text if text.startswith("-") else "+" + text


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
