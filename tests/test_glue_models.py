"""Encoders of four architectures with LoRA: what is adapted, trained, saved, loaded and refused."""

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from encoders import KINDS, make_tokenizer, save_encoder
from safetensors.torch import load_file

from common.cli import UsageError
from common.lora import read_adapter, write_adapter
from lora_glue_fl.glue_tasks import TASKS, demo_task
from lora_glue_fl.models import TaskModel, load_tokenizer

PREFIX = "base_model.model."
# the two layers' adapted modules, and the modules that are trained whole, where the file has no head
TARGETS = {
    "bert": ("bert.encoder.layer.{}.attention.self.", "query value", "bert.pooler classifier"),
    "roberta": ("roberta.encoder.layer.{}.attention.self.", "query value", "classifier"),
    "deberta-v2": ("deberta.encoder.layer.{}.attention.self.", "query_proj value_proj", "pooler classifier"),
    "modernbert": ("model.layers.{}.attn.", "Wqkv", "head classifier"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an encoder, pretrained on masked words: it has no head, and BERT no pooler."""
    root = tmp_path_factory.mktemp("encoders")

    def of(kind):
        return root / kind if (root / kind).is_dir() else save_encoder(root / kind, kind)

    return of


def args_of(folder, task="wnli", **more):
    about = {"task_name": task, "model": str(folder), "model_size": None, "dataset": "demo"}
    about |= {"data_root": None, "max_length": 24, "eval_batch_size": 32, "device": "cpu"}
    return SimpleNamespace(**{**about, "amp": "off", "threads": 0, "seed": 0, "pooling": "cls", **more})


def random_adapter(adapted, seed=1):
    """Random factors, so that neither A's nor B's gradient is zero, and a head of their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*(p for pair in adapted.factors().values() for p in pair), *adapted.head.values()]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def adapted_of(folder, task="wnli", r=2, alpha=2):
    return TaskModel(args_of(folder, task), (r, alpha, 0.0, None), train=False).adapted


# ---- the architectures


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_values_are_adapted_and_the_new_parts_trained(kind, folders):
    place, names, head = TARGETS[kind]
    adapted = adapted_of(folders(kind))
    assert adapted.targets == tuple(names.split()) and not adapted.about()["fan_in_fan_out"]
    assert set(adapted.layers) == {place.format(i) + name for i in (0, 1) for name in names.split()}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders(kind), num_labels=2)
    wanted = {n: p.shape for n, p in plain.named_parameters() if n.startswith(tuple(head.split()))}
    assert {name: p.shape for name, p in adapted.head.items()} == wanted


@pytest.mark.parametrize(
    "kind, letters", [*((kind, ("A", "B")) for kind in KINDS), ("deberta-v2", ("B",)), ("bert", ("A",))]
)
def test_a_step_changes_what_is_trained_and_nothing_else(kind, letters, folders):
    found = TaskModel(args_of(folders(kind)), (3, 6, 0.0, None))
    adapted = found.adapted
    random_adapter(adapted)
    trained, before = adapted.trainable(letters), state(adapted.model)
    adapted.model.train()
    found.loss(found.encoded["train"].batch(np.arange(8))).backward()
    torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0).step()
    after = state(adapted.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {f"{PREFIX}{layer}.lora_{x}.default.weight" for layer in adapted.layers for x in letters}
    wanted |= {name for name in before if ".modules_to_save.default." in name}
    learnt = {name for name, p in found.model.named_parameters() if p.requires_grad}
    assert changed == wanted == learnt and len(trained) == len(wanted)
    for name, p in trained.items():
        letter, _, layer = name.partition(".")
        if letter in "AB":
            assert torch.equal(p, after[f"{PREFIX}{layer}.lora_{letter}.default.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_in_plain_peft_gives_the_same_outputs_and_metrics(kind, folders, tmp_path):
    found = TaskModel(args_of(folders(kind)), (3, 6, 0.0, None), train=False)
    adapted = found.adapted
    random_adapter(adapted)
    factors = {name: (A.detach(), B.detach()) for name, (A, B) in adapted.factors().items()}
    about = {"alpha": 6, "target_modules": list(adapted.targets), "modules_to_save": found.head}
    write_adapter(tmp_path / "a", factors, adapted.head, base_model=str(folders(kind)), **about)
    torch.manual_seed(77)  # of what the plain model draws for the parts that the file lacks
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders(kind), num_labels=2)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders(kind))
    split = demo_task("wnli")["validation"]
    texts = [*split.texts.values()]
    with torch.no_grad():
        rows = [
            plain(**tokenizer(a, b, return_tensors="pt", truncation=True, max_length=24)).logits[0]
            for a, b in zip(*texts, strict=True)
        ]
    torch.testing.assert_close(found.outputs("validation"), torch.stack(rows), rtol=1e-4, atol=1e-5)
    assert torch.stack(rows).std(dim=0).min() > 1e-2  # examples differ: a model that ignores them would pass
    metrics, labels = found.evaluate(), torch.tensor(split.labels)
    assert metrics["val_accuracy"] == pytest.approx((torch.stack(rows).argmax(dim=1) == labels).double().mean().item())
    loss = torch.nn.functional.cross_entropy(torch.stack(rows).double(), labels)
    assert metrics["val_loss"] == pytest.approx(loss.item(), rel=1e-4)
    found.check_fits(read_adapter(tmp_path / "a"))


HEADS = {  # what transformers makes of hidden states h [B, L, H], of which it takes the first
    "bert": lambda model, h: model.classifier(model.bert.pooler(h)),
    "deberta-v2": lambda model, h: model.classifier(model.pooler(h)),
    "modernbert": lambda model, h: model.classifier(model.head(h[:, 0])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_reads_the_first_token_or_the_mean_of_those_that_are_no_padding(kind, folders):
    found, mean = (TaskModel(args_of(folders(kind), pooling=pooling), None) for pooling in ("cls", "mean"))
    for name, p in mean.model.named_parameters():
        if {*name.split(".")} & {*mean.head}:
            torch.nn.init.normal_(p, std=0.5)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders(kind), num_labels=2).eval()
    plain.load_state_dict(found.model.state_dict())
    split = found.encoded["validation"]
    batch = split.batch(np.arange(20))
    mask = batch["attention_mask"]
    del batch["labels"]
    lengths = [int(n) - i % 7 for i, n in enumerate(mask.sum(dim=1))]
    for i, n in enumerate(lengths):
        batch["input_ids"][i, n:], mask[i, n:] = split.pad, 0
    with torch.no_grad():
        assert torch.equal(found.model.eval()(**batch).logits, plain(**batch).logits)  # transformers' own, every bit
        outputs = mean.model.eval()(**batch).logits
        plain.load_state_dict(mean.model.state_dict())
        plain.double()
        expected = []
        for i, n in enumerate(lengths):  # one after the other: without padding
            h = plain.base_model(**{name: t[i : i + 1, :n] for name, t in batch.items()}).last_hidden_state
            head = HEADS.get(kind, lambda model, h: model.classifier(h))
            expected.append(head(plain, h.mean(dim=1, keepdim=True))[0])
    torch.testing.assert_close(outputs.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.stack(expected).std(dim=0).min() > 1e-2


# ---- heads and files


@pytest.mark.parametrize("kind, labels, task", [("roberta", 1, "mnli"), ("bert", 3, "stsb")])
def test_a_head_for_other_labels_is_new(kind, labels, task, tmp_path):
    folder = save_encoder(tmp_path / "m", kind, "AutoModelForSequenceClassification", num_labels=labels)
    found, stored = TaskModel(args_of(folder, task), None, train=False), load_file(folder / "model.safetensors")
    last = {"bert": "classifier", "roberta": "classifier.out_proj"}[kind]
    assert found.notes == [f"not in {folder}, begins at random: {last}"]
    own = found.model.state_dict()
    assert own[f"{last}.weight"].shape == (TASKS[task].num_labels, 16) and found.head == ["classifier"]
    assert {name for name, t in stored.items() if own[name].shape != t.shape} == {f"{last}.weight", f"{last}.bias"}
    assert all(torch.equal(own[name], t) for name, t in stored.items() if not name.startswith(last))
    outputs = found.outputs(TASKS[task].evaluation_splits[0])
    assert outputs.shape[1] == TASKS[task].num_labels


def test_the_tokenizer_is_the_models_own(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_downloads"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no_downloads" / "hub"))
    pair = ("the farmer", "the table")
    own = load_tokenizer(str(folders("bert")), "demo")(*pair)
    assert own == make_tokenizer("bert")(*pair) and "token_type_ids" in own
    with pytest.raises(UsageError, match="roberta-base.*--model tiny --dataset demo"):
        load_tokenizer("tiny", "glue")
    tokenizer = make_tokenizer("bert")
    tokenizer.pad_token = None
    folder = save_encoder(tmp_path / "unpadded", "bert", tokenizer=make_tokenizer("bert"))
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="unpadded has no padding token"):
        load_tokenizer(str(folder), "demo")


def test_adapters_that_do_not_fit_are_named(folders, tmp_path):
    found = TaskModel(args_of(folders("bert")), (2, 2, 0.0, None), train=False)
    wide = save_encoder(tmp_path / "wide", "bert", hidden_size=32)
    cases = {
        "bert.encoder.layer.0.* is None, in .*--model": adapted_of(folders("roberta")),
        "classifier.bias is .3,., in .*2,.*--task-name": adapted_of(folders("bert"), "mnli"),
        "is .32, 32., in .* .16, 16.: give its --model": adapted_of(wide),
    }
    for words, other in cases.items():
        factors = {layer: (A.detach(), B.detach()) for layer, (A, B) in other.factors().items()}
        write_adapter(tmp_path / "a", factors, other.head, alpha=2, base_model="x", **other.about())
        with pytest.raises(UsageError, match=words):
            found.check_fits(read_adapter(tmp_path / "a"))
