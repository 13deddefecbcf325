"""Runs a study's grid: rows x seeds, each run one of the study's scripts in a process of its own; rates by --tune.

    STUDY = {"presets": {"gap": preset(rows, shared, seeds=(0, 1, 2))}, "default": "gap", "output": "results/{preset}"}
    if __name__ == "__main__":
        run_main(lambda argv: main(STUDY, argv), None)

A row is `row("mamba_fl/fed_avg.py --lr 1e-3", group=, seeds=, tune=, ...)`: {name: row} is a preset's `rows`. Under the
output folder: a run's own folder; output/NAME.txt with what it printed; results.jsonl, a line for each run that ended.
Finished runs are skipped and broken ones go on (--resume), so that a command can be given again at any time. Flags that
are not listed go to every run, a row's own win.

--tune runs every row at some values of a flag, on a seed that the table does not use, and keeps the best on validation:
the last `objective` of a run, never of the test split; a run that diverged is worse than any other. A best at the edge
of the values extends them there, by the ratio of the last two, at most EXTENSIONS times a side. Of two flags the first
is tuned at the row's own value of the second, then the second at the first's best. A row with `rate_of` takes that
row's values; its own are tuned after and at them. OUTPUT/tuned.json gets {row: {flag: {best, edge, tried, ...}}}; the
same command without --tune runs the rows with these values as their last flags.
"""

import ctypes
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int
from common.curves import number, read_metrics
from common.progress import duration
from plots.read import TUNING, not_finite

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TUNED = "results.jsonl", "tuned.json"
EXTENSIONS = 3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}  # and one process, as torchrun's only one
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork
HERE = {"output_dir", "run_name", "resume", "overwrite", "data_root", "cache_dir", "hf_home", "track"}


def row(line, group="", seeds=None, tune=None, rate_of="", needs=(), objective="", tag="_seed_{seed}", record=""):
    """A row of a grid. line: script and flags, in which {seed} and {output} (and a study's own `values`) are replaced;
    seeds: how many of the seeds it takes (None: all); tune: {flag: values}; needs: rows that are run first, of the same
    seed; tag: what its name ends in; record: the file that says that it ended, of a script that makes no run."""
    return dict(line=line, group=group, seeds=seeds, tune=tune or {}, rate_of=rate_of, needs=needs) | dict(
        objective=objective, tag=tag, record=record
    )


def preset(rows, shared="", seeds=(0, 1, 2), objective="val_loss", higher=False, tuned="", name="{row}"):
    """shared: flags of every run; objective: what --tune compares, a field of metrics.jsonl; higher: whether more of it
    is better; tuned: a file of tuned values in the repository; name: of a run, before its tag."""
    return dict(rows=rows, shared=shared, seeds=seeds, objective=objective, higher=higher, tuned=tuned, name=name)


@dataclass(frozen=True)
class Run:
    """name: also its folder below the output folder; needs: names of the runs that must be finished first."""

    name: str
    row: str
    script: str
    words: tuple
    place: tuple = ()
    needs: tuple = ()
    record: str = "run.json"
    about: dict = field(default_factory=dict, compare=False)

    @property
    def command(self):
        return (self.script, *self.words, *self.place)

    def at(self, point):
        """The run with {flag: value} as its last flags of its own."""
        return replace(self, words=(*self.words, *(w for flag, x in point.items() for w in (f"--{flag}", f"{x:g}"))))


# ---- the command line and the plan


def build_parser(study, description, preset_names=(), output_names=()):
    parser = Parser(description)
    names = {"choices": list(study["presets"]), "default": study["default"]}
    parser.add_argument("--preset", *preset_names, **names, help="what is run, and at which sizes")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", metavar="N", help="default: the preset's")
    jobs = "runs at a time, of one thread each; a run alone may take all cores (default: 1; quick: as many as cores)"
    parser.add_argument("--jobs", type=positive_int, metavar="N", help=jobs)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows or groups (default: all)")
    parser.add_argument(
        "--plan", action="store_true", help="print the runs' commands and how far they are; run nothing"
    )
    tune = "find each row's best value of a flag on validation, and run no more; alone: the rows' own values"
    parser.add_argument("--tune", nargs="*", action="append", metavar=("FLAG", "X"), help=tune)
    parser.add_argument("--tune-seed", type=non_negative_int, default=100, metavar="N", help="none of --seeds")
    tuned = "tuned values that the runs take; off: none (default: DIR/tuned.json and the preset's)"
    parser.add_argument("--tuned", metavar="FILE", help=tuned)
    folder = study["output"].format(preset="PRESET")
    parser.add_argument("--output-dir", *output_names, metavar="DIR", help=f"run folders (default: {folder})")
    return parser


def main(study, argv=None, parser=None):
    """Runs what a command line asks for. Returns the exit code."""
    args, words = (parser or build_parser(study, "Runs the study's grid.")).parse_known_args(argv)
    return run_study(study, args, words)


def run_study(study, args, words=()):
    """words: flags for every run. Raises UsageError where a script refuses its run, RunFailed where runs failed."""
    one, output = study["presets"][args.preset], output_of(study, args)
    seeds = list(args.seeds or one["seeds"])
    if args.tune is not None:
        if args.tune_seed in seeds:
            raise UsageError(f"--tune-seed {args.tune_seed} is one of the table's --seeds: take another")
        return tune(study, args, one, runs_of(study, args, [args.tune_seed], words), output)
    runs = with_tuned(args, one, runs_of(study, args, seeds, words), output, seeds)
    if args.plan:
        return put_plan(runs, output)
    failed = run_all(runs, output, jobs_of(args))
    collect(output)
    for line in study.get("show", ()):
        command = [word.format(output=output) for word in line.split()]
        subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/output")
    print(output)
    return 0


def output_of(study, args):
    return Path(args.output_dir or study["output"].format(preset=args.preset.replace("-", "_")))


def jobs_of(args):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return args.jobs or (cores if args.preset == "quick" else 1)


def runs_of(study, args, seeds, words=()):
    """The `Run`s of the rows that the flags choose, seed by seed, each after those that it needs."""
    one, output, tuning, found = study["presets"][args.preset], output_of(study, args), args.tune is not None, {}
    known = dict.fromkeys(name for row, about in one["rows"].items() for name in (about["group"], row) if name)
    if unknown := [name for name in args.only or () if name not in known]:
        raise UsageError(f"--only {' '.join(unknown)}: not in this preset; choose from {', '.join(known)}")
    shared = [*shlex.split(one["shared"]), *words]

    def add(name, seed):
        about = one["rows"][name]
        needs = tuple(add(other, seed) for other in about["needs"])
        values = {"seed": seed, "output": output} | study.get("values", lambda *_: {})(seed, tuning)
        tag = about["tag"].format(**values)
        script, *own = (word.format(**values) for word in shlex.split(about["line"]))
        if about["record"]:
            places = [(f, last(words, f)) for f in ("--dataset", "--data-root", "--cache-dir") if last(words, f)]
            called, own = name + tag, (*own, *(word for pair in places for word in pair))
            run = Run(called, "", script, own, (), needs, about["record"])
        else:
            given = {key: Path(last(shared, f"--{key}").format(**values)).name for key in ("dataset", "model")}
            called = one["name"].format(row=name, **given) + tag
            seeded = () if "--seed" in own else ("--seed", str(seed))
            folder = ("--output-dir", str(output), "--run-name", Path(called).name, "--resume")
            whole = (*(word.format(**values) for word in shared), *own)
            run = Run(called, name, script, whole, (*seeded, *folder), needs, "run.json", about)
        found.setdefault(called, run)
        return called

    for i, seed in enumerate(seeds):
        for name, about in one["rows"].items():
            chosen = not args.only or {name, about["group"]} & set(args.only)
            if chosen and about["group"] != "first" and (about["seeds"] is None or i < about["seeds"]):
                add(name, seed)
    return list(found.values())


def last(words, flag):
    """The last value of a flag in a command line, "" without."""
    return next((words[i + 1] for i in range(len(words) - 2, -1, -1) if words[i] == flag), "")


def put_plan(runs, output):
    try:
        for run in runs:
            print(f"# {run.name}: {state(run, output)}\npython {shlex.join(run.command)}", flush=True)
    except BrokenPipeError:  # of `--plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
    return 0


# ---- what has become of a run


def record_of(run, output):
    """A run's record; its status, where it has none: finished; without the file: not run yet."""
    path = output / run.name / run.record
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"status": "finished"} | record
    except FileNotFoundError:
        return {"status": "not run yet"}
    except (OSError, ValueError, TypeError):
        return {"status": "damaged"}


def broke_down(record):
    """Whether its training broke down (no client's update was finite): a result like any other."""
    ended = {"how": record["status"]} | (record.get("ended") or {})
    return record["status"] == "failed" and not_finite({"ended": ended})


def over(run, output):
    """Whether the very command of `run` has ended with a result."""
    record = record_of(run, output)
    said, now = ([w for w in line[1:] if w != "--resume"] for line in (record.get("argv", run.command), run.command))
    return said == now and (record["status"] == "finished" or broke_down(record))


def state(run, output):
    record = record_of(run, output)
    if broke_down(record):
        return record["ended"].get("reason") or "diverged"
    if record["status"] != "finished":
        return record["status"] + ("" if record["status"] == "not run yet" else ", goes on")
    seconds = (record.get("results") or {}).get("seconds")
    return "finished" if seconds is None else f"finished, took {duration(seconds)}"


def collect(output):
    """Writes results.jsonl, the log behind a study's table: a line for each run below `output` that ended, by name."""
    lines, others = [], {path.parent for path in output.rglob(RESULTS)} - {output}
    for path in sorted(output.rglob("run.json")):
        record, name = record_of(Run("", "", "", (), record=str(path)), Path()), path.parent.relative_to(output)
        if record["status"] not in ("finished", "failed") or others & {path.parent, *path.parents}:
            continue
        rows = read_metrics(path.parent) if (path.parent / "metrics.jsonl").exists() else []
        line = {"name": name.as_posix(), "tuning": True} if output.name == TUNING else {"name": name.as_posix()}
        line["args"] = {k: placeless(v) for k, v in record["args"].items() if k not in HERE}
        line["data"] = {k: placeless(v) for k, v in (record.get("data") or {}).items() if k != "source"}
        names = (
            "command",
            "status",
            "ended",
            "clients",
            "git_commit",
            "versions",
            "processes",
            "resolved",
            "parameters",
        )
        line |= {key: record.get(key) for key in (*names, "results")}
        line["curve"] = [{key: value for key, value in one.items() if "second" not in key} for one in rows]
        lines.append(json.dumps(line) + "\n")
    write(output / RESULTS, "".join(lines))


def placeless(value):
    """A path's last part: where it lies on a machine says nothing."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() or os.sep in str(value) else value


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


# ---- the runs


def run_all(runs, output, jobs):
    """Runs what is not finished, `jobs` at a time. Returns the names of those that failed, or waited for one that did.

    What is running when this ends early (Ctrl-C, SIGTERM) is terminated too. Raises UsageError where a script refuses
    its run (exit code 2): what is wrong with one is wrong with others.
    """
    ended = {run.name for run in runs if over(run, output)}
    waiting = [run for run in runs if run.name not in ended]
    running, failed, todo, began = {}, [], len(waiting), time.monotonic()
    if ended:
        print(f"{len(ended)} of {len(runs)} runs are finished", flush=True)
    try:
        while waiting or running:
            for run in [run for run in waiting if ended.issuperset(run.needs)][: jobs - len(running)]:
                waiting.remove(run)
                running[run] = start(run.command, log_of(run, output), alone=jobs == 1)
            if not running:
                failed += [run.name for run in waiting]
                print(f"not started, for what they need failed: {', '.join(run.name for run in waiting)}", flush=True)
                break
            time.sleep(0.1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code, log = running.pop(run).returncode, log_of(run, output)
                said = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1][:300]
                good = code == 0 or over(run, output)
                if code == 2 and not good:
                    raise UsageError(f"{run.name}: {said.partition('error: ')[2] or said}")
                (ended.add if good else failed.append)(run.name)
                n = todo - len(waiting) - len(running)
                left = duration((time.monotonic() - began) / n * (todo - n))
                words = state(run, output) if good else f"exit code {code}: {said} (see {log})"
                print(f"[{n}/{todo}] {run.name}: {words}" + f"; about {left} left" * (n < todo), flush=True)
    finally:
        terminate(list(running.values()))
    return failed


def log_of(run, output):
    """The file that gets what the run prints."""
    return output / "output" / f"{run.name}.txt"


def start(command, log, alone=True):
    """Starts a command line, its output appended to the file `log`, as a group of processes of its own.

    alone: the run may take the whole machine, else it is one process of one thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line, place = [sys.executable, str(ROOT / command[0]), *command[1:]], os.environ | ({} if alone else ONE_THREAD)
    with open(log, "a", encoding="utf-8") as file:
        to = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "env": place}
        return subprocess.Popen(line, **to, start_new_session=True, preexec_fn=end_with_parent)


def end_with_parent():
    """In a process that begins: SIGTERM when the one that started it dies, of kill -9 too. Linux only."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def terminate(processes, patience=30):
    """SIGTERM for these processes and all that they started; after `patience` seconds they are killed."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signum)
        end = time.monotonic() + patience
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.05)


# ---- tuned values


def tune(study, args, one, runs, output):
    """All of --tune: runs, log, tuned.json, table. runs: one of each row, and what these need."""
    given, kept, found = values_of(args.tune), read_tuned(output / TUNED), {}
    grids = {run: given or values_of([(f, *xs) for f, xs in run.about["tune"].items()]) for run in runs if run.row}
    grids = {run: some for run, some in grids.items() if some}
    if not grids:
        raise UsageError("--tune: none of these rows has values of its own: give --tune FLAG X1 X2")
    known = {*kept, *(run.row for run in grids)}
    if lacking := [run for run in grids if run.about["rate_of"] not in ("", *known)]:
        raise UsageError(f"{lacking[0].row} takes what {lacking[0].about['rate_of']} is tuned to: --tune that first")
    needed = [run for run in runs if run not in grids and any(run.name in other.needs for other in runs)]
    if args.plan:
        return put_plan(
            [*needed, *(at(run, {f: x}) for run, some in grids.items() for f in some for x in some[f])], output
        )
    for later in (False, True):  # rows whose values others take, then those who take them
        some = {taking(run, kept): grids[run] for run in grids if bool(run.about["rate_of"]) == later}
        for run, result in search_all(some, needed, output, one, jobs_of(args)).items():
            about = {"objective": run.about["objective"] or one["objective"], "seed": args.tune_seed}
            kept[run.row] = found[run.row] = {flag: result[flag] | about for flag in result}
    broken = [name for name, result in kept.items() if any(some["best"] is None for some in result.values())]
    good = {name: result for name, result in kept.items() if name not in broken}
    write(output / TUNED, json.dumps(good, indent=1) + "\n")
    print("\n".join(table(found)))
    if broken:
        raise RunFailed(f"diverged at every value: {', '.join(broken)}: give lower ones")
    print(output / TUNED)
    return 0


def values_of(lines):
    """{flag: values, ascending} of [[flag, value, ...], ...]. Raises UsageError."""
    found = {}
    for flag, *words in filter(None, lines):
        try:
            values = sorted({rounded(float(word)) for word in words})
        except ValueError:
            values = []
        if len(values) < 2 or len(values) < len(words) or not 0 < values[0] <= values[-1] < math.inf:
            raise UsageError(
                f"--tune {' '.join(map(str, (flag, *words)))}: give a flag and two different numbers above 0"
            )
        found[flag.replace("_", "-")] = values
    return found


def rounded(x):
    """x to the six digits that command lines and folders show."""
    return float(f"{x:g}")


def taking(run, kept):
    """The run with the values that its row takes from another."""
    taken = kept.get(run.about["rate_of"], {})
    return run.at({flag: one["best"] for flag, one in taken.items() if one["best"] is not None})


def at(run, point):
    """The run of a row at a point {flag: value}, in the tuning folder."""
    end = "".join(f"_{flag.replace('-', '_')}_{x:g}" for flag, x in point.items())
    *seed, _, output, _, name, resume = run.place
    place = (*seed, "--output-dir", f"{output}/{TUNING}", "--run-name", name + end, resume)
    return replace(run.at(point), name=f"{TUNING}/{run.name}{end}", place=place)


def search(grids, higher=False):
    """The search for a row's best values: yields points [{flag: value}], is sent what came out at each: a number, or
    "diverged". Returns {flag: {best (None: no value gave a number), edge: whether it is at one, tried}}."""

    def badness(end):
        return math.inf if isinstance(end, str) else -end if higher else end

    chosen, found = {}, {}
    for flag, todo in grids.items():
        tried, extended = {}, Counter()
        while todo:
            ends = yield [{**chosen, flag: x} for x in todo]
            tried |= dict(zip(todo, ends, strict=True))
            order = sorted(tried)
            best = min(order, key=lambda x: badness(tried[x]))
            edge, beside = order[:2] if best == order[0] else order[:-3:-1]
            todo = [rounded(edge * edge / beside)] if best == edge and extended[best < beside] < EXTENSIONS else []
            extended[best < beside] += 1
        good = not isinstance(tried[best], str)
        tried = {f"{x:g}": tried[x] for x in sorted(tried)}
        found[flag] = {"best": best if good else None, "edge": best == edge, "tried": tried}
        if not good:
            break
        chosen[flag] = best
    return found


def search_all(rows, needed, output, one, jobs):
    """Runs the searches of all rows {run: {flag: values}} at once: {run: what was found}."""
    searches, found = {run: search(grids, one["higher"]) for run, grids in rows.items()}, {}
    wanted = {run: next(some) for run, some in searches.items()}
    while wanted:
        batch = {run: [at(run, point) for point in points] for run, points in wanted.items()}
        if failed := run_all([*needed, *(r for some in batch.values() for r in some)], output, jobs):
            raise RunFailed(f"{len(failed)} runs did not finish ({', '.join(failed)}): see {output}/output")
        collect(output / TUNING)
        wanted = {}
        for run, some in batch.items():
            try:
                field_ = run.about["objective"] or one["objective"]
                wanted[run] = searches[run].send([outcome(each, output, field_) for each in some])
            except StopIteration as stop:
                found[run] = stop.value
    return found


def outcome(run, output, objective):
    """The objective at a finished run's last evaluation, or "diverged", as is a run that left out an update."""
    rows = read_metrics(output / run.name) if (output / run.name / "metrics.jsonl").exists() else []
    values = [row[objective] for row in rows if row.get(objective) is not None]
    if broke_down(record_of(run, output)) or any(row.get("left_out_updates") for row in rows):
        return "diverged"
    if not values:
        raise RunFailed(f"{run.name}: metrics.jsonl has no {objective}")
    return number(values[-1]) if math.isfinite(number(values[-1])) else "diverged"


def table(found):
    """Lines of Markdown: what came out at each value of each row's flags, and the best."""
    yield "| row | flag | at each value | best |\n|---|---|---|---|"
    for name, result in found.items():
        for flag, one in result.items():
            ends = [f"{x}: {end if isinstance(end, str) else f'{end:.4f}'}" for x, end in one["tried"].items()]
            best = "none" if one["best"] is None else f"{one['best']:g}" + " (at the edge)" * one["edge"]
            yield f"| {name} | {flag} | {', '.join(ends)} | {best} |"


def read_tuned(path):
    """tuned.json as a dict, {} without it. Raises UsageError where it is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for result in rows.values():
            for one in result.values():
                float(one["best"]), int(one["seed"])
        return rows
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: delete it and run with --tune again") from None


def with_tuned(args, one, runs, output, seeds):
    """The runs, those of tuned rows with their values. Raises UsageError where one lacks its own, or a seed is the one
    that it was tuned on."""
    if args.tuned == "none":
        return runs
    if args.tuned and not Path(args.tuned).exists():
        raise UsageError(f"--tuned {args.tuned}: there is no such file")
    files = [Path(args.tuned)] if args.tuned else [*([ROOT / one["tuned"]] if one["tuned"] else []), output / TUNED]
    rows = {name: result for path in files for name, result in read_tuned(path).items()}

    def tuned(run):
        other, own = rows.get(run.about["rate_of"], {}), rows.get(run.row, {})
        if any(flag not in own for flag in run.about["tune"]) or (run.about["rate_of"] and not other):
            raise UsageError(f"{run.row} has no tuned values: give --tune first, or --tuned none")
        if same := [some for some in (*other.values(), *own.values()) if some["seed"] in seeds]:
            raise UsageError(f"--seeds {same[0]['seed']}: {run.row} was tuned on it: drop it")
        return run.at({flag: some["best"] for result in (other, own) for flag, some in result.items()})

    return [tuned(run) if run.row else run for run in runs]
