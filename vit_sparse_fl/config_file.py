"""--config FILE: the yaml keys of this study, as defaults of the flags."""

from common import config_file

NO_EFFECT = None
SHARED = {
    "seed": "seed",
    "device": "device",
    "num_workers": "num_workers",
    "pin_memory": NO_EFFECT,
    "dataset.name": "dataset",
    "dataset.data_dir": "data_root",
    "dataset.val_split": "val_split",
    "dataset.batch_size": "batch_size",
    "dataset.num_classes": "num_classes",
    "model.name": "model",
    "model.pretrained": "pretrained",
    "model.freeze_backbone": "freeze_backbone",
    "model.dropout": "dropout",
    "model.freeze_layers": "freeze_layers",
    "logging.use_wandb": "use_wandb",
    "logging.wandb_project": "wandb_project",
    "logging.log_interval": NO_EFFECT,
    "logging.save_interval": "save_every",
    "logging.checkpoint_dir": "output_dir",
    "logging.log_dir": "log_dir",
    "experiment.name": "run_name",
    "experiment.num_runs": "num_runs",
}
CENTRALIZED = {
    "centralized.epochs": "epochs",
    "centralized.learning_rate": "lr",
    "centralized.momentum": "momentum",
    "centralized.weight_decay": "weight_decay",
    "centralized.scheduler": "scheduler",
    "centralized.warmup_epochs": "warmup_epochs",
    "centralized.label_smoothing": "label_smoothing",
    "centralized.early_stopping_patience": "early_stopping_patience",
}
FEDERATED = {
    "federated.num_clients": "num_clients",
    "federated.participation_rate": "participation_rate",
    "federated.local_steps": "local_steps",
    "federated.num_rounds": "num_rounds",
    "federated.learning_rate": "lr",
    "federated.momentum": "momentum",
    "federated.weight_decay": "weight_decay",
    "federated.label_smoothing": "label_smoothing",
    "federated.scheduler": "scheduler",
    "federated.min_lr": "min_lr",
    "federated.early_stopping_patience": "early_stopping_patience",
    "federated.use_amp": "use_amp",
    "federated.eval_every": "eval_every",
    "sharding.strategy": "sharding",
    "sharding.nc": "nc",
    "heterogeneity_experiment.nc_values": "nc_values",
    "heterogeneity_experiment.j_values": "j_values",
}
SPARSE = {
    "sparse.sparsity_ratio": "sparsity_ratio",
    "sparse.calibration_rounds": "calibration_rounds",
    "sparse.mask_strategy": "mask_strategy",
    "sparse.fisher_samples": "fisher_samples",
}
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
