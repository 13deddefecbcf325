"""Flags are read before anything heavy is imported: --help, a typo and a contradiction are answered at once."""

import json
import subprocess
import sys
import urllib.request
from unittest import mock

import harness
import pytest

from common import hub
from common.early import CHECK
from vit_sparse_fl import mask_flags, masks

# Each of the lines as a script's command line, in one interpreter that has none of the heavy packages.
ALONE = """
import contextlib, io, json, runpy, sys
HEAVY = "torch torchvision transformers peft datasets tokenizers scipy sklearn matplotlib pandas pyarrow"
sys.modules.update(dict.fromkeys(HEAVY.split()))
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(words[0], run_name="__main__")
        code = "went on"
    except SystemExit as stop:
        code = stop.code
    except ImportError as error:
        code = str(error)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def answers(lines):
    """[(exit code, stdout, stderr)] of the command lines."""
    given = json.dumps([[str(harness.ROOT / script), *words] for script, *words in lines])
    line = [sys.executable, "-c", ALONE]
    done = subprocess.run(line, input=given, capture_output=True, text=True, check=True, cwd=harness.ROOT)
    return list(map(json.loads, done.stdout.splitlines()))


def scripts():
    folders = "mamba_fl vit_sparse_fl lora_glue_fl llm_noniid plots benchmarks".split()
    paths = [path for folder in folders for path in sorted((harness.ROOT / folder).glob("*.py"))]
    return [str(path.relative_to(harness.ROOT)) for path in paths if "__main__" in path.read_text()]


def test_every_script_answers_help_and_a_typo_without_its_heavy_imports():
    every = scripts()
    assert len(every) > 30 and {*harness.SCRIPTS} <= {*every}
    for script, (code, out, err) in zip(every, answers([script, "--help"] for script in every), strict=True):
        assert code == 0 and out.startswith("usage: ") and not err, (script, code, err)
    for script, (code, _, err) in zip(every, answers([script, "--no-such-flag"] for script in every), strict=True):
        assert code == 2 and " error: " in err, (script, code, err)


CONTRADICTIONS = [
    ("mamba_fl/fed_avg.py --dataset demo --sync epoch --participation 0.5", "--sync epoch needs every client"),
    ("vit_sparse_fl/train_federated.py --weights a --init-from b", "--weights and --init-from"),
    ("vit_sparse_fl/train_federated_sparse.py --mask-strategy least_sensitive --head keep", "--init-from RUN"),
    ("lora_glue_fl/main_glue_lora.py --task-name sst2", "nothing to do: give --do-train"),
    ("llm_noniid/train.py --cluster updates --algorithm fedprox", "--cluster updates"),
    ("llm_noniid/run_experiments.py --mode main --no-such-flag", "no-such-flag"),
    ("lora_glue_fl/run_study.py --tasks wnli", "--tasks wnli: not in the preset"),
]


def test_contradictions_too():
    said = answers(line.split() for line, _ in CONTRADICTIONS)
    for (line, part), (code, out, err) in zip(CONTRADICTIONS, said, strict=True):
        assert code == 2 and not out and part in err and err.count("\n") == 1, (line, code, err)


def test_the_flags_know_the_strategies_of_masks():
    assert mask_flags.STRATEGIES == {name: strategy.images for name, strategy in masks.STRATEGIES.items()}


def test_what_can_be_downloaded_is_not_downloaded_for_a_check(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", mock.Mock())
    assert hub.answers("http://127.0.0.1:9")
    monkeypatch.setenv(CHECK, "study")
    with pytest.raises(SystemExit) as stop:
        hub.answers("http://127.0.0.1:9")
    assert stop.value.code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.answers("http://127.0.0.1:9")
