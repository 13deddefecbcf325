"""Run folders with known numbers, without training, and the commands of plots/ called in this process."""

import json
import re
import runpy
import sys
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def log(path):
    """{row of the grid: {seed: line}} of a log, by its names; of --tune the rates are part of them."""
    found = defaultdict(dict)
    for line in map(json.loads, (ROOT / path).read_text().splitlines()):
        name, seed, rate = re.search(r"(.*)_seed_(\d+)(.*)", line["name"]).groups()
        found[name + rate][int(seed)] = line
    return found


def run(root, name, command, args, rows, results=None, status="finished", **more):
    """Writes run.json and metrics.jsonl of a run whose `rows` are dicts without their round. Returns the folder."""
    folder = Path(root) / name
    folder.mkdir(parents=True)
    lines = [{"round": t} | row for t, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"command": command, "args": args, "status": status, "results": results, "data": {}} | more
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def mamba(root, name, command="fed_avg", seed=0, ppl=100.0, **args):
    """A run of mamba_fl that ends with a test perplexity of `ppl`."""
    more = {"dataset": "demo", "tokenizer": "bpe:64", "layers": 1, "lr": 0.01, "batch_size": 16, "seed": seed}
    if command != "central":
        more |= {"num_clients": 4, "batch_size": 4, "local_updates": 1, "client_state": "keep", "participation": 1.0}
    rows = [{"tokens": 1000 * t, "val_loss": 1, "val_ppl": 2 * ppl - ppl * t / 2} for t in range(3)]
    rows = [row | {"bytes_up": 4e6, "bytes_down": 4e6} for row in rows]
    results = {"test_ppl_last": ppl, "final_val_ppl": ppl, "tokens": 2000, "seconds": 60}
    return run(root, name, command, more | args, rows, results)


def vit(root, name, command="train_federated", seed=0, accuracy=0.5, own=(-1.0, -0.5), others=(0.5, 0.1), **args):
    """A run of vit_sparse_fl whose clients gain -own and cost the others `others` in rounds 1 and 2."""
    args = {"dataset": "demo", "model": "tiny", "sharding": "iid", "local_steps": 4, "lr": 0.1, "seed": seed} | args
    rows = [{"val_accuracy": 0.2, "val_loss": 3.0}]
    for one, other in zip(own, others, strict=True):
        rows.append({"val_accuracy": accuracy, "val_loss": 1.0, "interference_own": one, "interference_others": other})
    results = {"test_accuracy_last": accuracy, "val_accuracy_best": accuracy, "rounds": 2}
    return run(root, name, command, args, rows, results)


def noniid(root, name, algorithm="fedavg", seed=0, loss=3.0, accuracy=0.5, partition="iid", alpha=0.1, **args):
    """A run of llm_noniid."""
    args = {"algorithm": algorithm, "partition": partition, "alpha": alpha, "local_steps": 10, "seed": seed} | args
    args = {"num_rounds": 2, "learning_rate": 0.1, "mu": 0.01, "model": "tiny", "num_clients": 4} | args
    rows = [{"val_loss": 4.0}, {"val_loss": 3.5, "val_accuracy": 0.3}, {"val_loss": loss, "val_accuracy": accuracy}]
    return run(root, name, "train", args, rows, {"val_loss": loss})


def call(line, *words):
    """Runs `python LINE WORDS` in this process: (exit code, stdout, stderr)."""
    out, err, code = StringIO(), StringIO(), 0
    words = [*line.split(), *map(str, words)]
    with patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def tables(line, *words):
    """[(heading, {first cell: {column: cell}})] of the tables that a command prints."""
    code, text, err = call(f"plots/tables.py {line}", *words)
    assert code == 0, err
    found = []
    for row in text.splitlines():
        if row.startswith("### "):
            found.append((row[4:], []))
        elif row.startswith("| "):
            found[-1][1].append([cell.strip() for cell in row.strip("| ").split(" | ")])
    return [(about, {r[0]: dict(zip(head, r, strict=True)) for r in rows}) for about, (head, _, *rows) in found]


def figures(line, *words, out):
    """{file name: matplotlib's figure} of what a command draws into `out`."""
    drawn = []

    def savefig(figure, path, **kwargs):  # the file's text says whose it is, under whatever name it ends
        Path(path).write_text(str(len(drawn)))
        drawn.append(figure)

    with patch.object(Figure, "savefig", savefig):
        code, _, err = call(line, *words, "--out-dir", out)
    assert code == 0, err
    return {path.name: drawn[int(path.read_text())] for path in sorted(Path(out).iterdir())}
