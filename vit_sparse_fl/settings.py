"""The settings that `run_all_experiments.py` runs, one factor at a time from IID, J = 4, dense; its presets."""

from dataclasses import dataclass, replace

from common.grid import Preset, Setting
from vit_sparse_fl.masks import STRATEGIES


@dataclass
class Sizes:
    """What the presets differ in; flags as text."""

    central: str = ""
    federated: str = ""  # for federated and sparse runs, without the number of rounds
    sparse: str = ""  # for sparse runs besides
    topk: str = ""  # for the run without a mask, which trains densely and sends a part
    rounds: int = 500
    nc: tuple = (50, 10, 5, 1)
    j: tuple = (8, 16)
    sparsities: tuple = (("least_sensitive", (0.5, 0.7, 0.95, 0.99)),)
    calibration_rounds: tuple = (1, 2, 3, 5, 6, 7, 8, 9, 10)
    beyond: bool = True  # calibration on clients and the source's calibration too
    lower: tuple = ()  # dense FedAvg where the common learning rate is too high: (nc1 or J16, the rate)


# from random weights, of which a threshold over all layers takes those that train nothing: one threshold a tensor
QUICK = Sizes(
    central="--epochs 6 --warmup-epochs 1 --lr 0.1",
    federated="--num-clients 20 --participation-rate 0.25 --lr 0.1 --eval-every 2",
    sparse="--fisher-samples 64 --no-freeze-head --mask-scope layer --lr 0.5",
    topk="--lr 0.1",
    rounds=8,
    nc=(5, 1),
    j=(8,),
    sparsities=(("least_sensitive", (0.5,)),),
    calibration_rounds=(1,),
)
# a ViT of half a million weights, trained on classes 0 to 49, then federated on the other 50; the head, fitted by ridge
# regression, is frozen everywhere but where the name says otherwise, so that dense and sparse runs differ in one factor
TINY = "--dataset cifar100 --model tiny --threads 1 --amp auto --dropout 0"
PRETRAIN = "--classes 0:50 --epochs 60 --lr 0.1 --early-stopping-patience 0 --seed 0"
OTHER_HALF = "--classes 50:100 --head ridge --batch-size 32 --early-stopping-patience 0"
STAND_IN = Sizes(
    central=f"{OTHER_HALF} --epochs 20 --lr 0.03 --warmup-epochs 0",
    federated=f"{OTHER_HALF} --freeze-head --lr 0.1 --eval-every 10 --save-every 40",
    rounds=120,
    nc=(25, 5, 1),
    sparsities=(("least_sensitive", (0.5, 0.99)), ("random", (0.5, 0.99))),
    calibration_rounds=(1, 10),
    beyond=False,
    lower=(("nc1", "0.01"), ("J16", "0.03")),
)


def settings(sizes):
    """Every setting, one factor at a time from IID, J = 4, dense."""
    federated, rounds = sizes.federated.split(), ["--num-rounds", sizes.rounds]

    def dense(name, *words, rounds=rounds):
        script = "vit_sparse_fl/train_federated.py"
        return Setting(name, script, (*federated, *rounds, *words), "federated")

    def sparse(name, *words, group="sparse"):
        script = "vit_sparse_fl/train_federated_sparse.py"
        return Setting(name, script, (*federated, *rounds, *sizes.sparse.split(), *words), group)

    def steps(j):
        return {"rounds": ["--num-rounds", max(1, sizes.rounds * 4 // j), "--local-steps", j]}

    yield Setting("centralized", "vit_sparse_fl/train_centralized.py", tuple(sizes.central.split()), "centralized")
    yield dense("fedavg_iid")
    for nc in sizes.nc:
        yield dense(f"fedavg_nc{nc}", "--sharding", "non_iid", "--nc", nc)
    for j in sizes.j:
        yield dense(f"fedavg_J{j}", **steps(j))
    for strategy in STRATEGIES:
        group = "sparse" if strategy == "least_sensitive" else "extension"
        yield sparse(f"{strategy}_s0.9", "--mask-strategy", strategy, group=group)
    for strategy, values in sizes.sparsities:
        for s in values:
            yield sparse(f"{strategy}_s{s:g}", "--mask-strategy", strategy, "--sparsity-ratio", s)
    for n in sizes.calibration_rounds:
        yield sparse(f"calibration_rounds_{n}", "--calibration-rounds", n)
    for strategy in ("least_sensitive", "random"):
        yield sparse(f"{strategy}_s0.9_nc5", "--mask-strategy", strategy, "--sharding", "non_iid", "--nc", 5)
    if "--freeze-head" in federated:
        yield dense("fedavg_iid_head_trained", "--no-freeze-head")
    yield sparse("topk_s0.9", "--upload", "topk", "--mask-strategy", "random", *sizes.topk.split(), group="extension")
    if "--mask-scope" not in sizes.sparse:
        yield sparse("per_layer", "--mask-scope", "layer", group="extension")
    for name, lr in sizes.lower:
        more = ["--sharding", "non_iid", "--nc", 1, "--lr", lr] if name == "nc1" else ["--lr", lr]
        yield dense(f"fedavg_{name}_lr{lr}", *more, **(steps(16) if name == "J16" else {}))
    if sizes.beyond:
        yield sparse("calibration_seed", "--calibration", "seed", group="extension")
        yield sparse("on_clients", "--calibrate-on", "clients", group="extension")


SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 32 --dropout 0 --threads 1"
PRESETS = {
    "full": Preset((), tuple(settings(Sizes()))),
    "quick": Preset(SMALL.split(), tuple(settings(QUICK)), seeds=(0,)),
    "stand-in": Preset(TINY.split(), tuple(settings(STAND_IN))),
    # the same for a GPU: the ViT sees 64 patches instead of 16
    "stand-in-gpu": Preset((*TINY.split(), "--image-size", "64"), tuple(settings(replace(STAND_IN, rounds=500)))),
}
