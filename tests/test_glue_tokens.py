"""Tokens of GLUE's tasks, and batches of similar length."""

import numpy as np
import pytest
import torch
from encoders import make_tokenizer

from common.cli import UsageError
from common.seeding import stream
from lora_glue_fl.data_prep import encode, load_task, training_batches
from lora_glue_fl.glue_tasks import TASKS, demo_tokenizer

pytestmark = pytest.mark.usefixtures("alone")


def test_the_demo_tokenizer():
    tokenizer = demo_tokenizer()
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special == (0, 1, 2, 3)
    ids = tokenizer("the Doctor sold", "zebra")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "the", "doctor", "sold", "</s>", "</s>", "<unk>", "</s>"]
    for task in TASKS:
        encoded = encode(load_task(task, "demo"), tokenizer)
        assert all(3 not in split.tokens for split in encoded.values())  # no word is unknown
    assert 100 < len(tokenizer) < 300


def bert_tokenizer():
    """Of a model that tells the two sentences apart by types, and takes 64 tokens."""
    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 64
    return tokenizer


@pytest.mark.parametrize("task, most", [("rte", 20), ("qnli", 14)])  # one has the longer sentence first, one second
@pytest.mark.parametrize("make", [demo_tokenizer, bert_tokenizer])
def test_batches_equal_the_tokenizers_own_padding(make, task, most):
    tokenizer, data = make(), load_task(task, "demo")
    encoded = encode(data, tokenizer, max_length=most)
    rows = np.array([7, 0, 1199, 7])
    batch = encoded["train"].batch(rows)
    texts = [[column[i] for i in rows] for column in data.splits["train"].texts.values()]
    own = tokenizer(*texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
    assert set(batch) == set(own) | {"labels"} and batch["input_ids"].shape[1] == most
    for name in own:
        assert torch.equal(batch[name], own[name]) and batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == data.splits["train"].labels[rows].tolist()
    ids = tokenizer(*data.splits["train"].texts.values(), truncation=True, max_length=most)["input_ids"]
    assert encoded["train"].lengths().tolist() == list(map(len, ids))


def test_a_length_that_the_model_does_not_take():
    with pytest.raises(UsageError, match="--max-length 65 is outside 8 to 64"):
        encode(load_task("rte", "demo"), bert_tokenizer(), max_length=65)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("n, size", [(1, 8), (8, 8), (65, 32)])
def test_every_epoch_has_each_example_once(n, size):
    lengths = stream(0, "lengths").integers(5, 60, size=n)
    batches, steps = training_batches(lengths, size, 3, seed=0), -(-n // size)
    assert len(batches) == 3 * steps and max(map(len, batches)) <= size
    for epoch in range(3):
        rows = np.concatenate(batches[epoch * steps : (epoch + 1) * steps])
        assert np.array_equal(np.sort(rows), np.arange(n))


def test_batches_change_with_every_key_and_with_nothing_else():
    lengths = stream(0, "lengths").integers(5, 60, size=200)

    def order(*args, epochs=1):
        return [tuple(rows) for rows in training_batches(lengths, 16, epochs, *args)]

    first, second = order(0, 1, 2, epochs=2)[:13], order(0, 1, 2, epochs=2)[13:]
    assert order(0, 1, 2) == first != second
    others = [order(1, 1, 2), order(0, 2, 2), order(0, 1, 3), second]
    # not only in another order: other examples meet
    sets = [{frozenset(rows) for rows in batches} for batches in (first, *others)]
    assert all(len(a & b) <= 2 for i, a in enumerate(sets) for b in sets[:i])
