"""--config FILE: the yaml keys of this study, as defaults of the flags."""

from common import config_file

NO_EFFECT = None


def _same(section, names):
    """{"section.name": name} of keys that are called as their flags."""
    return {f"{section}.{name}": name for name in names.split()}


SHARED = {
    **{name: name for name in ("seed", "device", "num_workers")},
    "pin_memory": NO_EFFECT,
    "dataset.name": "dataset",
    "dataset.data_dir": "data_root",
    **_same("dataset", "val_split batch_size num_classes"),
    "model.name": "model",
    **_same("model", "pretrained freeze_backbone dropout freeze_layers"),
    **_same("logging", "use_wandb wandb_project log_dir"),
    "logging.log_interval": NO_EFFECT,
    "logging.save_interval": "save_every",
    "logging.checkpoint_dir": "output_dir",
    "experiment.name": "run_name",
    "experiment.num_runs": "num_runs",
}
TRAINING = "momentum weight_decay scheduler label_smoothing early_stopping_patience"
CENTRALIZED = {
    "centralized.learning_rate": "lr",
    **_same("centralized", f"epochs warmup_epochs {TRAINING}"),
}
FEDERATED = {
    "federated.learning_rate": "lr",
    **_same("federated", f"num_clients participation_rate local_steps num_rounds min_lr use_amp eval_every {TRAINING}"),
    "sharding.strategy": "sharding",
    "sharding.nc": "nc",
    **_same("heterogeneity_experiment", "nc_values j_values"),
}
SPARSE = _same("sparse", "sparsity_ratio calibration_rounds mask_strategy fisher_samples")
# switches of the source that only set another flag -> (that flag, its value)
SWITCHES = {"use_amp": ("amp", "auto"), "use_wandb": ("track", "wandb")}
EVERY_KEY = {**SHARED, **CENTRALIZED, **FEDERATED, **SPARSE}


def apply_config(parser, path):
    """Makes the values in the yaml file at `path` the defaults of `parser`'s flags (see `common.config_file`).

    One file serves all scripts: a key of another script is checked for its name only.
    """
    # lr, momentum and others are in two sections: a script takes those of its own
    federated = any(action.dest == "num_rounds" for action in parser._actions)
    own = {**SHARED, **FEDERATED, **SPARSE} if federated else {**SHARED, **CENTRALIZED}
    config_file.apply_config(parser, path, own, EVERY_KEY, SWITCHES)
