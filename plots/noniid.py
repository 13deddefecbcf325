"""Tables and figures of llm_noniid.

python plots/tables.py llm_noniid --against iid --fields val_loss val_accuracy
python plots/noniid.py --data-dir results --out-dir results/plots               # all that the runs allow
python plots/noniid.py cost_map --data-dir llm_noniid/results/regimes.jsonl

curves      noniid_curves.png: validation loss against rounds (of labels their accuracy), a panel per partition, each
            method at its best rate
cost_map    noniid_cost_map.png: what skew costs, a panel per algorithm and budget, a row per number of local steps
            H, a column per alpha. A cell is the mean over seeds of

                cost = outcome(alpha, H) - outcome(IID, H)     each at its own learning rate and mu

            in validation accuracy (--target label: the opposite, in points) or loss (of texts, nats a token). It is
            broken, with a frame, if the mean is above 5 points, of texts 0.05 nats, and the paired 95 % interval
            excludes 0, or if a run diverged (hatched; their number stands in it, they are no part of the mean). Of
            fewer than 3 pairs, or above that with 0 in the interval, nothing is decided. The column IID has its outcome
"""

import json
import math

import numpy as np

from common.cli import positive_float, run_main
from common.curves import GREY, number, set_title
from plots import style
from plots.pairs import difference, interval, paired, pairs_cell, spread
from plots.read import Study, not_finite, order_of
from plots.read import result as result_of
from plots.rows import base_name, describe, distance, groups, nearest, rows_of, shared_setting, words_for
from plots.style import caption, heat_map, legend_below, looks_of, numbered, panel_axes, seeds_range, seeds_text
from plots.tables import Table, over_rounds, result, seeds, sent, whole

# ---- the study

KEYS = ("dataset", "target", "texts", "evaluated", "model", "train", "lora_r", "lora_alpha", "clients", "partition")
KEYS += ("alpha", "participation", "local", "learning_rate", "rounds")
PLACE = ("partition", "alpha")  # in what the panels of one figure differ
FREE = ("partition", "alpha", "participation", "learning_rate", "local")  # what the rows of one table may differ in
WIDE = (*FREE, "rounds")  # of paired differences and costs: the same budget in fewer rounds of more steps too
TUNED = {"learning_rate", "server_lr", "mu"}  # of each row
DIFFER = {"iid": {*PLACE, "min_samples"}, "fedavg": {"personal"}}  # in what a row and its baseline differ


def kind_of(command, flags):
    cluster = flags.get("cluster") or "none"
    return str(flags.get("algorithm")) if cluster == "none" else f"clusters_{cluster}"


def setting_of(run):
    facts, counts = run["data"], run["data"].get("counts") or {}
    values = {
        "dataset": facts.get("dataset") or run.get("--dataset"),
        "target": run.get("--target") or "text",
        "train": run.get("--train") or "lora",
        "texts": counts.get("train"),
        # what losses are means over: not to be compared between other numbers of texts
        "evaluated": json.dumps([counts.get("validation"), counts.get("test"), run.get("--eval_samples")]),
        "model": base_name(str(run.get("--model"))),
        "clients": facts.get("clients") or run.get("--num_clients"),
        "participation": run.get("--participation_rate"),
        "local": local_work(run),
        "rounds": run.get("--num_rounds"),
    }
    values |= {key: run.get(f"--{key}") for key in ("lora_r", "lora_alpha", "learning_rate")}
    return values if run["kind"] == "central" else values | place_of(run)


def place_of(run):
    """The settings of PLACE that the flags name; a central run's too, which has no partition."""
    alpha = {"alpha": run.get("--alpha")} if run.get("--partition") == "topic_skew" else {}
    return {"partition": partition_name(run)} | alpha


def local_work(run):
    """`5 local steps`, `1 local epoch`: what a client does in a round."""
    steps, epochs = run.get("--local_steps"), run.get("--local_epochs")
    if steps:
        return f"{steps} local step{'s' * (steps != 1)}"
    return None if epochs is None else f"{epochs:g} local epoch{'s' * (epochs != 1)}"


def partition_name(run):
    """`IID`, `topic skew`, `topic skew (equal sizes)`, `style skew (length)`; alpha is a setting of its own."""
    name, sizes = str(run.get("--partition")), run.get("--sizes") or "dirichlet"
    more = {"style_skew": run.get("--style_criterion"), "token_skew": run.get("--skew_type")}.get(name)
    more = f"{sizes} sizes" if name == "topic_skew" and sizes != "dirichlet" else more
    return "IID" if name == "iid" else name.replace("_", " ") + (f" ({more})" if more else "")


def order(key, value):
    """From the least skew and the least work on: partitions as the study names them, alpha downwards."""
    if key == "partition":
        names = ("IID", "topic", "style", "token")
        return names.index(value.split()[0]) if value.split()[0] in names else 9, 0, 0, value
    if key == "local":
        return 0, value.endswith("steps") or value.endswith("step"), float(value.split()[0]), ""
    if key in ("alpha", "participation") and isinstance(value, (int, float)):
        return 0, -value, 0, ""
    return order_of(value)


def with_last_round(runs):
    """The runs; where updates were not finite that round is the last line, and no result counts."""
    runs = runs.copy()
    for i, run in runs.iterrows():
        t = run["ended"].get("round")
        if not_finite(run) and not (run["curve"] and run["curve"][-1]["round"] == t):
            alarm = {"detector": "diverged", "round": t}
            line = {"round": t, "val_loss": "nan", "worst_client_val_loss": "nan", "alarms": [alarm]}
            runs.at[i, "curve"] = [*run["curve"], line]
            for name in set(run.index) & {"val_loss", "val_ppl", "val_accuracy", "test_loss", "test_accuracy"}:
                runs.at[i, name] = None
    return runs


STUDY = Study(
    name="llm_noniid",
    commands=("train",),
    kinds={
        "central": "Central",
        "fedavg": "FedAvg",
        "fedprox": "FedProx",
        "scaffold": "SCAFFOLD",
        "fednova": "FedNova",
        "fedavgm": "FedAvgM",
        "fedadam": "FedAdam",
        "fedadamw": "FedAdamW",
        "clusters_updates": "Clusters by updates",
        "clusters_labels": "Clusters by topics",
        "local": "Local only",
    },
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    said=frozenset(KEYS)
    | frozenset(
        "algorithm cluster num_clusters cluster_round style_criterion skew_type max_samples num_clients sizes stop_on"
        " participation_rate local_epochs local_steps num_rounds eval_samples probe_samples drift_samples".split()
    ),
    words={
        "dataset": "{}",
        "target": lambda target: "" if target == "text" else f"predicting the {target}",
        "train": lambda trained: "" if trained == "lora" else "all parameters",
        "texts": "{:,} texts",
        "evaluated": None,
        "model": "{}",
        "lora_r": None,
        "lora_alpha": None,
        "clients": "{} clients",
        "partition": "{}",
        "alpha": "alpha {:g}",
        "participation": "participation {:g}",
        "local": "{}",
        "learning_rate": "lr {:g}",
        "rounds": "{} rounds",
        "mu": "mu {:g}",
        "server_lr": "server lr {:g}",
        "init_from": "from {}",
        "dropout": "dropout {}",
        "personal": lambda part: None if part == "none" else f"personal {part}",
        "client_optimizer": "client {}",
        "batch_size": "batch {}",
        "max_length": "{} tokens at most",
    },
    order=order,
    adjust=with_last_round,
)

# ---- the table


def plain_fedavg(row):
    """Whether it is FedAvg of all parameters."""
    return row.kind == "fedavg" and row["personal"] in (None, "none")


def usual_fedavg(rows):
    """The plain FedAvg row that differs least from the federated ones, None without any."""

    def apart(one):
        return sum(distance(one, row) for row in rows if not row.central)

    return min(filter(plain_fedavg, rows), key=apart, default=None)


def against_fedavg(row, rows):
    """To the FedAvg in the row's setting that differs least from it; of FedAvg itself to the usual one."""
    base = usual_fedavg(rows)
    if not (plain_fedavg(row) or row.central):
        there = [one for one in rows if plain_fedavg(one) and all(one.args.get(k) == row.args.get(k) for k in FREE)]
        base = nearest(row, there)
    same = base in (None, row)
    return "-" if same else difference(row.results("val_loss"), base.results("val_loss"), 3)


def baseline(row, rows, against):
    """The row that `row` is compared with (see WORDS), None without one or for itself. against: "iid" or "fedavg"."""

    def fits(other):
        if against == "iid" and (other.kind != row.kind or other.args.get("partition") != "IID"):
            return False
        if against == "fedavg" and not plain_fedavg(other):
            return False
        names = {*other.args, *row.args} - TUNED - DIFFER[against]
        return all(other.args.get(name) == row.args.get(name) for name in names)

    seeds = set(row.runs.index)
    best = max(filter(fits, rows), key=lambda other: tuned_rank(other, seeds), default=None)
    return None if row.central or best in (None, row) or not tuned_rank(best, seeds)[0] else best


def tuned_rank(row, seeds=None):
    """Highest for the learning rate that counts: (how many seeds, of those in `seeds`; minus the mean loss)."""
    n = sum(seeds is None or seed in seeds for seed in row.runs.index)
    return n, -np.nan_to_num(row.results("val_loss").mean(skipna=False), nan=math.inf)


def losses(run):
    """[(round, validation loss)] of its evaluations after a round, nan where it is not finite."""
    return [(row["round"], number(row["val_loss"])) for row in run["curve"] if "val_loss" in row and row["round"]]


def first_at(run, target):
    return next((t for t, loss in losses(run) if loss <= target), None)


def best(row, _):
    lowest = [min((x for _, x in losses(run) if x == x), default=math.nan) for _, run in row.runs.iterrows()]
    return spread(np.array(lowest), 3)


def to_target(target):
    """A cell: the rounds to this loss, `>40` where a seed never had it."""

    def cell(row, _):
        rounds = [first_at(run, target) for _, run in row.runs.iterrows()]
        longest = max(lines[-1]["round"] for lines in row.runs["curve"])
        return f">{longest}" if None in rounds else spread(np.array(rounds, dtype=float), 1)

    return cell


def failure(rows):
    """Why a run of these lines of metrics.jsonl failed, in words; "" if it did not.

    It raised the alarm `diverged`, or its last validation loss is not finite, above its first evaluation's after a
    round, or above the model's before training (a run that breaks in its first round can fall from then on).
    """
    if any(alarm["detector"] == "diverged" for row in rows for alarm in row.get("alarms") or []):
        return "diverged"
    after = [loss for _, loss in losses({"curve": rows})]
    if not after or math.isnan(after[-1]):
        return "the loss is not finite" if after else "no evaluation"
    if after[-1] > after[0]:
        return "ends above its first evaluation"
    before = next((number(row["val_loss"]) for row in rows if not row["round"]), math.inf)
    return "ends above the model before training" if after[-1] > before else ""


def failed(row, _):
    said = [run.get("failed") or failure(run["curve"]) for _, run in row.runs.iterrows()]
    return f"{sum(map(bool, said))} of {len(said)}"


GRADIENTS = {"gradient drift": "drift_ratio", "chance drift": "drift_ratio_chance", "correction": "correction_ratio"}
GRADIENTS |= {"correction cosine": "correction_cosine"}


def logged(rows, name):
    return any(np.isfinite(row.mean_over_rounds(name)).any() for row in rows)


def columns(rows, args):
    if args.against:
        return differences(rows, args)
    target = getattr(args, "target", None)
    return {
        "val loss": result("val_loss", digits=3),
        **({"accuracy": result("val_accuracy", 100, 1)} if rows[0].first["setting"]["target"] == "label" else {}),
        "best": best,
        "vs FedAvg": against_fedavg,
        "val ppl": result("val_ppl"),
        "test ppl": result("test_ppl"),
        "bits/byte": result("val_bits_per_byte", digits=3),
        "mean client": result("mean_client_val_loss", digits=3),
        "worst client": result("worst_client_val_loss", digits=3),
        "gap": result("generalization_gap", digits=3),
        "drift": over_rounds("relative_drift", digits=2),
        **{head: over_rounds(name, digits=2) for head, name in GRADIENTS.items() if logged(rows, name)},
        "cosine": over_rounds("update_cosine", digits=3),
        "1 - CKA": lambda row, _: spread(np.maximum(1 - row.mean_over_rounds("mean_cka"), 0), 3),
        **({f"to {target:g}": to_target(target)} if target else {}),
        "failed": failed,
        "MB up": lambda row, rows: "-" if row.kind == "local" else sent("bytes_up")(row, rows),
        "rounds": whole("rounds"),
        "minutes": result("seconds", 1 / 60, 1),
        "seeds": seeds,
    }


def differences(rows, args):
    def pair(name):
        def cell(row, rows):
            base = baseline(row, rows, args.against)
            return pairs_cell(paired(row.results(name), base.results(name))) if base else "-"

        return cell

    found, words = {}, {"iid": "vs IID", "fedavg": "vs FedAvg"}[args.against]
    for name in args.fields:
        head = name.replace("_", " ")
        found |= {head: result(name, digits=3), f"{head} {words}": pair(name)}
    return found | {"seeds": seeds}


def groups_of(runs, args, notes):
    free, found = WIDE if args.against else FREE, []
    for setting, members in groups(runs, STUDY, free):
        rows = rows_of(members, STUDY, free, notes=notes)
        found.append((describe(STUDY, shared_setting(setting, rows)), rows))
    return found


WORDS = """Losses are in nats per token (of labels: per text), after the last round; `accuracy` of labels in %. `vs
FedAvg` is the difference in validation loss to FedAvg in the same setting; of FedAvg and central training, to FedAvg in
the setting that most runs share. `mean client`, `worst client`: losses on the clients' own held-out texts; `gap`:
generalisation gap. drift, cosine (mean over pairs of updates) and 1 - CKA are means over the
evaluated rounds. --target: the first round with that loss. `failed`: the alarm `diverged`, no finite update, or a last
loss that is not finite, above the first evaluation's or above that before training.

--against iid, fedavg: instead the paired differences of any fields to the same algorithm under IID, or to FedAvg on the
same partition, at the same local work, rounds and other flags. Learning rates and mu may differ, as each row's are
tuned: of several baselines that with most seeds in common counts, of those the one with the lowest validation loss.
"""


def add_flags(parser):
    text = "say how many rounds a run took to it"
    parser.add_argument("--target", type=positive_float, metavar="LOSS", help=text)
    text = "paired differences with 95 %% intervals, to IID or to FedAvg (default: the table of results)"
    parser.add_argument("--against", choices=DIFFER, help=text)
    text = "results or fields of metrics.jsonl that --against compares (default: val_loss)"
    parser.add_argument("--fields", nargs="+", default=["val_loss"], metavar="FIELD", help=text)


TABLE = Table(STUDY, columns, WORDS, flags=add_flags, groups=groups_of)

# ---- curves


def curves(runs, args, notes):
    """Validation loss, of labels accuracy, against rounds: a panel per partition, each method at its best rate."""
    drawn = []
    for setting, members in groups(runs[runs["kind"] != "central"], STUDY, (*PLACE, "learning_rate")):
        name, _, factor, words, *_ = OUTCOMES[setting["target"]]
        panels = groups(members, STUDY, ("learning_rate",))
        panels.sort(key=lambda panel: [order(key, panel[0][key]) for key in PLACE if key in panel[0]])
        panels = [
            (place, at_best_rate(rows_of(some, STUDY, ("learning_rate",), notes=notes))) for place, some in panels
        ]
        every = [row for _, rows in panels for row in rows]
        if len(every) < 2:
            continue
        figure, axes = panel_axes(len(panels), sharey=True)
        looks = looks_of(every)
        for axis, (place, rows) in zip(axes, panels, strict=True):
            style.draw_rounds(axis, rows, looks, name, factor)
            axis.set_title(describe(STUDY, place, PLACE), fontsize=9.5)
            axis.set_ylabel(f"{words.capitalize()} ({'%' if factor == 100 else 'nats'})")
        legend_below(figure, axes)
        caption(figure, f"{words.capitalize()}: {seeds_text(every)}", setting, every)
        drawn.append(figure)
    yield from numbered("noniid_curves", drawn)


def at_best_rate(rows):
    """Of rows of one method that differ in TUNED only the one that counts, labelled by the method."""
    found = {}
    for row in rows:
        key = row.kind, str({name: value for name, value in row.args.items() if name not in TUNED})
        if key not in found or tuned_rank(row) > tuned_rank(found[key]):
            found[key] = row
    chosen = [row for row in rows if row in found.values()]
    for row in chosen:
        said = [name for name in row.unlike if name not in TUNED]
        row.label = ", ".join([row.name, *(w for name in said for w in words_for(STUDY, name, row.args[name]))])
    return chosen


# ---- what skew costs

THRESHOLD = 0.05  # of accuracy (--target label), nats a token (text): a mean cost above it is broken
PAIRS = 3  # that decide
IN_MAP = {"alpha", "local", "rounds", "min_samples"} | TUNED  # what may differ within a panel
OUTCOMES = {  # --target: (field that decides, which way is worse, factor, name, unit, digits)
    "text": ("val_loss", 1, 1, "validation loss", "nats a token", 3),
    "label": ("val_accuracy", -1, 100, "validation accuracy", "points", 1),
}


def outcomes(row):
    """The deciding result a seed, without runs that diverged."""
    field = OUTCOMES[row.first["setting"]["target"]][0]
    return row.results(field)[[not has_diverged(run) for _, run in row.runs.iterrows()]]


def has_diverged(run):
    """Whether its updates or last loss were not finite or, of --target text, that loss is above that before training.

    Of labels a model knows less than nothing before training: that loss says nothing, and accuracy decides.
    """
    start = next((row.get("val_loss") for row in run["curve"] if row["round"] == 0), None)
    last = result_of(run, "val_loss")
    return bool(not_finite(run) or np.isnan(last) or setting_of(run)["target"] == "text" and last > number(start))


def cost_of(row, control):
    """(costs by seed, of the pairs without a run that diverged; how many runs did; broken: None is not decided)."""
    worse = OUTCOMES[row.first["setting"]["target"]][1]
    costs = (worse * paired(outcomes(row), outcomes(control))).dropna()
    diverged = sum(has_diverged(run) for _, run in row.runs.iterrows())
    high = len(costs) > 0 and costs.mean() > THRESHOLD
    undecided = len(costs) < PAIRS or (high and interval(costs)[0] <= 0)
    return costs, diverged, True if diverged else None if undecided else bool(high)


def cost_map(runs, args, notes):
    """A figure for each group of like runs in which a setting has its IID control."""
    drawn = []
    for setting, members in groups(runs[runs["kind"] != "central"], STUDY, WIDE):
        rows, panels = rows_of(members, STUDY, WIDE, notes=notes), {}
        for row in at_best_rate(rows):
            control = baseline(row, rows, "iid")
            if control is not None and row.args["partition"] != "IID" and "alpha" in row.args:
                same = {key: value for key, value in row.args.items() if key not in IN_MAP}
                steps = (row["local_steps"] or row["local_epochs"]) * row["num_rounds"]
                panels.setdefault((row.name, steps, str(same)), []).append((row, control))
        # a panel of one H says little beside maps of several: its cells are rows of the table against IID
        several = {key: some for key, some in panels.items() if len({row.args["local"] for row, _ in some}) > 1}
        if panels:
            drawn.append(draw_map(shared_setting(setting, rows), several or panels))
    yield from numbered("noniid_cost_map", drawn)


def draw_map(setting, panels):
    _, _, factor, words, unit, _ = OUTCOMES[setting["target"]]
    every = [pair for pairs in panels.values() for pair in pairs]
    means = [factor * costs.mean() for costs, *_ in (cost_of(*pair) for pair in every) if len(costs)]
    scale = min([0, *means]), max([factor * THRESHOLD, *means])
    wide = min(3, len(panels))
    figure, axes = panel_axes(len(panels), wide, extra=2.0, width=max(5.4, 4.9 * wide + 1), height=2.8)
    for axis, ((algorithm, budget, _), pairs) in zip(axes, panels.items(), strict=True):
        draw_cells(axis, pairs, scale)
        local = pairs[0][0].args["local"].rstrip("s").split()[-1]
        axis.set_title(f"{algorithm}, {budget:g} {local}s a client", fontsize=9.5)
    bar = figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, fraction=0.04)
    bar.set_label(f"Cost in\n{words} ({unit})", fontsize=8.5)
    count = seeds_range([row for row, _ in every])
    title = f"What skew costs against IID, mean of {count} seed{'s' * (count != '1')}"
    line = f"frame: broken, over {factor * THRESHOLD:g} {unit} worse, 95 % interval without 0, or diverged"
    set_title(figure, "\n".join([title, describe(STUDY, setting), line]))
    return figure


def draw_cells(axis, pairs, scale):
    """A panel: rows of local work, most on top; columns IID and alpha, least skew on the left."""
    from matplotlib.patches import Rectangle

    *_, factor, _, _, digits = OUTCOMES[pairs[0][0].first["setting"]["target"]]
    alphas = sorted({row.args["alpha"] for row, _ in pairs}, reverse=True)
    steps = sorted({row.args["local"] for row, _ in pairs}, key=lambda value: order("local", value), reverse=True)
    values, texts = np.full((len(steps), len(alphas) + 1), np.nan), {}
    for row, control in pairs:
        i, j = steps.index(row.args["local"]), 1 + alphas.index(row.args["alpha"])
        costs, diverged, broken = cost_of(row, control)
        values[i, j] = round(factor * costs.mean(), digits) + 0.0
        said = [f"{values[i, j]:+.{digits}f}"] * bool(len(costs))
        said += [f"{diverged}/{len(row.runs)} div."] * bool(diverged) + ["not decided"] * (broken is None)
        texts[i, j] = "\n".join(said)
        texts[i, 0] = f"{factor * outcomes(control).mean():.{digits}f}"
        if broken:
            look = {"edgecolor": GREY, "hatch": "////"} if diverged else {"edgecolor": "black", "linewidth": 2}
            axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, facecolor="none", **look))
    heat_map(axis, np.ma.masked_invalid(values), *scale, "cividis_r")
    for (i, j), words in texts.items():
        color = "white" if values[i, j] > sum(scale) / 2 else "black"
        axis.text(j, i, words, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(alphas) + 1), ["IID", *(f"{alpha:g}" for alpha in alphas)])
    axis.set_yticks(range(len(steps)), [value.split()[0] for value in steps])
    axis.tick_params(length=0)
    axis.set_xlabel("Dirichlet's alpha (right: more skew)", fontsize=9)
    axis.set_ylabel(f"Local {steps[0].split()[2].rstrip('s')}s a round, H")


FIGURES = {
    "curves": (curves, "federated runs of two methods or partitions"),
    "cost_map": (cost_map, "runs under topic skew and under IID"),
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES)


if __name__ == "__main__":
    run_main(lambda args: style.draw_figures(STUDY, FIGURES, args), build_parser().parse_args())
