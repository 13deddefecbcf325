"""Every figure's data and every table's text, from fixed run folders, against tests/goldens/figures.json.

python tests/test_figures.py                        # what differs from the goldens
python tests/test_figures.py --record NAME [NAME]   # new goldens of these names (`all`: of every one)
"""

import argparse
import json
import runpy
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import fixed_runs
import golden
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens" / "figures.json"

# golden -> (run folders: one of fixed_runs.STUDIES, command line); {out} is where figures go
FIGURES = {
    "mamba": ("mamba", "plots/plot_perplexities.py --data_dir {runs} --out_dir {out}"),
    "mamba central updates": ("mamba", "plots/visualize_deltas.py --data_dir {runs} --output_dir {out}"),
    "mamba server updates": ("mamba", "plots/visualize_federated_deltas.py --data_dir {runs} --output_dir {out}"),
    "mamba client updates": (
        "mamba",
        "plots/visualize_federated_deltas.py --data_dir {runs} --output_dir {out} --entity client",
    ),
    "mamba log": ("mamba log", "plots/plot_perplexities.py --data-dir {runs} --out-dir {out}"),
    "vit": ("vit", "plots/vit_figures.py --data-dir {runs} --out-dir {out}"),
    "vit heterogeneity at best": ("vit", "plots/vit_heterogeneity.py --data-dir {runs} --out-dir {out} --at best"),
    "vit local_steps at best": ("vit", "plots/vit_local_steps.py --data-dir {runs} --out-dir {out} --at best"),
    "vit strategies at best": ("vit", "plots/vit_strategies.py --data-dir {runs} --out-dir {out} --at best"),
    "vit log": ("vit log", "plots/vit_figures.py --data-dir {runs} --out-dir {out}"),
    "glue": ("glue", "plots/glue_figures.py --data-dir {runs} --out-dir {out}"),
    "glue log": ("glue log", "plots/glue_figures.py --data-dir {runs} --out-dir {out}"),
    "noniid": ("noniid", "plots/noniid_figures.py --data-dir {runs} --out-dir {out}"),
    "noniid log": ("noniid log", "plots/noniid_figures.py --data-dir {runs} --out-dir {out}"),
}
# one figure by name -> (the golden that has it, command line)
PARTS = {
    "mamba, one layer": ("mamba", "plots/plot_perplexities.py --config pure_ssm_1_layer"),
    "vit curves": ("vit", "plots/vit_curves.py"),
    "vit heterogeneity": ("vit", "plots/vit_heterogeneity.py"),
    "vit local_steps": ("vit", "plots/vit_local_steps.py"),
    "vit strategies": ("vit", "plots/vit_strategies.py"),
    "vit sparsity": ("vit", "plots/vit_sparsity.py"),
    "vit layers": ("vit", "plots/vit_layers.py"),
    "vit interference": ("vit", "plots/vit_interference.py"),
    "vit shards": ("vit", "plots/vit_shards.py"),
    "glue metric": ("glue", "plots/glue_metric.py"),
    "glue error": ("glue", "plots/glue_error.py"),
    "glue bytes": ("glue", "plots/glue_bytes.py"),
    "glue clients": ("glue", "plots/glue_clients.py"),
    "noniid curves": ("noniid", "plots/noniid_curves.py"),
    "noniid drift": ("noniid", "plots/noniid_drift.py"),
    "noniid clients": ("noniid", "plots/noniid_clients.py"),
    "noniid similarity": ("noniid", "plots/noniid_similarity.py"),
    "noniid partition": ("noniid", "plots/noniid_partition.py"),
    "noniid failure_map": ("noniid", "plots/noniid_failure_map.py"),
}
# golden -> (run folders, command line): what it prints, or the page it writes
TABLES = {
    "table mamba": ("mamba", "plots/summarize.py --data_dir {runs} --markdown"),
    "table mamba plain": ("mamba", "plots/summarize.py --data_dir {runs} --config pure_ssm_2_layer"),
    "table mamba log": ("mamba log", "plots/summarize.py --data_dir {runs} --markdown"),
    "table vit": ("vit", "plots/vit_table.py --data-dir {runs} --markdown"),
    "table vit plain": ("vit", "plots/vit_table.py --data-dir {runs}"),
    "table vit interference": ("vit", "plots/vit_table.py --data-dir {runs} --markdown --interference"),
    "table vit log": ("vit log", "plots/vit_table.py --data-dir {runs} --markdown"),
    "table glue": ("glue", "plots/glue_table.py --data-dir {runs} --markdown"),
    "table glue plain": ("glue", "plots/glue_table.py --data-dir {runs} --tasks cola"),
    "table glue against svd": ("glue", "plots/glue_table.py --data-dir {runs} --markdown --against svd"),
    "table glue wide": ("glue", "plots/glue_table.py --data-dir {runs} --markdown --wide --tasks cola rte"),
    "table glue log": ("glue log", "plots/glue_table.py --data-dir {runs} --markdown"),
    "table noniid": ("noniid", "plots/noniid_table.py --data-dir {runs} --markdown"),
    "table noniid plain": ("noniid", "plots/noniid_table.py --data-dir {runs} --target 4.5"),
    "table noniid log": ("noniid log", "plots/noniid_table.py --data-dir {runs} --markdown"),
    "page noniid": ("report", "llm_noniid/report.py --results-dir {runs} --no-figures --out {out}/page.html"),
    "page noniid log": ("noniid log", "llm_noniid/run_experiments.py --mode compare --results-dir {runs}"),
    "page noniid tables": ("report", "llm_noniid/run_experiments.py --mode compare --results-dir {runs}"),
}


LOGS = ("mamba log", "vit log", "glue log", "noniid log")  # many curves: their names are in the legends


class Runs:
    """The run folders of each study, written when they are first asked for."""

    def __init__(self, root):
        self.root, self.made = Path(root), {}

    def __getitem__(self, study):
        if study not in self.made:
            folder = self.root / study.replace(" ", "_")
            fixed_runs.STUDIES[study](folder)
            self.made[study] = folder
        return self.made[study]


def call(line, **places):
    """Runs a command line in this process as `python` would. Returns its exit code."""
    script, *argv = (word.format(**places) for word in line.split())
    with patch.object(sys, "argv", [script, *argv]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


def drawn(line, runs, out, coarse=False):
    """{file name: description} of the figures that a command line saves in `out`."""
    shown = []

    def savefig(figure, path, **kwargs):  # the file's text says whose it is, under whatever name it ends
        Path(path).write_text(str(len(shown)))
        shown.append(golden.describe(figure, coarse))

    with patch.object(Figure, "savefig", savefig), redirect_stdout(StringIO()):
        assert call(line, runs=runs, out=out) == 0
    return {path.name: shown[int(path.read_text())] for path in sorted(out.iterdir())}


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


def printed(line, runs, out):
    """The lines that a command line prints, those of its page if it writes one, without machine paths."""
    said = StringIO()
    with redirect_stdout(said):
        assert call(line, runs=runs, out=out) == 0
    page = out / "page.html"
    lines = said.getvalue().splitlines()
    if page.exists():
        lines = [golden.words(x) for x in Page(page.read_text(encoding="utf-8")).lines]
    return [line.replace(str(runs), "RUNS") for line in lines if line.strip()]


def shown(name, runs, out):
    """What the golden of this name should be."""
    if name in TABLES:
        study, line = TABLES[name]
        return printed(line, runs[study], out)
    if name in FIGURES:
        study, line = FIGURES[name]
        return drawn(line, runs[study], out, coarse=study in LOGS)
    whole, line = PARTS[name]
    return drawn(line + " --data-dir {runs} --out-dir {out}", runs[FIGURES[whole][0]], out)


def check(name, goldens, now):
    """Fails with the places where they differ."""
    if name in PARTS:  # the golden is the names of its figures, which are those of the whole set
        whole = goldens[PARTS[name][0]]
        wrong = golden.differences(goldens[name], sorted(now))
        wrong += golden.differences({file: whole[file] for file in now if file in whole}, now)
    else:
        wrong = golden.differences(goldens[name], now)
    assert not wrong, f"{name}: {len(wrong)} differences\n" + "\n".join(wrong[:20])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def goldens():
    return read()


@pytest.mark.parametrize("name", [*FIGURES, *PARTS, *TABLES])
def test_what_is_shown_is_what_was_shown(name, runs, goldens, tmp_path):
    check(name, goldens, shown(name, runs, tmp_path))


def read():
    return json.loads(GOLDENS.read_text(encoding="utf-8")) if GOLDENS.exists() else {}


def write(goldens):
    """A figure on a line, a line of a table on a line."""
    parts = []
    for name in [name for name in (*FIGURES, *PARTS, *TABLES) if name in goldens]:
        value = goldens[name]
        if isinstance(value, dict):
            lines = [f"  {json.dumps(file)}: {_json(about)}" for file, about in value.items()]
        else:
            lines = [f"  {_json(line)}" for line in value]
        ends = "{}" if isinstance(value, dict) else "[]"
        parts.append(f" {json.dumps(name)}: {ends[0]}\n" + ",\n".join(lines) + f"\n {ends[1]}")
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*FIGURES, *PARTS, *TABLES]
    parser.add_argument("--record", nargs="+", choices=[*every, "all"], default=[], metavar="NAME")
    record = parser.parse_args().record
    goldens = read()
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "runs")
        for i, name in enumerate(every if not record or "all" in record else record):
            out = Path(folder) / f"out_{i}"
            out.mkdir()
            now = shown(name, runs, out)
            if record:
                goldens[name] = sorted(now) if name in PARTS else now
            try:
                check(name, goldens, now)
            except (AssertionError, KeyError) as error:
                print(error)
    if record:
        write(goldens)


if __name__ == "__main__":
    main()
