"""A study's tables in Markdown: per method and setting, mean and standard deviation over seeds.

    python plots/tables.py vit_sparse_fl                           # from the study's committed logs, one after another
    python plots/tables.py vit_sparse_fl --data-dir results        # from run folders, or from a log
    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl --holm

One table per group of runs that may be compared; a row is one method with the settings and flags that set it apart,
what most rows share is said above it. `±` is the sample standard deviation over seeds (n - 1 in the denominator), `-` a
value that a seed lacks or that is not finite. Differences (`vs ...`) are taken seed by seed over the seeds that both
rows have; the number behind them says how many. --holm prints every comparison of the tables with its p value, and
that after Holm's correction over all of a log's. The columns are declared in plots/mamba.py, vit.py, glue.py and
noniid.py, each as `TABLE`, which says what they mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError, run_main
from plots.pairs import Cell, holm, spread
from plots.read import STUDIES, Study, module, read
from plots.rows import comparable, describe, usual

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Table:
    """A study's tables. `columns` is {head: cell(row, rows of the table) -> str}, or a function (rows) of it."""

    study: Study
    columns: object
    words: str  # what its columns mean
    place: Callable | None = None  # a sort key of a table's setting (default: those with most runs first)
    further: Callable = lambda runs: (runs, [])  # -> (runs of the usual tables, tables of another form that follow)
    first: str = "method"  # the head of the first column


def tables_of(table, runs, notes, heads=None):
    """list[(heading, what most rows share, [[cell]])], the head first; heads: the columns (default: all)."""
    runs, further = table.further(runs)
    found, every = [], comparable(runs, table.study, notes)
    for setting, rows in sorted(every, key=lambda one: table.place(one[0])) if table.place else every:
        columns = table.columns(rows) if callable(table.columns) else table.columns
        columns = {head: cell for head, cell in columns.items() if head in (heads or columns)}
        cells = [[row.label, *(cell(row, rows) for cell in columns.values())] for row in rows]
        found += [(describe(table.study, setting), usual(rows), [[table.first, *columns], *cells])]
    return found + further


def text_of(tables, with_holm=False):
    """Tables as Markdown."""
    parts = []
    for about, shared, cells in tables:
        parts += [f"### {about}", *([f"Unless said otherwise: {shared}."] if shared else []), layout(cells)]
    return "\n\n".join([*parts, *(holm_parts(tables) if with_holm else [])])


def holm_parts(tables):
    """A heading with the number of comparisons, and a table that names the row and column of each."""
    found = [
        (about, row[0], head, cell)
        for about, _, (heads, *rows) in tables
        for row in rows
        for head, cell in zip(heads, row, strict=True)
        if isinstance(cell, Cell) and cell.p == cell.p
    ]
    corrected = holm([cell.p for *_, cell in found])
    rows = [[*one, f"{one[-1].p:.3g}", f"{p:.3g}"] for one, p in zip(found, corrected, strict=True)]
    names = len({one[:2] for one in found})
    heading = f"### Holm's correction over {len(found)} comparisons of {names} rows"
    return [heading, layout([["table", "row", "column", "comparison", "p", "after Holm"], *rows])]


def layout(rows):
    """Rows of cells, the head first, as a Markdown table."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rest])


# ---- cells


def result(name, factor=1.0, digits=None):
    """A cell of a result of run.json."""
    return lambda row, _: spread(factor * row.results(name), digits)


def over_rounds(name, factor=1.0, digits=None):
    """A cell of the mean over the evaluated rounds of a field of metrics.jsonl."""
    return lambda row, _: spread(factor * row.mean_over_rounds(name), digits)


def whole(name):
    """A cell of the mean of a count, `1,368,064`."""

    def cell(row, _):
        values = row.results(name)
        return f"{values.mean():,.0f}" if len(values) and np.isfinite(values).all() else "-"

    return cell


def sent(name):
    """A cell of bytes in MB: one number where all seeds sent as much; `-` for runs without a federation."""

    def cell(row, _):
        values = row.results(name)
        if row.central or not len(values):
            return "-"
        return spread(values[:1] / 1e6 if np.ptp(values) == 0 else values / 1e6)

    return cell


def seeds(row, _):
    return str(len(row.runs))


# ---- the command line


def build_parser():
    parser = Parser("Prints a study's tables: what its runs reached, mean and standard deviation over seeds.")
    each = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name in STUDIES:
        one = each.add_parser(name, description=f"Prints what the runs of {name} reached.")
        one.add_argument("--data-dir", nargs="+", help="run folders or logs (default: the study's committed logs)")
        one.add_argument("--columns", nargs="+", metavar="HEAD", help="only these columns")
        one.add_argument("--holm", action="store_true", help="p values, and Holm's correction over all of them")
    return parser


def main(args):
    # a committed log is a study of its own, with its own rates: its rows are compared with each other
    logs = sorted((ROOT / args.study / "results").glob("*.jsonl"))
    paths, parts = [args.data_dir] if args.data_dir else [[log] for log in logs], []
    if not paths:
        raise UsageError(f"{args.study}/results has no log: give --data-dir")
    table = module(args.study).TABLE
    for some in paths:
        runs = read(some, table.study, notes=(notes := []))
        parts += [text_of(tables_of(table, runs, notes, args.columns), args.holm), *dict.fromkeys(notes)]
    print("\n\n".join(parts))


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
