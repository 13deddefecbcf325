"""llm_noniid/train.py: what --final best leaves."""

import pytest
from comparing import same_bits
from noniid_script import call, done, words
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import fed_core

pytestmark = pytest.mark.slow
FAST = "--local-steps 1 --probe-samples 0 --eval-samples 4"


def rising(monkeypatch, best):
    """Makes the logged validation loss rise after round `best`."""
    real, seen = fed_core.evaluate, []

    def evaluate(study, thetas, group):
        seen.append(1)
        row = real(study, thetas, group)
        return row | {"val_loss": row["val_loss"] + max(0, len(seen) - 1 - best)}

    monkeypatch.setattr(fed_core, "evaluate", evaluate)


def test_final_best_is_what_the_best_round_left_over_a_resume_too(tmp_path, monkeypatch):
    best, more = 1, "--cluster updates"
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
