"""Runs a study's grid: rows x seeds, each run one of the study's scripts in a process of its own; rates by --tune.

A study is {"presets": {name: preset(rows, ...)}, "default": a preset, "output": "results/{preset}", "show": commands
that follow}; a preset's rows are {name: row("mamba_fl/fed_avg.py --lr 1e-3", ...)}. Under the output folder: a run's
own folder; output/NAME.txt with what it printed; results.jsonl, a line for each run that ended. Finished runs are
skipped and broken ones go on (--resume), so that a command can be given again at any time. Flags that are not listed
go to every run, a row's own win.

--tune runs every row at some values of a flag, on a seed that the table does not use, and keeps the best by the last
`objective` of a run; who diverged is worst. A best at the edge of the values extends them by the last two's ratio,
at most EXTENSIONS times a side. Of two flags the second is tuned at the first's best. A row with `rate_of` takes that
row's values; its own are tuned at them. OUTPUT/tuned.json gets {row: {flag: {best, edge, tried, ...}}}; the same
command without --tune runs the rows with these values as last flags.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int
from common.curves import number, read_metrics
from plots.read import TUNING, last_part, not_finite

ROOT = Path(__file__).resolve().parents[1]
TUNED, EXTENSIONS = "tuned.json", 3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}  # and one process, as torchrun's only one
HERE = {"output_dir", "run_name", "resume", "overwrite", "data_root", "cache_dir", "hf_home", "track"}
LOGGED = "command status ended clients git_commit versions processes resolved parameters results".split()


def row(line, group="", seeds=None, tune=None, rate_of="", needs=(), tag="_seed_{seed}", record=""):
    """A row of a grid. line: script and flags, in which {seed} and {output} (and a study's own `values`) are replaced;
    seeds: how many of the seeds it takes (None: all); tune: {flag: values}; needs: rows that are run first, of the same
    seed; tag: what its name ends in; record: the file that says that it ended, of a script that makes no run."""
    return locals() | {"tune": tune or {}}


def preset(rows, shared="", seeds=(0, 1, 2), objective="val_loss", higher=False, tuned="", name="{row}"):
    """shared: flags of every run; objective: what --tune compares, a field of metrics.jsonl; higher: whether more of it
    is better; tuned: a file of tuned values in the repository; name: of a run, before its tag."""
    return locals()


@dataclass(frozen=True)
class Run:
    """name: its folder below `output`; words: script and flags; point: {flag: tuned value}; needs: names of the runs
    that must be finished first; record: the file that says that it ended. A run without a `row` is what others need."""

    output: Path
    name: str
    row: str
    words: tuple
    needs: tuple = ()
    record: str = "run.json"
    point: dict = field(default_factory=dict, compare=False)

    @property
    def folder(self):
        return self.output / self.name

    @property
    def command(self):
        tuned = [word for flag, x in self.point.items() for word in (f"--{flag}", f"{x:g}")]
        place = ["--output-dir", str(self.folder.parent), "--run-name", self.folder.name, "--resume"]
        return [*self.words, *tuned, *(place if self.record == "run.json" else ())]


# ---- the command line and the plan


def build_parser(study, description, preset_names=(), output_names=()):
    """The parser of a study's front. preset_names, output_names: further spellings of --preset and --output-dir."""
    parser = Parser(description)
    add, names = parser.add_argument, list(study["presets"])
    add("--preset", *preset_names, choices=names, default=study["default"], help="what is run, and at which sizes")
    add("--seeds", type=non_negative_int, nargs="+", metavar="N", help="default: the preset's")
    add("--jobs", type=positive_int, metavar="N", help="runs at a time (default: 1; quick: one a core)")
    add("--only", nargs="+", metavar="NAME", help="only these rows or groups (default: all)")
    add("--plan", action="store_true", help="print the runs' commands and how far they are; run nothing")
    text = "find each row's best value of a flag on validation, and run no more; alone: the rows' own values"
    add("--tune", nargs="*", metavar=("FLAG", "X"), help=text)
    add("--tune-seed", type=non_negative_int, default=100, metavar="N", help="none of --seeds")
    add("--output-dir", *output_names, metavar="DIR", help=f"run folders (default: {study['output']})")
    return parser


def run_study(study, args, words=()):
    """Runs what a command line asks for; words: flags for every run. Returns the exit code. Raises as `run_all`."""
    one, output = study["presets"][args.preset], output_of(study, args)
    args.jobs = args.jobs or (os.cpu_count() if args.preset == "quick" else 1)
    if args.tune is not None:
        return tune(args, one, runs_of(study, args, [args.tune_seed], words), output)
    seeds = list(args.seeds or one["seeds"])
    runs = runs_of(study, args, seeds, words)
    runs = [replace(run, point=point_of(one, run, seeds=seeds)) if run.row else run for run in runs]
    if args.plan:
        return put_plan(runs)
    try:
        run_all(runs, args.jobs)
    finally:
        collect(output)
    for line in study.get("show", ()):
        script, *flags = line.format(output=output).split()
        subprocess.run([sys.executable, str(ROOT / script), *flags], check=False)
    print(output)
    return 0


def output_of(study, args):
    return Path(args.output_dir or study["output"].format(preset=args.preset.replace("-", "_")))


def runs_of(study, args, seeds, words=()):
    """The `Run`s of the rows that the flags choose, seed by seed, each after those that it needs."""
    one, output, found = study["presets"][args.preset], output_of(study, args), {}
    known = dict.fromkeys(name for row, about in one["rows"].items() for name in (about["group"], row) if name)
    if unknown := [name for name in args.only or () if name not in known]:
        raise UsageError(f"--only {' '.join(unknown)}: not in this preset; choose from {', '.join(known)}")
    shared = [*shlex.split(one["shared"]), *words]

    def add(name, seed):
        about, values = one["rows"][name], {"seed": seed, "output": output}
        needs = tuple(add(other, seed) for other in about["needs"])
        values |= study["values"](seed, args.tune is not None) if "values" in study else {}
        script, *own = (word.format(**values) for word in shlex.split(about["line"]))
        tag = about["tag"].format(**values)
        if about["record"]:
            own += [w for f in ("--dataset", "--data-root", "--cache-dir") if f in words for w in (f, last(words, f))]
            run = Run(output, name + tag, "", (script, *own), needs, about["record"])
        else:
            given = {key: Path(last(shared, f"--{key}").format(**values)).name for key in ("dataset", "model")}
            own += [] if "--seed" in own else ["--seed", str(seed)]
            called = one["name"].format(row=name, **given) + tag
            run = Run(output, called, name, (script, *(word.format(**values) for word in shared), *own), needs)
        found.setdefault(run.name, run)
        return run.name

    for i, seed in enumerate(seeds):
        for name, about in one["rows"].items():
            chosen = not args.only or {name, about["group"]} & set(args.only)
            if chosen and about["group"] != "first" and (about["seeds"] is None or i < about["seeds"]):
                add(name, seed)
    return list(found.values())


def last(words, flag):
    """The last value of a flag in a command line, "" without."""
    return ["", *(value for word, value in zip(words, words[1:], strict=False) if word == flag)][-1]


def put_plan(runs):
    for run in runs:
        print(f"# {run.name}: {record_of(run)['status']}\npython {shlex.join(run.command)}")
    return 0


# ---- what has become of a run


def record_of(run):
    """A run's record; its status, where it has none: finished; without the file: not run yet."""
    path = run.folder / run.record
    return {"status": "finished"} | json.loads(path.read_text()) if path.exists() else {"status": "not run yet"}


def broke_down(record):
    """Whether its training broke down (no client's update was finite): a result like any other."""
    return not_finite({"ended": {"how": record["status"]} | (record.get("ended") or {})})


def over(run):
    """Whether the very command of `run` has ended with a result."""
    record, now = record_of(run), run.command
    said, now = ([word for word in line[1:] if word != "--resume"] for line in (record.get("argv", now), now))
    return said == now and (record["status"] == "finished" or broke_down(record))


def collect(output):
    """Writes results.jsonl, the log behind a study's table: a line for each run in `output` that ended, by name."""
    lines = []
    for path in sorted(output.glob("*/run.json")):
        record, folder = json.loads(path.read_text()), path.parent
        if record["status"] in ("finished", "failed"):
            curve = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
            line = {"name": folder.name} | ({"tuning": True} if output.name == TUNING else {})
            line["args"] = {key: placeless(value) for key, value in record["args"].items() if key not in HERE}
            line["data"] = {key: placeless(v) for key, v in (record.get("data") or {}).items() if key != "source"}
            line |= {key: record.get(key) for key in LOGGED}
            line["curve"] = [{key: v for key, v in one.items() if "second" not in key} for one in curve]
            lines.append(json.dumps(line) + "\n")
    (output / "results.jsonl").write_text("".join(lines))


def placeless(value):
    """A path's name: where it lies on a machine says nothing."""
    return last_part(value) if isinstance(value, str) and os.sep in value else value


# ---- the runs


def run_all(runs, jobs):
    """Runs what is not finished, `jobs` at a time; what is running when this ends early (Ctrl-C) is terminated.

    Raises RunFailed, at the end, where runs failed or waited for one that did, and UsageError at once where a script
    refuses its run (exit code 2): what is wrong with one is wrong with others.
    """
    ended = {run.name for run in runs if over(run)}
    waiting = [run for run in runs if run.name not in ended]
    running, failed, todo = [], [], len(waiting)
    try:
        while waiting or running:
            for run in [run for run in waiting if ended.issuperset(run.needs)][: jobs - len(running)]:
                waiting.remove(run)
                running.append((run, *start(run, alone=jobs == 1)))
            if not running:
                failed += [run.name for run in waiting]
                break
            time.sleep(0.1)
            for run, process, log in [one for one in running if one[1].poll() is not None]:
                running.remove((run, process, log))
                said = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
                code, good = process.returncode, process.returncode == 0 or over(run)
                if code == 2 and not good:
                    raise UsageError(f"{run.name}: {said.partition('error: ')[2] or said}")
                (ended.add if good else failed.append)(run.name)
                words = record_of(run)["status"] if code == 0 else f"exit code {code}: {said} (see {log})"
                print(f"[{todo - len(waiting) - len(running)}/{todo}] {run.name}: {words}", flush=True)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish: {', '.join(failed)}: see output/*.txt")


def start(run, alone=True):
    """Starts a run: (its process, the file that gets what it prints). alone: it may take the whole machine."""
    log, place = run.output / "output" / f"{run.name}.txt", os.environ | ({} if alone else ONE_THREAD)
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(ROOT / run.words[0]), *run.command[1:]]
    with open(log, "a") as file:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=place), log


# ---- tuned values


def tune(args, one, runs, output):
    """All of --tune: runs, log, tuned.json. runs: one of each row, and what these need."""
    rows, given, worse = one["rows"], values_of(args.tune), -1 if one["higher"] else 1
    grids = {run: given or rows[run.row]["tune"] for run in runs if run.row and (given or rows[run.row]["tune"])}
    needed = [run for run in runs if any(run.name in other.needs for other in runs)]
    if not grids:
        raise UsageError("--tune: none of these rows has values of its own: give --tune FLAG X1 X2")
    if args.plan:
        points = [at(run, flag, x) for run, grid in grids.items() for flag, values in grid.items() for x in values]
        return put_plan([*needed, *points])

    for run in sorted(grids, key=lambda run: rows[run.row]["rate_of"] != ""):
        point, found = point_of(one, run, own=False), {}
        for flag, values in grids[run].items():
            tried, todo = {}, values
            while todo:
                points = {x: at(replace(run, point=point), flag, x) for x in todo}
                run_all([*needed, *points.values()], args.jobs)
                collect(output / TUNING)
                tried |= {x: outcome(one_run, one["objective"], worse) for x, one_run in points.items()}
                todo = extension(tried, values)
            best = best_value(tried)
            if tried[best] == math.inf:
                raise RunFailed(f"{run.row} diverged at every value of {flag}: give lower ones")
            ends = {f"{x:g}": "diverged" if tried[x] == math.inf else worse * tried[x] for x in sorted(tried)}
            found[flag] = {"best": best, "edge": best in (min(tried), max(tried)), "tried": ends}
            found[flag] |= {"objective": one["objective"], "seed": args.tune_seed}
            point[flag] = best
            print(f"{run.row}: {flag} {best:g} of {ends}", flush=True)
        (output / TUNED).write_text(json.dumps(tuned_in(output / TUNED) | {run.row: found}, indent=1) + "\n")
    print(output / TUNED)
    return 0


def values_of(words):
    """{flag: values, ascending} of [flag, value, ...]; {} of none. Raises UsageError."""
    try:
        values = sorted({float(word) for word in words[1:]})
    except ValueError:
        values = []
    if words and len(values) < 2:
        raise UsageError(f"--tune {' '.join(words)}: give a flag and two different numbers")
    return {words[0].replace("_", "-"): values} if words else {}


def at(run, flag, x):
    """The run of a row with one value more, in the tuning folder; of a value that its line has, the run without."""
    point = run.point if last(run.words, f"--{flag}") == f"{x:g}" else run.point | {flag: x}
    end = "".join(f"_{flag.replace('-', '_')}_{x:g}" for flag, x in point.items())
    return replace(run, name=f"{TUNING}/{run.name}{end}", point=point)


def best_value(tried):
    """The best of {value: outcome there}: the lowest outcome, of several the lowest value."""
    return min(sorted(tried), key=tried.get)


def extension(tried, given):
    """[the value beyond the edge], where that is the best so far; [] where it is not, or after EXTENSIONS."""
    values, best = sorted(tried), best_value(tried)
    for edge, beside, beyond in (
        (values[0], values[1], [x for x in values if x < min(given)]),
        (values[-1], values[-2], [x for x in values if x > max(given)]),
    ):
        if best == edge and len(beyond) < EXTENSIONS:
            return [float(f"{edge * edge / beside:g}")]  # as command lines and folders show it
    return []


def outcome(run, objective, worse):
    """`worse` (1 or -1) times the last evaluation's objective; inf where it diverged or left out an update."""
    lines = read_metrics(run.folder)
    if broke_down(record_of(run)) or any(line.get("left_out_updates") for line in lines):
        return math.inf
    value = worse * [number(line[objective]) for line in lines if line.get(objective) is not None][-1]
    return math.inf if math.isnan(value) else value


def tuned_in(path):
    """{row: {flag: what was found}} of a file of tuned values, {} without it."""
    return json.loads(path.read_text()) if path.is_file() else {}


def point_of(one, run, own=True, seeds=()):
    """{flag: best value} of a run's row and of the row whose values it takes. Raises UsageError where they are lacking,
    or were tuned on one of the seeds."""
    about, found = one["rows"][run.row], tuned_in(ROOT / one["tuned"]) | tuned_in(run.output / TUNED)
    other, mine = found.get(about["rate_of"], {}), found.get(run.row, {}) if own else {}
    if (about["rate_of"] and not other) or (own and not mine.keys() >= about["tune"].keys()):
        raise UsageError(f"{run.row} has no tuned values: give --tune first, with {about['rate_of'] or run.row}")
    if same := [result for result in (other | mine).values() if result["seed"] in seeds]:
        raise UsageError(f"--seeds {same[0]['seed']}: {run.row} was tuned on it: drop it")
    return {flag: result["best"] for flag, result in (other | mine).items()}
