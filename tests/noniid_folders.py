"""Made-up run folders of llm_noniid, for the tests of its plots and tables."""

import json

import numpy as np

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
BASE = {
    "algorithm": "fedavg",
    "mu": 0.01,
    "client_optimizer": "adamw",
    "scaffold_option": "mean_gradient",
    "server_lr": 1.0,
    "server_momentum": 0.9,
    "cluster": "none",
    "num_clusters": 2,
    "cluster_round": 1,
    "stop_on": "never",
    "dataset": "ag_news",
    "max_samples": 2000,
    "eval_samples": 200,
    "partition": "topic_skew",
    "alpha": 0.1,
    "style_criterion": "length",
    "skew_type": "frequency",
    "num_clients": 6,
    "min_samples": 10,
    "model": "models/small",
    "tokenizer": None,
    "lora_r": 8,
    "lora_alpha": 16,
    "num_rounds": 40,
    "participation_rate": 1.0,
    "local_epochs": 1.0,
    "local_steps": 5,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "eval_every": 4,
    "seed": 0,
}


def alarm(detector, t):
    return {"detector": detector, "round": t, "value": 1.0, "threshold": 0.5, "message": f"round {t}: {detector}"}


def write_run(root, last=4.0, alarms=(), status="finished", reason=None, drop=(), name=None, losses=None, **args):
    """One run folder, evaluated every --eval-every rounds; `args` go over BASE.

    The validation loss falls from 5.5 to `last` (or is `losses`, one an evaluation); clients' losses are it + k/20,
    topics' + c/10. alarms: (detector, round) pairs. drop: fields left out.
    """
    a = BASE | args
    k, every = a["num_clients"], a["eval_every"]
    central, apart = a["algorithm"] == "central", a["algorithm"] == "local" or a["cluster"] != "none"
    m = 1 if central else max(1, int(a["participation_rate"] * k + 0.5))
    rng = np.random.default_rng([a["seed"], int(1e6 * a["alpha"]), len(a["algorithm"])])
    rounds = list(range(every, a["num_rounds"] + 1, every))
    if losses is None:
        losses = [last + (5.5 - last) * 0.9 ** (t - every) for t in rounds]
    rows = []
    for t, loss in zip(rounds, losses, strict=False):
        chosen = sorted(rng.choice(k, m, replace=False).tolist())
        clients = [loss + c / 20 for c in range(k)] if isinstance(loss, float) else [loss] * k
        row = {"round": t, "tokens": 100 * t, "bytes_up": 1_000_000 * t, "bytes_down": 1_000_000 * t}
        row |= {"left_out_updates": 0, "val_loss": loss, "val_ppl": 50.0, "val_bits_per_byte": 1.5, "clients": chosen}
        row |= {"val_topic_loss": [loss + c / 10 if isinstance(loss, float) else loss for c in range(len(TOPICS))]}
        row |= {"client_val_loss": clients, "worst_client_val_loss": clients[-1], "train_loss": loss}
        row |= {"mean_client_val_loss": float(np.mean(clients)) if isinstance(loss, float) else loss, "seconds": 6 * t}
        if not central and not apart:
            row |= {
                "relative_drift": 1 + t / 20 + 0.1 * a["seed"],
                "relative_drift_max": 3.0,
                "effective_clients": float(m),
            }
            row |= {"gradient_diversity": 0.2 + t / 100, "mean_cosine": 0.9 - t / 80, "mean_cka": 1 - t / 500}
            groups = np.array([c % len(TOPICS) for c in chosen])
            like = np.where(groups[:, None] == groups[None], 0.7, 0.2) + 0.02 * rng.standard_normal((m, m))
            cosines = (like + like.T) / 2
            np.fill_diagonal(cosines, 1)
            row["update_cosines"] = cosines.round(4).tolist()
        if apart:
            row["group"] = [c % 2 for c in range(k)] if a["cluster"] != "none" else list(range(k))
        new = [alarm(d, at) for d, at in alarms if t - every < at <= t]
        rows.append({key: v for key, v in (row | ({"alarms": new} if new else {})).items() if key not in drop})
    folder = root / (name or f"run_{len(list(root.glob('run_*')))}")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts = {"dataset": a["dataset"], "counts": {"train": a["max_samples"], "validation": 300, "test": 300}}
    facts |= {"sha256": {"train": f"of seed {a['seed']}"}, "clients": k, "label_names": list(TOPICS)}
    end = rows[-1]
    names = ("val_loss", "val_ppl", "val_bits_per_byte", "mean_client_val_loss", "worst_client_val_loss", "bytes_up")
    results = {n: end[n] for n in names if n in end} | {"test_loss": last, "test_ppl": 51.0, "rounds": end["round"]}
    results |= {"seconds": end["seconds"], "alarms": [x for row in rows for x in row.get("alarms", [])]}
    manifest = {"command": "train", "args": a, "data": facts, "status": status, "reason": reason}
    manifest["results"] = results if status == "finished" else None
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "partition.json").write_text(json.dumps(partition(a)), encoding="utf-8")
    return folder


def partition(a):
    """A partition.json as `llm_noniid.partition.statistics` writes it."""
    k, skewed = a["num_clients"], a["partition"] == "topic_skew" and a["alpha"] < 10
    rng = np.random.default_rng(a["seed"])
    counts = np.full((k, len(TOPICS)), 20)
    if skewed:
        counts = np.zeros((k, len(TOPICS)), dtype=int)
        for c in range(k):
            counts[c, c % len(TOPICS)] = 60 + 10 * c
            counts[c, (c + 1) % len(TOPICS)] = 5 * (c % 3)
    shift = np.arange(k) * (12.0 if a["partition"] == "style_skew" else 0.0)
    lengths = shift[:, None] + np.array([8, 15, 30, 40, 50, 70, 128])[None]
    overlap = np.full((k, k), 0.25) + 0.05 * rng.random((k, k))
    overlap = (overlap + overlap.T) / 2
    np.fill_diagonal(overlap, 1)
    size = counts.sum(axis=1)
    return {
        "counts": size.tolist(),
        "token_counts": (50 * size).tolist(),
        "label_names": list(TOPICS),
        "label_histograms": counts.tolist(),
        "vocabulary_sizes": (20 * size).tolist(),
        "vocabulary_overlap": overlap.round(6).tolist(),
        "quantiles": [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0],
        "length_words": (lengths * 0.8).tolist(),
        "length_words_all": (0.8 * lengths.mean(axis=0)).tolist(),
        "length_tokens": lengths.tolist(),
        "length_tokens_all": lengths.mean(axis=0).tolist(),
        "means": {"length": (lengths[:, 3] * 0.8).tolist()},
        "divergence_unit": "bits",
        "label_divergence": [0.4 + 0.02 * c if skewed else 0.001 for c in range(k)],
        "label_divergence_chance": [0.002 + 0.001 * c for c in range(k)],
        "token_divergence": [0.16 + 0.01 * c if skewed else 0.101 for c in range(k)],
        "token_divergence_chance": [0.10 + 0.002 * c for c in range(k)],
    }


def write_study(root, seeds=2, **common):
    """Four partitions with three algorithms; alpha, participation, rate and local work of FedAvg; the others beside."""
    for seed in range(seeds):
        every = common | {"seed": seed}
        shift = 0.05 * seed
        for p, worse in (("iid", 0.0), ("topic_skew", 0.3), ("style_skew", 0.15), ("token_skew", 0.1)):
            for i, algorithm in enumerate(("fedavg", "fedprox", "scaffold")):
                alarms = [("drifting", 12)] if p == "topic_skew" else []
                alarms += [("slow", 32)] if seed == 0 else []
                last = 4.0 + worse - 0.04 * i + shift
                write_run(root, last, alarms, partition=p, algorithm=algorithm, **every)
        for alpha in (100.0, 1.0, 0.01):
            write_run(root, 4.2 - 0.05 * np.log10(alpha) + shift, alpha=alpha, **every)
        for rate in (0.3, 0.1):
            write_run(root, 4.5 - rate / 2 + shift, participation_rate=rate, **every)
        for rate in (1e-4, 5e-3):
            write_run(root, 4.4 + shift, learning_rate=rate, **every)
        wild = [5.4, 6.0, 8.0, 9.5, 10.0, 10.2, 10.0, 10.4, 10.3, 10.5]
        write_run(root, 10.5, [("diverged", 12)], losses=wild, learning_rate=5e-2, **every)
        write_run(root, 4.1 + shift, local_steps=25, **every)
        write_run(root, 4.1 + shift, cluster="updates", **every)
        write_run(root, 4.15 + shift, cluster="labels", **every)
        write_run(root, 4.9 + shift, algorithm="local", **every)
        write_run(root, 3.8 + shift, algorithm="central", **every)
