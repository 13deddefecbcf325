"""Whole runs of llm_noniid's scripts: data that may not be used, training and evaluation mode, dropout."""

from dataclasses import replace

import forwards
import pytest
from comparing import same_bits
from harness import read_lines, read_results
from noniid_script import done, served
from safetensors.torch import load_file
from test_noniid_pretrain import made

from llm_noniid import fed_core

FAST = "--num-rounds 2 --local-steps 1 --participation-rate 0.5 --eval-samples 8 --lora-dropout 0.1 --final best"


def noisy(monkeypatch, split):
    """Makes the texts of a split others, each word one letter of its own, and reverses the order of its labels."""
    real = fed_core.load_texts

    def load_texts(*args):
        texts = real(*args)
        strange = [" ".join(word[0] * len(word) for word in text.split()) for text in texts.splits[split]]
        labels = texts.labels | {split: texts.labels[split][::-1].copy()}
        return replace(texts, splits=texts.splits | {split: strange}, labels=labels)

    monkeypatch.setattr(fed_core, "load_texts", load_texts)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return done(tmp_path_factory.mktemp("plain"), "plain", FAST)


def test_nothing_before_the_final_evaluation_depends_on_the_test_texts(plain, tmp_path, monkeypatch):
    noisy(monkeypatch, "test")
    folder = done(tmp_path, "noise", FAST)
    assert read_lines(folder) == read_lines(plain) and same_bits(served(folder), served(plain))
    found, wanted = read_results(folder), read_results(plain)
    assert {name for name in wanted if found[name] != wanted[name]} == {name for name in wanted if "test_" in name}


def test_no_weight_depends_on_the_validation_texts(plain, tmp_path, monkeypatch):
    noisy(monkeypatch, "validation")
    folder = done(tmp_path, "noise", FAST)
    assert same_bits(*(load_file(each / "checkpoint" / "theta.safetensors") for each in (folder, plain)))
    for row, wanted in zip(read_lines(folder), read_lines(plain), strict=True):
        assert row["val_loss"] != wanted["val_loss"]
        for name in ("train_loss", "client_train_loss", "client_val_loss", "relative_drift", "tokens"):
            assert row.get(name) == wanted.get(name), name


def test_clients_train_in_training_mode_with_a_dropout_of_their_own_and_are_evaluated_without(tmp_path):
    with forwards.noted() as seen:
        done(tmp_path, "a", FAST)
    forwards.check(seen, turns=4)


def test_pretraining_has_a_dropout_for_each_epoch_and_evaluates_without(tmp_path):
    with forwards.noted() as seen:
        made(tmp_path / "base", "--layers", 1)
    forwards.check(seen, turns=2)
