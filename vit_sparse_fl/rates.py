"""The preset `rates` of run_all_experiments.py: every row at its own rate, on several splits of the classes.

    python vit_sparse_fl/run_all_experiments.py --preset rates --tune --jobs 2 --only main_nc5_J16      # rates first
    python vit_sparse_fl/run_all_experiments.py --preset rates --jobs 2 --only main_nc5_J16             # then 6 seeds

Half of the classes pretrain, the rest is federated; seed S takes split S mod 3 of SPLITS, each pretrained once, so that
seeds 0 to 5 are two seeds of each split. --tune runs on a fourth split. As many images in every row (central too).
Groups for --only: PART_FEDERATION, such as controls_iid_J4, of PARTS and FEDERATIONS.
"""

from dataclasses import replace

from common import grid
from common.grid import Setting
from vit_sparse_fl.mask_flags import STRATEGIES

SPLITS = ("0:50", "50:100", "25:75")  # classes of the pretraining
TUNING_SPLIT = len(SPLITS)  # number of one more
CLASSES = (*SPLITS, "10:60")
PRETRAIN = "--epochs 60 --lr 0.1 --early-stopping-patience 0 --seed 0"
SHARED = "--classes rest --head ridge --freeze-head --batch-size 32 --early-stopping-patience 0"
ROUNDS = "--eval-every 10 --save-every 40"
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FEDERATIONS = {  # 120 rounds x 10 clients x 4 steps x 32 = 153,600 images, 6.8 passes of 22,500
    "iid_J4": "--num-rounds 120 --local-steps 4 --interference-every 30",
    "nc5_J16": "--num-rounds 30 --local-steps 16 --sharding non_iid --nc 5 --interference-every 10",
    "nc1_J4": "--num-rounds 120 --local-steps 4 --sharding non_iid --nc 1 --interference-every 30",
}
SPARSE, LEAST = "train_federated_sparse", "train_federated_sparse --mask-strategy least_sensitive"
PARTS = {  # part -> {row: script and flags}
    "main": {
        "dense": "train_federated",
        **{name: f"{SPARSE} --mask-strategy {name}" for name in STRATEGIES},
        "least_per_layer": f"{LEAST} --mask-scope layer",
        "topk": f"{SPARSE} --upload topk",
    },
    "controls": {
        "head_only": "train_federated --freeze-backbone --no-freeze-head",
        "least_no_key_bias": f"{LEAST} --mask-omit key_bias",
        "topk_both_ways": f"{SPARSE} --upload topk --error-feedback --download topk",
    },
    "scopes": {
        **{f"least_per_{scope}": f"{LEAST} --mask-scope {scope}" for scope in ("kind", "unit", "block")},
        **{
            f"random_per_{scope}": f"{SPARSE} --mask-strategy random --mask-scope {scope}"
            for scope in ("unit", "block")
        },
    },
    "forms": {f"least_{form}": f"{LEAST} --fisher-form {form}" for form in ("true", "nll")},
}
ONE_FEDERATION = ("scopes", "forms")  # parts that only the first has


def settings():
    """Every row in every federation, and central training at the federations' number of images."""
    tune = {"lr": RATES}
    words = (*SHARED.split(), "--epochs", "7", "--warmup-epochs", "0")
    yield Setting("central", "vit_sparse_fl/train_centralized.py", words, "central", tune=tune)
    for i, (federation, more) in enumerate(FEDERATIONS.items()):
        for part, rows in PARTS.items():
            for name, line in rows.items() if i == 0 or part not in ONE_FEDERATION else ():
                script, *flags = line.split()
                words = (*SHARED.split(), *ROUNDS.split(), *more.split(), *flags)
                script, group = f"vit_sparse_fl/{script}.py", f"{part}_{federation}"
                yield Setting(f"{name}_{federation}", script, words, group, tune=tune)


def split_of(seed, tuning):
    """The split of a seed; --tune has one of its own."""
    return TUNING_SPLIT if tuning else seed % len(SPLITS)


def plan(args, chosen, shared):
    """The runs of the chosen settings, after the pretraining of each split that they start from.

    shared: flags of every run. In runs of --tune nothing is measured besides (--interference-every).
    """
    tuning, output, runs, first = args.tune is not None, args.output_dir, [], {}
    for seed in args.seeds:
        split = split_of(seed, tuning)
        name, classes = f"pretrain_seed_{split}", CLASSES[split]
        place = ["--classes", classes, "--output-dir", output, "--run-name", name, "--resume"]
        script = "vit_sparse_fl/train_centralized.py"
        first[name] = grid.Run(name, (script, *shared, *PRETRAIN.split(), *place))
        # the setting's own words do not say which split, so that it is one setting for all seeds
        for run in grid.expand(chosen, [*shared, "--init-from", f"{output}/pretrain"], [seed], output, needs=name):
            words = [f"{output}/{name}" if word == f"{output}/pretrain" else word for word in run.command]
            if tuning and "--interference-every" in words:
                words[words.index("--interference-every") + 1] = "0"
            runs.append(replace(run, command=tuple(words)))
    return [*first.values(), *runs]
