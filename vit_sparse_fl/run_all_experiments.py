"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --preset rates --tune      # the measured study: first its rates
    python vit_sparse_fl/run_all_experiments.py --quick                    # small, offline: minutes
    python vit_sparse_fl/run_all_experiments.py --full --plan              # only shows the commands

full, quick  every setting of the source, one factor at a time from IID, J = 4, dense
rates        every row at its own rate. Half of the classes pretrain, the rest is federated; seed S takes split S mod 3
             of SPLITS, each pretrained once. --tune runs on a fourth split: the best accuracy on its validation images
             (the loss prefers rates at which nothing is learnt). As many images in every row: 153,600, central 157,472
             (7 epochs)
replay       interference replay on ten splits of the classes, each with a pretraining of its own: seed S pretrains on
             classes 5 S to 5 S + 49

Flags that are not listed are the scripts' and go to every run.
"""

from common.cli import non_negative_int, positive_int, run_main
from plots import runner
from plots.runner import preset, row

GROUPS = ("centralized", "federated", "sparse", "extension")
STRATEGIES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random")
CENTRAL, DENSE = "vit_sparse_fl/train_centralized.py", "vit_sparse_fl/train_federated.py"
SPARSE, TOPK = "vit_sparse_fl/train_federated_sparse.py", "vit_sparse_fl/train_federated_topk.py"


def source(rounds, nc, js, sparsities, calibrations, central="", federated="", sparse="", topk="", needs=()):
    """One factor at a time. nc: classes a client; js: local steps; federated: flags of all but central training;
    sparse: of masks besides; topk: of the run that trains densely and sends a part."""

    def dense(words="", t=rounds):
        return row(f"{DENSE} {federated} --num-rounds {t} {words}", "federated", needs=needs)

    def masked(words, group="sparse"):
        return row(f"{SPARSE} {federated} --num-rounds {rounds} {sparse} {words}", group, needs=needs)

    rows = {"centralized": row(f"{CENTRAL} {central}", "centralized", needs=needs), "fedavg_iid": dense()}
    rows |= {f"fedavg_nc{n}": dense(f"--sharding non_iid --nc {n}") for n in nc}
    rows |= {f"fedavg_J{j}": dense(f"--local-steps {j}", max(1, rounds * 4 // j)) for j in js}
    for name in STRATEGIES:
        group = "sparse" if name == "least_sensitive" else "extension"
        rows[f"{name}_s0.9"] = masked(f"--mask-strategy {name}", group)
    rows |= {f"least_sensitive_s{s:g}": masked(f"--sparsity-ratio {s}") for s in sparsities}
    rows |= {f"calibration_rounds_{n}": masked(f"--calibration-rounds {n}") for n in calibrations}
    for name in ("least_sensitive", "random"):
        rows[f"{name}_s0.9_nc5"] = masked(f"--mask-strategy {name} --sharding non_iid --nc 5")
    rows["topk_s0.9"] = row(f"{TOPK} {federated} --num-rounds {rounds} {topk}", "extension", needs=needs)
    return rows


FULL = source(500, (50, 10, 5, 1), (8, 16), (0.5, 0.7, 0.95, 0.99), (1, 2, 3, 5, 6, 7, 8, 9, 10))
# a few epochs on the same ten classes come first: under a mask a ViT with random weights learns nothing
FROM = "--init-from {output}/pretrain --head keep"
SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 32 --dropout 0 --threads 1"
QUICK = source(
    8,
    (5, 1),
    (8,),
    (0.5,),
    (1,),
    central=f"{FROM} --epochs 6 --warmup-epochs 1 --lr 0.1",
    federated=f"{FROM} --num-clients 20 --participation-rate 0.25 --freeze-head --lr 0.1 --eval-every 2",
    sparse="--fisher-samples 64 --lr 0.5",
    topk="--lr 0.1",
    needs=("pretrain",),
)
PRETRAIN = "--early-stopping-patience 0 --seed 0"
QUICK["pretrain"] = row(f"{CENTRAL} --epochs 3 --warmup-epochs 1 --lr 0.1 {PRETRAIN}", "first", tag="")

# ---- every row at its own rate, on several splits of the classes

SPLITS = ("0:50", "50:100", "25:75", "10:60")  # classes of the pretraining; the last one's are for --tune


def values(seed, tuning):
    """What stands in rows for a seed; in runs of --tune nothing is measured besides."""
    split = len(SPLITS) - 1 if tuning else seed % (len(SPLITS) - 1)
    return {
        "window": f"{5 * seed}:{5 * seed + 50}",  # of the preset replay
        "split": split,
        "classes": SPLITS[split],
        "every_10": 0 if tuning else 10,
        "every_30": 0 if tuning else 30,
    }


SHARED = "--init-from {output}/pretrain_seed_{split} --classes rest --head ridge --freeze-head --batch-size 32"
SHARED += " --early-stopping-patience 0"
FEDERATIONS = {  # rounds x 10 clients x steps x 32 = 153,600 images, 6.8 passes of 22,500
    "nc5_J16": "--num-rounds 30 --local-steps 16 --sharding non_iid --nc 5 --interference-every {every_10}",
    "nc1_J4": "--num-rounds 120 --local-steps 4 --sharding non_iid --nc 1 --interference-every {every_30}",
    "iid_J4": "--num-rounds 120 --local-steps 4 --interference-every {every_30}",
    "iid_J16": "--num-rounds 30 --local-steps 16 --interference-every {every_10}",
}
FIRST, NO_SKEW = "nc5_J16", "iid_J16"  # the one that has controls and 6 seeds; the one at the former's rates
ALL, KEPT, SLOW = (0.01, 0.03, 0.1), (0.1, 0.3, 1.0), (0.3, 1.0, 3.0)  # rates where all weights move, some, the least
LEAST = f"{SPARSE} --mask-strategy least_sensitive"
MAIN = {"dense": (DENSE, ALL)} | {name: (f"{SPARSE} --mask-strategy {name}", KEPT) for name in STRATEGIES}
MAIN |= {
    "least_sensitive": (LEAST, SLOW),
    "least_per_layer": (f"{LEAST} --mask-scope layer", KEPT),
    "topk": (TOPK, ALL),
}
# below the best rate: the most sensitive mask's diverges on two of three splits, as dense training's of iid_J4; and
# dense training where clients gain as little as under masks
LOW = {"lower_dense": ("dense", 0.01), "lowest_dense": ("dense", 0.003)}
LOWER = {
    FIRST: {"lower_most_sensitive": ("most_sensitive", 0.033), **LOW},
    "nc1_J4": LOW,
    "iid_J4": {"lower_dense": ("dense", 0.03)},
}


def rates():
    """Every row of every federation, and central training at the federations' number of images."""
    first = {"needs": ("pretrain",)}
    words = f"{SHARED} --epochs 7 --warmup-epochs 0"
    pretrain = f"{CENTRAL} --epochs 80 --warmup-epochs 5 --lr 0.1 --weight-decay 1e-4 --mixup 0.2 {PRETRAIN}"
    rows = {"pretrain": row(pretrain + " --classes {classes}", "first", tag="_seed_{split}")}
    rows["central"] = row(f"{CENTRAL} {words}", f"controls_{FIRST}", 3, {"lr": ALL}, **first)
    for federation, more in FEDERATIONS.items():
        more, seeds = f"{SHARED} --eval-every 10 --save-every 40 {more}", 6 if federation == FIRST else 3
        for name, (line, grid) in MAIN.items():
            if federation != NO_SKEW:
                rows[f"{name}_{federation}"] = row(f"{line} {more}", f"main_{federation}", seeds, {"lr": grid}, **first)
            elif name in ("dense", "random", "least_sensitive"):
                taken = f"{name}_{FIRST}"
                rows[f"{name}_{federation}"] = row(f"{line} {more}", f"main_{federation}", 3, rate_of=taken, **first)
        if federation == FIRST:
            words = f"{DENSE} --freeze-backbone --no-freeze-head {more}"
            rows[f"head_only_{FIRST}"] = row(words, f"controls_{FIRST}", 3, {"lr": ALL}, **first)
        for name, (of, rate) in LOWER.get(federation, {}).items():
            rows[f"{name}_{federation}"] = row(f"{MAIN[of][0]} {more} --lr {rate}", f"lower_{federation}", 3, **first)
    return rows


def replays():
    """Dense training for 21 rounds, and what every method does to its clients before rounds 1, 11 and 21."""
    pretrain = f"{CENTRAL} --epochs 40 --warmup-epochs 5 --lr 0.1 --weight-decay 1e-4 --mixup 0.2 {PRETRAIN}"
    rows = {"pretrain": row(pretrain.replace("--seed 0", "--seed {seed}") + " --classes {window}", "first")}
    line = f"vit_sparse_fl/replay.py {SHARED.replace('{split}', '{seed}')} --scheduler none --eval-every 1"
    line += " --num-rounds 21 --replay-every 10 --sharding non_iid"
    for name, words in {"nc5": "--nc 5 --local-steps 16 --lr 0.03", "nc1": "--nc 1 --local-steps 4 --lr 0.01"}.items():
        rows[f"replay_{name}"] = row(f"{line} {words}", name, needs=("pretrain",))
    return rows


TINY = "--dataset cifar100 --model tiny --threads 1 --amp auto --dropout 0"
TUNED = {"tuned": "vit_sparse_fl/results/tuning/rates.json", "objective": "val_accuracy", "higher": True}
STUDY = {
    "presets": {
        "full": preset(FULL),
        "quick": preset(QUICK, SMALL, seeds=(0,)),
        "rates": preset(rates(), TINY, seeds=range(6), **TUNED),
        "replay": preset(replays(), TINY, seeds=range(10)),
    },
    "default": "full",
    "output": "results/vit_{preset}",
    "values": values,
    "show": [
        "plots/vit.py --data-dir {output} --out-dir {output}/figures",
        "plots/tables.py vit_sparse_fl --data-dir {output}",
    ],
}


def build_parser():
    parser = runner.build_parser(STUDY, __doc__.split("\n")[0], output_names=["--checkpoint-dir"])
    size = parser.add_mutually_exclusive_group()
    for name, text in (("full", "the source's configuration"), ("quick", "ten classes of the demo, a few rounds")):
        size.add_argument(f"--{name}", action="store_const", dest="preset", const=name, help=text)
    for group in GROUPS:
        parser.add_argument(f"--only-{group}", action="store_true", help=f"only the group {group} (may be combined)")
    parser.add_argument("--num-runs", type=positive_int, metavar="N", help="so many seeds, from --seed on")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="the first seed")
    return parser


def parse(argv=None):
    """(own flags, the scripts' flags as words)."""
    args, words = build_parser().parse_known_args(argv)
    args.only = [*(args.only or ()), *(group for group in GROUPS if getattr(args, f"only_{group}"))] or None
    count = args.num_runs or (len(STUDY["presets"][args.preset]["seeds"]) if args.seed else 0)
    args.seeds = args.seeds or list(range(args.seed, args.seed + count))
    return args, words


if __name__ == "__main__":
    run_main(lambda argv: runner.run_study(STUDY, *parse(argv)), None)
