"""A study's table in Markdown: per method and setting, mean and standard deviation over seeds.

    python plots/tables.py vit_sparse_fl                           # from the study's committed logs: the README's table
    python plots/tables.py vit_sparse_fl --data-dir results        # from run folders, or from a log
    python plots/tables.py lora_glue_fl --data-dir out_fedavg --against svd
    python plots/tables.py llm_noniid --columns "val loss" "vs FedAvg" failed

One table per group of runs that may be compared; a row is one method with the settings and arguments that set it apart,
what most rows share is said above it. `±` is the sample standard deviation over seeds (n - 1 in the denominator), `-` a
value that a seed lacks or that is not finite. Differences (`vs ...`) are taken seed by seed over the seeds that both
rows have: two runs of one seed have the same shards and the same start, so that spread is the one to judge by. The
columns and what they mean are declared in plots/mamba.py, vit.py, glue.py and noniid.py, each as `TABLE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError, run_main
from plots.runs import Study, describe, like_with_like, read_runs
from plots.seeds import curves_of, interval, paired, usual

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Column:
    """One column: its head and what stands in it, `cell(curve, curves of the table) -> str`."""

    head: str
    cell: Callable


@dataclass(frozen=True)
class Table:
    """A study's table. `columns` is a tuple of Columns or a function (curves, args) -> such a tuple."""

    study: Study
    columns: object
    free: tuple = ()  # settings in which the rows of one table may differ
    first: str = "method"  # the head of the first column
    flags: Callable = lambda parser: None  # adds the study's own flags
    select: Callable = lambda runs, args: runs  # the runs that the flags ask for
    about: Callable = lambda study, setting, curves: describe(study, setting)
    text: Callable | None = None  # (runs, notes, args) -> list[str], where one group is not one table
    words: str = ""  # what its columns mean


def report(table, paths, args):
    """The tables of all groups of runs in `paths` as Markdown, with notes on the runs that were left out."""
    runs, notes = read_runs(paths, table.study, unfinished=args.unfinished)
    parts = parts_of(table, runs, notes, args)
    return "\n\n".join([*parts, *dict.fromkeys(map(str, notes))])


def parts_of(table, runs, notes, args):
    """A heading, what most rows share, and the table, for every group of the runs that the flags ask for: list[str]."""
    runs, parts = table.select(runs, args), []
    if table.text:
        return table.text(runs, notes, args)
    for setting, members in like_with_like(runs, table.free):
        curves = curves_of(members, table.free, notes=notes)
        parts += one_table(table, table.about(table.study, setting, curves), curves, args)
    return parts


def one_table(table, about, curves, args):
    """The heading, what most rows share (if anything), and the table of some curves: list[str]."""
    columns = table.columns(curves, args) if callable(table.columns) else table.columns
    if unknown := set(args.columns or ()) - {column.head for column in columns}:
        heads = ", ".join(column.head for column in columns)
        raise UsageError(f"--columns {' '.join(sorted(unknown))}: the table of {about} has {heads}")
    columns = [column for column in columns if column.head in (args.columns or [column.head])]
    rows = [[curve.label, *(column.cell(curve, curves) for column in columns)] for curve in curves]
    shared = usual(curves)
    said = [f"Unless said otherwise: {shared}."] if shared else []
    return [f"### {about}", *said, layout([[table.first, *(column.head for column in columns)], *rows])]


def layout(rows):
    """Rows of cells, the head first, as a Markdown table: the first column to the left, the others to the right."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rest])


# ---- cells


def result(head, name, factor=1.0, digits=None):
    """A Column of a result of run.json."""
    return Column(head, lambda curve, _: spread(factor * curve.results(name), digits))


def over_rounds(head, name, factor=1.0, digits=None):
    """A Column of the mean over the evaluated rounds of a field of metrics.jsonl."""
    return Column(head, lambda curve, _: spread(factor * curve.mean_over_rounds(name), digits))


def spread(values, digits=None):
    """`141.6 ± 0.5`; the mean alone for one seed; `-` where a value is missing or not finite."""
    if not len(values) or not np.isfinite(values).all():
        return "-"
    mean = values.mean()
    if digits is None:
        digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    text = f"{mean:,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):,.{digits}f}"


def difference(curve, base, name, factor=1.0, digits=2):
    """`-1.20 ± 0.30`: a result's difference to the curve `base`, seed by seed; `-` without any."""
    if base is None or base is curve:
        return "-"
    text = spread(factor * paired(curve, base, name), digits)
    return text if text.startswith("-") else "+" + text


def paired_cell(curve, base, name, factor=1.0, digits=3):
    """`+0.119 [+0.052, +0.186], 3`: a result's mean difference to the curve `base`, seed by seed, the 95 % interval of
    a paired t test (`?` of one pair), how many pairs, `2 of 3` where one is not finite; `-` without any."""
    return pairs_cell(factor * paired(curve, base, name) if base not in (None, curve) else np.array([]), digits)


def pairs_cell(every, digits=3):
    """`paired_cell` of the differences themselves."""
    pairs = every[np.isfinite(every)]
    if not len(pairs):
        return "-" if not len(every) else f"none of {len(every)} finite"
    ends = ", ".join(f"{end:+,.{digits}f}" for end in interval(pairs)) if len(pairs) > 1 else "?"
    count = f"{len(pairs)} of {len(every)}" if len(pairs) < len(every) else len(pairs)
    return f"{pairs.mean():+,.{digits}f} [{ends}], {count}"


def whole(name):
    """A Column's cell: the mean of a count, `1,368,064`."""

    def cell(curve, _):
        values = curve.results(name)
        return f"{values.mean():,.0f}" if len(values) and np.isfinite(values).all() else "-"

    return cell


def sent(curve, name):
    """Bytes in MB: one number where all seeds sent as much; `-` for runs without a federation."""
    values = curve.results(name)
    if curve.central or not len(values):
        return "-"
    return spread(values[:1] / 1e6 if np.ptp(values) == 0 else values / 1e6)


MINUTES = result("minutes", "seconds", 1 / 60, digits=1)
ROUNDS = Column("rounds", whole("rounds"))
SEEDS = Column("seeds", lambda curve, _: str(len(curve.runs)))


# ---- the command line


# study -> its module, imported when asked for: those modules import this one
STUDIES = {
    "mamba_fl": "plots.mamba",
    "vit_sparse_fl": "plots.vit",
    "lora_glue_fl": "plots.glue",
    "llm_noniid": "plots.noniid",
}


def build_parser():
    parser = Parser("Prints a study's table: what its runs reached, mean and standard deviation over seeds.")
    each = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name, place in STUDIES.items():
        one = each.add_parser(name, description=f"Prints what the runs of {name} reached.")
        one.add_argument("--data-dir", nargs="+", help="run folders or logs (default: the study's committed logs)")
        one.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
        one.add_argument("--columns", nargs="+", metavar="HEAD", help="only these columns")
        import_module(place).TABLE.flags(one)
    return parser


def main(args):
    paths = args.data_dir or sorted((ROOT / args.study / "results").glob("*.jsonl"))
    if not paths:
        raise UsageError(f"{args.study}/results has no log: give --data-dir")
    print(report(import_module(STUDIES[args.study]).TABLE, paths, args))


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
