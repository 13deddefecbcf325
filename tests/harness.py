"""Whole runs of the scripts for the tests: their command lines, and what they leave on disk.

A run is a process of its own, forked from a server that has imported every script once: what a run costs is then the
run. `GOLDEN` has a command for every script; `whole(name)` is the folder of its run, made once in a test session
(for all of xdist's workers), which the tests of resuming and of several processes compare theirs with.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from common import parallel
from common.cli import RULES

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "_per_second", "peak_memory", "versions", "git_commit", "args")


@dataclass(frozen=True)
class Golden:
    """A command: `{out}` is its output folder, `{name}` the folder of the run `name` of `GOLDEN`."""

    script: str
    flags: str
    folder: str = "r"  # of the run, in {out}
    federated: bool = True
    resumes: bool = True


MAMBA = (
    "--dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 --sequence-length 32 --batch-size 2 "
    "--num-clients 4 --val-sequences 6 --threads 1 --amp off --seed 0 --val-freq 2 --rounds 6 --lr 0.01 "
    "--output-dir {out} --run-name r --save-deltas"
)
MAMBA_FEDERATED = f"{MAMBA} --participation 0.75 --client-val-sequences 2"
RARELY = "--participation 1 --client-state pooled --moments-every 3 --average-every embedding=3 conv=2"
VIT = (
    "--dataset demo --model tiny --classes 0:10 --threads 1 --amp off --seed 0 --lr 0.01 "
    "--output-dir {out} --run-name r"
)
VIT_FEDERATED = (
    f"{VIT} --batch-size 8 --num-clients 12 --participation-rate 0.25 --num-rounds 6 --local-steps 2 --eval-every 2 "
    "--save-every 2"
)
SPARSE = f"{VIT_FEDERATED} --sharding non_iid --nc 3 --fisher-samples 16"
GLUE = (
    "--model tiny --dataset demo --task-name sst2 --learning-rate 5e-3 --max-length 32 --threads 1 --amp off --seed 7"
)
GLUE_ROUNDS = (
    f"{GLUE} --shard-dir {{lora_glue_fl/sharding}} --output-root {{out}} --run-name r --rounds 3 --local-epochs 0.5 "
    "--batch-size 8 --lora-r 4 --eval-each-round --eval-clients --keep all --aggregate"
)
GLUE_CENTRAL = f"{GLUE} --output-dir {{out}} --do-train --do-eval --max-examples 100 --num-train-epochs 3"
GLUE_CENTRAL += " --batch-size 16"
NONIID = (
    "--model tiny --dataset demo --tokenizer bpe:800 --max-length 96 --lora-r 4 --threads 1 --amp off --seed 42 "
    "--max-samples 160 --num-clients 4 --min-samples 6 --batch-size 4 --eval-samples 24 --probe-samples 8 "
    "--local-steps 3 --learning-rate 5e-3 --num-rounds 3 --eval-every 1 --alpha 0.5 --output-dir {out} --name r"
)
PARTIAL = f"{NONIID} --participation-rate 0.5"
PRETRAIN = (
    "--dataset demo --max-samples 160 --tokenizer bpe:800 --max-length 96 --d-model 32 --layers 2 --heads 2 --epochs 2 "
    "--batch-size 8 --learning-rate 5e-3 --threads 1 --out {out}/r"
)
RANKS = {"svd": "--svd-rank 4", "stack": "--client-ranks 2 4 3"}

GOLDEN = {
    "mamba_fl/central": Golden("mamba_fl/central.py", f"{MAMBA} --save-freq 2", federated=False),
    "mamba_fl/fed_avg": Golden("mamba_fl/fed_avg.py", f"{MAMBA_FEDERATED} {RARELY}"),
    "mamba_fl/fed_momentum": Golden("mamba_fl/fed_momentum.py", MAMBA_FEDERATED),
    "mamba_fl/fed_entropy": Golden("mamba_fl/fed_entropy.py", f"{MAMBA_FEDERATED} --temperature 0.001"),
    "mamba_fl/fed_fisher": Golden("mamba_fl/fed_fisher.py", MAMBA_FEDERATED),
    "vit_sparse_fl/centralized": Golden(
        "vit_sparse_fl/train_centralized.py",
        f"{VIT} --batch-size 30 --epochs 3 --save-every 1 --warmup-epochs 1",
        federated=False,
    ),
    "vit_sparse_fl/federated": Golden(
        "vit_sparse_fl/train_federated.py", f"{VIT_FEDERATED} --sharding dirichlet --alpha 0.5"
    ),
    "vit_sparse_fl/sparse": Golden("vit_sparse_fl/train_federated_sparse.py", f"{SPARSE} --lr 0.3"),
    "vit_sparse_fl/topk": Golden("vit_sparse_fl/train_federated_topk.py", f"{VIT_FEDERATED} --sharding non_iid --nc 3"),
    "lora_glue_fl/sharding": Golden(
        "lora_glue_fl/sharding.py",
        "--task-name sst2 --dataset demo --k 3 --mode dirichlet --dirichlet-alpha 1 --seed 1 --max-examples 150 "
        "--out-dir {out}/r",
        federated=False,
        resumes=False,
    ),
    **{
        f"lora_glue_fl/{rule}": Golden("lora_glue_fl/fedavg_rounds.py", f"{GLUE_ROUNDS} {rule} {RANKS.get(rule, '')}")
        for rule in RULES
    },
    "lora_glue_fl/central_lora": Golden(
        "lora_glue_fl/main_glue_lora.py",
        f"{GLUE_CENTRAL} --lora-r 4 --lora-dropout 0.1",
        folder="sst2_tiny/r4",
        federated=False,
    ),
    "lora_glue_fl/baseline": Golden("lora_glue_fl/baseline_run.py", GLUE_CENTRAL, folder="sst2_tiny", federated=False),
    "llm_noniid/fedavg": Golden("llm_noniid/train.py", NONIID),
    "llm_noniid/scaffold": Golden("llm_noniid/train.py", f"{PARTIAL} --algorithm scaffold"),
    "llm_noniid/fedadam": Golden("llm_noniid/train.py", f"{PARTIAL} --algorithm fedadam"),
    "llm_noniid/central": Golden("llm_noniid/train.py", f"{NONIID} --algorithm central", federated=False),
    "llm_noniid/clusters": Golden("llm_noniid/train.py", f"{NONIID} --cluster labels --num-clusters 2"),
    "llm_noniid/pretrain": Golden("llm_noniid/pretrain.py", PRETRAIN, federated=False, resumes=False),
}
SCRIPTS = sorted({golden.script for golden in GOLDEN.values()})


def command(name, out, *more):
    """[script, word, ...] of the run `name` with its output in `out`."""
    golden = GOLDEN[name]
    text = golden.flags.replace("{out}", str(out))
    for other in GOLDEN:
        if "{" + other + "}" in text:
            text = text.replace("{" + other + "}", str(whole(other)))
    one = ["--processes", "1"] if golden.federated else []
    return [golden.script, *shlex.split(text), *one, *map(str, more)]


# ---------------------------------------------------------------------------------------------- processes


Ended = namedtuple("Ended", "code out err")  # how a process ended: its exit code (-9: killed), and what it wrote


class Started:
    """A script in a process of its own."""

    def __init__(self, words, die=None, env=None, without=()):
        self.place = Path(tempfile.mkdtemp(dir=_runs()))
        every = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        every = {name: value for name, value in every.items() if name not in without}
        self.process = server().Process(target=_script, args=([*map(str, words)], str(self.place), every, die))
        self.process.start()

    def ended(self, seconds=300):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        if self.process.exitcode == 255:  # multiprocessing's word for "the server that knows the exit code is gone"
            raise RuntimeError("the fork server ended before its process: killed, or no memory to fork: run it again")
        out, err = ((self.place / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.place)
        return Ended(self.process.exitcode, out, err)


def run(words, die=None):
    """The script `words[0]` with the flags that follow, in a process of its own, until it has ended.

    die: (folder, lines, changes, what): at change number `changes` of a file in `folder` (made, opened to write,
    renamed, removed), or the first whose path has the text `changes` in it, after metrics.jsonl has `lines` lines, the
    process gets the signal `what`; with a fifth, a process number, that process gets it in its place. "full": only
    what is made or opened counts, and that fails as on a full disk.
    """
    return Started(words, die).ended()


def run_ranks(words, size):
    """The same by `size` processes, with the environment that torchrun gives them. Returns how each ended."""
    words = [*words, "--processes", "0"] if "--processes" in words else words
    about = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Started(words, env={"RANK": str(r), "LOCAL_RANK": str(r), **about}) for r in range(size)]
    return [rank.ended() for rank in ranks]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(true, seconds):
    """Waits until true(), so many seconds at most. Returns what it is then."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@contextlib.contextmanager
def as_rank(rank, size, port):
    """This process as one of `size` that torchrun started, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.init_parallel()
    yield
    parallel.close_parallel()


def answers_of(size, process):
    """{rank: answer} of `size` processes process(rank, size, port, answers), each putting (rank, answer)."""
    context = server()
    port = free_port()
    answers = context.SimpleQueue()
    processes = [context.Process(target=process, args=(rank, size, port, answers)) for rank in range(size)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
        p.kill()  # one that waits for a process that failed
    assert [p.exitcode for p in processes] == [0] * size
    return dict(answers.get() for _ in range(size))


def server():
    """The multiprocessing context whose processes are forked from one that has imported every script."""
    context = multiprocessing.get_context("forkserver")
    modules = [script.removesuffix(".py").replace("/", ".") for script in SCRIPTS]
    context.set_forkserver_preload(
        [*modules, "matplotlib.pyplot", "matplotlib.backends.backend_agg", "peft", "sklearn.metrics"]
    )
    return context


def _script(words, place, env, die):
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    if die:
        sys.addaudithook(_death(*die))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _death(folder, lines, changes, what, whom=None):
    folder = os.path.realpath(folder)
    left, part = (0, changes) if isinstance(changes, str) else (changes, "")

    def hook(event, args):
        nonlocal left
        if event == "open":
            touched = isinstance(args[1], str) and set(args[1]) & set("wax+")
        else:
            touched = event == "os.mkdir" or what != "full" and event in ("os.rename", "os.remove", "shutil.rmtree")
        if left < 0 or not touched:
            return
        path = os.path.realpath(str(args[0]))
        if not path.startswith(folder) or part not in path:
            return
        try:
            file = os.open(f"{folder}/metrics.jsonl", os.O_RDONLY)
        except FileNotFoundError:
            reached = 0
        else:
            reached = os.read(file, 1 << 20).count(b"\n")
            os.close(file)
        if reached >= lines:
            left -= 1
            if left < 0 and what == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if left < 0:
                os.kill(whom or os.getpid(), what)

    return hook


# ---------------------------------------------------------------------------------------------- what a run leaves


def whole(name):
    """Folder of the finished run `name`, made once in a session."""
    place = _runs() / name
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (place / "done").exists():
            ended = run(command(name, place / "out"))
            assert ended.code == 0, f"{name}: {ended.err}"
            (place / "done").write_text(ended.out)
    return place / "out" / GOLDEN[name].folder


def _runs():
    folder = Path(os.environ["FEDQUARTET_TEST_RUNS"])
    folder.mkdir(exist_ok=True)
    return folder


def without_times(value):
    """A JSON value without timings, versions and the folders that it names."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(part in k for part in TIMES)}
        return {k: without_times(v) for k, v in kept.items() if not (isinstance(v, str) and v.startswith("/"))}
    if isinstance(value, list):
        return [without_times(v) for v in value if not (isinstance(v, str) and v.startswith("/"))]
    return value


def read_lines(folder):
    """The lines of metrics.jsonl without their timings; [] where there is none."""
    path = folder / "metrics.jsonl"
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def read_results(folder):
    """The results of run.json without timings; {} where there is none."""
    path = folder / "run.json"
    return without_times(json.loads(path.read_text())["results"] or {}) if path.exists() else {}


def digest(folder):
    """SHA-256 of all tensors of a folder: their files, names, types, shapes and bits."""
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        hashed.update(str(path.relative_to(folder)).encode())
        for key, t in sorted(load_file(path).items()):
            hashed.update(f"{key} {t.dtype} {list(t.shape)}".encode())
            hashed.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def same_run(a, b):
    """Asserts that two folders hold the same run: metrics, results, and the bits of all tensors but a checkpoint's."""
    assert read_lines(a) == read_lines(b)
    assert read_results(a) == read_results(b)
    files = [_files(folder) for folder in (a, b)]
    assert files[0].keys() == files[1].keys()
    assert [name for name, value in files[0].items() if files[1][name] != value] == []


def _files(folder):
    """{file: SHA-256} of what a run publishes."""
    names = [path for kind in ("*.safetensors", "*.npz", "training_history.json") for path in folder.rglob(kind)]
    names = sorted(str(path.relative_to(folder)) for path in names)
    read = {name: (folder / name).read_bytes() for name in names if not name.startswith("checkpoint")}
    return {name: hashlib.sha256(content).hexdigest() for name, content in read.items()}
