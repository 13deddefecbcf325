"""One self-contained page from runs of any study: flags side by side, tables, how runs ended, figures.

    python plots/report.py results                              # writes results/report.html
    python plots/report.py runs_a runs_b --out page.html --no-figures
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
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #bbb; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; font-size: .82rem; } th, td { border: 1px solid #ccc; padding: .2rem .45rem; }
th { background: #eee; text-align: left; } td { vertical-align: top; } .wide { overflow-x: auto; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { font-size: .85rem; color: #333; }
"""


def write(paths, out, title=None, figures=True, unfinished=False, more=()):
    """Writes the page of the runs in `paths` (folders, logs) to `out`. Returns its path.

    more: further command lines of plots/tables.py without the study's name, whose tables it shows besides.
    """
    notes, out = [], Path(out)
    runs = read(paths, unfinished=unfinished, notes=notes)
    parts = [f"<p>{len(runs)} runs of {' and '.join(dict.fromkeys(runs['study']))}.</p>"]
    for name in STUDIES:
        mine = runs[runs["study"] == name].dropna(axis="columns", how="all")
        if len(mine):
            parts += [f"<h2>{name}</h2>", *study_parts(name, mine, notes, more)]
            parts += figure_parts(name, paths, mine, notes) if figures else []
    parts += ["<h2>Notes</h2>", *map(paragraph, dict.fromkeys([*provenance(runs), *notes]))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document(title or f"Runs of {' and '.join(dict.fromkeys(runs['study']))}", parts), encoding="utf-8")
    return out


def study_parts(name, runs, notes, more):
    """HTML of one study's tables, flags and endings."""
    table, parts = module(name).TABLE, []
    for words in ((), *more):
        args = tables.build_parser().parse_args([name, *words])
        for about, shared, cells in tables.tables_of(table, runs, args, notes):
            parts += [f"<h3>{escape(about)}</h3>", paragraph(f"Unless said otherwise: {shared}.") if shared else ""]
            parts.append(table_html(cells))
    parts += [paragraph(text) for text in (tables.__doc__.split("\n\n")[2], *table.words.split("\n\n"))]
    return [*parts, "<h3>Flags</h3>", *flag_parts(runs), "<h3>How runs ended</h3>", *ending_parts(runs)]


def flag_parts(runs):
    """A table of the flags in which runs differ, a row for all seeds; the others in a line."""
    flags = {f: [str(plain(v)) for v in runs[f]] for f in runs if f.startswith("--") and f != "--seed"}
    differ = [flag for flag, values in flags.items() if len(set(values)) > 1]
    rows = {}
    for i, seed in enumerate(runs["seed"]):
        rows.setdefault((runs["kind"].iloc[i], *(flags[flag][i] for flag in differ)), []).append(str(seed))
    cells = [["method", *differ, "seeds"], *([*values, " ".join(seeds)] for values, seeds in rows.items())]
    same = ", ".join(f"{flag} {values[0]}" for flag, values in flags.items() if flag not in differ)
    return [table_html(cells), paragraph(f"in all runs: {same}")]


def ending_parts(runs):
    """How many runs ended how; a table of those that did not simply finish."""
    counts = Counter(ended["how"] for ended in runs["ended"])
    columns = ("how", "by", "round", "clients", "reason")
    rows = [
        [run["name"], *(str(run["ended"].get(key, "-")) for key in columns)]
        for _, run in runs.iterrows()
        if run["ended"]["how"] != "finished"
    ]
    said = paragraph(", ".join(f"{n} {how}" for how, n in sorted(counts.items(), key=str)) + ".")
    return [said, table_html([["run", *columns], *rows])] if rows else [said]


def provenance(runs):
    """Commits and versions of the runs, a line each."""
    versions = {", ".join(f"{k} {v}" for k, v in some.items()) for some in runs["versions"] if some}
    for name, values in (("commits", {str(commit)[:12] for commit in runs["commit"]}), ("versions", versions)):
        yield f"{name}: {'; '.join(sorted(values))}"


def figure_parts(name, paths, runs, notes):
    """HTML of every figure that the runs allow."""
    one, parts, missing = module(name), ["<h3>Figures</h3>"], []
    args = one.build_parser().parse_args(["--data-dir", *map(str, paths)])
    for stem, figure in each_figure(one.STUDY, one.FIGURES, runs, args, notes, missing):
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=100)
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
        words = escape(" ".join(f"{figure.get_suptitle()} ({stem})".split()))
        parts.append(f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>')
    return [*parts, *map(paragraph, missing)]


# ---- HTML


def document(title, parts):
    body, title = "\n".join(filter(None, parts)), escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n'


def escape(words):
    return html.escape(str(words))


def paragraph(words):
    return f"<p>{escape(words)}</p>"


def table_html(rows):
    """Rows of cells, the head first."""
    head, *rest = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


# ---- the command line


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="DIR", help="folders with run folders, or logs")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first DIR)")
    parser.add_argument("--title", help="of the page (default: the studies' names)")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="without figures")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    return parser


def main(args):
    first = Path(args.paths[0])
    out = args.out or (first if first.is_dir() else Path()) / "report.html"
    print(write(args.paths, out, args.title, figures=args.figures, unfinished=args.unfinished))


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
