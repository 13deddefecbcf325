"""Tokens and batches of the non-IID study: one real end a text, padding never scored, batches by key."""

import numpy as np
import pytest
import torch

from common import text as common_text
from llm_noniid import data, tokens

pytestmark = pytest.mark.usefixtures("alone")


def made_texts(*train):
    """`Texts` of a test's own; validation and test are one text each."""
    splits = {"train": list(train), "validation": ["one two"], "test": ["three"]}
    labels = {split: np.zeros(len(items), dtype=np.int64) for split, items in splits.items()}
    return data.Texts("made", splits, labels, ("all",), {"source": "a test"})


def bpe(texts, size=300):
    return common_text.load_tokenizer(f"bpe:{size}", data.as_corpus(texts))


@pytest.mark.filterwarnings("ignore:bpe")
def test_tokens_are_those_of_the_tokenizer():
    texts = made_texts("one two three two one, na\u00efve " * 3, "a", "two <|endoftext|> one", "one two three four")
    tokenizer = bpe(texts)
    for max_length in (2, 7, 500):
        split = tokens.encode(texts, tokenizer, max_length)["train"]
        assert len(split) == 4 and split.tokens.dtype == np.uint16 and split.eos == tokenizer.eos_token_id
        for i, text in enumerate(texts.splits["train"]):
            ids = tokenizer.encode(text, split_special_tokens=True)
            assert split.eos not in ids
            wanted = [*ids, split.eos][:max_length]
            got = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
            assert got == wanted and split.scored([i]) == len(wanted) - 1


def test_a_batch_by_hand():
    """Texts of 3, 2 and 4 tokens; 9 is end of text, the last text is cut."""
    ids = np.array([5, 6, 9, 7, 9, 1, 2, 3, 4], dtype=np.uint16)
    texts = tokens.TokenizedTexts(ids, np.array([0, 3, 5, 9]), 9, np.ones(3, dtype=np.int64))
    batch = texts.batch(np.array([1, 2, 0]))
    assert batch["input_ids"].tolist() == [[7, 9, 9, 9], [1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 9, -100, -100], [-100, 2, 3, 4], [-100, 6, 9, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# ----------------------------------------------------------------------------------------------- batches


def test_an_epoch_takes_every_text_once():
    batches = tokens.training_batches(11, 4, 2, seed=3, t=1, client=2)
    assert [len(batch) for batch in batches] == [4, 4, 3] * 2
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(11)) and first.tolist() != second.tolist()
    assert len(tokens.training_batches(11, 4, 0.5)) == 2 and len(tokens.training_batches(11, 4, 1 / 3)) == 1
