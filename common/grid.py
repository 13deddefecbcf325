"""The runs of a study: presets x settings x seeds, each run one of the study's scripts in a process of its own.

    parser = build_parser(__doc__, PRESETS, default="small", output="results/{preset}")    # --preset --seeds --jobs ...
    runs = expand(PRESETS[args.preset].settings, shared, seeds, args.output_dir)
    run_study(args, runs, show=[["plots/tables.py", "mamba_fl", "--data-dir", "{output}"]])

Under the output folder: a run's own folder; output/NAME.txt with what it printed; results.jsonl with a line for each
run that ended. Finished runs are skipped and broken ones go on, so that a command can be given again at any time. A
run whose training broke down (no client's update was finite) is a result like any other and is not started again.
"""

import contextlib
import ctypes
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int
from common.early import CHECK
from common.progress import duration
from common.records import TUNING, collect, over, state
from common.stopping import undisturbed

ROOT = Path(__file__).resolve().parents[1]
GOES_ON = "the same command goes on"
SAY = partial(print, flush=True)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}  # and one process, as torchrun's only one
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork


@dataclass(frozen=True)
class Setting:
    """What a preset runs with its seeds. words: the script's flags, "{seed}" in them is the seed; group: for --only;
    seeds: how many of the seeds it takes (None: all); tune: {flag: values} that --tune tries where it has none;
    objective: what --tune compares, where it is another than the preset's; tuned_as: the setting whose tuned values it
    takes, beside those of its own `tune`, which are found at them."""

    name: str
    script: str
    words: tuple = ()
    group: str = ""
    seeds: int | None = None
    tune: dict = field(default_factory=dict)
    objective: str = ""
    tuned_as: str = ""


@dataclass(frozen=True)
class Preset:
    """shared: flags of every run; settings: a tuple of `Setting`s, or what a study makes them of; seeds: by default;
    objective: what --tune compares, a field of metrics.jsonl; higher: whether more of it is better; tuned: a file of
    tuned values in the repository."""

    shared: tuple
    settings: object
    seeds: tuple = (0, 1, 2)
    objective: str = "val_loss"
    higher: bool = False
    tuned: str = ""


@dataclass(frozen=True)
class Run:
    """name: also its folder below the output folder; command: a script's path in the repository, then its flags;
    needs: the run that must be finished first; record: the file that says how it ended (without "status": finished);
    setting: the one that `expand` made it of, with the shared flags among its words."""

    name: str
    command: tuple
    needs: str = ""
    record: str = "run.json"
    setting: Setting | None = field(default=None, compare=False)


def build_parser(description, presets, default, output, preset_names=(), output_names=()):
    """The flags that the runners of all studies have. preset_names, output_names: more spellings of the two flags."""
    parser = Parser(description)
    parser.set_defaults(output_pattern=output)
    parser.add_argument(
        "--preset", *preset_names, choices=list(presets), default=default, help="what is run, and at which sizes"
    )
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", metavar="N", help="default: the preset's")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="runs at a time, of one thread each; a run alone may take all cores (default: 1; quick: as many as cores)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these settings or groups (default: all)")
    plan = "check the runs, print their commands and how long each took, and run nothing"
    parser.add_argument("--plan", action="store_true", help=plan)
    tune = "find each setting's best value of a flag on validation, and run no more; of two flags (--tune twice) the "
    tune += "first at the setting's own value of the second, the second at the first's best; alone: the settings' grids"
    parser.add_argument("--tune", nargs="*", action="append", metavar=("FLAG", "X"), help=tune)
    tune = "seed of these runs, none of --seeds"
    parser.add_argument("--tune-seed", type=non_negative_int, default=100, metavar="N", help=tune)
    tune = "tuned values that the runs take; off: none (default: DIR/tuned.json and the preset's)"
    parser.add_argument("--tuned", metavar="FILE", help=tune)
    folder = output.format(preset="PRESET")
    parser.add_argument(
        "--output-dir", *output_names, metavar="DIR", help=f"run folders, results.jsonl (default: {folder})"
    )
    return parser


def complete(args, presets):
    """Fills in the flags whose defaults depend on the preset: seeds (with --tune its seed alone), output_dir."""
    args.seeds = args.seeds or list(presets[args.preset].seeds if args.preset in presets else ())
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: one is there twice: drop it")
    if args.tune is not None:
        if args.tune_seed in args.seeds:
            raise UsageError(f"--tune-seed {args.tune_seed} is one of the table's --seeds: take another")
        if args.preset not in presets:
            raise UsageError(f"--preset {args.preset} runs nothing: drop --tune")
        args.seeds = [args.tune_seed]
    args.output_dir = args.output_dir or args.output_pattern.format(preset=args.preset.replace("-", "_"))
    return args


def jobs_of(args):
    """How many runs at a time the flags ask for."""
    if args.jobs or args.preset != "quick":
        return args.jobs or 1
    from common.processes import cores  # torch, which --help must not wait for

    return cores()


def given(args, names):
    """The flags of these names that were given, as words for a command line."""
    words = []
    for name in names:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words


def select(settings, only):
    """The settings of these names or groups, all where `only` is None. Raises UsageError for one that is not there."""
    settings = list(settings)
    known = dict.fromkeys(name for s in settings for name in (s.group, s.name) if name)
    if unknown := [name for name in only or () if name not in known]:
        raise UsageError(f"--only {' '.join(unknown)}: not in this preset; choose from {', '.join(known)}")
    return [s for s in settings if not only or s.name in only or s.group in only]


def expand(settings, shared, seeds, output, name="{setting}_seed_{seed}", needs=""):
    """The `Run`s of settings x seeds, seed by seed. name: of a run, with {setting} and {seed}."""
    runs = []
    for i, seed in enumerate(seeds):
        for s in settings:
            if s.seeds is not None and i >= s.seeds:
                continue
            called = name.format(setting=s.name, seed=seed)
            words = [str(word).replace("{seed}", str(seed)) for word in (*shared, *s.words, "--seed", seed)]
            place = ["--output-dir", str(output), "--run-name", Path(called).name, "--resume"]
            whole = replace(s, words=tuple(map(str, (*shared, *s.words))))
            runs.append(Run(called, (s.script, *words, *place), needs, setting=whole))
    return runs


def run_study(args, runs, show=(), prepare=None, also=()):
    """All of a study: runs, log, figures, table; with --plan the commands only. Returns the exit code.

    show: command lines, the last one the table's, "{output}" in them is the output folder; prepare: called before the
    first run; also: runs that are checked with the others and not started.
    Raises UsageError where a script refuses its run, before anything is written where `check` sees it; RunFailed,
    naming them, where runs failed.
    """
    output = Path(args.output_dir)
    if not runs:
        raise UsageError("these flags leave nothing to run: drop --only or what else chooses among the settings")
    try:
        check([*runs, *also], output)
        if args.plan:
            put(planned(runs, output))
            return 0
        if prepare:
            prepare()
        failed = run_all(runs, output, jobs_of(args))
        collect(output)
        codes = [call([word.format(output=output) for word in line]) for line in show]
    except KeyboardInterrupt as error:
        error.add_note(GOES_ON)
        raise
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/output")
    if codes and codes[-1]:
        raise RunFailed(f"the runs are finished but {show[-1][0]} ended with exit code {codes[-1]}")
    print(output)
    return 0


def planned(runs, output):
    """What --plan says of each run: how far it is, and its command."""
    return [f"# {run.name}: {state(run, output)}\npython {shlex.join(run.command)}" for run in runs]


def put(lines):
    """Prints lines; whoever reads them may have enough of them (`--plan | head`)."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends


# ---- the checks: a script says itself what it refuses


def check(runs, output):
    """Raises UsageError where a script refuses a run: the flags of any, data and model of the first that has them.

    Nothing is written and nothing is downloaded.
    """
    for run in runs:
        _accepted(run, *read_flags(run.command))
    for run in _first_of_each(runs, output):
        if not over(run, output):
            _accepted(run, *read_study(run.command))


def _accepted(run, code, said):
    if code == 2:
        raise UsageError(f"{run.name}: {_reason(said)}")


def _first_of_each(runs, output):
    """The first run of each data set and model; not of those that need what the grid has not made yet."""
    first = {}
    for run in runs:
        flags = dict(zip(run.command, run.command[1:], strict=False))
        places = [path for path in map(Path, run.command) if output in path.parents and path != output / TUNING]
        if run.record == "run.json" and all(path.exists() for path in places):
            first.setdefault(tuple(map(flags.get, ("--dataset", "--model", "--model-size"))), run)
    return first.values()


def read_flags(command):
    """(exit code, what it said) of a script that ends where its flags are read, in this process: nothing heavy is
    imported for that."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    os.environ[CHECK] = "flags"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code, said.getvalue()
    finally:
        sys.argv = argv
        del os.environ[CHECK]
    raise AssertionError(f"{command[0]} went on after its flags: see common/early.py")


def read_study(command):
    """(exit code, what it said) of a script that ends where data and model are read, as one process of one thread."""
    line = [sys.executable, str(ROOT / command[0]), *command[1:]]
    place = os.environ | ONE_THREAD | {CHECK: "study"}
    ended = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=place, check=False)
    return ended.returncode, ended.stderr


def _reason(said):
    """The last line of what a script said, without what stands before the reason."""
    line = _last_line(said)
    return line.partition("error: ")[2] or line


# ---- the runs


def run_all(runs, output, jobs, say=SAY):
    """Runs what is not finished, `jobs` at a time. Returns the names of those that failed, or waited for one that did.

    What is running when this ends early (Ctrl-C) is interrupted too. Raises UsageError where a script refuses its run
    (exit code 2): what is wrong with one is wrong with others. Of that run nothing is left.
    """
    ended = {run.name for run in runs if over(run, output)}
    waiting = [run for run in runs if run.name not in ended]
    running, failed, made, began = {}, [], [], time.monotonic()
    if ended:
        say(f"{len(ended)} of {len(runs)} runs are finished")
    todo = len(waiting)
    try:
        while waiting or running:
            ready = [run for run in waiting if run.needs in ended or not run.needs]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                log = log_of(run, output)
                made += [path for path in (log, *log.parents) if not path.exists()]
                with undisturbed():  # who is started is known to `interrupt`
                    running[run] = start(run.command, log, alone=jobs == 1)
            if not running:
                failed += [run.name for run in waiting]
                say(f"not started: {', '.join(run.name for run in waiting)}, which need {waiting[0].needs}")
                break
            time.sleep(0.1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                good = code == 0 or over(run, output)
                if code == 2 and not good:
                    interrupt(list(running.values()))
                    said = log_of(run, output).read_text(encoding="utf-8", errors="replace")
                    unmake(set(made) - {log_of(one, output) for one in runs if (output / one.name).exists()})
                    _accepted(run, code, said)
                ended |= {run.name} if good else set()
                failed += [] if good else [run.name]
                n = todo - len(waiting) - len(running)
                left = (time.monotonic() - began) / n * (todo - n)
                said = state(run, output) if good else failure(code, log_of(run, output))
                say(f"[{n}/{todo}] {run.name}: {said}" + (f"; about {duration(left)} left" if n < todo else ""))
    finally:
        interrupt(list(running.values()))
    return failed


def start(command, log, alone=True):
    """Starts a command line with its output appended to the file `log`, as a group of processes of its own.

    alone: the run may take the whole machine, else it is one process (as torchrun's only one) of one thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(ROOT / command[0]), *command[1:]]
    place = os.environ | ({} if alone else ONE_THREAD)
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=place,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent():
    """In a process that begins: SIGTERM when the one that started it dies, of kill -9 too. Linux only."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def interrupt(processes, patience=30):
    """SIGTERM for these processes and all that they started; after `patience` seconds they are killed."""
    for signum in (signal.SIGTERM, signal.SIGKILL):  # not SIGINT: what a shell starts with & ignores it
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signum)
        end = time.monotonic() + patience
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.05)


def call(command):
    """Runs a command line to its end. Returns the exit code."""
    sys.stdout.flush()
    line = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.run(line, check=False, process_group=0).returncode  # Ctrl-C is ours to say


def log_of(run, output):
    """The file that gets what the run prints."""
    return output / "output" / f"{run.name}.txt"


def failure(code, log):
    """What is said of a run that failed: its exit code, its last line, where the rest is."""
    return f"exit code {code}: {_last_line(log.read_text(encoding='utf-8', errors='replace'))} (see {log})"


def _last_line(said):
    return (said.strip().splitlines() or [""])[-1][:300]


def unmake(paths):
    """Removes files, and folders where nothing else is in them."""
    for path in sorted(paths, reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
