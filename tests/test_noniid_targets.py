"""llm_noniid's --target label and --train full against transformers and plain loops."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noniid_script import done, no_dropout
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from common.cli import UsageError
from common.lora import LoraModel
from common.runlog import read_metrics
from common.text import load_tokenizer
from common.vector import Weights
from llm_noniid import data, text_model
from llm_noniid.tokens import IGNORE, encode_labelled

pytestmark = pytest.mark.usefixtures("alone")
FULL = "--target label --train full --lora-dropout 0.05 --test-samples 20"


@pytest.fixture(scope="module")
def texts():
    return data.load_texts("demo", max_samples=160)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return load_tokenizer("bpe:800", data.as_corpus(texts))


def asked(tokenizer, text, label, room):
    """(ids up to " Topic:", ids of the label), by the tokenizer alone."""
    ids = tokenizer(text)["input_ids"][:room] + tokenizer(" Topic:")["input_ids"]
    return ids, tokenizer(f" {label}")["input_ids"]


def test_texts_end_in_their_label_which_alone_is_scored(texts, tokenizer):
    split = encode_labelled(texts, tokenizer, 40)["validation"]
    answers = [tokenizer(f" {name}")["input_ids"] for name in texts.label_names]
    room = 40 - len(tokenizer(" Topic:")["input_ids"]) - max(map(len, answers))
    rows = np.array([3, 0, 7])
    batch = split.batch(rows)
    for i, row in enumerate(rows):
        label = texts.label_names[texts.labels["validation"][row]]
        prompt, answer = asked(tokenizer, texts.splits["validation"][row], label, room)
        n = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, :n].tolist() == prompt + answer and n <= 40
        wanted = [IGNORE] * len(prompt) + answer + [IGNORE] * (batch["labels"].shape[1] - n)
        assert batch["labels"][i].tolist() == wanted
        assert (split.lengths()[row], split.scored(rows)[i]) == (n, len(answer))
        ids, mask = (t[i].tolist() for t in split.questions(rows))
        assert ids[: sum(mask)] == prompt and mask == [1] * len(prompt) + [0] * (len(mask) - len(prompt))
    whole = [len(tokenizer(text)["input_ids"]) for text in texts.splits["validation"]]
    assert sum(n > room for n in whole) > 0


def test_labels_need_room(texts, tokenizer):
    with pytest.raises(UsageError, match=r"--max-length 5 leaves a text no room beside its label: raise it by 8"):
        encode_labelled(texts, tokenizer, 5)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of all parameters on labels."""
    with pytest.MonkeyPatch.context() as patch:
        no_dropout(patch)
        return done(tmp_path_factory.mktemp("full"), "full", FULL)


def test_what_is_served_gives_the_logged_loss_and_accuracy_in_transformers(full, texts):
    model = AutoModelForCausalLM.from_pretrained(full / "final" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(full / "final" / "model")
    answers = [tokenizer(f" {name}")["input_ids"] for name in texts.label_names]
    room = 96 - len(tokenizer(" Topic:")["input_ids"]) - max(map(len, answers))
    manifest = json.loads((full / "run.json").read_text())
    rows = data.stream(42, "evaluated test").choice(len(texts.splits["test"]), 20, replace=False)
    losses, right = [], 0
    for row in sorted(rows):
        label, nll = texts.labels["test"][row], []
        for name in texts.label_names:
            prompt, answer = asked(tokenizer, texts.splits["test"][row], name, room)
            ids, scored = torch.tensor([prompt + answer]), torch.tensor([[IGNORE] * len(prompt) + answer])
            with torch.no_grad():
                nll.append(model(input_ids=ids, labels=scored).loss.item() * len(answer))
        losses.append(nll[label])
        right += int(np.argmin(nll) == label)
    assert manifest["results"]["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert manifest["results"]["test_accuracy"] == pytest.approx(right / len(rows))
    assert manifest["parameters"]["total"] == manifest["parameters"]["trainable"] == model.num_parameters()
    last = read_metrics(full)[-1]
    assert 0 <= last["mean_client_val_accuracy"] <= 1 and last["bytes_up"] == 3 * 4 * 4 * model.num_parameters()


def test_a_model_that_knows_nothing_loses_ln_v_at_each_word_of_a_label(texts, tokenizer):
    module, tokens = small("gpt2", len(tokenizer)), encode_labelled(texts, tokenizer, 40)
    model = text_model.TextModel("small", tokenizer, tokens, module, Weights(module), torch.device("cpu"), None)
    rows = np.concatenate([np.flatnonzero(texts.labels["train"] == c)[: c + 1] for c in range(4)])
    theta, nat = model.weights.snapshot() * 0, math.log(len(tokenizer))
    of_text = np.array([len(tokenizer(f" {name}")["input_ids"]) for name in texts.label_names])
    of_text = of_text[texts.labels["train"][rows]]
    assert len(set(of_text)) > 1
    model.weights.load(theta)
    assert model.loss(model.batch("train", rows)).item() == pytest.approx(of_text.mean() * nat)
    one = text_model.quality(model, theta[None], [1], "train", rows, "x")
    assert [one["x_loss"], math.log(one["x_ppl"])] == pytest.approx([of_text.mean() * nat] * 2)
    held = [rows[:1], rows[1:3], rows[1:]]
    clients = text_model.clients_quality(model, theta[None], np.zeros(3, dtype=int), held)
    own = [part.mean() * nat for part in (of_text[:1], of_text[1:3], of_text[1:])]
    assert clients["client_val_loss"] == pytest.approx(own)


@pytest.mark.parametrize("family", ["gemma2", "lora"])
def test_the_head_at_scored_tokens_gives_transformers_loss_and_gradients(texts, tokenizer, family):
    torch.manual_seed(0)
    model = small(family, len(tokenizer))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = encode_labelled(texts, tokenizer, 40)["train"].batch(np.array([5, 1, 8]))
    heads = []  # rows that the head was given
    model.get_output_embeddings().register_forward_hook(lambda _, x, y: heads.append(y.shape[:-1].numel()))
    nll = text_model.negative_log_likelihood(model, batch, None)
    scored = batch["labels"][:, 1:] != IGNORE
    assert heads == [int(scored.sum())] and nll.shape == scored.shape and (nll[~scored] == 0).all()
    ours = torch.autograd.grad(nll.sum() / scored.sum(), parameters.values())
    loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    theirs = torch.autograd.grad(loss, parameters.values())
    torch.testing.assert_close(nll.sum() / scored.sum(), loss, rtol=1e-6, atol=1e-6)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama", "lora"])
def test_a_text_read_once_for_all_labels_is_judged_as_text_by_text(texts, tokenizer, family):
    torch.manual_seed(0)
    module, tokens = small(family, len(tokenizer)), encode_labelled(texts, tokenizer, 200)
    model = text_model.TextModel("small", tokenizer, tokens, module.eval(), None, torch.device("cpu"), None)
    rows, wanted, prompts = np.array([5, 1, 8, 3]), [], []
    room = 200 - len(tokenizer(" Topic:")["input_ids"]) - max(map(len, tokens["test"].answers))
    for row in rows:
        for name in texts.label_names:
            prompt, answer = asked(tokenizer, texts.splits["test"][row], name, room)
            with torch.no_grad():
                after = (
                    module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                )
            wanted.append(-after[torch.arange(len(answer)), answer].sum().item())
            prompts.append(prompt)
    assert len(set(map(len, prompts))) > 1 and max(map(len, tokens["test"].answers)) > 1
    got = text_model.answer_losses(model, "test", rows)
    np.testing.assert_allclose(got, np.reshape(wanted, (4, 4)), rtol=1e-5)


def test_a_model_that_keeps_no_text_is_refused_for_labels():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
    args = SimpleNamespace(model="rnn", max_length=5)
    with pytest.raises(UsageError, match="--model rnn keeps no keys and values of 5 tokens: for --target label take"):
        text_model.check_kept(MambaForCausalLM(MambaConfig(**sizes)), args)


def small(family, words):
    """A model without dropout; lora: GPT-2 with an adapter whose B is not zero."""
    sizes = {"vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 48, "num_key_value_heads": 1}
    if family == "gemma2":
        capped = {"head_dim": 16, "final_logit_softcapping": 0.5, "attn_implementation": "eager"}
        return Gemma2ForCausalLM(Gemma2Config(**sizes, **more, **capped))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **more))
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    if family == "gpt2":
        return model
    lora = LoraModel(model, 4, 8)
    for _, B in lora.factors().values():
        torch.nn.init.normal_(B, std=0.1)
    return lora.model
