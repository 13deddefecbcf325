"""Run folders of vit_sparse_fl as the plots see them: read, grouped so that only like is compared with like.

A run is selected by what its run.json says (command, args, data), never by its folder's name.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from plots import alike
from plots.alike import (  # noqa: F401  (what the figures and tables of this study use)
    base_name,
    curves_of,
    label,
    like_with_like,
    lines_of,
    setting_of,
    text,
    usual,
    usual_variants,
    words_for,
)
from plots.reading import read_runs

COMMANDS = ("train_centralized", "train_federated", "train_federated_sparse")
# kind of a run -> its name in figures and tables, in their order
KINDS = {
    "central": "Central",
    "dense": "Dense FedAvg",
    "least_sensitive": "Least sensitive",
    "most_sensitive": "Most sensitive",
    "lowest_magnitude": "Lowest magnitude",
    "highest_magnitude": "Highest magnitude",
    "random": "Random",
    "topk": "Top-k updates",
    "given": "Mask from a file",
}
STRATEGIES = tuple(KINDS)[2:7]

# A figure or table holds only runs that agree on these, apart from what it varies. A key that a run's command does
# not have agrees with anything: a central run joins every federation on its data, a dense one every sparsity.
SETTING = (
    "dataset",
    "classes",
    "data",
    "val_split",
    "model",
    "weights",
    "image_size",
    "init_from",
    "num_clients",
    "participation_rate",
    "shards",
    "local_steps",
    "num_rounds",
    "sparsity",
)
FEDERATION = frozenset(("num_clients", "participation_rate", "shards", "local_steps", "num_rounds"))
_FROM_ARGS = tuple(key for key in SETTING if key not in ("data", "shards", "sparsity"))

_CALIBRATION = frozenset(
    "calibration calibration_rounds calibrate_on calibration_clients fisher_samples mask_merge".split()
)
_MASK = _CALIBRATION | {"mask_scope"}
# Args that a kind of run does not read, whatever its run.json holds.
_UNREAD = {
    "dense": _MASK,
    "topk": _MASK,
    "given": _MASK,
    "lowest_magnitude": _CALIBRATION,
    "highest_magnitude": _CALIBRATION,
    "random": _CALIBRATION,
}
_FEDERATED_ONLY = frozenset("participation_rate num_clients local_steps num_rounds client_weights".split()) | _MASK
# Says where and how a run was computed, not what: runs that differ only here are seeds of one curve.
_NOT_THE_METHOD = frozenset(
    "seed data_dir data_root output_dir cache_dir run_name experiment_name resume overwrite track use_wandb"
    " wandb_project threads device num_workers pin_memory compile config checkpoint_dir log_dir log_interval"
    " save_every save_interval keep_best eval_every eval_batch_size download num_runs hp_search hp_epochs"
    " heterogeneity_experiment nc_values local_steps_experiment j_values compare_strategies sparsity_experiment"
    " sparsity_values sharding nc alpha allow_unused_classes sparsity_ratio upload mask mask_strategy use_amp"
    " num_classes".split()
) | frozenset(SETTING)
_SHORT = {
    "shards": "{}",
    "local_steps": "J {}",
    "num_rounds": "{} rounds",
    "sparsity": "sparsity {}",
    "calibration": "{} calibration",
    "calibration_rounds": "{} calibration rounds",
    "calibrate_on": "calibrated on {}",
    "fisher_samples": "{} Fisher samples",
    "mask_scope": "{} threshold",
    "mask_merge": "{} of clients' masks",
    "batch_size": "batch {}",
    "num_clients": "{} clients",
    "participation_rate": "participation {}",
    "epochs": "{} epochs",
    "init_from": "from {}",
    "image_size": "{} px",
}
_YES_NO = {"freeze_head": ("head frozen", "head trained"), "pretrained": ("pretrained", "from scratch")}


@dataclass(frozen=True, eq=False)
class Run(alike.Run):
    kinds, keys, short, yes_no = KINDS, SETTING, _SHORT, _YES_NO

    @staticmethod
    def order(key, value):
        # the federation without skew first, then ever more of it
        return (0, *(-v for v in shards_order(value)), "") if key == "shards" else alike.Run.order(key, value)

    @property
    def kind(self):
        """One of KINDS, or the name of a strategy that is not among them."""
        if self.command == "train_centralized":
            return "central"
        if self.args.get("upload") == "topk":
            return "topk"
        if self.command == "train_federated":
            return "dense"
        return "given" if self.args.get("mask") else str(self.args.get("mask_strategy"))

    def setting(self):
        """dict over SETTING of what this run has; a key that its command does not know is not in it."""
        args = self.args
        values = {key: text(args[key]) for key in _FROM_ARGS if key in args}
        for key in ("weights", "init_from", "model"):
            if isinstance(args.get(key), str):
                values[key] = base_name(args[key])
        # `--classes` left out and all of them given are the same
        if "classes" in self.data:
            values["classes"] = text(self.data["classes"])
        sums = {key: value for key, value in self.data.items() if key.startswith("sha256")}
        if sums:
            values["data"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:8]
        if "sharding" in args:
            values["shards"] = shards_name(args)
        if self.kind not in ("central", "dense") and "sparsity_ratio" in args:
            values["sparsity"] = args["sparsity_ratio"]
        if self.kind == "central":
            values = {key: value for key, value in values.items() if key not in FEDERATION}
        return values

    def method(self):
        """(kind, its method-defining args as sorted pairs): equal for the seeds of one curve."""
        unread = _NOT_THE_METHOD | _UNREAD.get(self.kind, frozenset())
        if self.kind == "central":
            unread |= _FEDERATED_ONLY
        elif self.args.get("calibrate_on") != "clients":
            unread |= {"calibration_clients", "mask_merge"}
        return self.kind, tuple(sorted((k, text(v)) for k, v in self.args.items() if k not in unread))


def shards_name(args):
    """`IID`, `Nc 5`, `Dirichlet 0.1`: how the args of a run deal the images to the clients."""
    if args.get("sharding") == "iid":
        return "IID"
    if args.get("sharding") == "dirichlet":
        return f"Dirichlet {args.get('alpha')}"
    return f"Nc {args.get('nc')}"


def shards_order(name):
    """A sort key: Dirichlet with alpha upwards, Nc upwards, IID last."""
    kind, _, value = str(name).partition(" ")
    return ("Dirichlet", "Nc", "IID").index(kind), float(value or 0)


def find_runs(data_dir, unfinished=False):
    """All readable runs of vit_sparse_fl in `data_dir` and the folders below it, and notes: see `read_runs`."""
    return read_runs(data_dir, COMMANDS, Run, unfinished)


def suffixes(settings):
    """File-name suffix of each setting: see `alike.suffixes`."""
    return alike.suffixes(settings, SETTING)


def describe(setting):
    """One line for captions: `cifar100, classes 50 to 99, tiny, 32 px, 100 clients, participation 0.1, IID, J 4`."""
    words = [str(setting["dataset"])] if setting.get("dataset") else []
    if setting.get("classes") is not None:
        low_high = re.findall(r"\d+", str(setting["classes"]))
        several = len(low_high) == 2
        words.append(f"classes {low_high[0]} to {int(low_high[1]) - 1}" if several else f"classes {setting['classes']}")
    if setting.get("model"):
        words.append(str(setting["model"]))
    for key in ("weights", "image_size", "init_from", "num_clients", "participation_rate"):
        words += words_for(key, setting.get(key), _SHORT, _YES_NO)
    for key in ("shards", "local_steps", "num_rounds", "sparsity"):
        words += words_for(key, setting.get(key), _SHORT, _YES_NO)
    return ", ".join(words)
