"""The command lines that draw figures and print tables, run in the test's process."""

import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]

FIGURES = {
    "vit": "curves heterogeneity local_steps strategies sparsity layers interference shards",
    "glue": "metric losses error bytes clients",
    "noniid": "curves drift clients cost_map similarity partition",
}
# name -> command line; `vit` draws every figure of that study, `vit curves` one of them, `table vit` prints its table
COMMANDS = {
    "mamba": "plots/plot_perplexities.py",
    "mamba gap": "plots/mamba_gap.py",
    "mamba central updates": "plots/visualize_deltas.py",
    "mamba federated updates": "plots/visualize_federated_deltas.py",
    **{study: f"plots/{study}.py" for study in FIGURES},
    **{f"{study} {name}": f"plots/{study}.py {name}" for study, names in FIGURES.items() for name in names.split()},
    "noniid corrections": "plots/noniid.py corrections",  # of runs with --drift-samples alone
    "glue replay": "plots/glue.py replay",  # of runs with --replay alone
    "table mamba": "plots/tables.py mamba_fl",
    "table vit": "plots/tables.py vit_sparse_fl",
    "table glue": "plots/tables.py lora_glue_fl",
    "table noniid": "plots/tables.py llm_noniid",
    "page": "plots/report.py --no-figures",
    "page noniid": "llm_noniid/report.py --no-figures",
    "compare noniid": "llm_noniid/run_experiments.py --mode compare",
}
STUDIES = ("mamba", "vit", "glue", "noniid")


def command_line(name, runs, out, more=""):
    """The words of a command on the run folders in `runs`; a figure's or page's goes into `out`."""
    if name == "page":
        places = [runs, "--out", f"{out}/page.html"]
    elif name.endswith(" noniid") and not name.startswith("table"):
        places = ["--results-dir", runs, *(["--out", f"{out}/page.html"] if name.startswith("page") else [])]
    else:
        places = ["--data-dir", runs, *([] if name.startswith("table") else ["--out-dir", out])]
    return [*COMMANDS[name].split(), *map(str, places), *more.split()]


def call(words):
    """Runs `python WORDS` in this process. Returns (exit code, stdout, stderr)."""
    out, err, code = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", list(words)), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def run(name, runs, more="", out=None):
    """(what a command prints, the matplotlib figures that it would draw, each with its number in the file)."""
    drawn = []

    def savefig(figure, path, **kwargs):  # the file's text says whose it is, under whatever name it ends
        Path(path).write_text(str(len(drawn)))
        drawn.append(figure)

    with patch.object(Figure, "savefig", savefig):
        code, text, error = call(command_line(name, runs, out or Path(runs) / "plots", more))
    assert code == 0, error
    return text, drawn


def figures(name, runs, more="", out=None):
    """{file name: matplotlib figure} of what a command draws, without drawing it."""
    _, drawn = run(name, runs, more, out)
    return {path.name: drawn[int(path.read_text())] for path in sorted(Path(out or Path(runs) / "plots").iterdir())}


def printed(name, runs, more="", out=None):
    """The text that a command prints; of the page that it writes, the text without tags."""
    text, _ = run(name, runs, more, out or runs)
    page = Path(out or runs) / "page.html"
    if page.exists():
        text = "\n".join(" ".join(line.split()) for line in Page(page.read_text(encoding="utf-8")).lines)
    return text


def refused(name, runs, more=""):
    """The line with which a command refuses its input: exit code 2, nothing written."""
    out = Path(runs) / "plots"
    code, _, error = call(command_line(name, runs, out, more))
    assert code == 2 and error.count("\n") == 1 and not out.exists(), (name, code, error)
    return error


def tables(name, runs, more=""):
    """[(heading, {first cell: {column: cell}})] of the Markdown tables that a command prints."""
    found = []
    for line in printed(name, runs, more).splitlines():
        if line.startswith("### "):
            found.append((line[4:], []))
        elif line.startswith("| "):
            found[-1][1].append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return [
        (heading, {row[0]: dict(zip(head, row, strict=True)) for row in rows}) for heading, (head, _, *rows) in found
    ]


def table(name, runs, more=""):
    """{first cell: {column: cell}} of a command's only table."""
    ((_, rows),) = tables(name, runs, more)
    return rows


def lines_of(axes):
    """{label: line} of the lines that have one."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def ticks(axis):
    """The labels at an axis' ticks, each on one line."""
    return [" ".join(label.get_text().split()) for label in axis.get_ticklabels()]


def texts_of(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


class Page(HTMLParser):
    """The lines of a page's text; of its pictures, the points of lines and the letters."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.hidden = [""], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.hidden += tag == "style"
        if tag in ("p", "h1", "h2", "h3", "tr", "figure", "summary", "polyline", "pre", "svg"):
            self.lines.append("")
        elif tag in ("td", "th"):
            self.lines[-1] += " | "
        self.lines[-1] += dict(attributes).get("points") or ""

    def handle_endtag(self, tag):
        self.hidden -= tag == "style"

    def handle_data(self, data):
        if not self.hidden:
            self.lines[-1] += data.replace("\n", " ")
