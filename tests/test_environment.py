"""environment.yml, pyproject.toml, README.md and .ci/run say the same."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
README = (ROOT / "README.md").read_text()


def test_conda_installs_this_project_and_its_development_tools():
    plain = [d for d in CONDA["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict)]
    assert f"python{PROJECT['project']['requires-python']}" in plain
    assert CONDA["name"] == PROJECT["project"]["name"]
    assert pip[0] == "-e ."  # all packages come from pyproject.toml
    assert sorted(pip[1:]) == sorted(PROJECT["dependency-groups"]["dev"])


def test_every_dependency_has_a_lower_bound():
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in sum(groups, []):
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", requirement), requirement


def test_every_folder_of_code_is_installed():
    code = {f.parent.name for f in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == code


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"\n(.*uv run pytest)\n", README)
    assert f"\n{command} || exit 1\n" in (ROOT / ".ci" / "run").read_text()


def test_every_script_is_in_a_readme():
    texts = README + "".join(file.read_text() for file in ROOT.glob("*/README.md"))
    for folder in PROJECT["tool"]["setuptools"]["packages"] + ["benchmarks"]:
        for file in (ROOT / folder).glob("*.py"):
            assert file.name == "__init__.py" or file.name in texts, file
    for name in re.findall(r"\b[a-z_0-9]+/[a-z_0-9]+\.py", texts):
        assert (ROOT / name).exists(), f"a README names {name}, which is not there"


def test_ruff_is_clean():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, check=True)
