"""The settings of this study's grids (`run_experiments.py --mode ...`), each a tuple of flags of train.py.

quick    3 algorithms x 4 partitions, 6 rounds, the tiny model on the demo
main     3 algorithms x 4 partitions x participation 0.3, 0.5, 1.0
failure  3 algorithms x (alpha 0.01; participation 0.1; learning rate 1e-3; 5 local epochs), topic skew
study    one factor at a time from FedAvg, topic skew, alpha 0.1: the partitions with 3 algorithms, alpha 100, 1, 0.01,
         participation 0.3, 0.1, higher learning rates (IID too), 5 times the local steps, clusters, local and central
         training, WikiText-2 beside AG News
"""

from common.grid import Preset, Setting
from llm_noniid.partition import PARTITIONS

ALGORITHMS = ("fedavg", "fedprox", "scaffold")
MORE_STEPS = 5  # times the local steps: the study's 5 local epochs


def setting(name, algorithm, partition, *words, seeds=None):
    """One setting of train.py."""
    words = ("--algorithm", algorithm, "--partition", partition, *map(str, words))
    return Setting(name, "llm_noniid/train.py", words, algorithm, seeds)


def partitions(names=PARTITIONS, suffix="", *words):
    """The three algorithms on partitions."""
    return [setting(f"{a}_{p}{suffix}", a, p, *words) for p in names for a in ALGORITHMS]


def study(base, rates):
    """One factor at a time; see this module's docstring. base: train.py's flags; rates: learning rates."""
    yield from partitions()
    for alpha in (100, 1, 0.1, 0.01):
        if alpha != base.alpha:
            yield setting(f"fedavg_alpha_{alpha:g}", "fedavg", "topic_skew", "--alpha", f"{alpha:g}")
    for share in (1.0, 0.3, 0.1):
        if share != base.participation_rate:
            words = ("--participation-rate", f"{share:g}")
            yield setting(f"fedavg_participation_{share:g}", "fedavg", "topic_skew", *words)
    for rate in rates or (10 * base.learning_rate, 100 * base.learning_rate):
        if rate != base.learning_rate:
            for partition in ("topic_skew", "iid"):
                words = ("--learning-rate", f"{rate:g}")
                yield setting(f"fedavg_{partition}_lr_{rate:g}", "fedavg", partition, *words, seeds=2)
    steps = ("--local-steps", MORE_STEPS * base.local_steps)
    if not base.local_steps:
        steps = ("--local-epochs", f"{MORE_STEPS * base.local_epochs:g}")
    yield setting(f"fedavg_{steps[0][2:].replace('-', '_')}_{steps[1]}", "fedavg", "topic_skew", *steps)
    for kind in ("updates", "labels"):
        yield setting(f"fedavg_clusters_{kind}", "fedavg", "topic_skew", "--cluster", kind)
    for algorithm in ("local", "central"):
        yield setting(algorithm, algorithm, "topic_skew")
    if base.dataset == "ag_news":
        for partition in ("iid", "topic_skew"):
            yield setting(f"fedavg_{partition}_wikitext", "fedavg", partition, "--dataset", "wikitext", seeds=1)


SMALL = "--threads 1 --eval-every 1"
PRESETS = {
    "quick": Preset(
        f"{SMALL} --dataset demo --local-steps 5 --num-rounds 6 --max-samples 300 --eval-samples 60 --max-length 64 "
        "--probe-samples 8 --learning-rate 1e-2".split(),
        lambda base, rates: partitions(),
        seeds=(42,),
    ),
    "main": Preset(
        (),
        lambda base, rates: [
            one
            for share in ("0.3", "0.5", "1.0")
            for one in partitions(PARTITIONS, f"_participation_{share}", "--participation-rate", share)
        ],
        seeds=(42,),
    ),
    "failure": Preset(
        (),
        lambda base, rates: [
            *partitions(["topic_skew"], "_alpha_0.01", "--alpha", "0.01"),
            *partitions(["topic_skew"], "_participation_0.1", "--participation-rate", "0.1"),
            *partitions(["topic_skew"], "_lr_1e-3", "--learning-rate", "1e-3"),
            *partitions(["topic_skew"], "_epochs_5", "--local-steps", "0", "--local-epochs", "5"),
        ],
        seeds=(42,),
    ),
    "study": Preset(
        f"{SMALL} --local-steps 10 --num-rounds 12 --max-samples 4000 --eval-samples 300 --probe-samples 32 "
        "--max-length 64 --learning-rate 3e-3".split(),
        study,
    ),
}
