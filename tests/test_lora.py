"""Adapters on disk: the same bytes as peft's, loadable by plain peft, and every file that is refused."""

import sys

import peft
import pytest
import torch
from comparing import same_bits
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from common.checkpoint import read_json, write_json
from common.cli import RunFailed, UsageError
from common.lora import CONFIG, WEIGHTS, read_adapter, write_adapter

PREFIX = "base_model.model."
QUERY = "roberta.encoder.layer.0.attention.self.query"
TOKENS = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 12, 2, 1]])


def roberta(labels=3, hidden=16):
    """A RoBERTa of two layers, the same weights in every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = RobertaConfig(vocab_size=50, max_position_embeddings=20, num_labels=labels, pad_token_id=1, **sizes)
    return RobertaForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=1)
    return GPT2ForSequenceClassification(config).eval()


def adapted(seed, base=None, r=2, alpha=4, targets=("query", "value"), **options):
    """A peft model with random factors and head. intermediate.dense is 24 x 16: a transposed factor cannot hide."""
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], **options}
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    model = peft.get_peft_model(base or roberta(), config).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def save_by_peft(folder, seed=1, **options):
    model = adapted(seed, **options)
    model.save_pretrained(folder)
    return model


def change(folder, **fields):
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **fields})


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=(TOKENS != 1).long()).logits


def write_again(file, folder, **options):
    about = {"alpha": file.alpha, "target_modules": file.target_modules, "modules_to_save": file.modules_to_save}
    about |= {"base_model": file.base_model, "fan_in_fan_out": file.fan_in_fan_out}
    write_adapter(folder, file.factors, file.head, **{**about, **options})


# ---- what is written and read


def test_reads_what_peft_saved(tmp_path):
    model = save_by_peft(tmp_path / "a", targets=["value", "query", "intermediate.dense"])
    file = read_adapter(tmp_path / "a")
    assert (file.r, file.alpha, file.scale, file.base_model, file.fan_in_fan_out) == (2, 4, 2.0, None, False)
    assert file.target_modules == ["intermediate.dense", "query", "value"] and len(file.factors) == 6
    for layer, (A, B) in file.factors.items():
        part = model.get_submodule(PREFIX + layer)
        assert torch.equal(A, part.lora_A["default"].weight) and torch.equal(B, part.lora_B["default"].weight)
    head = model.get_submodule(PREFIX + "classifier.modules_to_save.default")
    assert same_bits(file.head, {f"classifier.{name}": p.detach() for name, p in head.named_parameters()})


@pytest.mark.parametrize("base, targets, flipped", [(roberta, "query value", False), (gpt2, "c_attn c_fc", True)])
def test_writes_what_peft_writes_and_plain_peft_loads_it(base, targets, flipped, tmp_path):
    head = ["classifier"] if base is roberta else ["score"]
    options = {"targets": targets.split(), "fan_in_fan_out": flipped, "modules_to_save": head}
    model = save_by_peft(tmp_path / "peft", base=base(), **options)
    file = read_adapter(tmp_path / "peft")
    write_again(file, tmp_path / "ours", modules_to_save=read_json(tmp_path / "peft" / CONFIG)["modules_to_save"])
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()
    ours, theirs = (read_json(tmp_path / name / CONFIG) for name in ("ours", "peft"))
    assert {**theirs, "target_modules": sorted(theirs["target_modules"])} == ours
    assert read_adapter(tmp_path / "ours").sha256 == file.sha256
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(base()), atol=1e-3)


def test_half_precision(tmp_path):
    save_by_peft(tmp_path / "a")
    half = {k: t.to(torch.bfloat16, copy=True) for k, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(half, tmp_path / "a" / WEIGHTS)
    file = read_adapter(tmp_path / "a")
    assert {t.dtype for pair in file.factors.values() for t in pair} == {torch.float32}


# ---- whole or not at all


def test_an_adapter_is_replaced_but_nothing_else_and_only_by_finite_numbers(tmp_path):
    save_by_peft(tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    write_again(file, tmp_path / "a", alpha=99, more={"fuse_manifest.json": {"x": 1}})
    write_again(file, tmp_path / "a", alpha=98.5)
    assert read_adapter(tmp_path / "a").alpha == 98.5
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS]
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="thesis.txt"):
        write_again(file, tmp_path / "a")
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"
    file.factors[QUERY][0][0, 0] = float("nan")
    with pytest.raises(RunFailed, match=f"{QUERY}.lora_A"):
        write_again(file, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---- what is refused


REFUSED_OPTIONS = [
    ({"peft_type": "IA3"}, "peft_type IA3"),
    ({"megatron_config": {"x": 1}}, "megatron_config"),
    ({"task_type": "CAUSAL_LM"}, "CAUSAL_LM"),
    ({"use_dora": True}, "use_dora"),
    ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"query": 4}}, "rank_pattern"),
    ({"bias": "all"}, "bias all"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ({"of_a_later_peft": "on"}, "of_a_later_peft"),
    ({"r": 3}, "with r 3"),
    ({"r": 0}, "save the adapter again"),
    ({"lora_alpha": 0}, "lora_alpha 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"modules_to_save": None}, "classifier"),
]


def test_options_that_are_refused(tmp_path):
    save_by_peft(tmp_path)
    good = read_json(tmp_path / CONFIG)
    for fields, words in REFUSED_OPTIONS:
        write_json(tmp_path / CONFIG, {**good, **fields})
        refused(tmp_path, words)


def test_code_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    save_by_peft(tmp_path / "a")
    (tmp_path / "planted.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    change(tmp_path / "a", megatron_core="planted")
    refused(tmp_path / "a", "megatron_core planted")
    change(tmp_path / "a", auto_mapping={"base_model_class": "X", "parent_library": "planted"}, megatron_core=None)
    refused(tmp_path / "a", "auto_mapping")
    assert "planted" not in sys.modules and not (tmp_path / "ran").exists()


def test_what_is_missing_damaged_or_pickled(tmp_path):
    refused(tmp_path / "none", f"has no {CONFIG}")
    save_by_peft(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, f"has no {WEIGHTS}: give an adapter in safetensors, pickles are not read")
    for share in (0.0, 0.2, 0.9999):
        (tmp_path / WEIGHTS).write_bytes(data[: int(share * len(data))])
        refused(tmp_path, f"{WEIGHTS} is damaged")
    (tmp_path / WEIGHTS).write_bytes(data)
    for text in ("", "{", "[]", "\xff"):
        (tmp_path / CONFIG).write_text(text, encoding="latin-1")
        refused(tmp_path, CONFIG)


def test_tensors_that_are_refused(tmp_path):
    save_by_peft(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    A, B, head = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight", f"{PREFIX}classifier.dense.bias"
    for key, tensor, words in [
        (A, None, "[None, [16, 2]]"),
        (A, torch.zeros(3, 16), "with r 2"),
        (B, torch.zeros(16, 3), "with r 2"),
        (B, torch.full((16, 2), torch.inf), f"{QUERY}.lora_B.weight is not finite"),
        (head, torch.full((16,), torch.nan), "classifier.dense.bias is not finite"),
        (f"{PREFIX}{QUERY}.lora_magnitude_vector", torch.zeros(16), "lora_magnitude_vector"),
        ("classifier", None, "no weights of classifier"),
        ("lora_", None, "no weights of factors"),
    ]:
        stored = {name: t for name, t in good.items() if tensor is not None or key not in name}
        save_file({**stored, key: tensor} if tensor is not None else stored, tmp_path / WEIGHTS)
        refused(tmp_path, words)


def refused(folder, words):
    with pytest.raises(UsageError) as error:
        read_adapter(folder)
    text = str(error.value)
    assert words in text and str(folder) in text and "\n" not in text and len(text) < 500, text
