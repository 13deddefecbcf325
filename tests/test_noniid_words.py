"""llm_noniid's README and RESULTS: tables as the command prints them, the rule that the README adds."""

import json
import os
import re
import shlex

import pytest
import torch
from made_runs import ROOT, call
from noniid_script import done, served

from llm_noniid import algorithms, flags, partition
from llm_noniid.data import load_texts

REAL = os.environ.get("FEDQUARTET_DATA")
FOLDER = ROOT / "llm_noniid"
README = (FOLDER / "README.md").read_text()


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_tables_are_what_the_command_prints():
    code, printed, _ = call("plots/tables.py llm_noniid")
    assert code == 0 and printed.strip() in (FOLDER / "RESULTS.md").read_text()
    line = re.search(r"\n    python (plots/tables.py.*\\\n.*)\n", README)[1].replace("\\\n", " ")
    code, printed, _ = call(*shlex.split(line))
    shown = rows_of(README.partition("## Commands")[0])
    assert code == 0 and len(shown) == 10 and set(shown) <= set(rows_of(printed))


def test_the_readme_is_short_and_names_every_file():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1500
    assert all(f"`{path.name}`" in README for path in FOLDER.glob("*.py") if path.name != "__init__.py")
    assert {path.name for path in FOLDER.rglob("*.png")} == set(re.findall(r"\(results/(\w+\.png)\)", README))


@pytest.mark.skipif(not REAL, reason="FEDQUARTET_DATA does not name the real data")
def test_what_always_saying_the_commonest_topic_scores():
    for words, scores in json.loads((FOLDER / "results" / "commonest.json").read_text()).items():
        for seed in (0, 2):
            args = flags.parse(flags.build_parser(""), f"{words} --max-samples 8000 --seed {seed}".split())
            texts = load_texts("ag_news", REAL, 8000, seed)
            facts = partition.statistics(texts, *partition.clients_of(args, texts)[:2])
            assert facts["commonest_topic_accuracy"] == pytest.approx(scores[seed], rel=1e-9)


@pytest.mark.slow
def test_the_rule_of_your_own_is_fedavg_with_a_shorter_step(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "ALGORITHMS", dict(algorithms.ALGORITHMS))
    monkeypatch.setattr(flags, "ALGORITHMS", (*flags.ALGORITHMS, "clipped"))
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], vars(algorithms))
    line = "--num-rounds 1 --local-steps 1 --probe-samples 0 --learning-rate 0.1 --algorithm"
    clipped, plain = (served(done(tmp_path, name, f"{line} {name}")) for name in ("clipped", "fedavg"))
    ends = [torch.cat([x[name].flatten() for name in x if ".lora_B." in name]) for x in (clipped, plain)]  # from 0 on
    share = ends[0].norm() / ends[1].norm()
    assert 0.01 < share < 0.9 and torch.allclose(ends[0], share * ends[1], rtol=1e-3, atol=1e-6)
