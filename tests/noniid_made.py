"""Run folders of llm_noniid without a run: what train.py writes, with losses of the test's choice."""

import json
from itertools import product
from pathlib import Path

from llm_noniid import flags


def made_args(**other):
    """train.py's flags with their defaults, as run.json has them."""
    args = vars(flags.parse(flags.build_parser("x"), []))
    return json.loads(json.dumps(args | {"num_rounds": 4, "eval_every": 1, "local_steps": 5, "seed": 0} | other))


def made_row(round, loss, **other):
    """A line of metrics.jsonl."""
    row = {
        "round": round,
        "val_loss": loss,
        "val_bits_per_byte": loss,
        "mean_client_val_loss": loss,
        "worst_client_val_loss": loss,
        "generalization_gap": 0.1,
        "relative_drift": 1.0,
        "gradient_norm_variance": 0.5,
        "mean_cka": 0.99,
        "bytes_up": 100,
        "tokens": 1000,
        "seconds": 6.0,
    }
    return row | other


def make_run(output, losses, status="finished", reason=None, alarms=(), rows=None, **args):
    """A run folder in `output`; alarms: (detector, round); rows: more values of every line. Returns the folder."""
    args = made_args(**args)
    factors = ("algorithm", "cluster", "partition", "alpha", "participation_rate", "learning_rate", "seed", "dataset")
    folder = Path(output) / "_".join(str(args[name]) for name in factors)
    folder.mkdir(parents=True)
    lines = [made_row(i + 1, loss, **(rows or {})) for i, loss in enumerate(losses)]
    for detector, round in alarms:
        alarm = {"detector": detector, "round": round, "value": 1.5, "threshold": 1.0, "message": f"{detector} <seen>"}
        lines[round - 1].setdefault("alarms", []).append(alarm)
    text = "".join(json.dumps({k: _text(v) for k, v in line.items()}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    results = {"seconds": 6.0} if status == "finished" else None
    manifest = {"command": "train", "args": args, "status": status, "reason": reason, "results": results, "data": {}}
    (folder / "run.json").write_text(json.dumps(manifest | {"git_commit": "abc", "versions": {"torch": "2"}}))
    return folder


def _text(value):
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value


def make_seeds(output, last, spread=0.001, **args):
    """Three seeds of one setting whose loss falls from 4 to about `last`."""
    for seed in range(3):
        end = last + spread * (seed - 1)
        make_run(output, [4.0, (4.0 + end) / 2, end + 0.01, end], seed=seed, **args)


def write_regimes(path, cost, seeds=3, algorithms=("fedavg",), steps=(4, 32), alphas=(100.0, 1.0, 0.1), **args):
    """A log of runs that predict labels with all parameters, a budget of 128 local steps, each cell at its own rate.

    cost(algorithm, H, alpha, seed) -> nats above IID's 0.5 + seed / 100, and accuracy below its 0.9 - seed / 100 (at
    most 0.7); inf: the loss ends not finite. As in real runs all losses begin at 7 nats or more, far above the labels'
    prior, seeds learn at another pace, and the training loss is the lower the more skew costs.
    """
    lines = []
    for algorithm, local, alpha, seed in product(algorithms, steps, (None, *alphas), range(seeds)):
        above = 0.0 if alpha is None else cost(algorithm, local, alpha, seed)
        place = {"partition": "iid"} if alpha is None else {"partition": "topic_skew", "alpha": alpha}
        own = {"algorithm": algorithm, "local_steps": local, "num_rounds": 128 // local, "seed": seed}
        rate = round(0.01 / local * (1 if alpha is None else 1 + alpha), 6)
        own |= {"target": "label", "train": "full", "learning_rate": rate, "eval_samples": 300}
        own |= {"mu": 0.01 if alpha is None else 0.1}
        rows, last = [], 0.5 + seed / 100 + above
        for t in range(own["num_rounds"] + 1):
            left = (1 - t / own["num_rounds"]) ** 3
            loss = (7.0 + 0.5 * seed) * left + last * (1 - left) if left == 0 or last < float("inf") else 7.0
            row = {"round": t, "val_loss": loss, "val_accuracy": 0.9 - seed / 100 - min(above, 0.7)}
            row |= {"val_topic_loss": [loss] * 4, "drift_ratio": 2 + above * (1 + t), "drift_ratio_chance": 2.0}
            row |= {"train_loss": 0.6 - min(above, 0.5) + seed / 1000} if t else {}
            if algorithm == "scaffold":
                row |= {"correction_ratio": 0.5 + seed / 10 if t > 1 else None, "correction_cosine": 0.1 * above}
            rows.append({name: _text(value) for name, value in row.items()})
        every = made_args(**own | place | args)
        line = {"name": f"{algorithm}_{local}_{alpha}_{seed}", "args": every, "curve": rows, "results": {}}
        lines.append(line | {"command": "train", "status": "finished"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
