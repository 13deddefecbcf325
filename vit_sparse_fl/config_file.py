"""--config FILE: the yaml keys of this study, as defaults of the flags."""

from common import config_file


def _section(section, same, **others):
    """{"section.key": flag}: keys that are called as their flag, and others with theirs (None: no effect)."""
    prefix = f"{section}." if section else ""
    return {prefix + key: flag for key, flag in {**{key: key for key in same.split()}, **others}.items()}


_TRAINING = "momentum weight_decay label_smoothing scheduler early_stopping_patience"
SHARED = {
    **_section("", "seed device num_workers", pin_memory=None),
    **_section("dataset", "val_split batch_size num_classes", name="dataset", data_dir="data_root"),
    **_section("model", "pretrained freeze_backbone dropout freeze_layers", name="model"),
    **_section("logging", "use_wandb wandb_project log_dir", log_interval=None, save_interval="save_every"),
    **_section("logging", "", checkpoint_dir="output_dir"),
    **_section("experiment", "num_runs", name="run_name"),
}
CENTRALIZED = _section("centralized", f"epochs warmup_epochs {_TRAINING}", learning_rate="lr")
FEDERATED = {
    **_section("federated", "num_clients participation_rate local_steps num_rounds min_lr use_amp eval_every"),
    **_section("federated", _TRAINING, learning_rate="lr"),
    **_section("sharding", "nc", strategy="sharding"),
    **_section("heterogeneity_experiment", "nc_values j_values"),
}
SPARSE = _section("sparse", "sparsity_ratio calibration_rounds mask_strategy fisher_samples")
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
