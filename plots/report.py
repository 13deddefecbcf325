"""One self-contained page from runs of any study: its tables and figures.

    python plots/report.py results                              # writes results/report.html
    python plots/report.py runs_a runs_b --out page.html
    python plots/report.py mamba_fl/results/gap.jsonl --out page.html

DIR is a folder with run folders, at any depth, or a committed log. The page holds all it shows (figures as data URIs,
no script, no font, no link to elsewhere), so that it can be mailed and read offline.
"""

import base64
import html
import io
from argparse import Namespace
from collections import Counter
from pathlib import Path

from common.cli import Parser, run_main
from plots import tables
from plots.read import STUDIES, module, read
from plots.style import each_figure

CSS = """
body { font: 15px/1.5 sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; font-size: .82rem; } th, td { border: 1px solid #ccc; padding: .2rem .45rem; }
th { background: #eee; text-align: left; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
"""


def write(paths, out):
    """Writes the page of the runs in `paths` (folders, logs) to `out`. Returns its path."""
    notes, out = [], Path(out)
    runs = read(paths, notes=notes)
    names = [name for name in STUDIES if name in set(runs["study"])]
    endings = ", ".join(f"{n} {how}" for how, n in sorted(Counter(end["how"] for end in runs["ended"]).items()))
    title = f"Runs of {' and '.join(names)}"
    parts = [f"<h1>{title}</h1>", paragraph(f"{len(runs)} runs: {endings}.")]
    for name in names:
        mine = runs[runs["study"] == name].dropna(axis="columns", how="all")
        parts += [f"<h2>{name}</h2>", *figure_parts(name, paths, mine, notes), *table_parts(name, mine, notes)]
    commits = sorted({str(commit)[:12] for commit in runs["commit"]})
    parts += ["<h2>Notes</h2>", *map(paragraph, dict.fromkeys([f"commits: {'; '.join(commits)}", *notes]))]
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{CSS}</style>'
    body = "\n".join(filter(None, parts))
    out.parent.mkdir(parents=True, exist_ok=True)
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    out.write_text(page, encoding="utf-8")
    return out


def table_parts(name, runs, notes):
    """HTML of a study's tables, and what their columns mean."""
    table = module(name).TABLE
    for about, shared, (head, *rows) in tables.tables_of(table, runs, notes):
        yield f"<h3>{html.escape(about)}</h3>"
        yield paragraph(f"Unless said otherwise: {shared}.") if shared else ""
        lines = [cells("th", head), *(cells("td", row) for row in rows)]
        yield f'<div class="wide"><table>{"".join(lines)}</table></div>'
    yield from map(paragraph, (tables.__doc__.split("\n\n")[2], *table.words.split("\n\n")))


def figure_parts(name, paths, runs, notes):
    """HTML of every figure that the runs allow."""
    for stem, figure in each_figure(module(name).FIGURES, runs, Namespace(data_dir=paths), notes, []):
        data = io.BytesIO()
        figure.savefig(data, format="webp", dpi=90)
        words = html.escape(" ".join(f"{figure.get_suptitle()} ({stem})".split()))
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
        yield f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def paragraph(words):
    return f"<p>{html.escape(words)}</p>"


def cells(tag, row):
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def main(args):
    first = Path(args.paths[0])
    print(write(args.paths, args.out or (first if first.is_dir() else Path()) / "report.html"))


if __name__ == "__main__":
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="DIR", help="folders with run folders, or logs")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first DIR)")
    run_main(main, parser.parse_args())
