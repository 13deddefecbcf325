"""Run folders of llm_noniid without a run: what train.py writes, with losses of the test's choice."""

import json
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
