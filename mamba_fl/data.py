"""WikiText-2 (or the demo text) as blocks of tokens, dealt to clients.

Documents are dealt first, then each client packs its own into one stream and cuts it into blocks: no block
holds text of two clients. The last tenth of each client's blocks is held out in every method, so that methods
which use it (FedEntropy) and those which do not train on the same tokens.
"""

import dataclasses

import numpy as np
import torch

from common import text
from common.cli import UsageError
from common.seeding import stream
from common.sharding import contiguous, iid
from common.text import SPLITS, load_corpus
from mamba_fl.cross_entropy import IGNORE

HELD_OUT = 0.1  # the share of a client's blocks that no method trains on


@dataclasses.dataclass(frozen=True)
class FederatedText:
    """Blocks of T + 1 tokens, int64: `inputs_and_labels` turns them into inputs and labels [B, T].

    train, held_out: a tensor [n_k, T + 1] for each client; validation, test: [n, T + 1], the tail padded with
    -100. token_bytes: int64 [vocab_size]. fingerprint: what identifies the data; shards: how they are dealt.
    """

    train: list[torch.Tensor]
    held_out: list[torch.Tensor]
    validation: torch.Tensor
    test: torch.Tensor
    tokenizer: object
    vocab_size: int
    token_bytes: torch.Tensor
    fingerprint: dict
    shards: dict


def inputs_and_labels(blocks):
    """Blocks [B, T + 1] -> inputs [B, T] and labels [B, T], the next tokens; padding is 0 in the inputs.

    A causal model never looks from a real token to the padding, which is all behind it.
    """
    return blocks[:, :-1].clamp(min=0), blocks[:, 1:]


def build_data(dataset, tokenizer, sequence_length, num_clients, sharding="contiguous", seed=0, data_root=None):
    """The data of a run as `FederatedText`.

    dataset: "wikitext2" or "demo". tokenizer: "gpt2", "bpe:N" or a path. sharding: "contiguous" (runs of
    documents in corpus order, token counts as equal as document ends allow) or "iid" (documents shuffled with `seed`).
    sequence_length: T, the tokens a model sees at once.

    Raises UsageError for an unknown dataset, missing files, a tokenizer that is not there, more clients than
    documents, and a sequence longer than a client's text.
    """
    corpus = load_corpus(dataset, data_root)
    encoder = text.load_tokenizer(tokenizer, corpus, data_root)
    splits = text.encode(corpus, encoder)
    streams = {split: torch.from_numpy(splits[split].tokens.astype(np.int64)) for split in SPLITS}
    lengths = splits["train"].lengths()
    documents, what = streams["train"].split(lengths.tolist()), "training documents"
    if sharding == "iid":
        shards = iid(len(lengths), num_clients, stream(seed, "sharding", 0, 0), what=what)
    else:
        shards = contiguous(len(lengths), num_clients, sizes=lengths, what=what)

    train, held_out, client_tokens = [], [], []
    for k, shard in enumerate(shards):
        tokens = torch.cat([documents[i] for i in shard])
        blocks = full_blocks(tokens, sequence_length)
        if len(blocks) < 2:
            raise UsageError(
                f"client {k} has {len(tokens)} tokens, too few for a training and a held-out block of "
                f"--sequence-length {sequence_length}: lower it, or lower --num-clients ({num_clients})"
            )
        kept = len(blocks) - max(1, int(HELD_OUT * len(blocks)))
        train.append(blocks[:kept].clone())
        held_out.append(blocks[kept:].clone())
        client_tokens.append(len(tokens))

    vocab_size = text.vocabulary_size(encoder)
    return FederatedText(
        train=train,
        held_out=held_out,
        validation=padded_blocks(streams["validation"], sequence_length),
        test=padded_blocks(streams["test"], sequence_length),
        tokenizer=encoder,
        vocab_size=vocab_size,
        token_bytes=torch.from_numpy(text.token_byte_lengths(encoder)),
        fingerprint={
            "dataset": corpus.name,
            "variant": corpus.variant,
            "source": corpus.source,
            "sha256": corpus.fingerprint,
            "tokenizer": tokenizer,
            "tokenizer_sha256": text.tokenizer_fingerprint(encoder),
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
            "sharding": sharding,
            "documents": {split: len(splits[split]) for split in SPLITS},
            "tokens": {split: len(streams[split]) for split in SPLITS},
        },
        shards={
            "client_documents": [len(shard) for shard in shards],
            "client_tokens": client_tokens,
            "client_blocks": [len(blocks) for blocks in train],
        },
    )


def full_blocks(tokens, length):
    """Windows of length + 1 tokens with stride `length`: [n, length + 1]; a tail that fills none is dropped.

    Neighbours share one token, the last label of one and the first input of the next: every token but the
    first is a label exactly once.
    """
    if len(tokens) < length + 1:
        return tokens.new_empty(0, length + 1)
    return tokens.unfold(0, length + 1, length)  # [n, T + 1]


def padded_blocks(tokens, length):
    """`full_blocks` with the tail kept and padded with -100: every token but the first is a label once."""
    blocks = max(1, -(-(len(tokens) - 1) // length))
    padded = torch.full((blocks * length + 1,), IGNORE, dtype=torch.int64)
    padded[: len(tokens)] = tokens
    return padded.unfold(0, length + 1, length).clone()  # [n, T + 1]
