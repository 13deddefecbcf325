"""Whole runs of this study's scripts: data that may not be used, training and evaluation mode, dropout."""

import forwards
import numpy as np
import pytest
from comparing import same_bits
from harness import read_lines
from safetensors.torch import load_file
from test_glue_rounds import EVAL, call, words

from lora_glue_fl import data_prep, sharding
from lora_glue_fl.glue_tasks import Split

CENTRAL = [*EVAL, *"--seed 7 --do-train --do-eval --num-train-epochs 2 --max-examples 60 --learning-rate 5e-3".split()]


@pytest.fixture(scope="module")
def two_clients(tmp_path_factory):
    """Shards of two clients."""
    folder = tmp_path_factory.mktemp("two")
    info = sharding.make_client_splits("sst2", 2, seed=1, max_examples=60, dataset="demo")
    sharding.save_shard_manifests(folder, info)
    return folder


def rounds(folder, out, *more):
    """The folder of a run of two rounds."""
    more = ("--output-root", out, "--run-name", "r", "--rounds", 2, "--lora-dropout", 0.1, *more)
    assert call(*words(folder, *more)) == 0
    return out / "r"


def central(out):
    """The folder of two epochs of central training."""
    assert call(*CENTRAL, "--output-dir", out, script="main_glue_lora") == 0
    return out / "sst2_tiny"


def noisy(monkeypatch):
    """Makes the validation examples random words with random labels."""
    real, draw = data_prep.demo_task, np.random.default_rng(0)

    def demo_task(name):
        splits = real(name)
        sentences, labels = splits["validation"].texts["sentence"], splits["validation"].labels
        vocabulary = sorted({word for sentence in sentences for word in sentence.split()})
        drawn = [" ".join(draw.choice(vocabulary, 9)) for _ in sentences]
        return splits | {"validation": Split({"sentence": drawn}, draw.integers(0, 2, len(labels)))}

    monkeypatch.setattr(data_prep, "demo_task", demo_task)


def trained(folder):
    """The lines of a run's log without what is measured on the validation examples."""
    return [
        {name: v for name, v in row.items() if "val_" not in name and name != "replay"} for row in read_lines(folder)
    ]


def test_no_weight_of_a_round_depends_on_the_validation_examples(two_clients, tmp_path, monkeypatch):
    more = ("--replay", "--eval-clients", "--keep", "all")
    folders = [rounds(two_clients, tmp_path / "a", *more)]
    noisy(monkeypatch)
    folders += [rounds(two_clients, tmp_path / "b", *more)]
    same_weights(*folders)
    assert read_lines(folders[0])[-1]["val_loss"] != read_lines(folders[1])[-1]["val_loss"]


def test_no_weight_of_central_training_depends_on_the_validation_examples(tmp_path, monkeypatch):
    folders = [central(tmp_path / "a")]
    noisy(monkeypatch)
    folders += [central(tmp_path / "b")]
    same_weights(*folders)


def same_weights(*folders):
    """The runs have the same log but for the validation examples, and the same bits in every adapter or model."""
    assert trained(folders[0]) == trained(folders[1])
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in folders]
    files = [[file for file in each if "checkpoint" not in file.parts[0]] for each in files]  # it knows the best metric
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        assert same_bits(*(load_file(folder / file) for folder in folders))


def test_clients_train_in_training_mode_with_a_dropout_of_their_own_and_are_evaluated_without(two_clients, tmp_path):
    with forwards.noted() as seen:
        rounds(two_clients, tmp_path, "--replay", "--eval-clients")
    forwards.check(seen, turns=4)


def test_epochs_train_in_training_mode_with_a_dropout_of_their_own_and_are_evaluated_without(tmp_path):
    with forwards.noted() as seen:
        central(tmp_path)
    forwards.check(seen, turns=2)
