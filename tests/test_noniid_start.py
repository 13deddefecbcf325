"""llm_noniid/train.py: what a run begins with (--init-from) and what it leaves (--final)."""

import json
import shutil

import pytest
from comparing import same_bits
from noniid_script import call, done, served, words
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import fed_core

pytestmark = pytest.mark.slow
FAST = "--local-steps 1 --probe-samples 0 --eval-samples 4"
SHORT = f"{FAST} --num-rounds 1"
STILL = f"{SHORT} --client-optimizer sgd --learning-rate 1e-30"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run to begin with."""
    return done(tmp_path_factory.mktemp("first"), "first", f"{SHORT} --learning-rate 0.05")


# ---- --init-from


def test_a_run_begins_with_anothers_adapter(first, tmp_path):
    last = read_metrics(first)[-1]
    places = (first, first / "final", first / "final" / "adapter")
    for i, place in enumerate(places):
        folder = done(tmp_path, f"{i}", f"{STILL} --init-from {place}")
        assert read_metrics(folder)[0]["client_val_loss"] == last["client_val_loss"]
        assert same_bits(served(folder), served(first))
    other = read_metrics(done(tmp_path, "scale", f"{STILL} --init-from {first} --lora-alpha 5"))[0]
    assert other["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)  # s B A is what is kept
    assert call(*words(tmp_path, "0", f"{STILL} --resume --init-from {tmp_path / 'scale'}")) == 2


@pytest.mark.parametrize("apart", ["--algorithm local", "--cluster labels"])
def test_all_models_begin_with_the_adapter(apart, first, tmp_path):
    folder = done(tmp_path, "a", f"{STILL} --init-from {first} {apart}")
    groups = sorted((folder / "final").iterdir())
    assert len(groups) > 1
    for group in groups:
        assert same_bits(load_file(group / "adapter_model.safetensors"), served(first))


def copy(first, tmp_path, **config):
    """The adapter alone, its configuration changed."""
    folder = shutil.copytree(first / "final" / "adapter", tmp_path / "alone")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | config))
    return folder


def several(first, tmp_path):
    (tmp_path / "run" / "final" / "group_0").mkdir(parents=True)
    return tmp_path / "run"


def unfinished(first, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(first / "run.json", tmp_path / "run")
    return tmp_path / "run"


def another_base(first, tmp_path):
    (tmp_path / "other").mkdir()
    return copy(first, tmp_path, base_model_name_or_path=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "make, flags, said",
    [
        (lambda first, _: first, "--lora-r 2", ["has rank 4, not 2", "--lora-r 4"]),
        (lambda first, _: first, "--target-modules c_proj", ["other layers", "attn.c_attn", "c_attn c_proj"]),
        (lambda first, _: first, "--seed 1", ["another base", "frozen_sha256", "--seed"]),
        (copy, "--seed 1", ["another base", "frozen_sha256"]),  # by the run whose base it names
        (another_base, "", ["another base", "other differs"]),
        (several, "", ["1 adapters", "group_0"]),
        (unfinished, "", ["run/final does not exist"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(make, flags, said, first, tmp_path, capsys):
    line = f"{SHORT} --init-from {make(first, tmp_path)} {flags}"
    assert call(*words(tmp_path, "a", line)) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said) and error.count("\n") == 1, error
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_evaluated_or_adapted_is_refused(tmp_path, capsys):
    (tmp_path / "data" / "ag_news").mkdir(parents=True)
    for split in ("train", "test"):
        lines = (f'"{i % 4 + 1}","a",""\n' for i in range(200))
        (tmp_path / "data" / "ag_news" / f"{split}.csv").write_text("".join(lines))
    for line, said in (
        (
            f"--dataset ag_news --data-root {tmp_path / 'data'} --tokenizer bpe:257",
            "validation texts have one token each",
        ),
        ("--lora-r 65", "rank 65 is above 64"),
        ("--init-from=", "an empty text is no value"),
    ):
        assert call(*words(tmp_path, "a", f"{SHORT} {line}")) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "a").exists(), error


def test_a_base_that_is_not_here_is_taken_for_the_model(first, tmp_path, capsys):
    place = copy(first, tmp_path, base_model_name_or_path="someone/tiny")
    done(tmp_path, "a", f"{SHORT} --init-from {place}")
    assert "names someone/tiny, which is not here: taken for --model tiny" in capsys.readouterr().err


# ---- --final


def rising(monkeypatch, best):
    """Makes the logged validation loss rise after round `best`."""
    real, seen = fed_core.evaluate, []

    def evaluate(study, thetas, group):
        seen.append(1)
        row = real(study, thetas, group)
        return row | {"val_loss": row["val_loss"] + max(0, len(seen) - 1 - best)}

    monkeypatch.setattr(fed_core, "evaluate", evaluate)


@pytest.mark.parametrize("more", ["--algorithm scaffold", "--cluster updates --cluster-round 2"])
def test_final_best_is_what_the_best_round_left_over_a_resume_too(more, tmp_path, monkeypatch):
    best, alike = 1, "" if "cluster" in more else more  # before there are groups all clients have one model
    short = done(tmp_path, "short", f"{FAST} --num-rounds {best} {alike}")
    line = f"{FAST} --num-rounds 2 --final best {more}"
    rising(monkeypatch, best)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_final", broken)
        assert call(*words(tmp_path, "a", line)) == 130
    assert call(*words(tmp_path, "a", line), "--resume") == 0
    results, expected = (read_json(folder / "run.json")["results"] for folder in (tmp_path / "a", short))
    assert results["rounds"] == 2 and results["final_round"] == best == results["best_round"] == expected["final_round"]
    assert results["best_val_loss"] == expected["val_loss"] and results["test_loss_best"] == expected["test_loss"]
    last = read_metrics(tmp_path / "a")[-1]  # --final says which weights are written, not what the old names mean
    for name in ("val_loss", "val_ppl", "mean_client_val_loss"):
        assert results[name] == last[name], name
    assert results["test_loss"] != results["test_loss_best"]
    finals = [sorted((folder / "final").rglob("*.safetensors")) for folder in (tmp_path / "a", short)]
    for a, b in zip(*finals, strict=True):
        assert a.parent.name == b.parent.name and same_bits(load_file(a), load_file(b))
    assert (tmp_path / "a" / "checkpoint" / "best.safetensors").exists()
    assert not (short / "checkpoint" / "best.safetensors").exists()


def broken(self, write):
    raise KeyboardInterrupt
