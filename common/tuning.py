"""Rates for each row of a study: --tune runs every setting at some values of a flag and keeps the best on validation.

    python mamba_fl/run_study.py --preset quick --tune lr 1e-3 2e-3 4e-3 --tune server-lr 0.3 1

best = argmin over the values of `Preset.objective` at a run's last evaluation, never of the test split; a run that
diverged is worse than any other. A best at the edge of the values extends them there by the ratio of the last two, at
most EXTENSIONS times a side. Of two flags the first is tuned at the setting's own value of the second, then the second
at the first's best. A setting with `tuned_as` takes that one's values; its own flags are tuned after and at them.

The runs are ordinary ones below OUTPUT/tuning/ (a log of their own: results.jsonl), with a seed that the table does not
use. OUTPUT/tuned.json gets {setting: {flag: {best, edge, tried: {value: objective or "diverged"}, objective, seed,
words}}}; the same command without --tune runs the settings with these values as their last flags.
"""

import json
import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

from common import grid, records
from common.cli import RunFailed, UsageError
from common.curves import number, read_metrics

TUNED = "tuned.json"
EXTENSIONS = 3
MACHINE = ("--data-root", "--cache-dir", "--device", "--threads")  # flags that decide nothing of a run


def run_study(args, preset, runs, show=(), prepare=None, also=()):
    """`grid.run_study` with the tuned values that there are; with --tune the search for them. Returns the exit code."""
    if args.tune is None:
        return grid.run_study(args, with_tuned(args, preset, runs), show, prepare, also)
    try:
        return tune(args, preset, runs, prepare, also)
    except KeyboardInterrupt as error:
        error.add_note(grid.GOES_ON)
        raise


# ---- the search


def tune(args, preset, runs, prepare=None, also=()):
    """All of --tune: runs, log, tuned.json, table. Args: runs: one of each setting, and what these need.

    Raises UsageError where a script refuses a run, before anything is written; RunFailed where a run failed for
    another reason than that it diverged, or every value of a setting diverged.
    """
    output, given, rows, found, made = Path(args.output_dir), _values(args.tune), {}, {}, {}
    for run in runs:
        if run.setting and (values := given or _values([(flag, *xs) for flag, xs in run.setting.tune.items()])):
            rows[run] = values
    if not rows:
        raise UsageError("--tune: none of these settings has values of its own: give --tune FLAG X1 X2")
    kept = read(output / TUNED) if (output / TUNED).exists() else {}
    tuned = {*kept, *(run.setting.name for run in rows)}
    if lacking := [run.setting for run in rows if run.setting.tuned_as not in ("", *tuned)]:
        raise UsageError(f"{lacking[0].name} takes what {lacking[0].tuned_as} is tuned to: --tune that first, or too")
    needed = [run for run in runs if run.name in {row.needs for row in rows}]
    points = [(run, flag, x) for run, grids in rows.items() for flag, xs in grids.items() for x in xs]
    grid.check([*needed, *(at(run, {flag: x}) for run, flag, x in points), *also], output)
    if args.plan:
        first = [at(run, {flag: x}) for run, flag, x in points if flag == next(iter(rows[run]))]
        grid.put(grid.planned(needed + first, output))
        more = sum(2 * EXTENSIONS * len(grids) for grids in rows.values())
        grid.put([f"# {len(points)} runs, and at most {more} more where a best is at an edge"])
        return 0
    if prepare:
        prepare()
    records.collect(output / records.TUNING)  # from now on a grid of its own
    for later in (False, True):  # whose values others take, and who takes them
        some = {_taking(run, kept): grids for run, grids in rows.items() if bool(run.setting.tuned_as) == later}
        results, of = search_all(some, needed, output, preset, grid.jobs_of(args))
        for run, row in results.items():
            about = {"objective": run.setting.objective or preset.objective, "seed": args.tune_seed, "words": told(run)}
            found[run] = {flag: one | about for flag, one in row.items()}
            kept[run.setting.name] = found[run]
        made |= of
    broken = [name for name, row in kept.items() if any(one["best"] is None for one in row.values())]
    from common.checkpoint import write_json  # torch, which --plan must not wait for

    write_json(output / TUNED, {name: row for name, row in kept.items() if name not in broken})
    grid.put(table(found, made, output, preset.objective))
    if broken:
        raise RunFailed(f"diverged at every value: {', '.join(broken)}: give lower ones")
    print(output / TUNED)
    return 0


def _taking(run, kept):
    """The run with the values that its setting takes from another. Args: kept: what was found of each."""
    taken = kept.get(run.setting.tuned_as, {})
    return with_flags(run, {flag: one["best"] for flag, one in taken.items() if one["best"] is not None})


def search_all(rows, needed, output, preset, jobs):
    """Runs the searches of all rows {run: {flag: values}} at once: ({run: what was found}, {run: the runs of it})."""
    searches = {run: search(grids, preset.higher) for run, grids in rows.items()}
    wanted = {run: next(one) for run, one in searches.items()}
    found, made = {}, {run: [] for run in rows}
    while wanted:
        batch = {run: [at(run, point) for point in points] for run, points in wanted.items()}
        good = [one for ones in batch.values() for one in ones if grid.read_flags(one.command)[0] != 2]
        failed = grid.run_all([*needed, *good], output, jobs)
        records.collect(output / records.TUNING)
        if failed:
            raise RunFailed(f"{len(failed)} runs did not finish ({', '.join(failed)}): see {output}/output")
        wanted = {}
        for run, ones in batch.items():
            objective = run.setting.objective or preset.objective
            made[run] += [one for one in ones if one in good]
            try:
                ends = [outcome(one, output, objective) if one in good else "refused" for one in ones]
                wanted[run] = searches[run].send(ends)
            except StopIteration as stop:
                found[run] = stop.value
    return found, made


def _values(lines):
    """{flag: values, ascending} of [[flag, value, ...], ...]; those without a flag say nothing. Raises UsageError."""
    found = {}
    for flag, *words in filter(None, lines):
        flag, said = flag.replace("_", "-"), f"--tune {' '.join(map(str, (flag, *words)))}"
        try:
            values = sorted({rounded(float(word)) for word in words})
        except ValueError:
            values = []
        if len(values) < 2 or len(values) < len(words) or not (values[0] > 0 and math.isfinite(values[-1])):
            raise UsageError(f"{said}: give a flag and at least two different numbers above 0")
        if flag in found:
            raise UsageError(f"{said}: the flag is there twice: drop one")
        found[flag] = values
    return found


def rounded(x):
    """x to the six digits that command lines and folders show."""
    return float(f"{x:g}")


def search(grids, higher=False):
    """The search for a row's best values: yields points [{flag: value}], is sent a list of what came out at them.

    Args: grids: {flag: values}; higher: whether more is better. What is sent: a number, or a word where there is none
    ("diverged"). Returns {flag: {best (None: no value gave a number), edge: whether it is at one, tried}}.
    """

    def badness(one):
        return math.inf if isinstance(one, str) else -one if higher else one

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
        shown = {f"{x:g}": tried[x] for x in order}
        found[flag] = {"best": best if good else None, "edge": best == edge, "tried": shown}
        if not good:
            break
        chosen[flag] = best
    return found


def at(run, point):
    """The run of a setting at a point {flag: value}, in the tuning folder."""
    *words, seed, n, output, place, name, called, resume = with_flags(run, point).command
    suffix = "".join(f"_{flag.replace('-', '_')}_{x:g}" for flag, x in point.items())
    line = (*words, seed, n, output, f"{place}/{records.TUNING}", name, f"{called}{suffix}", resume)
    return replace(run, name=f"{records.TUNING}/{run.name}{suffix}", command=line)


def with_flags(run, point):
    """A run of `grid.expand` with these flags behind its setting's own: the last one wins."""
    words, places = run.command[:-7], run.command[-7:]
    return replace(run, command=(*words, *(w for flag, x in point.items() for w in (f"--{flag}", f"{x:g}")), *places))


def outcome(run, output, objective):
    """The objective at a finished run's last evaluation, or "diverged", as is a run that left out an update."""
    if records.broke_down(records.read_record(output / run.name / run.record)):
        return "diverged"
    rows = read_metrics(output / run.name)
    if any(row.get("left_out_updates") for row in rows):
        return "diverged"
    values = [row[objective] for row in rows if row.get(objective) is not None]
    if not values:
        raise RunFailed(f"{run.name}: metrics.jsonl has no {objective}")
    return number(values[-1]) if math.isfinite(number(values[-1])) else "diverged"


def table(found, made, output, objective):
    """Lines of Markdown: settings x flags, what came out at each value, the best, runs and minutes."""
    yield f"| setting | flag | {objective} at each value | best | runs | minutes |\n|---|---|---|---|---|---|"
    spent = {run: [_seconds(output / one.name) / 60 for one in ones] for run, ones in made.items()}
    for run, row in found.items():
        for i, (flag, one) in enumerate(row.items()):
            ends = [f"{x}: {end if isinstance(end, str) else f'{end:.4f}'}" for x, end in one["tried"].items()]
            best = "none" if one["best"] is None else f"{one['best']:g}"
            best += f" (at the edge after {EXTENSIONS} more)" if one["edge"] else ""
            budget = f"{len(spent[run])} | {sum(spent[run]):.1f}" if i == 0 else "|"
            name = f"{run.setting.name} ({own})" if (own := run.setting.objective) else run.setting.name
            yield f"| {name} | {flag} | {', '.join(ends)} | {best} | {budget} |"
    yield f"{sum(map(len, spent.values()))} runs, {sum(map(sum, spent.values())):.1f} minutes"


def _seconds(folder):
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return rows[-1].get("seconds", 0) if rows else 0


# ---- what was found


def told(run):
    """The words of a run's setting that decide what is computed, as a command line; of places only the last name."""
    words = [run.setting.script]
    for word in run.setting.words:
        words.append(Path(word).name if "/" in word else word)
        if words[-2] in MACHINE:
            del words[-2:]
    return shlex.join(words)


def with_tuned(args, preset, runs):
    """The runs, those of tuned settings with their values. Raises UsageError where a setting is another than the one
    that was tuned, or a seed is the one that it was tuned on."""
    rows = {}
    files = [grid.ROOT / preset.tuned] if preset.tuned else []
    files += [path for path in [Path(args.output_dir) / TUNED] if path.exists()]
    files = files if args.tuned is None else [] if args.tuned == "none" else [Path(args.tuned)]
    for path in files:
        rows |= {name: (path, row) for name, row in read(path).items()}

    def with_both(run):
        of = run.setting
        other, own = (rows.get(name, (None, {})) for name in (of.tuned_as, of.name))
        if args.tuned != "none":
            if missing := [flag for flag in of.tune if flag not in own[1]]:
                raise UsageError(f"{of.name} has no tuned --{missing[0]}: give --tune first, or --tuned none")
            if of.tuned_as and not other[1]:
                raise UsageError(f"{of.name} takes what {of.tuned_as} is tuned to: --tune that first, or --tuned none")
        return _tuned(_tuned(run, args, *other, another=True), args, *own)

    return [with_both(run) if run.setting else run for run in runs]


def _tuned(run, args, path, row, another=False):
    for flag, one in row.items():
        old, new = shlex.split(one["words"]), shlex.split(told(run))
        if old != new and not another:
            i = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            then, now = (" ".join(words[max(0, i - 1) : i + 1]) for words in (old, new))
            text = f"{path}: {run.setting.name} was tuned with other flags ({then}; now {now})"
            raise UsageError(f"{text}: run it with --tune again, or give --tuned none")
        if one["seed"] in args.seeds:
            raise UsageError(f"--seeds {one['seed']}: {path} tuned --{flag} of {run.setting.name} on it: drop it")
    return with_flags(run, {flag: one["best"] for flag, one in row.items()})


def read(path):
    """tuned.json as a dict. Raises UsageError without it and where it is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows.values():
            for one in row.values():
                float(one["best"]), shlex.split(one["words"]), int(one["seed"])
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give the tuned.json that --tune wrote") from None
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: delete it and run with --tune again") from None
    return rows
