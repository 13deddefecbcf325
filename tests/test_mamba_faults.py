"""Faults that no other test sees: what training may not look at, and checkpoints that only one process saw damaged."""

import dataclasses
from functools import partial

import harness
import pytest
import torch
from processes import answers_of, as_rank
from test_mamba_rounds import FEDERATED, TINY, V, run

from common import checkpoint
from common.cli import UsageError
from mamba_fl import central, fed_avg, fed_core, fed_entropy, fed_fisher, fed_momentum


@pytest.mark.parametrize("module", [central, fed_avg, fed_entropy, fed_fisher, fed_momentum])
def test_the_test_text_changes_nothing_before_the_final_evaluation(module, tmp_path, monkeypatch):
    words = f"{TINY if module is central else FEDERATED} --rounds 2 --val-freq 1"
    run(module, tmp_path / "text", words)
    build = fed_core.build_data

    def with_noise(*args):
        data = build(*args)
        return dataclasses.replace(data, test=torch.randint(V, data.test.shape))

    monkeypatch.setattr(fed_core, "build_data", with_noise)
    run(module, tmp_path / "noise", words)
    folders = tmp_path / "text" / "r", tmp_path / "noise" / "r"
    metrics, tensors, results = zip(
        *((harness.read_lines(one), harness.digest(one), harness.read_results(one)) for one in folders), strict=True
    )
    assert metrics[0] == metrics[1] and tensors[0] == tensors[1]
    differ = {name for name in results[0] if results[0][name] != results[1][name]}
    assert differ == {"test_ppl_best", "test_ppl_last"}


# ---- checkpoints


def saved(folder, rounds=1):
    for t in range(1, rounds + 1):
        tensors = {name: {"a": torch.tensor([float(t)])} for name in ("theta", "best")}
        checkpoint.save(folder / "checkpoint", {"round": t}, tensors)
    return folder / "checkpoint"


def damage(path):
    path.write_bytes(path.read_bytes()[:-1])


def refusals(folder, rank, size, port, answers):
    with as_rank(rank, size, port):
        lines = []
        for name in ("theta", "best"):
            with pytest.raises(UsageError) as refused:
                checkpoint.load(folder / name / "checkpoint")
            lines.append(str(refused.value))
        answers.put((rank, lines))


def test_a_file_that_the_main_process_found_damaged_is_refused_by_all_alike(tmp_path):
    for name in ("theta", "best"):
        damage(saved(tmp_path / name) / f"{name}.safetensors")
    lines = answers_of(2, partial(refusals, tmp_path))
    assert lines[0] == lines[1]
    assert all(f"{name}.safetensors is damaged" in line for name, line in zip(("theta", "best"), lines[0], strict=True))


def test_of_the_checkpoints_before_the_last_takes_the_place_of_one_that_is_gone(tmp_path):
    folder = saved(tmp_path, rounds=3)
    damage(folder / "theta.safetensors")
    with pytest.raises(UsageError, match="goes on from .*checkpoint.1"):
        checkpoint.load(folder)
    folder.rename(tmp_path / "gone")
    assert checkpoint.load(folder)[0]["round"] == 2
