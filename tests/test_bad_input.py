"""Generated bad input: any value of any flag, and damage to every file that a script reads.

    python tests/test_bad_input.py --cases 1000        # the long form: prints counts, and each case that is not well

Each case is a script's command line at tiny size in a forked process, up to the point where its run would begin (a run
that goes on: where it has its state again; what reads runs: to its end). It is well if the input is refused (exit code
2, one line on stderr, no traceback, nothing written) or if it is taken. What is taken and was made to be bad is taken
in silence, which is not well, unless the script says so: a flag's value is bad by what --help says of the flag (see
`wrong_values`), a file by what was done to it (see bad_files.py), a run that goes on and a table by what comes of them.

A case may take SECONDS and, beside what this process has, MEMORY.
"""

import argparse
import gc
import hashlib
import importlib
import io
import itertools
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
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest
import torch
from bad_files import CIFAR, READS, compared, damage, damages, files, make_input
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

ACCEPTED, SECONDS, MEMORY = 77, 20, 4 * 2**30
PLACES = {  # in the flags of tests/harness.py -> of this module's input
    "{lora_glue_fl/sharding}": "{in}/shards",
    "{lora_glue_fl/central_lora}/adapter": "{in}/adapters/1",
    **{f"{{lora_glue_fl/svd}}/round_1/client_{k}/adapter": f"{{in}}/adapters/{k}" for k in (1, 2, 3)},
}
FLAGS = {golden.script: golden.flags for golden in reversed(harness.GOLDEN.values())} | {
    "llm_noniid/run_experiments.py": "--output-dir {out} --plan",
    "lora_glue_fl/run_study.py": "--output-dir {out} --plan",
    "mamba_fl/run_study.py": "--output-dir {out} --plan",
    "vit_sparse_fl/run_all_experiments.py": "--output-dir {out} --plan",
    "plots/mamba.py": "--data-dir {in}/runs --out-dir {out}",
    "plots/vit.py": "--data-dir {in}/runs --out-dir {out}",
    "plots/glue.py": "--data-dir {in}/runs --out-dir {out}",
    "plots/noniid.py": "--data-dir {in}/runs --out-dir {out}",
    "plots/visualize_federated_deltas.py": "--output-dir {out}",
    "plots/tables.py": "",
    "plots/report.py": "",
}


# ---------------------------------------------------------------------------------------------- flags

NUMBERS = "-1 0 1 0.5 1e30 1e400 nan -inf 99999999 999999999999999999999999999999 1e-400 0x10 1_000 \u0663".split()
WORDS = ["", " ", ".", "a/b", "x" * 300, "x" * 5000, "\xfc", "\udcff", "two\nlines", "--", "-", "{}", "*", "none"]
WORDS += ["tiny", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "demo", "auto", "cuda:9", "bpe:-1"]
LETTERS = st.characters(exclude_characters="/~\0", codec="utf-8")
ANYTHING = {"run_name", "wandb_project", "prompt", "title"}  # texts that nothing has to know


def wrong_values(action):
    """Values that nobody would take for good ones who has read what --help says of a flag."""
    letter, said = str(action.metavar), f"{action.help} {action.default}"
    if action.choices:
        return ["", "no-such", f"{next(iter(action.choices))}x", "nan"]
    numbers = [action.default] if not isinstance(action.default, (list, tuple)) else action.default
    if type(next(iter(numbers), None)) in (int, float) or re.fullmatch("[A-Z]|RHO", letter):
        wrong = ["", " ", "x", "nan", "inf", "-inf", "1e400", "-1", "-0.5", "0x10", "1,5", "--", "1 2"]
        if letter != "X" and (type(numbers[0]) is int or letter in "NKBRHJS"):
            wrong += ["0.5", "4.0", "1e3", "1.", "1e-400"]
        if not re.search(r"\b0\b", said) and action.dest != "seed":
            wrong.append("0")
        if letter in "XC" and re.search(r"\b([Ss]hare|dropout|smoothing|momentum|beta|b1|b2)\b", said):
            wrong += ["1.5", "2", "1e30"]
        return wrong
    wrong = [] if "''" in said else [""]
    if action.dest in ANYTHING:
        return wrong
    if letter in ("FILE", "RUN") and action.dest != "out" or action.dest in ("adapter_path", "adapters", "shard_dir"):
        wrong += ["no/such", "/etc/passwd", "x" * 300, " "]
        wrong += ["/dev/null"] if action.dest != "config" else []  # an empty file, which sets no flag
    if letter in ("NAME", "TASK", "COLUMN", "A:B", "HEAD") or action.dest in ("tokenizer", "device"):
        wrong += ["no-such", " ", "x" * 300, "-"]
    return wrong


@dataclass
class Case:
    """A script's command line, or one file that it reads damaged, and whether a reader can see that."""

    script: str
    flags: str = ""
    words: tuple = ()
    wrong: tuple = ()  # flags with a value of `wrong_values`
    harm: tuple = ()  # (file, kind, seed)
    seen: bool | None = None


@st.composite
def flag_case(draw, script, action):
    """The flag, and perhaps one or two others, each with any values, half of them with wrong ones."""
    others = st.sampled_from([one for one in parsers()[script] if one is not action])
    words, wrong = [], []
    for one in [action, *draw(st.sampled_from([0, 0, 0, 1, 2]).flatmap(lambda n: st.lists(others, max_size=n)))]:
        bad = wrong_values(one) if one.nargs != 0 else []
        known = [str(choice) for choice in one.choices or ()]
        value = st.sampled_from([*NUMBERS, *WORDS, *known]) | st.text(LETTERS, max_size=8) | st.integers().map(str)
        most = {None: 1, "?": 1, 0: draw(st.sampled_from([0, 0, 0, 1]))}.get(one.nargs, 3)
        values = draw(st.lists(value, min_size=min(1, most), max_size=most))
        if bad and draw(st.booleans()):
            values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from(bad))
        name = draw(st.sampled_from(one.option_strings))
        if one.dest not in [flag.dest for flag in wrong] and any(value in bad for value in values):
            wrong.append(one)
        elif one.dest in [flag.dest for flag in wrong]:
            continue  # a second value would take its place
        words += [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]
    return Case(script, words=tuple(words), wrong=tuple(wrong))


@st.composite
def file_case(draw, script, flags, file):
    kind, seen = draw(st.sampled_from(damages(Path(file))))
    if "--init-from" in flags and kind.startswith("fact") and Path(file).name == "run.json":
        seen = None  # only its facts of the base are read
    return Case(script, flags, harm=(file, kind, draw(st.integers(0, 10**9))), seen=seen)


# ---------------------------------------------------------------------------------------------- a case


def attempt(case, good, place, wanted):
    """How a case ends: (verdict, command line, stderr). place: an empty folder; wanted: {flags: what comes of them}."""
    line = command_line(case, place)
    shown = f"{shlex.join(line)}  {' '.join(map(str, case.harm))}".replace(str(place), ".")
    shown = shown.encode(errors="backslashreplace").decode()
    said, notes = parsed(line)
    if said:
        return "refused" if said.count("\n") == 1 else "lines", shown, said
    fill(good, place, line)
    if case.harm and not damage(place / "in" / case.harm[0], *case.harm[1:]):
        return "refused", shown, ""  # it does not apply to this file
    before = snapshot(place)
    code, out, err = forked(line, place)
    if code is None:
        verdict = "hang"
    elif "Traceback" in err or code not in (0, 2, ACCEPTED):
        verdict = "traceback"
    elif code != 2:
        verdict = "silent" if taken_in_silence(case, out, err, notes, wanted) else "accepted"
    elif snapshot(place) != before and "--cache-dir" not in shown:
        verdict, err = "left", f"{err}{[name for name, _ in snapshot(place).items() ^ before.items()]}"
    else:
        verdict = "refused" if len(err.strip().splitlines()) == 1 and not out else "lines"
    return verdict, shown, err or out[-500:]


def command_line(case, place):
    base = (
        ""
        if case.script.startswith("plots/") and case.harm and "--no" not in FLAGS[case.script]
        else FLAGS[case.script]
    )
    text = f"{base} {case.flags} {harness.EXTRA if '--processes' in PARSED[case.script] else ''}"
    if base != FLAGS[case.script]:
        text += " --out-dir {out}" if "--out-dir" in PARSED[case.script] else ""
    for name, there in {**PLACES, "{in}": str(place / "in"), "{out}": str(place / "out")}.items():
        text = text.replace(name, there)
    return [case.script, *shlex.split(text), *case.words]


def taken_in_silence(case, out, err, notes, wanted):
    """Whether what was taken is bad and nothing says so."""
    if case.harm and compared(case.script, case.flags):
        lines, good = ({*text.splitlines()} for text in (out + err, wanted[case.script, case.flags]))
        told = [line for line in lines - good if re.search("left out|damaged|not drawn|warning", line)]
        return case.seen is not False and lines != good and not told and ("--resume" in case.flags or case.seen)
    noted = notes + err
    if case.harm:
        return case.seen and Path(case.harm[0]).name not in noted
    return any(not any(name in noted for name in one.option_strings) for one in case.wrong)


def parsed(line):
    """(what the script's parser says to flags that it does not take, its notes on those that have no effect)."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            return "", "\n".join(getattr(PARSERS[line[0]]().parse_args(line[1:]), "notes", ()))
        except SystemExit as stop:
            return said.getvalue() if stop.code == 2 else "", ""


def fill(good, place, line):
    """Copies what the command line names of the good input."""
    (place / "in").mkdir()
    for name in {match[1] for word in line for match in re.finditer(re.escape(f"{place}/in/") + r"([^/\s]+)", word)}:
        if (good / name).is_dir():
            shutil.copytree(good / name, place / "in" / name)
        elif (good / name).exists():
            shutil.copy2(good / name, place / "in" / name)


def snapshot(place):
    found = {}
    for path in place.rglob("*"):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(place))] = path.read_bytes() if plain else path.is_dir()
    return found


def forked(line, place, seconds=SECONDS):
    """(exit code, None: it took too long; stdout; stderr) of a script in a forked process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            try:
                gc.disable()
                run_script(line, place, out, err)
            finally:
                os._exit(99)
        end, code = time.monotonic() + seconds, None
        while code is None and time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.002)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return code, *(os.pread(file.fileno(), 2**20, 0).decode(errors="replace") for file in (out, err))


def run_script(line, place, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.chdir(place)
    if resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY:  # not yet: a grid's check is a fork's fork
        # Large memory is refused as on a machine that has little; this process has address space that it does not use
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("default")
    sys.argv = [str(harness.ROOT / line[0]), *line[1:]]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def begins(run, *args, **options):
    """What stands in the place of a run's begin: the input was taken."""
    if run.before is not None:
        return BEGIN(run, *args, **options)
    ends(run)


def ends(*_, **__):
    from common.cli import say_waiting

    say_waiting()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ACCEPTED)


def restores(run, theta, named=None, *args, **lasting):
    """What stands in the place of a run's restore: prints what it goes on from."""
    theta = RESTORE(run, theta, named, *args, **lasting)
    state = {"theta": theta if isinstance(theta, dict) else {"": theta}}
    for name, thing in lasting.items():
        if hasattr(thing, "state_dict"):
            state[name] = thing.state_dict()
        elif hasattr(thing, "get"):
            state |= {f"{name} {k}": thing.get(k) or {} for k in range(20)}
    hashed = hashlib.sha256()
    for name, tensors in sorted(state.items()):
        for key, value in sorted(tensors.items()):
            plain = value.detach().contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value)
            hashed.update(f"{name} {key} ".encode() + (plain if isinstance(plain, bytes) else plain.encode()))
    rounds = [row["round"] for row in run.metrics()]
    print(f"goes on after round {run.start_round}: {hashed.hexdigest()} {sorted(run.counters.items())} {rounds}")
    ends()


def reads_study(command):
    """`grid.read_study`, forked."""
    from common.early import CHECK

    os.environ[CHECK] = "study"
    code, _, err = forked(command, Path.cwd())
    if code not in (0, 2, ACCEPTED):  # the grid lets its runs find out
        raise AssertionError(f"{shlex.join(command)}: exit code {code}: {err}")
    return code, err


def draws(figure, path, **options):
    Path(path).write_bytes(b"")


def alone(main, args, *_, **__):
    """`run_federated` in this process."""
    from common.cli import run_main

    run_main(main, args)


@contextmanager
def up_to_the_run(data):
    """Scripts in this block's forks end where they would begin to train, evaluate or start others. data: for those
    that no flag says it to, as a grid's: small, else its check takes as long as reading real texts."""
    global BEGIN, RESTORE
    from matplotlib.figure import Figure

    from common import grid, local, processes, runlog
    from lora_glue_fl.task_model import TaskModel
    from vit_sparse_fl import data
    from vit_sparse_fl.demo_images import demo_images

    demo_images()  # made once, for all forks
    BEGIN, RESTORE = runlog.Run.begin, runlog.Run.restore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.Run, "begin", begins)
        patch.setattr(runlog.Run, "restore", restores)
        patch.setattr(TaskModel, "evaluate", ends)
        patch.setattr(local, "local_steps", ends)
        patch.setattr(data, "CIFAR_COUNTS", CIFAR)
        patch.setattr(Figure, "savefig", draws)
        for name in ("start", "call"):
            patch.setattr(grid, name, ends)
        patch.setattr(grid, "read_study", reads_study)
        patch.setattr(processes, "run_federated", alone)
        patch.setenv("FEDQUARTET_DATA", str(data))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.delenv("WORLD_SIZE", raising=False)
        yield


PARSERS, PARSED, ACTIONS = {}, {}, {}  # of each script: its build_parser, {flag: action}, the flags but --help


def parsers():
    """{script: its flags but --help}, read once."""
    for script in FLAGS if not ACTIONS else ():
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        PARSERS[script] = module.build_parser
        actions = [a for a in module.build_parser()._actions if a.dest != "help" and a.option_strings]
        PARSED[script] = {name: a for a in actions for name in a.option_strings}
        ACTIONS[script] = actions
    return ACTIONS


def each(cases, start, many, tried):
    """Calls `tried` with `many` cases of a strategy."""
    left = -1  # the first of hypothesis' is the simplest one

    @seed(start)
    @settings(max_examples=many + 1, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(cases)
    def one(case):
        nonlocal left
        left += 1
        if left:
            tried(case)

    one()


def all_subjects(good):
    """(how many flags, how many files, a strategy of cases for each flag of each script and each file that is read)."""
    flags = [flag_case(script, action) for script, actions in parsers().items() for action in actions]
    of_files = [file_case(script, more, file) for script, more, names in READS for file in files(good, names)]
    random.Random(0).shuffle(flags)
    random.Random(1).shuffle(of_files)
    pairs = itertools.zip_longest(flags, of_files)
    return len(flags), len(of_files), [one for pair in pairs for one in pair if one is not None]


def check(cases, good, folder, report=None, part=0, parts=1):
    """Runs generated cases. Returns ({verdict: how many}, those not well: [(verdict, command line, stderr)]).

    Args: good: what `make_input` filled; folder: an empty one, made where it is not there; report: function of a case
        that is not well; part, parts: only every parts-th flag and file, from the part-th on.
    """
    folder.mkdir(exist_ok=True)
    counts, bad, wanted = Counter(), [], {}
    counts["flags"], counts["files"], subjects = all_subjects(good)

    def at(place, case):
        place.mkdir()
        ended = attempt(case, good, place, wanted)
        shutil.rmtree(place)
        return ended

    def good_output(case):
        place = folder / "case"
        place.mkdir()
        line = command_line(case, place)
        fill(good, place, line)
        code, out, err = forked(line, place)
        assert code in (0, ACCEPTED), f"{shlex.join(line)}: {err}"
        shutil.rmtree(place)
        return out + err

    def tried(case):
        key = case.script, case.flags
        if case.harm and compared(*key) and key not in wanted:
            wanted[key] = good_output(case)
        verdict, *about = at(folder / "case", case)
        counts[verdict] += 1
        if verdict not in ("accepted", "refused"):
            bad.append((verdict, *about))
            if report:
                report(*bad[-1])

    with up_to_the_run(good / "data"):
        gc.collect()
        gc.freeze()  # a fork then shares what it does not write
        for i in range(part, min(cases, len(subjects)), parts):
            each(subjects[i], i, len(range(i, cases, len(subjects))), tried)
        gc.unfreeze()
    return counts, bad


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(tmp_path):
    good = tmp_path / "in"
    good.mkdir()
    make_input(good)
    counts, bad = check(120, good, tmp_path / "cases")
    assert not bad, "\n\n".join(map("\n".join, bad))
    assert counts["refused"] > 60 and counts["accepted"] > 5


NOT_WELL = {"traceback": "tracebacks", "hang": "hangs", "left": "files left", "lines": "not one line"}
NOT_WELL |= {"silent": "silent acceptances"}


def shown(*about):
    print(*about, sep="\n", end="\n\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Generated bad input: prints how many cases ended how.")
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with harness.scratch(), tempfile.TemporaryDirectory() as folder:
        good = Path(folder, "in")
        good.mkdir()
        make_input(good)
        parsers()
        made = time.monotonic()
        jobs = [(args.cases, good, Path(folder, str(k)), shown, k, args.jobs) for k in range(args.jobs)]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            ended = pool.starmap(check, jobs, chunksize=1)
            pool.close()
            pool.join()
    counts = sum((part for part, _ in ended), Counter())
    tried = sum(counts[name] for name in ("refused", "accepted", *NOT_WELL))
    of = f"{counts['flags'] // args.jobs} flags of {len(FLAGS)} scripts, {counts['files'] // args.jobs} files"
    now = time.monotonic()
    print(f"{'inputs tried':20}{tried:6}   {of}; {now - made:.0f} s, after {made - started:.0f} s for good input")
    for name, words in {"refused": "refused", "accepted": "accepted", **NOT_WELL}.items():
        print(f"{words:20}{counts[name]:6}")
    sys.exit(any(bad for _, bad in ended))


if __name__ == "__main__":
    main()
