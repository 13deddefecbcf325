"""The runs of a study: presets x settings x seeds, each run one of the study's scripts in a process of its own.

    parser = build_parser(__doc__, PRESETS, default="small", output="results/{preset}")    # --preset --seeds --jobs ...
    runs = expand(PRESETS[args.preset].settings, shared, seeds, args.output_dir)
    run_study(args, runs, show=[["plots/tables.py", "mamba_fl", "--data-dir", "{output}"]])

Under the output folder: a run's own folder; output/NAME.txt with what it printed; results.jsonl with a line for each
run that ended. Finished runs are skipped and broken ones go on, so that a command can be given again at any time. A
run whose training broke down (no client's update was finite) is a result like any other and is not started again.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import manifest
from common.checkpoint import read_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int
from common.curves import read_metrics
from common.processes import cores
from common.stopping import undisturbed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.jsonl"
GOES_ON = "the same command goes on"
SAY = partial(print, flush=True)
FACTS = ("method", "clients", "git_commit", "versions", "processes", "resolved", "parameters", "results")
PLACES = ("model", "tokenizer", "init_from", "init_adapter", "weights", "mask", "shard_dir", "cache_dir")


@dataclass(frozen=True)
class Setting:
    """What a preset runs with its seeds. words: the script's flags, "{seed}" in them is the seed; group: for --only;
    seeds: how many of the seeds it takes (None: all)."""

    name: str
    script: str
    words: tuple = ()
    group: str = ""
    seeds: int | None = None


@dataclass(frozen=True)
class Preset:
    """shared: flags of every run; settings: a tuple of `Setting`s, or what a study makes them of; seeds: by default."""

    shared: tuple
    settings: object
    seeds: tuple = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """name: also its folder below the output folder; command: a script's path in the repository, then its flags;
    needs: the run that must be finished first; record: the file that says how it ended (without "status": finished)."""

    name: str
    command: tuple
    needs: str = ""
    record: str = "run.json"


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
    parser.add_argument("--plan", action="store_true", help="print the commands, how long each took, and do nothing")
    folder = output.format(preset="PRESET")
    parser.add_argument(
        "--output-dir", *output_names, metavar="DIR", help=f"run folders, results.jsonl (default: {folder})"
    )
    return parser


def complete(args, presets):
    """Fills in the flags whose defaults depend on the preset: seeds, jobs, output_dir."""
    args.seeds = args.seeds or list(presets[args.preset].seeds if args.preset in presets else ())
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: one is there twice: drop it")
    args.jobs = args.jobs or (cores() if args.preset == "quick" else 1)
    args.output_dir = args.output_dir or args.output_pattern.format(preset=args.preset.replace("-", "_"))
    return args


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
            runs.append(Run(called, (s.script, *words, *place), needs))
    return runs


def run_study(args, runs, show=(), prepare=None):
    """All of a study: runs, log, figures, table; with --plan the commands only. Returns the exit code.

    show: command lines, the last one the table's, "{output}" in them is the output folder; prepare: called before the
    first run. Raises RunFailed, naming them, where runs failed.
    """
    output = Path(args.output_dir)
    if not runs:
        raise UsageError("these flags leave nothing to run: drop --only or what else chooses among the settings")
    if args.plan:
        for run in runs:
            print(f"# {run.name}: {state(run, output)}\npython {shlex.join(run.command)}")
        return 0
    try:
        if prepare:
            prepare()
        failed = run_all(runs, output, args.jobs)
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


def run_all(runs, output, jobs, say=SAY):
    """Runs what is not finished, `jobs` at a time. Returns the names of those that failed, or waited for one that did.

    What is running when this ends early (Ctrl-C) is interrupted too.
    """
    ended = {run.name for run in runs if over(run, output)}
    waiting = [run for run in runs if run.name not in ended]
    running, failed, began = {}, [], time.monotonic()
    if ended:
        say(f"{len(ended)} of {len(runs)} runs are finished")
    todo = len(waiting)
    try:
        while waiting or running:
            ready = [run for run in waiting if run.needs in ended or not run.needs]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                with undisturbed():  # who is started is known to `interrupt`
                    running[run] = start(run.command, output / "output" / f"{run.name}.txt", alone=jobs == 1)
            if not running:
                failed += [run.name for run in waiting]
                say(f"not started: {', '.join(run.name for run in waiting)}, which need {waiting[0].needs}")
                break
            time.sleep(0.1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                good = code == 0 or over(run, output)
                ended |= {run.name} if good else set()
                failed += [] if good else [run.name]
                n = todo - len(waiting) - len(running)
                left = (time.monotonic() - began) / n * (todo - n)
                said = state(run, output) if good else failure(code, output, run.name)
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
    place = os.environ | ({} if alone else {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"})
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=place, start_new_session=True
        )


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


def duration(seconds):
    """`45 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def failure(code, output, name):
    """What is said of a run that failed: its exit code, its last line, where the rest is."""
    log = output / "output" / f"{name}.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    return f"exit code {code}: {lines[-1][:300]} (see {log})"


def read_record(path):
    """A run's record. Its status, where it has none: finished; without the file: not run yet; not JSON: damaged."""
    try:
        return {"status": "finished"} | read_json(path)
    except FileNotFoundError:
        return {"status": "not run yet"}
    except ValueError:
        return {"status": "damaged"}


def ending(record):
    """A run.json's `ended`; made up from what older ones say."""
    return record.get("ended") or manifest.ended(record["status"], None, reason=record.get("reason"))


def broke_down(record):
    """Whether a run's training broke down: the updates of its clients were not finite."""
    ended = ending(record)
    return ended["how"] == "failed" and (ended["by"] == "left_out" or "not finite" in (ended["reason"] or ""))


def over(run, output):
    """Whether the very command of `run` has ended with a result."""
    record = read_record(output / run.name / run.record)
    words, now = ([w for w in line[1:] if w != "--resume"] for line in (record.get("argv", run.command), run.command))
    return words == now and (record["status"] == "finished" or broke_down(record))


def state(run, output):
    """What is said of a run that may have ended."""
    record = read_record(output / run.name / run.record)
    if broke_down(record):
        return ending(record)["reason"]
    if record["status"] != "finished":
        return record["status"] + (", goes on" if record["status"] != "not run yet" else "")
    seconds = (record.get("results") or {}).get("seconds")
    return "finished" if seconds is None else f"finished, took {duration(seconds)}"


def told(args):
    """The flags of a run.json that decide what is computed; of those that name a place, only the last name."""
    kept = {key: value for key, value in args.items() if key not in manifest.NOT_COMPARED}
    return kept | {key: Path(kept[key]).name for key in PLACES if isinstance(kept.get(key), str)}


def collect(output):
    """Writes results.jsonl: a line of JSON for each run below `output` that finished or failed, by name.

    That is the log behind a study's table, small enough for the repository. A folder that has a results.jsonl of its
    own is another grid's.
    """
    others = {path.parent for path in output.rglob(RESULTS)} - {output}
    lines = []
    for path in sorted(output.rglob("run.json")):
        folder, record = path.parent, read_record(path)
        name = folder.relative_to(output).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or record["status"] not in ("finished", "failed") or others & {folder, *folder.parents}:
            continue
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        line = {"name": name, "command": record["command"], "args": told(record["args"]), "status": record["status"]}
        line |= {"ended": ending(record)} | {key: record.get(key) for key in FACTS}
        line["method"] = told(record.get("method") or {})
        line["data"] = {key: value for key, value in record["data"].items() if key != "source"}
        line["curve"] = [{key: value for key, value in row.items() if "second" not in key} for row in rows]
        lines.append(line)
    output.mkdir(parents=True, exist_ok=True)
    fresh = output / f"{RESULTS}.new"
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(fresh, output / RESULTS)
