"""Made-up run folders of lora_glue_fl, for the tests of its plots and tables."""

import json

from common.before.lowrank import RULES
from plots import glue_runs, glue_table

FEDERATED, CENTRAL, FULL = glue_runs.COMMANDS
ERRORS = {"svd": 0.2, "naive": 0.5}


def write_run(root, command=FEDERATED, value=0.5, seed=0, data=None, name=None, drop=(), status="finished", **args):
    """One run folder with rounds 1 to 3, evaluated after 1 and 3; `args` and `data` go over the defaults.

    The headline metric is value - 0.1, then value; the clients' are below it by 0.02 and 0.04. drop: fields left out.
    """
    every = {"task_name": "rte", "model_size": "base", "model": None, "dataset": "glue", "seed": seed, "batch_size": 32}
    every |= {"output_dir": f"{root}/{seed}", "learning_rate": 5e-4, "max_length": 128}
    if command != FULL:
        every |= {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    if command == FEDERATED:
        every |= {"aggregate": "svd", "skip_svd": False, "rounds": 3, "local_epochs": 1.0, "client_ranks": None}
        every |= {"svd_split": "us", "server_optimizer": "none", "server_lr": 1.0, "mu": 0.0, "shard_dir": f"s{seed}"}
    else:
        every |= {"num_train_epochs": 3.0, "max_examples": None}
    every |= args
    if command == FEDERATED:
        every = {"svd_rank": every["lora_r"], "alpha": float(every.get("svd_rank", every["lora_r"]))} | every
    task = every["task_name"]
    facts = {"dataset": "glue", "task": task, "source": str(root), "sha256": {"train": f"{task}12345678"}}
    facts |= {"model": every["model"] or f"roberta-{every['model_size']}", "examples": 90}
    if command == FEDERATED:
        k = (data or {}).get("clients", 3)
        facts |= {"clients": k, "mode": "iid", "dirichlet_alpha": None, "shard_seed": seed, "examples": [90 // k] * k}
        facts["ranks"] = [(every["client_ranks"] or [every["lora_r"]])[0]] * k
    facts |= data or {}
    metric = f"val_{glue_runs.headline(task)}"
    rule = "naive" if every.get("skip_svd") else every.get("aggregate")
    rows = []
    for r in (1, 2, 3):
        row = {
            "round": r,
            "bytes_up": 1_000_000 * r,
            "bytes_down": 3_000_000 * r,
            "train_loss": 1 / r,
            "seconds": 20 * r,
        }
        if r != 2:
            row |= {metric: value - 0.1 * (r == 1), "val_loss": 1.0}
        if command == FEDERATED:
            row |= {"aggregation_error": ERRORS.get(rule, 1e-7) * (1 + (r - 2) / 10), "delta_norm": 1.0}
            row |= {"discarded_energy": 0.04} if rule == "svd" else {}
            if r != 2:
                row[f"client_{metric}"] = [row[metric] - 0.02, row[metric] - 0.04]
        rows.append({key: v for key, v in row.items() if key not in drop})
    folder = root / (name or f"{command}_{len(list(root.glob('*')))}")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    results = {metric: value, f"best_{metric}": value + 0.01, "rounds": 3, "seconds": 60}
    results |= {"bytes_up": 3e6, "bytes_down": 9e6} if command == FEDERATED else {}
    manifest = {"command": command, "args": every, "data": facts, "status": status, "results": results}
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_study(root, seeds=2):
    """Central, six rules with 3 clients, two with 20 and Dirichlet; CoLA beside RTE; two further ranks."""
    for seed in range(seeds):
        write_run(root, CENTRAL, 0.70 + 0.02 * seed, seed)
        for i, rule in enumerate(RULES):
            write_run(root, value=0.60 + 0.01 * i + 0.04 * seed, seed=seed, aggregate=rule)
        for rule in ("svd", "naive"):
            write_run(root, value=0.55, seed=seed, aggregate=rule, data={"clients": 20, "examples": [9] * 10})
            mode = {"mode": "dirichlet", "dirichlet_alpha": 0.5}
            write_run(root, value=0.52, seed=seed, aggregate=rule, data=mode)
            write_run(root, value=0.58, seed=seed, aggregate=rule, lora_r=8, lora_alpha=16.0)
        write_run(root, value=0.4, seed=seed, task_name="cola")


def parse(script, root, *words):
    out = [] if script is glue_table else ["--out-dir", str(root / "plots")]
    return script.build_parser().parse_args(["--data-dir", str(root), *out, *words])
