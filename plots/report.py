"""One self-contained page from runs of any study: flags side by side, tables, endings and alarms, figures.

    python plots/report.py results                              # writes results/report.html
    python plots/report.py runs_a runs_b --out page.html --no-figures
    python plots/report.py llm_noniid/results/study.jsonl --out page.html

DIR is a folder with run folders, at any depth, or a committed log. The page holds all it shows (figures as data URIs,
no script, no font, no link to elsewhere), so that it can be mailed and read offline. Of each study that has runs there:

    flags           those in which runs of one group differ, a row per method; then the others
    table           plots/tables.py's: mean and standard deviation over seeds, differences seed by seed
    endings         runs that did not simply finish (by which alarm, round, clients), and every alarm
    figures         all that the runs allow, as the study's own script draws them

A study's own words go on top: `write(paths, out, title, lead)` takes them as HTML, made with the helpers here
(llm_noniid/report.py: paired differences).
"""

import base64
import html
import io
from collections import Counter
from importlib import import_module
from pathlib import Path

from common.cli import Parser, UsageError, run_main
from common.curves import save_figure
from plots import tables
from plots.runs import like_with_like, read_runs, text
from plots.seeds import curves_of
from plots.style import each_figure

HOW = tables.__doc__[tables.__doc__.index("One table per") :] + "\n"
CSS = """
body { font: 15px/1.5 sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #bbb; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; font-size: .82rem; } th, td { border: 1px solid #ccc; padding: .2rem .45rem; }
th { background: #eee; text-align: left; } td { vertical-align: top; }
.wide { overflow-x: auto; } .wide td:first-child, .status { white-space: nowrap; } .beside td { color: #555; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { font-size: .85rem; color: #333; }
summary { cursor: pointer; }
"""


def write(paths, out, title=None, lead="", figures=True, unfinished=False, keep=None):
    """Writes the page of the runs in `paths` (folders, logs) to `out`. Returns its path.

    Args: title: default: the studies' names; lead: HTML that stands before the first table; keep: a folder that gets
        the figures as files, too. Raises UsageError without a run.
    """
    from common.checkpoint import saving  # torch, which --help must not wait for

    paths, out = [Path(path) for path in paths], Path(out)
    modules = {name: import_module(place) for name, place in tables.STUDIES.items()}
    studies = [module.STUDY for module in modules.values()]
    runs, notes = read_runs(paths, *studies, unfinished=unfinished)
    if not runs:
        raise UsageError(f"no finished run in {', '.join(map(str, paths))}: train first, or give other folders")
    every, _ = read_runs(paths, *studies, unfinished=True)
    there = [name for name, module in modules.items() if any(run.study is module.STUDY for run in runs)]
    count = len(runs)
    parts = [f"<p>{count} run{'s' * (count != 1)} of {' and '.join(there)}.</p>", lead]
    missing, said = [], list(notes)
    for name in there:
        mine, all_mine = ([run for run in some if run.study.name == name] for some in (runs, every))
        of_tables, of_figures = [], list(notes)  # a figure's caption says what it leaves out, not what others do
        parts += study_parts(name, modules[name], mine, all_mine, of_tables)
        if figures:
            parts += figure_parts(modules[name], paths, mine, of_figures, missing, keep)
        said += [*of_tables, *of_figures]
    said = [*dict.fromkeys(map(str, said)), *(f"not drawn: {line}" for line in missing)]
    parts += ["<h2>Notes</h2>", *map(paragraph, [*provenance(every), *said])]
    page = document(title or f"Runs of {' and '.join(there)}", parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".new")
    with saving(out, fresh):
        fresh.write_text(page, encoding="utf-8")
        fresh.replace(out)
    return out


def study_parts(name, module, runs, every, notes):
    """HTML of one study's flags, table and endings: list[str]."""
    args = tables.build_parser().parse_args([name])
    table = module.TABLE
    parts = [f"<h2>{escape(name)}</h2>"]
    for setting, members in like_with_like(runs, table.free):
        curves = curves_of(members, table.free, notes=notes)
        parts += [f"<h3>{escape(table.about(module.STUDY, setting, curves))}: flags</h3>", *flag_parts(curves)]
    parts += ["<h3>What runs reached</h3>", details("how to read the tables", prose(HOW + table.words))]
    parts += from_markdown(tables.parts_of(table, runs, notes, args))
    return [*parts, "<h3>How runs ended</h3>", *ending_parts(every)]


# ---- flags, endings, provenance


def flag_parts(curves):
    """A table of the flags in which those that read them differ, a row per method; the others are below, folded in."""
    values = [{name: text(v) for name, v in curve.runs[0].method.items() if name != "seed"} for curve in curves]
    names = list(dict.fromkeys(name for flags in values for name in flags))
    given = {name: [flags[name] for flags in values if name in flags] for name in names}
    differ = [name for name in names if len(set(map(str, given[name]))) > 1]
    rows = [["method", *differ, "seeds"]]
    for curve, flags in zip(curves, values, strict=True):
        seeds = " ".join(str(run.seed) for run in curve.runs)
        rows.append([curve.label, *("" if flags.get(name) is None else str(flags[name]) for name in differ), seeds])
    same = [f"--{name.replace('_', '-')} {given[name][0]}" for name in names if name not in differ]
    parts = [table_html(rows)] if len(curves) > 1 else [paragraph(f"{rows[1][0]}, seeds {rows[1][-1]}")]
    return [*parts, details(f"{len(same)} flags that do not differ", paragraph(", ".join(same)))]


def ending_parts(runs):
    """How many runs ended how; a table of those that did not simply finish, and of every alarm."""
    counts = Counter(run.ended["how"] for run in runs)
    rows = [["run", "ended or alarm", "by", "round", "clients", "value", "threshold", "message"]]
    for run in runs:
        how, by, t, clients, reason = (run.ended.get(key) for key in ("how", "by", "round", "clients", "reason"))
        if how != "finished":
            rows.append([run.name, how, by, t, clients, None, None, reason])
        for alarm in (alarm for row in run.rows for alarm in row.get("alarms") or []):
            limits = [v if v is None else f"{v:.3g}" for v in (alarm.get("value"), alarm.get("threshold"))]
            rows.append([run.name, "alarm", alarm.get("detector"), alarm.get("round"), None, *limits])
            rows[-1].append(alarm.get("message"))
    said = paragraph(", ".join(f"{n} {how}" for how, n in sorted(counts.items(), key=str)) + ".")
    if len(rows) == 1:
        return [said, paragraph("No alarm in any run.")]
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return [said, details(f"{len(rows) - 1} endings and alarms", table_html(cells))]


def provenance(runs):
    """Commits, versions and devices of the runs, a line each."""
    commits = {str(run.commit)[:12] for run in runs}
    versions = {", ".join(f"{k} {v}" for k, v in run.versions.items()) for run in runs}
    devices = {", ".join(f"{k} {v}" for k, v in run.resolved.items()) for run in runs}
    parts = (("commits", commits), ("versions", versions), ("devices", devices))
    return [f"{name}: {'; '.join(sorted(values))}" for name, values in parts if any(values)]


# ---- figures


def figure_parts(module, paths, runs, notes, missing, keep=None):
    """HTML of every figure that the runs allow: list[str]; what could not be drawn goes into `missing`."""
    args = module.build_parser().parse_args(["--data-dir", *map(str, paths)])
    parts = []
    for stem, figure in each_figure(module.FIGURES.values(), runs, notes, missing, args, module.STUDY.keys):
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
        words = escape(" ".join(f"{figure.get_suptitle()} ({stem})".split()))
        parts.append(f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>')
        if keep:
            save_figure(figure, Path(keep) / f"{stem}.png")
    return ["<h3>Figures</h3>", *parts] if parts else []


# ---- HTML


def document(title, parts):
    body, title = "\n".join(filter(None, parts)), escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n'


def escape(words):
    return html.escape(str(words))


def paragraph(words):
    return f"<p>{escape(words)}</p>"


def details(summary, inside):
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def prose(words):
    """A docstring's paragraphs; what is indented stays as it is."""
    parts = words.replace("`", "").strip("\n").split("\n\n")
    shown = (
        f"<pre>{escape(part.rstrip())}</pre>" if part.startswith("    ") else paragraph(" ".join(part.split()))
        for part in parts
    )
    return "".join(shown)


def table_html(rows):
    """Rows of cells, the head first."""
    head, *rest = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def from_markdown(parts):
    """The Markdown of plots/tables.py (headings, paragraphs, tables) as HTML: list[str]."""
    shown = []
    for part in parts:
        if part.startswith("### "):
            shown.append(f"<h4>{escape(part[4:])}</h4>")
        elif part.startswith("| "):
            head, _, *rest = [line[2:-2].split(" | ") for line in part.splitlines()]
            shown.append(table_html([head, *rest]))
        else:
            shown.append(paragraph(part))
    return shown


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
