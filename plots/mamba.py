"""Figures and table of mamba_fl.

    python plots/mamba.py --data-dir results --out-dir results/plots        # all; also plots/plot_perplexities.py
    python plots/mamba.py lu_comparison --data-dir mamba_fl/results/gap.jsonl --config pure_ssm_1_layer
    python plots/tables.py mamba_fl

    central_vs_fed           1_central_vs_fed_{config}.png: central and FedAvg at the fewest local updates (LU)
    lu_comparison            2_lu_comparison_{config}.png: FedAvg at each LU
    method_comparison        3_method_comparison_{config}.png: the federated methods at the fewest LU
    multi_config_comparison  4_multi_config_comparison.png: depths, central and federated

A figure holds only runs with the same data, tokenizer, model, length, budget and sync; a further such group gets a
figure of its own, with what sets it apart in the file's name. A line is the mean over seeds at equal tokens, its band
their minimum to maximum. Perplexity is exp(mean NLL per token), so the axis is logarithmic.
"""

import math
import re
from dataclasses import replace
from functools import partial

import numpy as np

from common.cli import UsageError, run_main
from common.curves import break_lines, log_axis, new_figure, token_unit, tokens_label
from common.participation import per_round
from plots import style
from plots.runs import LeftOut, Study, base_name, text
from plots.seeds import curves_of, label, lines_of, nearest, ratio
from plots.style import Figure, band, caption, each_group, look, looks_of, markers_at, seeds_text
from plots.tables import SEEDS, Column, Table, result, spread, whole

# ---- the study

FROM_ARGS = ("dataset", "sequence_length", "val_sequences", "budget", "sync")
KEYS = ("dataset", "variant", "data", "tokenizer", "config", "shape", "val_sequences", "sequence_length", "budget")
KEYS += ("sync",)
# Mamba-2's sizes and the values that go without saying.
SIZES = {"d_model": None, "d_state": 128, "headdim": 64, "expand": 2}
FEDERATED_ONLY = frozenset(
    "local_updates rounds participation client_weights client_optimizer client_state alpha_global sync budget"
    " personal".split()
)


def setting_of(run):
    args = {key: value for key, value in run.args.items() if not (run.central and key in FEDERATED_ONLY)}
    values = {key: args[key] for key in FROM_ARGS if key in args}
    values["config"] = config_of(args)
    values["tokenizer"] = base_name(text(args.get("tokenizer") or run.data.get("tokenizer")))
    if "variant" in run.data:
        values["variant"] = text(run.data["variant"])
    if isinstance(run.data.get("sha256"), str):
        values["data"] = run.data["sha256"][:8]
    values["shape"] = ", ".join(
        f"{key} {args[key]}" for key, value in SIZES.items() if args.get(key) not in (None, value)
    )
    return values


def prepared(runs, notes):
    """The runs with one name for each tokenizer: a run that starts from another has that one's folder in its place."""
    names, shas = {}, {run: text(run.data.get("tokenizer_sha256")) for run in runs}
    for run in sorted(runs, key=lambda run: run.args.get("init_from") is not None):
        names.setdefault(shas[run], {"tokenizer": run.args.get("tokenizer")})
    return [replace(run, args=run.args | names[shas[run]]) if shas[run] else run for run in runs]


def config_of(args):
    """`pure_ssm_2_layer`, whether the command line said `--config` or `--layers`."""
    layers = args.get("layers")
    return f"pure_ssm_{layers}_layer" if layers else str(args.get("config"))


def layers_of(config):
    """The number of layers in the name of a configuration, or None."""
    number = re.search(r"_(\d+)_layer", str(config))
    return int(number[1]) if number else None


def layers_words(config, _=None):
    n = layers_of(config)
    return n and f"{n} layer{'s' * (n != 1)}"


def dataset_words(name, setting):
    variant = setting.get("variant")
    return name + (f" ({variant})" if variant not in (None, name) else "")


STUDY = Study(
    name="mamba_fl",
    commands=("central", "fed_avg", "fed_momentum", "fed_entropy", "fed_fisher"),
    kinds={
        "central": "Central",
        "fed_avg": "FedAvg",
        "fed_momentum": "FedMomentum",
        "fed_entropy": "FedEntropy",
        "fed_fisher": "FedFisher",
    },
    kind_of=lambda command, args: command,
    setting_of=setting_of,
    keys=KEYS,
    said=frozenset(KEYS) | frozenset(SIZES) | {"layers", "client_val_sequences", "held_out_sequences", "final"},
    unread=(
        (lambda a: a["command"] == "central", FEDERATED_ONLY),
        (lambda a: a.get("server_optimizer") in ("momentum", "nesterov"), {"server_beta2", "server_tau"}),
        (lambda a: a.get("server_optimizer") in ("adam", "yogi"), {"momentum_form"}),
        (lambda a: a.get("server_optimizer") == "adagrad", {"momentum_form", "server_beta2"}),
    ),
    paths=("init_from",),
    words={
        "local_updates": "LU {}",  # says most, so it comes first
        "alpha_global": "alpha {}",
        "amp": "amp {}",
        "batch_size": "batch {}",
        "beta1": "b1 {}",
        "beta2": "b2 {}",
        "client_optimizer": "client {}",
        "client_state": "{} client state",
        "init_from": "from {}",
        "lr": "lr {}",
        "lr_scheduler": "{} rate",
        "max_grad_norm": "clipped to {}",
        "momentum_form": "{}",
        "n_epochs": "{} epochs",
        "num_clients": "{} clients",
        "personal": "personal {}",
        "rounds": "{} rounds",
        "scheduled": "scheduled {}",
        "server_beta2": "server b2 {}",
        "server_bias_correction": lambda on, _: on and "bias-corrected",
        "server_lr": "server lr {}",
        "server_momentum": "momentum {}",
        "server_optimizer": "{}",
        "sharding": "{} shards",
        "warmup_steps": "warm-up {}",
        "steps": "{} steps",
        "dataset": dataset_words,
        "variant": None,
        "data": None,
        "tokenizer": lambda name, _: f"tokenizer {name.rpartition('/')[2]}",
        "config": layers_words,
        "shape": "{}",
        "val_sequences": lambda n, _: n and f"{n} validation sequences",
        "sequence_length": "length {}",
        "sync": "sync every {}",
    },
    off=dict.fromkeys(("init_from", "lr_scheduler", "warmup_steps", "max_grad_norm", "beta1", "beta2", "personal"), ())
    | {"server_lr": ("fed_momentum",), "server_bias_correction": (), "scheduled": ()},
    spoken=frozenset({"local_updates"}),
    # the two forms differ by a factor of ten in their steps: never left unsaid
    marked=frozenset({("momentum_form", "ema")}),
    lengths=frozenset({"rounds", "steps", "n_epochs"}),
    budgets=("tokens",),
    first={"sync": "round", "budget": "equal"},
    prepared=prepared,
)
# kind -> its name in file names: the source's
FILES = {kind: "federated" if kind == "fed_avg" else kind for kind in STUDY.kinds}


def of_config(runs, config):
    """The runs of one configuration (all for None). Raises UsageError where there are none."""
    chosen = [run for run in runs if config in (None, run.setting["config"])]
    if not chosen:
        there = ", ".join(sorted({run.setting["config"] for run in runs}))
        raise UsageError(f"no run of --config {config}: there are {there}")
    return chosen


# ---- what a figure shows


def fewest_updates(runs, notes):
    """The federated runs with the fewest local updates of any, and central ones."""
    updates = {run: run.args.get("local_updates") or 0 for run in runs if not run.central}
    fewest = min(updates.values(), default=0)
    more = sorted(run.name for run, n in updates.items() if n != fewest)
    if more:
        notes.append(LeftOut(f"{len(more)} run{'s' * (len(more) > 1)} at more than LU {fewest}", ", ".join(more)))
    return [run for run in runs if run.central or updates[run] == fewest]


def central_vs_fed(runs, notes):
    runs = fewest_updates([run for run in runs if run.kind in ("central", "fed_avg")], notes)
    return curves_of(runs, notes=notes) if len({run.kind for run in runs}) == 2 else []


def lu_comparison(runs, notes):
    runs = [run for run in runs if run.kind == "fed_avg"]
    return curves_of(runs, notes=notes) if len({run.args.get("local_updates") for run in runs}) > 1 else []


def method_comparison(runs, notes):
    runs = fewest_updates(runs, notes)
    return curves_of(runs, notes=notes) if len({run.kind for run in runs if not run.central}) > 1 else []


def depths(runs, notes):
    """The curves of methods that were run at two depths or more; `place["config"]` is the depth's."""
    runs = fewest_updates(runs, notes)
    curves = curves_of([run for run in runs if layers_of(run.setting["config"])], ("config",), ("config",), notes)
    several = [curve for line in lines_of(curves) if len(line) > 1 for curve in line]
    if all(curve.central for curve in several) and any(not run.central for run in runs):
        return []
    label(several)
    return several


# ---- figures


def tokens_panel(axis, lines, train=False, shown_from=0.05):
    """Perplexity against tokens: a line with its band per (curve, look, label); train: thin lines of training's too.

    What happens before `shown_from` of the tokens is alike for all and would squeeze the rest: it sets no axis.
    """
    divisor, word = token_unit(max((curve.series("val_ppl", "tokens")[0].max(initial=1) for curve, *_ in lines)))
    extent = []
    for i, (curve, own, name) in enumerate(lines):
        x, values = curve.evaluated("val_ppl", "tokens")
        band(axis, x / divisor, values, name, own, markers_at(i, len(x), len(lines)), "range", 0.2)
        shown = [(x, values)]
        if train:
            x, values = curve.evaluated("train_ppl", "tokens")
            shown.append((x, values))
            if np.isfinite(values.mean(axis=0)).any():
                thin = {key: own[key] for key in ("color", "linestyle")} | {"linewidth": 0.7}
                axis.plot(x / divisor, values.mean(axis=0), label=f"{curve.label}, train", **thin)
        for x, values in shown:
            late = values[:, x >= shown_from * x.max(initial=0)]
            extent += late[np.isfinite(late) & (late > 0)].tolist()
    if extent:
        log_axis(axis, min(extent), max(extent))
    axis.set_xlim(left=0)
    axis.set_xlabel(tokens_label(word))
    axis.set_ylabel("Perplexity" if train else "Validation perplexity")


def draw_curves(title, with_train, setting, curves, args):
    """Figures 1 and 2: perplexity against tokens; in figure 1 with train."""
    figure, axes = new_figure(height=4.4)
    axis, looks = axes[0, 0], looks_of(curves)
    tokens_panel(axis, [(curve, looks[curve.label], final_label(curve)) for curve in curves], with_train)
    title_of(figure, title, setting, curves)
    # inside the axes while it fits there, else below them
    handles, labels = axis.get_legend_handles_labels()
    heading = {"title": "after the colon: at the end, on all validation text", "title_fontsize": 8}
    if len(labels) <= 6 and max(map(len, labels)) <= 44:
        axis.legend(**heading)
    else:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(labels))
        figure.legend(handles, labels, loc="outside lower center", **heading)
    return figure


def draw_methods(title, setting, curves, args):
    """Figure 3: left, perplexity against tokens; right, the final perplexity, each seed and the mean.

    The right panel names the lines of the left one. Methods often differ by less than a line's width on the left.
    """
    figure, axes = new_figure(columns=2, width=10.0, height=max(4.2, 1.6 + 0.4 * len(curves)))
    (axis, ends), looks = axes[0], looks_of(curves)
    tokens_panel(axis, [(curve, looks[curve.label], curve.label) for curve in curves], shown_from=0.1)
    finals = []
    for place, curve in enumerate(curves):
        values, own = curve.results("final_val_ppl"), looks[curve.label]
        values = values[np.isfinite(values)]
        finals += values.tolist()
        ends.plot(values, [place] * len(values), "|", color=own["color"], markersize=9)
        # The stretch of line through the marker is the range over seeds in a grey print too.
        if len(values):
            ends.plot([values.min(), values.max()], [place] * 2, color=own["color"], linewidth=1.2)
            ends.plot([values.mean()], [place], **own | {"markersize": 7, "linestyle": ""})
            words = f"{values.mean():.4g}"
            ends.annotate(words, (values.max(), place), (7, 0), textcoords="offset points", va="center", size=8.5)
    ends.set_yticks(range(len(curves)), [break_lines(curve.label, 32) for curve in curves])
    ends.set_ylim(len(curves) - 0.4, -0.6)
    ends.set_xlabel("Final validation perplexity (bar: every seed)")
    if finals:
        room = 0.06 * (max(finals) - min(finals)) or 1
        ends.set_xlim(min(finals) - room, max(finals) + 3 * room)
    title_of(figure, title, setting, curves)
    return figure


def draw_depths(title, setting, curves, args):
    """Figure 4: left, perplexity against tokens for each depth; right, the final perplexity against depth.

    A method's colour and marker are its own; on the left a depth has its dash.
    """
    places = sorted({curve.place["config"] for curve in curves}, key=layers_of)

    def depth(curve):
        return places.index(curve.place["config"])

    figure, axes = new_figure(columns=2, width=10.0, height=4.6, gridspec_kw={"width_ratios": [3, 2]})
    (axis, summary), methods, left = axes[0], looks_of(curves), []
    for curve in sorted([c for c in curves if c.kind in ("central", "fed_avg")] or curves, key=depth):
        own = methods[curve.label] | {"linestyle": look(0, depth(curve))["linestyle"]}
        own |= {"markerfacecolor": "white"} if depth(curve) else {}
        left.append((curve, own, f"{layers_words(curve.place['config'])}: {curve.label}"))
    tokens_panel(axis, left)
    axis.legend()
    finals, lines = [], lines_of(curves)
    for i, line in enumerate(lines):
        # Points of equal depth stand side by side, so that no bar hides another.
        at = [depth(curve) + (i - (len(lines) - 1) / 2) * 0.08 for curve in line]
        values = [curve.results("final_val_ppl") for curve in line]
        mean = np.array([v.mean() for v in values])
        bars = [mean - [v.min() for v in values], [v.max() for v in values] - mean]
        summary.errorbar(at, mean, yerr=bars, capsize=3, label=line[0].label, **methods[line[0].label])
        finals += [v for seeds in values for v in seeds if np.isfinite(v)]
    summary.set_xticks(range(len(places)), [str(layers_of(config)) for config in places])
    summary.set_xlabel("Layers")
    summary.set_ylabel("Final validation perplexity")
    if finals:
        log_axis(summary, min(finals), max(finals))
    summary.legend()
    title_of(figure, title, setting, curves)
    return figure


def final_label(curve):
    """`FedAvg, LU 1: 141.6`: the mean over seeds of the final validation perplexity."""
    values = curve.results("final_val_ppl")
    return f"{curve.label}: " + (f"{values.mean():.4g}" if np.isfinite(values).all() else "not finite")


def title_of(figure, title, setting, curves):
    updates = {curve.args.get("local_updates") for curve in curves if not curve.central}
    title += f", LU {updates.pop()}" if len(updates) == 1 else ""
    caption(figure, f"{title}: {seeds_text(curves)}", setting, curves, unsaid=False)


# ---- all of them


def each_config(file, choose, draw, needs):
    """A Figure for every configuration: of --config, or of the runs there."""

    def of(config):
        return each_group(choose, keep=lambda run: run.setting["config"] == config)

    def figures(runs, args):
        configs = sorted({run.setting["config"] for run in of_config(runs, args.config)})
        return [Figure(f"{file}_{config}", of(config), draw, needs) for config in configs]

    return figures


CENTRAL = partial(draw_curves, "Central and federated training", True)
UPDATES = partial(draw_curves, "Local updates (LU) per round", False)
METHODS = partial(draw_methods, "Federated methods")
DEPTHS = partial(draw_depths, "Depth of the model")
ALIKE = "runs of central.py and of fed_avg.py with the same data, model and length"
TWO_UPDATES = "runs of fed_avg.py with two values of --local_updates, such as 1 and 8"
TWO_METHODS = "runs of two federated methods at the same --local_updates"
TWO_DEPTHS = "runs of one method with two depths, such as --layers 1 and --layers 2"
ALL_DEPTHS = each_group(depths, ("config",))
FIGURES = {
    "central_vs_fed": each_config("1_central_vs_fed", central_vs_fed, CENTRAL, ALIKE),
    "lu_comparison": each_config("2_lu_comparison", lu_comparison, UPDATES, TWO_UPDATES),
    "method_comparison": each_config("3_method_comparison", method_comparison, METHODS, TWO_METHODS),
    "multi_config_comparison": [Figure("4_multi_config_comparison", ALL_DEPTHS, DEPTHS, TWO_DEPTHS)],
}


def central_of(curve, curves):
    """The central curve that a federated one is measured by, None without one: with as many tokens, as large a batch
    (of all clients together) where there is one, and least different in what else both have; of several rates the
    best on validation, for each has its own best rate."""

    def batch(c):
        a = c.runs[0].args
        return a["batch_size"] * (1 if c.central else per_round(a.get("participation", 1.0), a["num_clients"]))

    def apart(c):
        names = {*curve.args, *c.args} - FEDERATED_ONLY - {"lr", "batch_size", "n_epochs"}
        values = ([run.args.get(name) for name in sorted(names)] for run in (curve.runs[0], c.runs[0]))
        unlike = sum(a != b for a, b in zip(*values, strict=True))
        return batch(c) != batch(curve), unlike, c.results("final_val_ppl").mean()

    return min((c for c in of_as_many_tokens(curve, curves) if c.central), key=apart, default=None)


def plain_of(curve, curves):
    """FedAvg of all parameters with each client's own moments at as many local updates and tokens, the least different;
    None without."""

    def plain(c):
        args = c.runs[0].args
        usual = args.get("client_state", "keep") == "keep" and args.get("personal", "none") == "none"
        return c.kind == "fed_avg" and usual and args["local_updates"] == curve.runs[0].args.get("local_updates")

    return nearest(curve, [c for c in of_as_many_tokens(curve, curves) if plain(c)])


def of_as_many_tokens(curve, curves):
    """Those trained on as many tokens as `curve`, within 2 %."""
    return [c for c in curves if abs(c.results("tokens").mean() / curve.results("tokens").mean() - 1) < 0.02]


def ratio_to(base_of, name="test_ppl_last", log=False):
    """A cell, `1.033 [1.021, 1.045]`: the perplexity over that of base_of(curve, curves), geometric mean over the
    seeds that both have and the 95 % interval of a paired t test of its logarithm; `-` without one. log: `name` is the
    perplexity's logarithm."""

    def cell(curve, curves):
        base = base_of(curve, curves)
        if curve.central or base in (None, curve):
            return "-" if base is None and not curve.central else "1"
        mean, low, high = ratio(curve, base, name, log)
        if not math.isfinite(mean):
            return "-"
        return f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else "")

    return cell


def columns(curves, args):
    """Those of the table; with --held-out of the clients' own text."""
    ppl, name, log = "test", "test_ppl_last", False
    first = [result("final val ppl", "final_val_ppl"), result("best val ppl", "best_val_ppl")]
    first += [result("test ppl (best)", "test_ppl_best"), result("test ppl (last)", "test_ppl_last")]
    if args.held_out:
        ppl, name, log = "held-out", "held_out_loss", True
        first = [Column("held-out ppl", lambda curve, _: spread(np.exp(curve.results("held_out_loss"))))]
    to_central = Column(f"{ppl} ratio to central", ratio_to(central_of, name, log))
    to_fedavg = Column("to FedAvg at its LU", ratio_to(plain_of, name, log))
    return *first, to_central, to_fedavg, Column("tokens", whole("tokens")), result("minutes", "seconds", 1 / 60), SEEDS


def add_config(parser):
    parser.add_argument("--config", metavar="NAME", help="only this one, such as pure_ssm_1_layer (default: all)")


def add_flags(parser):
    add_config(parser)
    text = "perplexity on the clients' own held-out text (geometric mean over clients) in place of the test text's"
    parser.add_argument("--held-out", action="store_true", help=text)


TABLE = Table(
    study=STUDY,
    columns=columns,
    flags=add_flags,
    select=lambda runs, args: of_config(runs, args.config),
)


def build_parser():
    return style.figure_parser(STUDY, FIGURES, add_config)


def main(args):
    style.draw_figures(STUDY, FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
