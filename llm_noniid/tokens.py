"""Labelled texts as tokens, padded per batch, and which of them a step takes.

texts = load_texts("ag_news", max_samples=2000)
tokenizer = common.text.load_tokenizer("bpe:2048", as_corpus(texts))
batch = encode(texts, tokenizer)["train"].batch(rows)     # input_ids, attention_mask, labels
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common import text
from common.batches import padded
from common.cli import UsageError
from common.seeding import stream
from llm_noniid.data import as_corpus

IGNORE = -100  # the label that no loss counts


@dataclass(frozen=True)
class TokenizedTexts(text.TokenizedDocuments):
    """A tokenised split: text i is `tokens[offsets[i] : offsets[i + 1]]`, scored from its token `starts[i]` on.

    Where the task is the text: all but its first token are scored, end of text last unless the text was cut. Where it
    is the label: each text, " Topic:", its label's words, which alone are scored.

    eos: the id of end of text, also the padding; starts int64 [n]; of labels, else None: answers, the tokens of each
    label's words; labels int64 [n].
    """

    eos: int
    starts: np.ndarray
    answers: tuple[np.ndarray, ...] | None = None
    labels: np.ndarray | None = None

    def scored(self, rows):
        """How many tokens of each of the texts `rows` are scored: int64 [n]."""
        return self.lengths()[rows] - self.starts[rows]

    def units(self, rows):
        """What a mean loss divides by, of each of the texts `rows`: its scored tokens, of labels 1 (int64 [n])."""
        return self.scored(rows) if self.answers is None else np.ones(len(rows), dtype=np.int64)

    def questions(self, rows):
        """Of labels, the texts `rows` up to them: (input ids, mask), int64 [B, L], padded on the right."""
        ends = self.starts[rows]
        inputs, _ = padded(self.tokens, self.offsets, rows, self.eos)
        mask = np.arange(ends.max()) < ends[:, None]
        inputs = np.where(mask, inputs[:, : ends.max()], self.eos)
        return torch.from_numpy(inputs), torch.from_numpy(mask.astype(np.int64))

    def batch(self, rows):
        """The texts `rows` as int64 tensors {"input_ids", "attention_mask", "labels"} [B, L], padded on the right.

        labels are the input ids where they are scored, else -100: a model that shifts them (transformers' do) predicts
        labels[:, 1:], each text's own end included. Of labels besides "before_scored" int64 [N]: the places of [B L]
        whose logits predict a scored token.
        """
        inputs, mask = padded(self.tokens, self.offsets, rows, self.eos)
        scored = mask & (np.arange(inputs.shape[1]) >= self.starts[rows][:, None])
        labels = np.where(scored, inputs, IGNORE)
        batch = {"input_ids": inputs, "attention_mask": mask.astype(np.int64), "labels": labels}
        if self.answers is not None:
            batch["before_scored"] = np.flatnonzero(scored) - 1
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def encode(texts, tokenizer, max_length=128):
    """{split: `TokenizedTexts`} of `Texts`: each text's tokens, then one end of text, `max_length` in all at most.

    A longer text keeps its first max_length tokens, without an end, which would teach the model to stop in the middle
    of a sentence. Words such as "<|endoftext|>" inside a text are ordinary characters.

    Raises UsageError for a max_length below 2.
    """
    if max_length < 2:
        raise UsageError(f"--max-length {max_length} leaves no token to predict: raise it to 2 or more")
    splits = {}
    for split, whole in text.encode(as_corpus(texts), tokenizer).items():
        rows = first_tokens(whole, np.minimum(whole.lengths(), max_length))
        starts = np.ones(len(rows), dtype=np.int64)
        splits[split] = TokenizedTexts(*joined(rows), int(tokenizer.eos_token_id), starts)
    return splits


def encode_labelled(texts, tokenizer, max_length=128):
    """The same with the label as task; a text is cut so that " Topic:" and the longest label fit into max_length.

    Raises UsageError for a max_length that leaves no token of a text.
    """
    words = (" Topic:", *(f" {name}" for name in texts.label_names))
    asks, *answers = (np.array(tokenizer.encode(one, add_special_tokens=False)) for one in words)
    room = max_length - len(asks) - max(map(len, answers))
    if room < 1:
        raise UsageError(f"--max-length {max_length} leaves a text no room beside its label: raise it by {1 - room}")
    splits = {}
    for split, whole in text.encode(as_corpus(texts), tokenizer).items():
        kept = np.minimum(whole.lengths() - 1, room)  # without the end of text
        questions = [np.append(row, asks).astype(row.dtype) for row in first_tokens(whole, kept)]
        splits[split] = with_answers(questions, tuple(answers), texts.labels[split], int(tokenizer.eos_token_id))
    return splits


def with_answers(questions, answers, labels, eos):
    """`TokenizedTexts` of each text up to " Topic:" and its label."""
    rows = [np.append(asked, answers[c]).astype(asked.dtype) for asked, c in zip(questions, labels, strict=True)]
    return TokenizedTexts(*joined(rows), eos, np.array([len(asked) for asked in questions]), answers, labels)


def first_tokens(whole, lengths):
    """The first `lengths` [n] tokens of each document, a list."""
    return [whole.tokens[a : a + n] for a, n in zip(whole.offsets[:-1], lengths, strict=True)]


def joined(rows):
    """(tokens, offsets) of a list of token arrays, as `common.text.TokenizedDocuments` has them."""
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def training_batches(n, batch_size, epochs=1, seed=0, t=0, client=0, steps=None):
    """Which of a client's n texts each step takes: a list of int64 arrays of at most batch_size.

    An epoch takes every text once, in an order of its own with the key (seed, t, client, epoch); its last batch may be
    smaller. epochs: above 0, 0.5 is the first half (rounded up) of an epoch's batches. steps: exactly so many batches
    instead, whatever n is: epochs follow each other until there are enough.
    """
    an_epoch = math.ceil(n / batch_size)  # batches
    wanted = math.ceil(epochs * an_epoch - 1e-9) if steps is None else steps
    batches = []
    for epoch in range(math.ceil(wanted / an_epoch)):
        order = stream(seed, f"batches of epoch {epoch}", t, client).permutation(n)
        batches += [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:wanted]
