"""Blocks and clients: documents dealt before packing, every token a label once, nothing held out is trained on."""

import string

import pytest
import torch

from common import text
from common.cli import UsageError
from common.text import Corpus
from mamba_fl import data

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def marked(monkeypatch):
    """A corpus of 26 documents, each of one letter only, of different lengths; every letter is a token."""
    documents = [letter * (60 + 7 * i) for i, letter in enumerate(string.ascii_lowercase)]
    corpus = Corpus("marked", "none", "a test", documents, ["zyx" * 11], ["wv" * 20])
    monkeypatch.setattr(data, "load_corpus", lambda *args: corpus)
    return corpus


def build(num_clients=4, sharding="contiguous", seed=0, sequence_length=16):
    return data.build_data("marked", "bpe:257", sequence_length, num_clients, sharding, seed)


def stream_of(built, k):
    """The tokens of a client again, less the dropped tail, from its blocks: neighbours share one."""
    blocks = torch.cat([built.train[k], built.held_out[k]])
    return torch.cat([blocks[:, :-1].flatten(), blocks[-1, -1:]])


def letters(built, k):
    return set(built.tokenizer.decode(stream_of(built, k).tolist(), skip_special_tokens=True))


def test_full_blocks_by_hand():
    assert data.full_blocks(torch.arange(10), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert data.full_blocks(torch.arange(9), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert data.full_blocks(torch.arange(3), 3).shape == (0, 4)


def test_padded_blocks_have_every_token_but_the_first_as_a_label_once():
    assert data.padded_blocks(torch.arange(5), 3).tolist() == [[0, 1, 2, 3], [3, 4, -100, -100]]
    assert data.padded_blocks(torch.arange(2), 3).tolist() == [[0, 1, -100, -100]]
    for tokens in range(2, 30):
        inputs, labels = data.inputs_and_labels(data.padded_blocks(torch.arange(tokens), 4))
        counted = labels != data.IGNORE
        assert labels[counted].tolist() == list(range(1, tokens))
        assert inputs[counted].tolist() == list(range(tokens - 1))  # each is predicted from the token before it
        assert inputs.min() >= 0 and inputs.shape == labels.shape == (-(-(tokens - 1) // 4), 4)


@pytest.mark.parametrize("sharding", ["contiguous", "iid"])
@pytest.mark.parametrize("num_clients", [4, 26])
def test_documents_are_dealt_whole_before_packing(marked, sharding, num_clients):
    built = build(num_clients, sharding)
    seen = [letters(built, k) for k in range(num_clients)]
    assert sum(map(len, seen)) == 26 and set().union(*seen) == set(string.ascii_lowercase)
    assert sum(built.shards["client_documents"]) == 26
    whole = sum(map(len, marked.train)) + 26  # each ends with end of text
    assert sum(built.shards["client_tokens"]) == built.fingerprint["tokens"]["train"] == whole


def test_contiguous_clients_have_their_documents_in_a_row_and_tokens_balanced(marked):
    built = build(4)
    whole = torch.from_numpy(text.encode(marked, built.tokenizer)["train"].tokens.astype("int64"))
    tokens = built.shards["client_tokens"]
    for k, mine in enumerate(whole.split(tokens)):
        stream = stream_of(built, k)
        assert torch.equal(stream, mine[: len(stream)]) and len(stream) >= len(mine) - 16
    assert max(tokens) - min(tokens) <= max(map(len, marked.train)) + 1
    assert letters(build(4, "iid", 1), 0) != letters(build(4, "iid", 2), 0)


def test_the_last_tenth_of_a_client_is_held_out(marked):
    built = build(2)
    for train, held_out in zip(built.train, built.held_out, strict=True):
        assert len(held_out) == (len(train) + len(held_out)) // 10 > 1
        assert train.dtype == held_out.dtype == torch.int64 and train.shape[1] == held_out.shape[1] == 17
        assert torch.equal(train[-1, -1], held_out[0, 0])  # shared as a last label and a first input only
    assert [len(train) for train in built.train] == built.shards["client_blocks"]
    assert all(len(held_out) == 1 for held_out in build(26).held_out)


def test_validation_and_test_are_all_of_their_tokens_and_bytes(marked):
    built = build()
    for blocks, tokens in ((built.validation, 34), (built.test, 41)):
        labels = data.inputs_and_labels(blocks)[1]
        labels = labels[labels != data.IGNORE]
        assert len(labels) == tokens - 1
        assert built.token_bytes[labels].sum() == len(labels) - 1  # a byte a letter, none for the end of text


def test_a_sequence_longer_than_a_clients_text(marked):
    build(26, sequence_length=30)
    # the shortest document has 61 tokens: two blocks need 63
    with pytest.raises(UsageError, match="^client 0 has 61 tokens, .* --sequence-length 31: lower it, .*$"):
        build(26, sequence_length=31)
