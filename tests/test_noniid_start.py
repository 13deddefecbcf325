"""llm_noniid/train.py: what a run begins with (--init-from) and what it leaves (--final)."""

import pytest
from comparing import same_bits
from noniid_script import call, done, words
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import fed_core

pytestmark = pytest.mark.slow
FAST = "--local-steps 1 --probe-samples 0 --eval-samples 4"


def test_a_run_begins_with_anothers_adapter(tmp_path, capsys):
    first = done(tmp_path, "first", f"{FAST} --num-rounds 1 --learning-rate 0.05")
    last, still = read_metrics(first)[-1], f"{FAST} --num-rounds 1 --client-optimizer sgd --learning-rate 1e-30"
    for i, (place, alpha) in enumerate(((first, 16), (first / "final" / "adapter", 5))):  # s B A is what is kept
        row = read_metrics(done(tmp_path, f"{i}", f"{still} --init-from {place} --lora-alpha {alpha}"))[0]
        assert row["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    for more, said in (("--lora-r 2", "--lora-r 4"), ("--target-modules c_proj", "c_attn c_proj")):
        assert call(*words(tmp_path, "a", f"{still} --init-from {first} {more}")) == 2
        assert f"--init-from {first} does not fit" in (error := capsys.readouterr().err) and said in error


def rising(monkeypatch, best):
    """Makes the logged validation loss rise after round `best`."""
    real, seen = fed_core.evaluate, []

    def evaluate(study, thetas, group):
        seen.append(1)
        row = real(study, thetas, group)
        return row | {"val_loss": row["val_loss"] + max(0, len(seen) - 1 - best)}

    monkeypatch.setattr(fed_core, "evaluate", evaluate)


@pytest.mark.parametrize("more", ["--algorithm scaffold", "--cluster updates"])
def test_final_best_is_what_the_best_round_left_over_a_resume_too(more, tmp_path, monkeypatch):
    best = 1
    short = done(tmp_path, "short", f"{FAST} --num-rounds {best} {more}")
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
