"""Every figure's data and every table's text, from fixed run folders, against tests/goldens/figures.json.

python tests/test_figures.py --record NAME [NAME]   # new goldens of these names (`all`: of every one)
"""

import argparse
import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import fixed_runs
import golden
import plotting
import pytest

GOLDENS = Path(__file__).parent / "goldens" / "figures.json"
LOGS = ("mamba log", "vit log", "glue log", "noniid log")  # many curves: their names are in the legends

# golden -> (run folders: one of fixed_runs.STUDIES, one of plotting.COMMANDS, further flags)
FIGURES = {
    "mamba": ("mamba", "mamba", ""),
    "mamba central updates": ("mamba", "mamba central updates", ""),
    "mamba server updates": ("mamba", "mamba federated updates", ""),
    "mamba client updates": ("mamba", "mamba federated updates", "--entity client"),
    "mamba log": ("mamba log", "mamba", ""),
    "vit": ("vit", "vit", ""),
    "vit heterogeneity at best": ("vit", "vit heterogeneity", "--at best"),
    "vit local_steps at best": ("vit", "vit local_steps", "--at best"),
    "vit strategies at best": ("vit", "vit strategies", "--at best"),
    "vit log": ("vit log", "vit", ""),
    "glue": ("glue", "glue", ""),
    "glue log": ("glue log", "glue", ""),
    "noniid": ("noniid", "noniid", ""),
    "noniid log": ("noniid log", "noniid", ""),
}
# a figure by its name -> the same: its golden is which of its study's figures it draws
PARTS = {
    "mamba, one layer": ("mamba", "mamba", "--config pure_ssm_1_layer"),
    **{f"{s} {name}": (s, f"{s} {name}", "") for s, names in plotting.FIGURES.items() for name in names.split()},
}
# golden -> the same: what is printed, or the text of the page that is written
TABLES = {
    "table mamba": ("mamba", "table mamba", ""),
    "table mamba plain": ("mamba", "table mamba", "--config pure_ssm_2_layer"),
    "table mamba log": ("mamba log", "table mamba", ""),
    "table vit": ("vit", "table vit", ""),
    "table vit log": ("vit log", "table vit", ""),
    "table glue": ("glue", "table glue", ""),
    "table glue of a task": ("glue", "table glue", "--tasks cola"),
    "table glue against svd": ("glue", "table glue", "--against svd"),
    "table glue wide": ("glue", "table glue", "--wide --tasks cola rte"),
    "table glue log": ("glue log", "table glue", ""),
    "table noniid": ("noniid", "table noniid", ""),
    "table noniid to a loss": ("noniid", "table noniid", "--target 4.5"),
    "table noniid log": ("noniid log", "table noniid", ""),
    "page mamba": ("mamba", "page", ""),
    "page vit": ("vit", "page", ""),
    "page glue": ("glue", "page", "--title Rules"),
    "page noniid": ("report", "page noniid", ""),
    "page noniid log": ("noniid log", "compare noniid", ""),
    "page noniid tables": ("report", "compare noniid", ""),
}
EVERY = FIGURES | PARTS | TABLES


class Runs:
    """The run folders of each study, written when they are first asked for."""

    def __init__(self, root):
        self.root, self.made = Path(root), {}

    def __getitem__(self, study):
        if study not in self.made:
            self.made[study] = self.root / study.replace(" ", "_")
            fixed_runs.STUDIES[study](self.made[study])
        return self.made[study]


def shown(name, runs, out):
    """What the golden of this name should be; for one of PARTS with its figures."""
    study, command, more = EVERY[name]
    if name in TABLES:
        text = plotting.printed(command, runs[study], more, out).replace(str(runs[study]), "RUNS")
        return [line.rstrip() for line in text.splitlines() if line.strip()]
    drawn = plotting.figures(command, runs[study], more, out)
    return {file: golden.describe(figure, coarse=study in LOGS) for file, figure in drawn.items()}


def differences(name, goldens, now):
    if name in PARTS:
        whole = goldens[EVERY[name][0]]
        names = golden.differences(goldens[name], sorted(now))
        return names + golden.differences({file: whole[file] for file in now if file in whole}, now)
    return golden.differences(goldens[name], now)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", EVERY)
def test_what_is_shown_is_what_was_shown(name, runs, tmp_path):
    wrong = differences(name, read(), shown(name, runs, tmp_path))
    assert not wrong, f"{len(wrong)} differences\n" + "\n".join(wrong[:20])


def test_no_golden_is_without_its_command():
    assert set(read()) == set(EVERY)


@functools.cache
def read():
    return json.loads(GOLDENS.read_text(encoding="utf-8"))


def write(goldens):
    """A figure on a line, a line of a table on a line."""
    parts = []
    for name in [name for name in EVERY if name in goldens]:
        value = goldens[name]
        if isinstance(value, dict):
            lines, (left, right) = [f"  {json.dumps(file)}: {_json(about)}" for file, about in value.items()], "{}"
        else:
            lines, (left, right) = [f"  {_json(line)}" for line in value], "[]"
        parts.append(f" {json.dumps(name)}: {left}\n" + ",\n".join(lines) + f"\n {right}")
    GOLDENS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="+", required=True, choices=[*EVERY, "all"], metavar="NAME")
    names = parser.parse_args().record
    goldens = dict(read())
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "runs")
        for name in EVERY if "all" in names else names:
            now = shown(name, runs, Path(folder) / name)
            goldens[name] = sorted(now) if name in PARTS else now
    write(goldens)


if __name__ == "__main__":
    main()
