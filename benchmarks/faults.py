"""Faults of every kind on a tiny run of each study's own script: how many are tried, and how many runs are lost.

    python benchmarks/faults.py                                   # all four; about 15 minutes on two idle cores
    python benchmarks/faults.py --study mamba_fl --kills 10 --quick

Each run is a process of its own, forked from this one, which has imported the libraries: what a fault costs is then
the run. A dozen of the kills of a study are of interpreters that are really started. A fault comes at the n-th change
of a file in the run folder (opened to write, written to, then torn in the middle, synced, renamed, linked, removed,
made), n spread over all that the whole run makes, or at a random moment. Then --resume.

It is lost where the run cannot be gone on with, where its log and results (without timings), its published weights or
the names of its files then are not those of the run without a fault, where it ended without one line that says why,
with a traceback, by hanging, or left a process behind. A file that was cut may also be refused, in one line, with
exit code 2 and the folder as it was.
"""

import argparse
import builtins
import errno
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "mamba_fl": "mamba_fl/fed_fisher.py --dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 "
    "--sequence-length 32 --batch-size 2 --num-clients 3 --participation 0.67 --val-sequences 6 "
    "--client-val-sequences 2 --val-freq 1 --rounds 3 --lr 0.01 --save-deltas",
    "vit_sparse_fl": "vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --classes 0:10 "
    "--num-clients 8 --num-rounds 3 --participation-rate 0.5 --local-steps 2 --batch-size 8 --eval-every 1 "
    "--save-every 1 --lr 0.1 --fisher-samples 8",
    "lora_glue_fl": "lora_glue_fl/fedavg_rounds.py --model tiny --dataset demo --task-name sst2 --max-length 32 "
    "--shard-dir {shards} --rounds 3 --local-epochs 0.25 --batch-size 8 --learning-rate 5e-3 --lora-r 4 "
    "--eval-each-round --aggregate svd --svd-rank 4",
    "llm_noniid": "llm_noniid/train.py --dataset demo --model tiny --tokenizer bpe:800 --max-length 96 --lora-r 4 "
    "--algorithm scaffold --num-rounds 3 --eval-every 1 --max-samples 160 --num-clients 4 --min-samples 6 "
    "--participation-rate 0.5 --local-steps 2 --batch-size 4 --eval-samples 12 --probe-samples 4",
}
SHARDS = "lora_glue_fl/sharding.py --task-name sst2 --dataset demo --k 3 --max-examples 150 --out-dir {shards}"
TIMES = ("second", "memory")  # in the names of what differs from run to run
PATIENCE = 120  # seconds in which a tiny run ends, on a busy machine
LEAVING = 25  # seconds in which the processes of a run whose supervisor was killed end
LINES = ("error: ", "failed: ", "interrupted", "terminated")


class Lost(Exception):
    """What a fault has done."""


# ---------------------------------------------------------------------------------------------- what changes files


class Changes:
    """Counts the changes of files in `folder` that this process makes, and strikes at number `at` (from 0).

    what: a signal; errno.ENOSPC: from then on nothing can be written; errno.EROFS: nothing can be changed.
    rank: of the process that is struck; "" where there is but one. Every change is a byte in the file `log` + rank.
    """

    def __init__(self, folder, log, what=None, at=0, rank=""):
        self.folder, self.log, self.what, self.at, self.rank = str(folder), log, what, at, rank
        self.count, self.file = 0, None

    def watch(self):
        """From now on, in this process and those that are forked from it."""
        import safetensors.torch

        self.plain_open = io.open
        builtins.open = io.open = self.opened
        self.plain_save, safetensors.torch.serialize_file = safetensors.torch.serialize_file, self.saved
        for name in ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "fsync"):
            setattr(os, name, partial(self.called, name, getattr(os, name)))

    def called(self, name, plain, path, *args, dir_fd=None, **more):
        place = f"/proc/self/fd/{path if name == 'fsync' else dir_fd}"
        whole = (
            os.readlink(place) if name == "fsync" else os.path.join("" if dir_fd is None else os.readlink(place), path)
        )
        self.change(name, whole)
        return plain(path, *args, **more) if dir_fd is None else plain(path, *args, dir_fd=dir_fd, **more)

    def opened(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **more):
        plain = isinstance(file, int) or not set(mode) & set("wax+") or not self.here(file)
        if plain:
            return self.plain_open(file, mode, buffering, encoding, errors, newline, *args, **more)
        self.change("open", file)
        raw = Torn(file, mode.replace("b", "").replace("t", ""))
        raw.change = self.change
        if not buffering:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def saved(self, tensors, file, metadata=None):
        """safetensors' own way of writing a file."""
        import safetensors

        def half():
            content = safetensors.serialize(tensors, metadata)
            with self.plain_open(file, "wb") as part:
                part.write(content[: len(content) // 2])

        try:
            self.change("write", file, half)
        except OSError as error:
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(text) from None
        self.plain_save(tensors, file, metadata=metadata)

    def here(self, path):
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)

    def change(self, kind, path, half=lambda: None):
        """half: does half of the change."""
        rank = os.environ.get("RANK", "")
        if not self.here(path):
            return
        if self.file is None or self.file[0] != rank:
            self.file = rank, os.open(self.log + rank, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.file[1], b".")
        self.count += 1
        if self.what is None or rank != self.rank or self.count <= self.at:
            return
        if self.what in (errno.ENOSPC, errno.EROFS):
            if self.what == errno.ENOSPC and kind in ("open", "write"):
                half()
            if kind not in ("fsync", "unlink", "remove", "rmdir") or self.what == errno.EROFS and kind != "fsync":
                raise OSError(self.what, os.strerror(self.what), os.fspath(path))
        elif self.count == self.at + 1:
            if self.what == signal.SIGKILL:  # what goes on after the signal makes the change whole
                half()
            os.kill(os.getpid(), self.what)


class Torn(io.FileIO):
    """A file whose writes are changes."""

    def write(self, data):
        self.change("write", self.name, lambda: io.FileIO.write(self, bytes(data)[: len(data) // 2]))
        return super().write(data)


# ---------------------------------------------------------------------------------------------- processes


class Script:
    """A script in a process, and a session, of its own. real: an interpreter that is started, else a fork of this.

    changes: `Changes`; limit: bytes that no file may exceed.
    """

    numbers = itertools.count()

    def __init__(self, words, place, changes=None, real=False, limit=None):
        self.err = Path(place, f"err{os.getpid()}_{next(self.numbers)}")
        self.err.touch()
        target = partial(_script, [*map(str, words)], str(self.err), changes, real, limit)
        self.process = multiprocessing.get_context("fork").Process(target=target)
        self.process.start()
        self.pid = self.process.pid

    @property
    def code(self):
        return self.process.exitcode

    def ended(self, *codes):
        """Waits for its end, and that of all it started. Returns its last line. Raises Lost where it ends badly."""
        if not until(lambda: self.code is not None, PATIENCE):
            self.kill()
            raise Lost(f"hangs: {self.last()}")
        gone = until(lambda: not self.members(), LEAVING)
        self.kill()
        if not gone:
            raise Lost("leaves a process")
        if "Traceback" in self.err.read_text():
            raise Lost(f"a traceback: {self.last()}")
        if self.code not in codes:
            raise Lost(f"exit code {self.code}: {self.last()}")
        if self.code > 0 and self.code != 128 + signal.SIGKILL and not self.last().startswith(LINES):
            raise Lost(f"ends without a line: {self.last()}")
        return self.last()

    def last(self):
        return next(iter(self.err.read_text(errors="replace").splitlines()[-1:]), "")

    def members(self, states="RSDTtIWKP"):
        """Its living processes in these states: itself first, then those it started, in their order."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.pid and state in states:
                pids.append(int(path.parent.name))
        return sorted(pids)

    def send(self, number, pids=None):
        for pid in self.members() if pids is None else pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self):
        self.send(signal.SIGKILL)
        self.process.join()


def _script(words, err, changes, real, limit):
    os.setsid()
    for number, path in ((0, os.devnull), (1, os.devnull), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(ROOT)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if real:
        os.execv(sys.executable, [sys.executable, *words])
    sys.argv = words
    if changes:
        changes.watch()
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


# ---------------------------------------------------------------------------------------------- a study, its run


@dataclass
class Study:
    name: str
    place: Path
    words: list
    whole: dict = None  # what the run without a fault leaves
    seconds: dict = None  # it lasts, by the number of processes
    changes: dict = None  # it makes, by the rank of the process; "" where there is but one

    def start(self, folder, processes, *more, changes=None, **how):
        """Its run in `folder`. changes: arguments of `Changes`."""
        changes = None if changes is None else Changes(folder / "r", f"{folder}.changes", *changes)
        words = [*self.words, "--processes", processes, "--output-dir", folder, "--run-name", "r", *more]
        return Script(words, self.place, changes, **how)

    def gone_on(self, folder):
        """Raises Lost where the run in `folder` does not go on and end as the whole one."""
        try:
            self.start(folder, 1, "--resume").ended(0)
        except Lost as lost:
            raise Lost(f"--resume: {lost}") from None
        self.same(folder)

    def same(self, folder):
        now = left(folder / "r")
        differs = [key for key in {**now, **self.whole} if now.get(key) != self.whole.get(key)]
        if differs:
            raise Lost(f"differs: {', '.join(differs)}")
        shutil.rmtree(folder)


def left(folder):
    """What a run leaves: {what: its value or SHA-256; None of a file that may differ}."""
    whole = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        published = path.suffix in (".safetensors", ".npz") and not name.startswith("checkpoint")
        whole[name] = hashlib.sha256(path.read_bytes()).hexdigest() if published else "there"
    whole["log"] = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "run.json").read_text())
    return whole | {"status": facts["status"], "results": untimed(facts["results"])}


def untimed(value):
    if isinstance(value, dict):
        return {name: untimed(v) for name, v in value.items() if not any(part in name for part in TIMES)}
    return value


def prepared(name, place):
    """The study with its whole run, by one process and by two."""
    place.mkdir()
    shards = str(place / "shards")
    study = Study(name, place, shlex.split(COMMANDS[name].replace("{shards}", shards)), seconds={}, changes={})
    if "{shards}" in COMMANDS[name]:
        Script(shlex.split(SHARDS.replace("{shards}", shards)), place).ended(0)
    for folder, processes in (("warm", 1), ("one", 1), ("two", 2)):  # the first makes what is cached
        began = time.monotonic()
        study.start(place / folder, processes, changes=()).ended(0)
        study.seconds[processes] = time.monotonic() - began
        study.whole = study.whole or left(place / folder / "r")
        for log in place.glob(f"{folder}.changes*"):
            study.changes[log.suffix.removeprefix(".changes")] = log.stat().st_size
        study.same(place / folder)
    return study


# ---------------------------------------------------------------------------------------------- faults


@dataclass
class Case:
    """Fault number `i` of `n` of its kind; it is the same for the same seed but for its moment."""

    study: Study
    kind: str
    i: int
    n: int
    seed: int

    def __post_init__(self):
        self.draw = random.Random(f"{self.study.name} {self.kind} {self.i} {self.seed}")
        self.folder = self.study.place / f"{self.kind.replace(' ', '_')}_{self.i}"
        self.about = ""

    def tried(self):
        """ "" or why the run is lost."""
        try:
            FAULTS[self.kind][1](self)
        except Lost as lost:
            return f"{self.study.name}, {self.kind} ({self.about}): {lost}"
        return ""

    def at_change(self, what, rank=""):
        """A run that is struck at a change; the i-th of n parts of all changes."""
        at = int((self.i + self.draw.random()) * self.study.changes[rank] / self.n)
        self.about = f"change {at} of {self.study.changes[rank]}, process {rank or 'alone'}"
        return self.study.start(self.folder, 2 if rank else 1, changes=(what, at, rank))

    def at_moment(self, processes, *more, begun=False, real=False):
        """A run at a random moment; begun: once there is a run.json. Tried again where it is over by then."""
        share = self.draw.random()
        for _ in range(5):
            script = self.study.start(self.folder, processes, *more, real=real)
            if begun:
                until((self.folder / "r" / "run.json").exists, PATIENCE)
            self.about = f"moment {share:.2f}, {processes} processes"
            time.sleep(share * self.study.seconds[processes] * (0.7 if begun else 1))
            until(lambda: script.code is not None or len(script.members()) > processes - (processes == 1), PATIENCE)
            members = script.members()
            if script.code is None and len(members) == (1 if processes == 1 else 1 + processes):
                return script, members
            script.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
            share *= 0.7
        raise Lost("no moment in which it runs")


def killed(case):
    case.at_change(signal.SIGKILL).ended(-signal.SIGKILL)
    case.study.gone_on(case.folder)


def one_killed_at_change(case):
    rank = str(case.i % 2) if case.study.changes.get("1") else "0"
    script = case.at_change(signal.SIGKILL, rank)
    line = script.ended(128 + signal.SIGKILL if rank == "0" else 1)
    if f"process {rank}" not in line:
        raise Lost(f"does not name the process: {line}")
    case.study.gone_on(case.folder)


def one_killed(case):
    script, members = case.at_moment(2, begun=True, real=True)
    who = case.i % 3  # the supervisor, process 0, process 1
    case.about += f", {('supervisor', 'process 0', 'process 1')[who]}, real"
    script.send(signal.SIGKILL, [members[who]])
    script.ended(0, (-signal.SIGKILL, 128 + signal.SIGKILL, 1)[who])
    case.study.gone_on(case.folder)


def all_killed(case):
    script, members = case.at_moment(2, begun=case.i % 4 < 3, real=True)
    script.send(signal.SIGKILL, members)
    script.ended(0, -signal.SIGKILL)
    case.study.gone_on(case.folder)


def asked(case, number):
    """A signal that a run can hear, to one process or to all."""
    if case.i % 2:
        script = case.at_change(number)
    else:
        script, members = case.at_moment(2)
        script.send(number, members if case.i % 4 else members[:1])
        case.about += ", to all" if case.i % 4 else ", to the supervisor"
    script.ended(0, 128 + number)
    case.study.gone_on(case.folder)


def stopped(case):
    script, members = case.at_moment(1 + case.i % 2)
    pid = [case.draw.choice(members)]
    script.send(signal.SIGSTOP, pid)
    time.sleep(1.5)
    script.send(signal.SIGCONT, pid)
    script.ended(0)
    case.study.same(case.folder)


def waited_for(case):
    """A process that stands still at a change of a file until another says that it waits for it."""
    rank = str(case.i % 2) if case.study.changes.get("1") else "0"
    at = int(case.draw.uniform(0.2, 0.6) * case.study.changes[rank])
    case.about = f"process {rank} at change {at} of {case.study.changes[rank]}"
    script = case.study.start(case.folder, 2, "--patience", 0.01, changes=(signal.SIGSTOP, at, rank))
    until(lambda: script.code is not None or script.members("T"), PATIENCE)
    before = len(script.err.read_text())  # it may have been slow and waited for, on a busy machine
    said = until(lambda: f"waiting for process {rank}" in script.err.read_text()[before:], PATIENCE / 4)
    script.send(signal.SIGCONT)
    script.ended(0)
    if not said:
        raise Lost("nobody says that it is waited for")
    case.study.same(case.folder)


def refusing(case, number):
    """A disk that is full, or cannot be changed, from a change on; still so at the next start; then it is mended."""
    rank = ("", "0", "1")[case.i % 3]
    script = case.at_change(number, rank if case.study.changes.get(rank) else "")
    line = script.ended(0, 1, 2)
    if script.code:
        if os.strerror(number) not in line:
            raise Lost(f"does not say why: {line}")
        case.study.start(case.folder, 1, "--resume", changes=(number, 0)).ended(1, 2)
    case.study.gone_on(case.folder)


def limited(case):
    """The kernel's own answer to a write that is too long."""
    limit = int(2 ** case.draw.uniform(8, 16))
    case.about = f"no file over {limit} bytes"
    case.study.start(case.folder, 1, limit=limit).ended(0, 1, 2)
    case.study.gone_on(case.folder)


def at_once(case):
    """Two processes in one folder, started together or the second later."""
    more = [["--resume"], ["--overwrite"], []][case.i % 3]
    first = case.study.start(case.folder, 1 + case.i % 2, *more[:0])
    later = 0 if case.i % 2 else case.draw.uniform(0, case.study.seconds[1 + case.i % 2] / 2)
    case.about = f"the second after {later:.1f} s {' '.join(more)}"
    time.sleep(later)
    second = case.study.start(case.folder, 1, *more)
    for script in (first, second):
        script.ended(0, 2)
    if {first.code, second.code} != {0, 2}:
        raise Lost(f"exit codes {first.code}, {second.code}: {first.last()} | {second.last()}")
    case.study.same(case.folder)


def parts(folder):
    """The files of a run, those together whose names differ but in a number."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    alike = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "", name), []).append(name)
    return list(alike.values())


def contents(folder):
    """{file: its content}; without that of a lock that the dead process left."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def cut(case):
    """Of the files that differ but in a number each is cut at some of the tenths."""
    broken, tenth = case.study.place / "broken" / "r", case.i % 10
    alike = parts(broken)[case.i // 10]
    file = alike[tenth % len(alike)]
    case.about = f"{file} cut at {tenth} tenths"
    folder = shutil.copytree(broken, case.folder / "r")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) * tenth // 10])
    before = contents(folder)
    script = case.study.start(case.folder, 1, "--resume")
    script.ended(0, 2)
    if not script.code:
        case.study.same(case.folder)
        return
    if script.err.read_text().count("\n") > 1:
        raise Lost(f"refused in more than one line: {script.err.read_text()}")
    if changed := [name for name, content in contents(folder).items() if before.get(name) != content]:
        raise Lost(f"refused ({script.last()}), but changed: {', '.join(changed)}")
    shutil.rmtree(case.folder)


FAULTS = {  # kind: (how many for 50 kills, what is done)
    "killed at a change": (18, killed),
    "one of two killed at a change": (8, one_killed_at_change),
    "one of two killed": (7, one_killed),
    "all killed": (5, all_killed),
    "SIGTERM": (6, partial(asked, number=signal.SIGTERM)),
    "SIGINT": (6, partial(asked, number=signal.SIGINT)),
    "stopped and continued": (4, stopped),
    "stopped and waited for": (4, waited_for),
    "disk full": (9, partial(refusing, number=errno.ENOSPC)),
    "file too large": (4, limited),
    "read-only": (6, partial(refusing, number=errno.EROFS)),
    "two in one folder": (6, at_once),
    "file cut": (0, cut),
}


def cases_of(study, args):
    """Every fault of a study."""
    kinds = args.only or FAULTS
    for kind in kinds:
        n = max(1, round(FAULTS[kind][0] * args.kills / 50))
        if kind != "file cut":
            yield from (Case(study, kind, i, n, args.seed) for i in range(n))
            continue
        broken = study.place / "broken"
        study.start(broken, 1, changes=(signal.SIGKILL, int(0.8 * study.changes[""]))).ended(-signal.SIGKILL)
        n = 10 * len(parts(broken / "r"))
        yield from (Case(study, kind, i, n, args.seed) for i in range(0, n, 1 + 6 * args.quick))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of each study; other faults in proportion")
    parser.add_argument("--study", choices=COMMANDS, nargs="+", default=list(COMMANDS), help="which (default: all)")
    parser.add_argument("--only", choices=FAULTS, nargs="+", metavar="FAULT", help="which kinds (default: all)")
    parser.add_argument("--quick", action="store_true", help="cut files at some tenths only")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="faults at a time (default: cores)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser


def main():
    args = build_parser().parse_args()
    for words in (*COMMANDS.values(), SHARDS):
        importlib.import_module(words.split()[0].removesuffix(".py").replace("/", "."))
    for library in ("peft", "sklearn.metrics", "matplotlib.pyplot", "matplotlib.backends.backend_agg"):
        importlib.import_module(library)
    tried, lost, began = Counter(), Counter(), time.monotonic()
    # no TemporaryDirectory: a forked process that ends by itself would delete it
    place = Path(os.path.realpath(tempfile.mkdtemp()))
    os.environ |= {"FEDQUARTET_CACHE": f"{place}/cache", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        for name in args.study:
            study = prepared(name, place / name)
            cases = list(cases_of(study, args))
            with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
                results = {pool.submit(Case.tried, case): case.kind for case in cases}
                for result in as_completed(results):
                    key = results[result], name
                    tried[key] += 1
                    if reason := result.result():
                        lost[key] += 1
                        print(f"lost: {reason}", file=sys.stderr, flush=True)
            print(f"{name}: {len(cases)} faults, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place)
    print("| tried / lost | " + " | ".join(args.study) + " |\n" + "|---" * (len(args.study) + 1) + "|")
    for kind in args.only or FAULTS:
        print(f"| {kind} | " + " | ".join(f"{tried[kind, s]} / {lost[kind, s]}" for s in args.study) + " |")
    print(f"\n{tried.total()} faults, {lost.total()} runs lost, {time.monotonic() - began:.0f} s")
    return 1 if lost.total() else 0


if __name__ == "__main__":
    sys.exit(main())
