"""One self-contained page from runs of any study: tables, flags side by side, how runs ended, figures.

    python plots/report.py results                              # writes results/report.html
    python plots/report.py runs_a runs_b --out page.html
    python plots/report.py llm_noniid/results/study.jsonl --out page.html

DIR is a folder with run folders, at any depth, or a committed log. The page holds all it shows (figures as data URIs,
no script, no font, no link to elsewhere), so that it can be mailed and read offline.
"""

import base64
import html
import io
from collections import Counter
from pathlib import Path

from common.cli import Parser, run_main
from plots import tables
from plots.read import STUDIES, module, read
from plots.rows import plain
from plots.style import each_figure

CSS = """
body { font: 15px/1.5 sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; font-size: .82rem; } th, td { border: 1px solid #ccc; padding: .2rem .45rem; }
th { background: #eee; text-align: left; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
"""


def write(paths, out, more=()):
    """Writes the page of the runs in `paths` (folders, logs) to `out`. Returns its path.

    more: further command lines of plots/tables.py without the study's name, whose tables it shows besides.
    """
    notes, out = [], Path(out)
    runs = read(paths, notes=notes)
    names = [name for name in STUDIES if name in set(runs["study"])]
    title = f"Runs of {' and '.join(names)}"
    parts = [f"<h1>{title}</h1>", paragraph(f"{len(runs)} runs.")]
    for name in names:
        mine = runs[runs["study"] == name].dropna(axis="columns", how="all")
        parts += [f"<h2>{name}</h2>", *table_parts(name, mine, notes, more), *flag_parts(mine), *ending_parts(mine)]
        parts += figure_parts(name, paths, mine, notes)
    commits = sorted({str(commit)[:12] for commit in runs["commit"]})
    parts += ["<h2>Notes</h2>", *map(paragraph, dict.fromkeys([f"commits: {'; '.join(commits)}", *notes]))]
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{CSS}</style>'
    body = "\n".join(filter(None, parts))
    out.parent.mkdir(parents=True, exist_ok=True)
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    out.write_text(page, encoding="utf-8")
    return out


def table_parts(name, runs, notes, more):
    """HTML of a study's tables, and what their columns mean."""
    table = module(name).TABLE
    for words in ((), *more):
        args = tables.build_parser().parse_args([name, *words])
        for about, shared, cells in tables.tables_of(table, runs, args, notes):
            yield f"<h3>{html.escape(about)}</h3>"
            yield paragraph(f"Unless said otherwise: {shared}.") if shared else ""
            yield table_html(cells)
    yield from map(paragraph, (tables.__doc__.split("\n\n")[2], *table.words.split("\n\n")))


def flag_parts(runs):
    """A table of the flags in which runs differ, a row for all seeds; the others in a line."""
    flags = {f: [str(plain(v)) for v in runs[f]] for f in runs if f.startswith("--") and f != "--seed"}
    differ, rows = [flag for flag, values in flags.items() if len(set(values)) > 1], {}
    for i, (seed, kind) in enumerate(zip(runs["seed"], runs["kind"], strict=True)):
        rows.setdefault((kind, *(flags[flag][i] for flag in differ)), []).append(str(seed))
    cells = [["method", *differ, "seeds"], *([*values, " ".join(seeds)] for values, seeds in rows.items())]
    same = ", ".join(f"{flag} {values[0]}" for flag, values in flags.items() if flag not in differ)
    return ["<h3>Flags</h3>", table_html(cells), paragraph(f"in all runs: {same}")]


def ending_parts(runs):
    """How many runs ended how; a table of those that did not simply finish."""
    counts = Counter(ended["how"] for ended in runs["ended"])
    columns = ("how", "by", "round", "clients", "reason")
    ends = [(name, end) for name, end in zip(runs["name"], runs["ended"], strict=True) if end["how"] != "finished"]
    rows = [[name, *(str(end.get(key, "-")) for key in columns)] for name, end in ends]
    said = paragraph(", ".join(f"{n} {how}" for how, n in sorted(counts.items())) + ".")
    return ["<h3>How runs ended</h3>", said, table_html([["run", *columns], *rows]) if rows else ""]


def figure_parts(name, paths, runs, notes):
    """HTML of every figure that the runs allow."""
    one, parts, missing = module(name), ["<h3>Figures</h3>"], []
    args = one.build_parser().parse_args(["--data-dir", *map(str, paths)])
    for stem, figure in each_figure(one.STUDY, one.FIGURES, runs, args, notes, missing):
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=100)
        words = html.escape(" ".join(f"{figure.get_suptitle()} ({stem})".split()))
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
        parts.append(f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>')
    return [*parts, *map(paragraph, missing)]


def paragraph(words):
    return f"<p>{html.escape(words)}</p>"


def table_html(rows):
    """Rows of cells, the head first."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", None):
        return f'<div class="wide">{pd.DataFrame(rows[1:], columns=rows[0]).to_html(index=False)}</div>'


def main(args):
    first = Path(args.paths[0])
    print(write(args.paths, args.out or (first if first.is_dir() else Path()) / "report.html"))


if __name__ == "__main__":
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="DIR", help="folders with run folders, or logs")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first DIR)")
    run_main(main, parser.parse_args())
