"""llm_noniid/models.py: bases from folders and configs, what LoRA adapts in them, what is refused."""

import json
import shutil

import pytest
import torch
from noniid_script import call, losses, token_rows, words

from common.runlog import read_metrics
from common.text import load_tokenizer
from llm_noniid import models
from llm_noniid.data import as_corpus, load_texts


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def texts():
    return load_texts("demo", max_samples=160)


@pytest.fixture(scope="session")
def tokenizer(texts):
    return load_tokenizer("bpe:800", as_corpus(texts))


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer):
    """Folders of tiny models with random weights: GPT-2, and one built like llama."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("bases")
    like_llama = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    like_llama |= dict(num_key_value_heads=2, max_position_embeddings=96, vocab_size=len(tokenizer))
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    for name, model in {
        "gpt2": GPT2LMHeadModel(gpt2),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**like_llama, tie_word_embeddings=True)),
    }.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.slow
def test_a_run_on_such_a_folder_serves_an_adapter_for_it(bases, texts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bases / "qwen2"
    line = words(tmp_path, "a", f"--model {base} --num-rounds 1 --local-steps 2 --eval-samples 0")
    del line[line.index("--tokenizer") : line.index("--tokenizer") + 2]  # the folder has its own
    assert call(*line) == 0
    assert not (tmp_path / "a" / "base").exists()
    named = json.loads((tmp_path / "a/final/adapter/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base) and named["fan_in_fan_out"] is False
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a/final/adapter")
    nll, n = losses(model, token_rows(AutoTokenizer.from_pretrained(base), texts.splits["validation"]))
    assert read_metrics(tmp_path / "a")[-1]["val_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_dropout_of_zero_leaves_nothing_to_chance(bases, tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "dropping"
    shutil.copytree(bases / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5, "attn_pdrop": 0.5}))
    ids = torch.arange(40)[None]
    differ = []
    for i, dropout in enumerate((None, 0.0)):
        model = models.load_base(str(folder), tokenizer, 64, 0, dropout)
        model.save_pretrained(tmp_path / f"saved_{i}")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved_{i}")
        for one in (model.train(), saved.train()):
            with torch.no_grad():
                differ.append(bool((one(ids).logits != one(ids).logits).any()))
    assert differ == [True, True, False, False]


def test_one_gelu_is_transformers_five_operations(bases, tokenizer):
    plain, one = (models.load_base(str(bases / "gpt2"), tokenizer, 64, 0, 0.0, one) for one in (False, True))
    assert type(plain.transformer.h[0].mlp.act) is not type(one.transformer.h[0].mlp.act)
    x = 3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.transformer.h[0].mlp.act(x), plain.transformer.h[0].mlp.act(x), rtol=1e-5, atol=1e-6)
