"""The preset `rates` of run_all_experiments.py: every row at its own rate, on several splits of the classes.

    for only in "main_nc5_J16 bytes_nc5_J16 controls_nc5_J16" main_nc1_J4 main_iid_J4 scopes_nc5_J16 \
            forms_nc5_J16; do
        python vit_sparse_fl/run_all_experiments.py --preset rates --jobs 2 --only $only --tune    # rates first
    done
    python vit_sparse_fl/run_all_experiments.py --preset rates --jobs 2    # then the seeds, or --only GROUPS as above

Half of the classes pretrain, the rest is federated; seed S takes split S mod 3 of SPLITS, each pretrained once, so that
seeds 0 to 5 are two seeds of each split. --tune runs on a fourth split: the best accuracy on its validation images (the
loss prefers rates at which nothing is learnt). As many images in every row: 153,600, central 157,472 (7 epochs).

On 2 cores at 1.1 to 1.4 minutes a run (on slower ones 2 to 3) and some 3.8 runs of --tune a row (three rates, and what
lies beyond an edge), in the order of their value; all but the last two groups are 3 hours:

    4 pretrainings (80 epochs of 22,500 images at some 2,300 a second and core)                          26 minutes
    main_nc5_J16      dense, the strategies, one threshold a tensor, top-k    8 rows x 6 seeds + --tune      48
    bytes_nc5_J16     LoRA, top-k both ways: what else as many bytes buy      2 rows x 6 seeds + --tune      12
    matched_nc5_J16   at the rate that has dense's drift (`matching_rate`)    5 rows x 3 seeds               10
    lower_nc5_J16     dense and the most sensitive mask at lower rates        3 rows x 3 seeds                6
    controls_nc5_J16  head only, central, no biases of keys                   3 rows x 3 seeds + --tune      12
    main_iid_J16      the same without skew, at the rates of nc5_J16          3 rows x 3 seeds                6
    main_nc1_J4       the skew                                                8 rows x 3 seeds + --tune      35
    lower_nc1_J4      dense at lower rates                                    2 rows x 3 seeds                4
    main_iid_J4       and its control                                         8 rows x 3 seeds + --tune      35
    lower_iid_J4      dense at a lower rate                                   1 row x 3 seeds                 2
    scopes_nc5_J16    whole heads and neurons; at 0.75, a block's share: one  4 rows x 3 seeds + --tune      16
    forms_nc5_J16     what is squared                                         2 rows x 3 seeds + --tune       8

Of the tiny model the masks of sparsity 0.9 keep 46,608 values, 186,432 bytes up a client and round (and 58,260 bytes of
places down, once a client); LoRA of rank 7 sends 48,384 values, 193,536 bytes. Minutes are the tiny model's too.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from common import grid, tuning
from common.cli import UsageError
from common.curves import number, read_metrics
from common.grid import Setting
from common.records import TUNING
from vit_sparse_fl.mask_flags import STRATEGIES

SPLITS = ("0:50", "50:100", "25:75")  # classes of the pretraining
TUNING_SPLIT = len(SPLITS)  # number of one more
CLASSES = (*SPLITS, "10:60")
# of 60 epochs without mixup the last ten fitted the training images only (validation loss 1.96 to 2.03 nats, 50 %
# accuracy); at weight decay 5e-4 80 epochs ended at 2.30 nats and 39 %, the training loss as high
PRETRAIN = "--epochs 80 --warmup-epochs 5 --lr 0.1 --weight-decay 1e-4 --mixup 0.2 --early-stopping-patience 0 --seed 0"
SHARED = "--classes rest --head ridge --freeze-head --batch-size 32 --early-stopping-patience 0"
ROUNDS = "--eval-every 10 --save-every 40"
FEDERATIONS = {  # rounds x 10 clients x steps x 32 = 153,600 images, 6.8 passes of 22,500
    "nc5_J16": "--num-rounds 30 --local-steps 16 --sharding non_iid --nc 5 --interference-every 10",
    "nc1_J4": "--num-rounds 120 --local-steps 4 --sharding non_iid --nc 1 --interference-every 30",
    "iid_J4": "--num-rounds 120 --local-steps 4 --interference-every 30",
    "iid_J16": "--num-rounds 30 --local-steps 16 --interference-every 10",
}
FIRST = "nc5_J16"  # the federation that has all parts, the others have "main"
CENTRAL, DENSE, SPARSE = "train_centralized", "train_federated", "train_federated_sparse"
LEAST = f"{SPARSE} --mask-strategy least_sensitive"
ALL, KEPT, SLOW = (0.01, 0.03, 0.1), (0.1, 0.3, 1.0), (0.3, 1.0, 3.0)  # rates where all weights move, some, the least
# part -> (seeds in the first federation, {row: (script and flags, its rates)})
PARTS = {
    "main": (
        6,
        {
            "dense": (DENSE, ALL),
            **{name: (f"{SPARSE} --mask-strategy {name}", KEPT) for name in STRATEGIES},
            "least_sensitive": (LEAST, SLOW),
            "least_per_layer": (f"{LEAST} --mask-scope layer", KEPT),
            "topk": (f"{SPARSE} --upload topk", ALL),
        },
    ),
    "bytes": (
        6,
        {
            "lora": (f"{DENSE} --lora-r {{rank}}", (0.03, 0.1, 0.3)),
            "topk_both_ways": (f"{SPARSE} --upload topk --error-feedback --download topk", ALL),
        },
    ),
    "controls": (
        3,
        {
            "head_only": (f"{DENSE} --freeze-backbone --no-freeze-head", ALL),
            "least_no_key_bias": (f"{LEAST} --mask-omit key_bias", SLOW),
        },
    ),
    "scopes": (
        3,
        {
            f"{name}_per_{scope}": (f"{SPARSE} --mask-strategy {strategy} --mask-scope {scope} {more}", KEPT)
            for name, strategy in (("least", "least_sensitive"), ("random", "random"))
            for scope, more in (("unit", ""), ("block", "--sparsity-ratio 0.75"))
        },
    ),
    "forms": (3, {f"least_{form}": (f"{LEAST} --fisher-form {form}", SLOW) for form in ("true", "nll")}),
}
# at rates below the best one: the most sensitive mask's diverges on two of the three splits, as dense training's of
# iid_J4; and dense training has lower ones to see what clients do to each other where they gain as little as under
# masks
LOW = {"dense": {"lower": 0.01, "lowest": 0.003}}
LOWER = {FIRST: {"most_sensitive": {"lower": 0.033}, **LOW}, "nc1_J4": LOW, "iid_J4": {"dense": {"lower": 0.03}}}
SKEW = ("dense", "random", "least_sensitive")  # rows of main that are measured without skew too, at the same rates
NO_SKEW = "iid_J16"
MATCHED = ("random", "least_sensitive", "most_sensitive", "lowest_magnitude", "topk")
# whose drift at its own rate the matched rows have after so many rounds: at that of random masks, which is larger,
# dense training, the most sensitive mask and top-k collapsed
MODEL, ROUND = "dense", 10


def settings(rank=7):
    """Every row of every federation; the controls have central training at the federations' number of images.

    rank: of LoRA, whose bytes are the masks' (7 of the tiny model, 26 of ViT-S).
    """
    shared, script = SHARED.split(), f"vit_sparse_fl/{CENTRAL}.py"
    words = (*shared, "--epochs", "7", "--warmup-epochs", "0")
    yield Setting("central", script, words, f"controls_{FIRST}", seeds=3, tune={"lr": ALL})
    for federation, more in FEDERATIONS.items():
        for part, (seeds, rows) in PARTS.items():
            if federation != FIRST and part != "main":
                continue
            for name, (line, rates) in rows.items():
                if federation == NO_SKEW and name not in SKEW:
                    continue
                script, *flags = line.format(rank=rank).split()
                one = Setting(
                    f"{name}_{federation}",
                    f"vit_sparse_fl/{script}.py",
                    (*shared, *ROUNDS.split(), *more.split(), *flags),
                    f"{part}_{federation}",
                    seeds=seeds if federation == FIRST else 3,
                )
                taken = {"tuned_as": f"{name}_{FIRST}"} if federation == NO_SKEW else {"tune": {"lr": rates}}
                yield replace(one, **taken)
                if part != "main":
                    continue
                if federation == FIRST and name in MATCHED:
                    yield replace(one, name=f"matched_{one.name}", group=f"matched_{federation}", seeds=3)
                for how, rate in LOWER.get(federation, {}).get(name, {}).items():
                    group, words = f"lower_{federation}", (*one.words, "--lr", str(rate))
                    yield replace(one, name=f"{how}_{one.name}", group=group, words=words, seeds=3)


def split_of(seed, tuning):
    """The split of a seed; --tune has one of its own."""
    return TUNING_SPLIT if tuning else seed % len(SPLITS)


def plan(args, chosen, shared):
    """The runs of the chosen settings, after the pretraining of each split that they start from.

    shared: flags of every run. In runs of --tune nothing is measured besides (--interference-every). Raises UsageError
    for matched rows before those that they are matched with are tuned.
    """
    tunes, output, runs, first = args.tune is not None, args.output_dir, [], {}
    chosen = [s if not s.name.startswith("matched_") else None if tunes else matched(s, output) for s in chosen]
    for i, seed in enumerate(args.seeds):
        split = split_of(seed, tunes)
        name, classes = f"pretrain_seed_{split}", CLASSES[split]
        place = ["--classes", classes, "--output-dir", output, "--run-name", name, "--resume"]
        script = f"vit_sparse_fl/{CENTRAL}.py"
        first[name] = grid.Run(name, (script, *shared, *PRETRAIN.split(), *place))
        some = [s for s in chosen if s and (s.seeds is None or i < s.seeds)]
        # the setting's own words do not say which split, so that it is one setting for all seeds
        for run in grid.expand(some, [*shared, "--init-from", f"{output}/pretrain"], [seed], output, needs=name):
            words = [f"{output}/{name}" if word == f"{output}/pretrain" else word for word in run.command]
            if tunes and "--interference-every" in words:
                words[words.index("--interference-every") + 1] = "0"
            runs.append(replace(run, command=tuple(words)))
    return [*first.values(), *runs] if runs else []


# ---- rows as far from the server's weights as dense training is


def matched(setting, output):
    """A matched setting with its rate. Raises UsageError before --tune was run for its row and for MODEL's."""
    rows = tuning.read(Path(output) / tuning.TUNED)
    row, model = setting.name.removeprefix("matched_"), f"{MODEL}_{FIRST}"
    if missing := [name for name in (row, model) if name not in rows]:
        raise UsageError(f"{setting.name}: {missing[0]} is not tuned: give --tune --only {missing[0]} first")
    target = drifts(model, rows[model]["lr"], output).get(rows[model]["lr"]["best"])
    try:
        rate = matching_rate(drifts(row, rows[row]["lr"], output), target)
    except (TypeError, ValueError):
        raise UsageError(f"{setting.name}: its runs of --tune do not give drifts that grow: tune it again") from None
    return replace(setting, words=(*setting.words, "--lr", f"{rate:.3g}"))


def drifts(name, tuned, output):
    """{rate: drift after ROUND rounds} of a tuned setting's runs, without those that had none."""
    found = {}
    for x in tuned["tried"]:
        folder = Path(output) / TUNING / f"{name}_seed_{tuned['seed']}_lr_{x}"
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        found |= {float(x): d for row in rows if row["round"] == ROUND and (d := number(row.get("drift"))) > 0}
    return found


def matching_rate(drift_at, target):
    """The rate with drift `target`, of {rate: drift}: on the line between two points in log-log, from the lowest rate
    up; beyond all points on that of the nearest two. Raises ValueError where there is no line or it does not rise."""
    points = sorted((math.log(x), math.log(d)) for x, d in drift_at.items())
    goal, lines = math.log(target), list(pairwise(points))
    if not lines:
        raise ValueError("one point is no line")
    around = [line for line in lines if line[0][1] <= goal <= line[1][1]]
    (x0, d0), (x1, d1) = (around or [lines[0] if goal < points[0][1] else lines[-1]])[0]
    if d1 <= d0:
        raise ValueError("drift does not grow with the rate")
    return math.exp(x0 + (goal - d0) / (d1 - d0) * (x1 - x0))
