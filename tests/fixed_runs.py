"""Run folders with known numbers, without training: what the tests of figures and tables read.

`write_mamba`, `write_vit` and `write_glue` write one run, those of `noniid_folders` one of llm_noniid; `STUDIES` has a
whole study of each and `unpack` the run folders behind a committed log.
"""

import json
from pathlib import Path

import noniid_folders
import noniid_made
import numpy as np

from common.lowrank import RULES
from lora_glue_fl.glue_tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
CENTRAL, DENSE, SPARSE = "train_centralized", "train_federated", "train_federated_sparse"
FEDERATED, LORA, FULL = "fedavg_rounds", "main_glue_lora", "baseline_run"
VECTORS = ("A_log", "D", "dt_bias")
ERRORS = {"svd": 0.2, "naive": 0.5}


def save(folder, rows, **manifest):
    """Writes run.json and metrics.jsonl. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def change(folder, **facts):
    """Puts other facts into a run's run.json."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | facts), encoding="utf-8")


def change_rows(folder, make):
    """Puts make(row) in the place of every line of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    rows = [make(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def next_folder(root, command, name):
    return root / (name or f"{command}_{len(list(root.glob('*'))):03d}")


# ---------------------------------------------------------------------------------------------------- mamba_fl


def write_mamba(
    root, command="fed_avg", name=None, seed=0, ppl=(400.0, 200.0, 150.0), layers=1, status="finished", **more
):
    """One run of mamba_fl, evaluated at 1000, 2000, ... tokens; `more` goes over the args, `variant` into the data."""
    data = {"variant": more.pop("variant", "raw")}
    args = {"dataset": "wikitext2", "tokenizer": "gpt2", "layers": layers, "config": None, "d_model": 512}
    args |= {"sequence_length": 256, "lr": 5e-4, "seed": seed, "n_epochs": 1, "batch_size": 16, "val_sequences": 0}
    args["output_dir"] = str(root)
    if command != "central":
        args |= {"num_clients": 4, "local_updates": 1, "client_optimizer": "adamw", "budget": "equal", "sync": "round"}
        args["batch_size"] = 4
    rows = []
    for i, value in enumerate(ppl, start=1):
        row = {"round": i, "tokens": 1000 * i, "val_ppl": value, "train_ppl": 100.0, "seconds": 60.0 * i}
        if command != "central":
            above = value if isinstance(value, str) else value + 1
            row |= {"clients": [0, 1], "client_val_ppl": [above, value]}
        rows.append(row)
    results = {"test_ppl_best": 90.0, "test_ppl_last": 95.0, "final_val_ppl": ppl[-1], "tokens": 1000 * len(ppl)}
    folder = next_folder(root, command, name)
    return save(folder, rows, command=command, args=args | more, data=data, status=status, results=results)


def write_deltas(folder, steps=(1, 2, 3), layers=2, seed=0):
    """Stored updates: d_model 32, d_inner 64, state 16, 4 heads: 64 + 64 + 16 + 16 + 4 rows; rank 2 and little more."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for step in steps:
        arrays = {}
        for i in range(layers):
            in_proj = rng.normal(size=(164, 2)) @ rng.normal(size=(2, 32)) / step
            in_proj += 0.01 * rng.normal(size=in_proj.shape)
            arrays[f"layers.{i}.in_proj"] = in_proj.astype("f4")
            arrays |= {f"layers.{i}.{name}": rng.normal(size=4).astype("f4") for name in VECTORS}
        np.savez(folder / f"step_{step:06d}.npz", **arrays)


def mamba_study(root):
    """Central and four methods, one and two layers, two numbers of local updates, two schedules; three with updates."""
    for seed in range(2):
        for layers in (1, 2):
            ppl = (300.0 - 10 * layers, 150.0 + 5 * seed, 120.0 + 4 * seed - 10 * layers)
            name = f"central_{layers}_layer_seed_{seed}"
            folder = write_mamba(root, "central", name, seed, ppl, layers)
            write_deltas(folder / "server" / "deltas", layers=layers, seed=seed)
            write_mamba(root, seed=seed, layers=layers, ppl=(420.0, 210.0 + 8 * seed, 160.0 - 5 * layers + 3 * seed))
        write_mamba(root, local_updates=8, seed=seed, ppl=(440.0 + seed, 240.0, 190.0 + seed))
        for i, command in enumerate(("fed_fisher", "fed_entropy", "fed_momentum")):
            folder = write_mamba(root, command, seed=seed, ppl=(410.0 - i, 230.0 + seed, 170.0 + 6 * i + 2 * seed))
            if command == "fed_fisher":
                write_deltas(folder / "server" / "deltas", layers=1, seed=seed)
                for k in range(2):
                    write_deltas(folder / f"client_{k}" / "deltas", layers=1, seed=10 * k + seed)
        write_mamba(root, "fed_momentum", server_optimizer="adam", seed=seed, ppl=(500.0, "inf", 300.0 + seed))
        write_mamba(root, sync="epoch", seed=seed, ppl=(450.0, 260.0 + seed))


# ----------------------------------------------------------------------------------------------- vit_sparse_fl


def write_vit(
    root,
    command=DENSE,
    seed=0,
    accuracy=0.5,
    name=None,
    status="finished",
    counts=None,
    kept=None,
    start=None,
    **args,
):
    """One run of vit_sparse_fl with evaluations at rounds 10, 20, 30; `args` go over the defaults.

    start: its validation accuracy before training; None: a log without round 0.
    """
    every = {"dataset": "cifar100", "model": "tiny", "image_size": 32, "init_from": f"runs/pretrain_seed_{seed}"}
    every |= {"lr": 0.01, "seed": seed, "output_dir": str(root)}
    if command == CENTRAL:
        every |= {"epochs": 30}
    else:
        every |= {"sharding": "iid", "nc": 10, "alpha": 0.1, "num_clients": 100, "participation_rate": 0.1}
        every |= {"local_steps": 4, "num_rounds": 30, "nc_values": [1, 5]}
    if command == SPARSE:
        every |= {"sparsity_ratio": 0.9, "mask_strategy": "random", "upload": "masked", "mask": None}
        every |= {"calibration": "talos", "calibration_rounds": 4, "calibrate_on": "server", "calibration_clients": 10}
    rows = [] if start is None else [{"round": 0, "val_accuracy": start, "val_loss": 3.7}]
    for r in (10, 20, 30):
        row = {"round": r, "val_accuracy": accuracy * r / 30, "val_loss": 60 / r, "bytes_up": 1e6 * r, "seconds": 2 * r}
        if command != CENTRAL:
            row |= {"update_cosine": 0.2, "gradient_diversity": 0.4, "sign_conflict": 0.5, "drift": 0.01}
            row |= {"drift_to_mean": 2.0}
        rows.append(row)
    results = {"test_accuracy_last": accuracy, "test_accuracy_best": accuracy + 0.01, "bytes_up": 3e7, "rounds": 30}
    if kept is not None:  # {tensor: share}
        results["kept"] = {tensor: [1000 * share, 1000] for tensor, share in kept.items()}
    data = {"sha256": {"train": "abc"}, "classes": [50, 100]}
    folder = next_folder(root, command, name)
    save(folder, rows, command=command, args=every | args, data=data, status=status, results=results)
    if counts is not None:
        (folder / "shards.json").write_text(json.dumps({"counts": counts, "notes": []}), encoding="utf-8")
    return folder


def vit_study(root, seeds=2):
    """Central, dense with five federations, masks of two strategies and two sparsities, top-k."""
    for seed in range(seeds):
        more = {"seed": seed, "counts": [[3, 0], [0, 4]]}
        write_vit(root, CENTRAL, accuracy=0.6, seed=seed)
        write_vit(root, accuracy=0.50 + 0.02 * seed, **more)
        write_vit(root, sharding="non_iid", nc=1, accuracy=0.3, **more)
        write_vit(root, sharding="non_iid", nc=5, accuracy=0.4 + 0.04 * seed, **more)
        write_vit(root, sharding="dirichlet", accuracy=0.35, **more)
        write_vit(root, local_steps=8, num_rounds=15, accuracy=0.45, **more)
        for strategy in ("least_sensitive", "random"):
            kept = {"vit.layers.0.attention.q_proj": 0.2, "vit.layers.1.attention.q_proj": 0.0, "vit.layernorm": 1.0}
            kept |= {"vit.layers.10.mlp.fc1": 0.1, "vit.layers.2.mlp.fc1": 0.2 + seed / 10}
            kept |= {"vit.layers.3.attention.q_proj": 0.4, "vit.embeddings.patch_embeddings.x": 0.05}
            kept = {f"{layer}.weight": share for layer, share in kept.items()}
            write_vit(root, SPARSE, accuracy=0.45, mask_strategy=strategy, kept=kept, seed=seed)
        write_vit(root, SPARSE, accuracy=0.4, sparsity_ratio=0.99, kept={"vit.layernorm.weight": 1.0}, seed=seed)
        write_vit(root, SPARSE, accuracy=0.42, upload="topk", seed=seed)


# ------------------------------------------------------------------------------------------------ lora_glue_fl


def write_glue(root, command=FEDERATED, value=0.5, seed=0, data=None, name=None, drop=(), status="finished", **args):
    """One run of lora_glue_fl with rounds 1 to 3, evaluated after 1 and 3; `args` and `data` go over the defaults.

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
    metric = f"val_{TASKS[task].metrics[0]}"
    rule = "naive" if every.get("skip_svd") else every.get("aggregate")
    rows = []
    for r in (1, 2, 3):
        row = {"round": r, "bytes_up": 1_000_000 * r, "bytes_down": 3_000_000 * r, "train_loss": 1 / r}
        row["seconds"] = 20 * r
        if r != 2:
            row |= {metric: value - 0.1 * (r == 1), "val_loss": 1.0}
        if command == FEDERATED:
            row |= {"aggregation_error": ERRORS.get(rule, 1e-7) * (1 + (r - 2) / 10), "delta_norm": 1.0}
            row |= {"discarded_energy": 0.04} if rule == "svd" else {}
            if r != 2:
                row[f"client_{metric}"] = [row[metric] - 0.02, row[metric] - 0.04]
        rows.append({key: v for key, v in row.items() if key not in drop})
    results = {metric: value, f"best_{metric}": value + 0.01, "rounds": 3, "seconds": 60}
    results |= {"bytes_up": 3e6, "bytes_down": 9e6} if command == FEDERATED else {}
    folder = next_folder(root, command, name)
    facts |= data or {}
    return save(folder, rows, command=command, args=every, data=facts, status=status, results=results)


def glue_study(root, seeds=2):
    """Central, six rules with 3 clients, two with 20 and Dirichlet; CoLA beside RTE; two further ranks."""
    for seed in range(seeds):
        write_glue(root, LORA, 0.70 + 0.02 * seed, seed)
        for i, rule in enumerate(RULES[:6]):
            write_glue(root, value=0.60 + 0.01 * i + 0.04 * seed, seed=seed, aggregate=rule)
        for rule in ("svd", "naive"):
            write_glue(root, value=0.55, seed=seed, aggregate=rule, data={"clients": 20, "examples": [9] * 10})
            mode = {"mode": "dirichlet", "dirichlet_alpha": 0.5}
            write_glue(root, value=0.52, seed=seed, aggregate=rule, data=mode)
            write_glue(root, value=0.58, seed=seed, aggregate=rule, lora_r=8, lora_alpha=16.0)
        write_glue(root, value=0.4, seed=seed, task_name="cola")


# -------------------------------------------------------------------------------------------------- llm_noniid


def report_study(root):
    """Three seeds of IID and topic skew, a run that diverged, one without a finite update."""
    for algorithm, last in (("fedavg", 3.0), ("scaffold", 2.8)):
        noniid_made.make_seeds(root, last, algorithm=algorithm)
        noniid_made.make_seeds(root, last - 0.2, algorithm=algorithm, partition="iid")
    noniid_made.make_run(root, [4.0, float("inf"), 9.0], alarms=[("diverged", 2)], learning_rate=0.5)
    reason = "round 1: the updates of all 10 clients are not finite: lower it"
    noniid_made.make_run(root, [], "failed", reason, learning_rate=5.0)


# ------------------------------------------------------------------------------------------------ committed logs


def unpack(log, root):
    """Writes the run folders that a committed log, results/NAME.jsonl, was made from: what it kept of them."""
    for line in (ROOT / log).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        data = row.get("data") or {}
        manifest = {"command": row.get("command", "train"), "args": row["args"], "results": row["results"]}
        if "failed" in row:  # how the study judged the run, with what the line does not tell
            manifest["results"] = (row["results"] or {}) | {"failed": row["failed"]}
        manifest["data"] = data if isinstance(data, dict) else {"sha256": data}
        manifest |= {"status": "failed" if row.get("reason") else "finished", "reason": row.get("reason")}
        kept = ("git_commit", "versions", "resolved", "method", "clients", "ended")
        manifest |= {key: row[key] for key in kept if row.get(key) is not None}
        save(root / row["name"], row["curve"], **manifest)


STUDIES = {
    "mamba": mamba_study,
    "vit": vit_study,
    "glue": glue_study,
    "noniid": noniid_folders.write_study,
    "report": report_study,
    "mamba log": lambda root: [unpack(f"mamba_fl/results/{name}.jsonl", root / name) for name in ("gap", "source")],
    "vit log": lambda root: unpack("vit_sparse_fl/results/rates.jsonl", root),
    "glue log": lambda root: unpack("lora_glue_fl/results/small.jsonl", root),
    "noniid log": lambda root: unpack("llm_noniid/results/study.jsonl", root),
}
