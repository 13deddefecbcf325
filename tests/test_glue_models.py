"""Encoders of seven architectures with LoRA: what is adapted, trained, saved, loaded and refused."""

import copy
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from comparing import same_bits
from encoders import KINDS, make_tokenizer, save_encoder
from safetensors.torch import load_file

from common.adapter_files import read_adapter, write_adapter
from common.cli import UsageError
from common.lora import find_targets
from common.products import Product
from lora_glue_fl.data_prep import adamw, plan_steps
from lora_glue_fl.demo_glue import demo_task, demo_tokenizer
from lora_glue_fl.glue_tasks import TASKS
from lora_glue_fl.models import find_tokenizer, load_encoder, most_tokens
from lora_glue_fl.task_model import TaskModel

PREFIX = "base_model.model."
# the two layers' adapted modules, and the modules that are trained whole, where the file has no head
TARGETS = {
    "bert": ("bert.encoder.layer.{}.attention.self.", "query value", "bert.pooler classifier"),
    "roberta": ("roberta.encoder.layer.{}.attention.self.", "query value", "classifier"),
    "deberta-v2": ("deberta.encoder.layer.{}.attention.self.", "query_proj value_proj", "pooler classifier"),
    "modernbert": ("model.layers.{}.attn.", "Wqkv", "head classifier"),
    "distilbert": ("distilbert.transformer.layer.{}.attention.", "q_lin v_lin", "pre_classifier classifier"),
    "electra": ("electra.encoder.layer.{}.attention.self.", "query value", "classifier"),
    "mpnet": ("mpnet.encoder.layer.{}.attention.attn.", "q v", "classifier"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an encoder, pretrained on masked words: it has no head, and BERT no pooler."""
    root = tmp_path_factory.mktemp("encoders")

    def of(kind):
        return root / kind if (root / kind).is_dir() else save_encoder(root / kind, kind)

    return of


def args_of(folder, task="wnli", **more):
    about = {"task_name": task, "model": str(folder), "model_size": None, "tokenizer": None, "dataset": "demo"}
    about |= {"data_root": None, "cache_dir": None, "max_length": 24, "eval_batch_size": 32, "device": "cpu"}
    return SimpleNamespace(**{**about, "amp": "off", "threads": 0, "seed": 0, "pooling": "cls", **more})


def random_adapter(adapted, seed=1):
    """Random factors, so that neither A's nor B's gradient is zero, and a head of their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*(p for pair in adapted.factors().values() for p in pair), *adapted.head.values()]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def encoder(folder, task="wnli", seed=0):
    return load_encoder(str(folder), TASKS[task], find_tokenizer(None, "demo", None, str(folder)), seed)


# ---- the architectures


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_values_are_adapted_and_the_new_parts_trained(kind, folders):
    place, names, head = TARGETS[kind]
    adapted = encoder(folders(kind)).adapted(r=2, alpha=4)
    assert adapted.targets == tuple(names.split()) and not adapted.about()["fan_in_fan_out"]
    assert set(adapted.layers) == {place.format(i) + name for i in (0, 1) for name in names.split()}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folders(kind), num_labels=2)
    wanted = {n: p.shape for n, p in plain.named_parameters() if n.startswith(tuple(head.split()))}
    assert {name: p.shape for name, p in adapted.head.items()} == wanted


@pytest.mark.parametrize(
    "kind, letters", [*((kind, ("A", "B")) for kind in KINDS), ("deberta-v2", ("B",)), ("distilbert", ("A",))]
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
    about = {"alpha": 6, "target_modules": list(adapted.targets), "modules_to_save": list(found.encoder.head)}
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
    "distilbert": lambda model, h: model.classifier(model.pre_classifier(h[:, 0]).relu()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_reads_the_first_token_or_the_mean_of_those_that_are_no_padding(kind, folders):
    found, mean = (TaskModel(args_of(folders(kind), pooling=pooling), None) for pooling in ("cls", "mean"))
    for name, p in mean.model.named_parameters():
        if {*name.split(".")} & {*mean.encoder.head}:
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


@pytest.mark.parametrize("lora", [(2, 4, 0.0, None), None], ids=["lora", "all weights"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_weight_decay_spares_what_transformers_trainer_spares(kind, lora, folders):
    model = TaskModel(args_of(folders(kind), learning_rate=0.1, weight_decay=0.3), lora, train=False)
    trained = model.adapted.trainable() if lora else dict(model.model.named_parameters())
    groups = adamw(model.args, model.model, trained).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    trainer = transformers.Trainer.get_decay_parameter_names(None, model.model)
    decayed = {id(p) for name, p in model.model.named_parameters() if p.requires_grad and name in trainer}
    assert {id(p) for p in groups[0]["params"]} == decayed
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(trained)
    model.args.weight_decay = 0.0
    assert len(adamw(model.args, model.model, trained).param_groups) == 1


def test_an_architecture_that_is_not_known_lists_its_layers(tmp_path):
    folder = save_encoder(
        tmp_path / "funnel", "funnel", "AutoModelForSequenceClassification", tokenizer=make_tokenizer("bert")
    )
    with pytest.raises(UsageError, match="funnel is of .*not known.* --target-modules among k_head, linear_1.* v_head"):
        encoder(folder).adapted(r=2, alpha=2)
    model = encoder(folder).model
    assert find_targets(model, ["q_head", "v_head"]) == ("q_head", "v_head")
    with pytest.raises(UsageError, match="has no linear layer query: choose --target-modules among k_head"):
        find_targets(model, ["q_head", "query"])


def test_target_names_inside_the_head_leave_the_head_whole():
    # the tiny model's classifier has a layer `dense` too
    adapted = load_encoder("tiny", TASKS["rte"], demo_tokenizer(), 0).adapted(2, 2, targets=["dense"])
    assert len(adapted.layers) == 6 and not any(name.startswith("classifier") for name in adapted.layers)
    assert set(adapted.head) == {f"classifier.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")}


def test_rotary_positions_have_no_most_tokens(folders):
    assert most_tokens(encoder(folders("modernbert")).model) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "modernbert"])
def test_the_most_tokens_are_those_that_the_model_takes(kind, folders):
    model = encoder(folders(kind)).model.eval()
    most = most_tokens(model)
    tokens = torch.full((1, most + 1), 5)
    with torch.no_grad():
        model(input_ids=tokens[:, :most])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)


def test_long_examples_are_one_line(tmp_path):
    folder = save_encoder(tmp_path / "short", "bert", max_position_embeddings=12)
    with pytest.raises(UsageError, match="tokens, model .* takes 12: lower --max-length 24 to 12"):
        TaskModel(args_of(folder), (2, 2, 0.0, None))
    assert TaskModel(args_of(folder, max_length=12), (2, 2, 0.0, None)).encoded["train"].lengths().max() == 12


# ---- heads and files


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "tiny"])
def test_new_weights_follow_from_the_seed_alone(kind, folders):
    def made(seed):
        torch.manual_seed(np.random.default_rng().integers(2**31))  # what ran before does not matter
        if kind == "tiny":
            found = load_encoder("tiny", TASKS["wnli"], demo_tokenizer(), seed)
        else:
            found = encoder(folders(kind), seed=seed)
        torch.manual_seed(np.random.default_rng().integers(2**31))
        adapted = found.adapted(2, 2, seed=seed)
        return state(adapted.model), adapted

    (first, adapted), (again, _), (other, _) = made(1), made(1), made(2)
    same_bits(first, again)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    head = ("bert.pooler", "classifier") if kind == "bert" else ("classifier",)
    parts = {name.replace(".modules_to_save.default", "").replace(".original_module", "") for name in differ}
    new = {PREFIX + name for name in adapted.head if name.startswith(head) and name.endswith("weight")}
    assert new <= parts and any("lora_A" in name for name in differ) and not any("lora_B" in name for name in differ)
    if kind != "tiny":
        assert parts == new | {name for name in differ if "lora_A" in name}  # the rest is the file's


@pytest.mark.parametrize("kind, labels, task", [("bert", 5, "wnli"), ("roberta", 1, "mnli"), ("bert", 3, "stsb")])
def test_a_head_for_other_labels_is_new(kind, labels, task, tmp_path):
    folder = save_encoder(tmp_path / "m", kind, "AutoModelForSequenceClassification", num_labels=labels)
    found, stored = encoder(folder, task), load_file(folder / "model.safetensors")
    last = {"bert": "classifier", "roberta": "classifier.out_proj"}[kind]
    assert found.notes == [f"not in {folder}, begins at random: {last}"]
    own = found.model.state_dict()
    assert own[f"{last}.weight"].shape == (TASKS[task].num_labels, 16) and found.head == ("classifier",)
    assert {name for name, t in stored.items() if own[name].shape != t.shape} == {f"{last}.weight", f"{last}.bias"}
    assert all(torch.equal(own[name], t) for name, t in stored.items() if not name.startswith(last))
    outputs = TaskModel(args_of(folder, task), None, train=False).outputs(TASKS[task].evaluation_splits[0])
    assert outputs.shape[1] == TASKS[task].num_labels


def test_a_head_that_fits_is_taken(tmp_path):
    folder = save_encoder(tmp_path / "m", "bert", "AutoModelForSequenceClassification", num_labels=2)
    found = encoder(folder, seed=5)
    same_bits(dict(found.model.state_dict()), load_file(folder / "model.safetensors"))
    assert found.notes == [] and found.head == ("classifier",)


def test_the_loss_of_scores_is_the_squared_error(folders):
    found = TaskModel(args_of(folders("bert"), "stsb"), (2, 2, 0.0, None))
    found.model.eval()
    batch = found.encoded["train"].batch([0, 1, 2])
    logits = found.model(**{name: t for name, t in batch.items() if name != "labels"}).logits
    assert logits.shape == (3, 1) and batch["labels"].std() > 0
    assert found.loss(batch).item() == pytest.approx(((logits[:, 0] - batch["labels"]) ** 2).mean().item())


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: cut(f, -7), "cannot be read as an encoder .*: give a folder"),
        (lambda f: cut(f, 5), "cannot be read as an encoder .*: give a folder"),
        (lambda f: edit(f, '"model_type": "bert"', '"model_type": "no_such"'), "no_such"),
        (lambda f: edit(f, '"model_type": "bert"', '"model_type": "vit"'), "ViTConfig"),
        (lambda f: edit(f, '"intermediate_size": 24', '"intermediate_size": 25'), "has another size in its file"),
        (lambda f: edit(f, '"num_hidden_layers": 2', '"num_hidden_layers": 3'), "lacks weights of encoder.*: give"),
        (lambda f: edit(f, '"architectures"', ""), "cannot be read as an encoder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json with model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are not read"),
    ],
)
def test_a_damaged_model_is_one_line(break_it, words, tmp_path):
    tokenizer = make_tokenizer("bert")
    folder = save_encoder(tmp_path / "m", "bert", tokenizer=tokenizer)
    break_it(folder)
    with pytest.raises(UsageError, match=words) as error:
        load_encoder(str(folder), TASKS["wnli"], tokenizer, 0)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def cut(folder, n):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:n])


def edit(folder, old, new):
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def test_fewer_embeddings_than_tokens_are_refused(folders):
    tokenizer = make_tokenizer("mpnet")
    own = len(make_tokenizer("bert"))
    with pytest.raises(UsageError, match=f"knows {own} tokens, the tokenizer has {own + 1}: give .*--tokenizer"):
        load_encoder(str(folders("bert")), TASKS["wnli"], tokenizer, 0)


def test_find_tokenizer(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_downloads"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no_downloads" / "hub"))
    monkeypatch.setenv("FEDQUARTET_DATA", str(tmp_path))
    pair = ("the farmer", "the table")
    own = find_tokenizer(None, "glue", None, str(folders("bert")))(*pair)
    assert own == make_tokenizer("bert")(*pair) and "token_type_ids" in own
    given = find_tokenizer(str(folders("mpnet")), "demo", None, str(folders("bert")))
    assert given(*pair)["input_ids"] == make_tokenizer("mpnet")(*pair)["input_ids"] != own["input_ids"]
    assert find_tokenizer("demo", "glue", None, str(folders("bert"))).get_vocab() == demo_tokenizer().get_vocab()
    assert find_tokenizer(None, "demo").get_vocab() == demo_tokenizer().get_vocab()
    with pytest.raises(UsageError, match="roberta-base.*--model tiny --dataset demo"):
        find_tokenizer(None, "glue")
    make_tokenizer("roberta").save_pretrained(tmp_path / "tokenizers" / "roberta-base")
    assert len(find_tokenizer(None, "glue")) == len(make_tokenizer("roberta"))
    assert len(find_tokenizer(None, "glue", tmp_path)) == len(make_tokenizer("roberta"))
    bare = save_encoder(tmp_path / "bare", "bert")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UsageError, match="bare.* knows no words: give a folder with tokenizer.json"):
        find_tokenizer(None, "demo", None, str(bare))


# ---- other ranks, and base weights

LAYERS = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"]}  # gpt2's are Conv1D, [k, d]


def conv_or_linear(kind, tmp_path):
    """(an adapted encoder with random factors, the plain model in fp64, tokens)."""
    folder = save_encoder(tmp_path / kind, kind, "AutoModelForSequenceClassification", num_labels=2)
    found = encoder(folder)
    plain = copy.deepcopy(found.model).double().eval()
    adapted = found.adapted(2, 3, targets=[name.split(".")[-1] for name in LAYERS[kind]])
    random_adapter(adapted)
    for name, p in adapted.head.items():
        plain.get_parameter(name).data.copy_(p)
    tokens = torch.randint(5, 36, (4, 11), generator=torch.Generator().manual_seed(3))
    return adapted, plain, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def add_dense(plain, factors, scale, flipped):
    """W + s B A in fp64, by numpy."""
    for name, (A, B) in factors.items():
        delta = scale * B.detach().double().numpy() @ A.detach().double().numpy()
        plain.get_submodule(name).weight.data += torch.from_numpy(delta.T if flipped else delta)


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits.double()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_another_ranks_adapter_gives_w_plus_s_b_a(kind, tmp_path):
    adapted, plain, batch = conv_or_linear(kind, tmp_path)
    assert adapted.about()["fan_in_fan_out"] == (kind == "gpt2")
    sizes = {B.shape[0] / A.shape[1] for A, B in adapted.factors().values()}
    assert sizes & {1.5, 3.0}, "a layer that is not square"
    generator = torch.Generator().manual_seed(4)
    factors = {
        name: (torch.randn(5, A.shape[1], generator=generator), torch.randn(B.shape[0], 5, generator=generator))
        for name, (A, B) in adapted.factors().items()
    }
    head = {name: torch.randn(p.shape, generator=generator) for name, p in adapted.head.items()}
    before = logits(adapted.model, batch)
    trained = adapted.trainable(("B",))
    adapted.load(factors, head, 0.7)
    found = adapted.factors()
    assert all(torch.equal(x, y) for name in factors for x, y in zip(factors[name], found[name], strict=True))
    assert all(p.data_ptr() != t.data_ptr() for n in factors for p, t in zip(found[n], factors[n], strict=True))
    assert adapted.scale == 0.7
    assert all(p.requires_grad == ("lora_B" in n) for n, p in adapted.model.named_parameters() if "lora_" in n)
    assert all(torch.equal(head[name], p) for name, p in adapted.head.items())
    assert {p.shape for p in adapted.trainable(("B",)).values()} != {p.shape for p in trained.values()}
    for name, t in head.items():
        plain.get_parameter(name).data.copy_(t)
    add_dense(plain, factors, 0.7, kind == "gpt2")
    adapted.model.double()
    torch.testing.assert_close(logits(adapted.model, batch), logits(plain, batch), rtol=1e-9, atol=1e-9)
    assert (logits(plain, batch) - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_base_weights_take_updates(kind, tmp_path):
    adapted, plain, batch = conv_or_linear(kind, tmp_path)
    base = {name: weight.detach().clone() for name, weight in adapted.base_weights().items()}
    same_bits(base, {name: plain.get_submodule(name).weight.float() for name in base})
    factors, left = adapted.factors(), sorted(base)[-1]
    updates = {
        name: Product(B.shape[0], A.shape[1]).add(A, B, -0.4) for name, (A, B) in factors.items() if name != left
    }
    new = adapted.updated(base, updates)
    assert new[left] is base[left]
    for name in updates:
        A, B = (t.detach().double().numpy() for t in factors[name])
        delta = -0.4 * B @ A
        wanted = base[name].double().numpy() + (delta.T if kind == "gpt2" else delta)
        assert np.abs(new[name].numpy() - wanted).max() < 1e-6 and np.abs(delta).max() > 1e-2
    adapted.load_base(new)
    same_bits({n: w.detach() for n, w in adapted.base_weights().items()}, new)
    add_dense(plain, {name: factors[name] for name in updates}, -0.4, kind == "gpt2")
    add_dense(plain, factors, adapted.scale, kind == "gpt2")
    torch.testing.assert_close(logits(adapted.model, batch), logits(plain, batch), rtol=1e-4, atol=1e-4)
    adapted.save_merged(tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), logits(plain, batch), rtol=1e-4, atol=1e-4)


def test_adapters_that_do_not_fit_are_named(folders, tmp_path):
    found = TaskModel(args_of(folders("bert")), (2, 2, 0.0, None), train=False)
    cases = {
        "its layers are not those of .*bert.encoder.layer.0.*--model": encoder(folders("roberta")).adapted(2, 2),
        "its layers are not those of .*self.value": encoder(folders("bert")).adapted(2, 2, targets=["query"]),
        "its head .*classifier.bias 3.* is not the task's .*classifier.bias 2.*--task-name": encoder(
            folders("bert"), "mnli"
        ).adapted(2, 2),
        "is 32 x 32, in .* 16 x 16: give its --model": encoder(
            save_encoder(tmp_path / "wide", "bert", hidden_size=32)
        ).adapted(2, 2),
    }
    for words, other in cases.items():
        factors = {layer: (A.detach(), B.detach()) for layer, (A, B) in other.factors().items()}
        write_adapter(tmp_path / "a", factors, other.head, alpha=2, base_model="x", **other.about())
        with pytest.raises(UsageError, match=words):
            found.check_fits(read_adapter(tmp_path / "a"))


@pytest.mark.parametrize("epochs, steps", [(2, [4, 4, 1, 4, 4, 1]), (1.5, [4, 4, 1, 4, 1]), (0.5, [4, 1])])
def test_accumulation_keeps_epochs_apart(epochs, steps):
    lengths = np.random.default_rng(0).integers(5, 30, 170)
    args = SimpleNamespace(batch_size=8, gradient_accumulation_steps=4, seed=1)
    found = plan_steps(SimpleNamespace(lengths=lambda: lengths), np.arange(100, 170), args, epochs)  # 9 batches a pass
    assert [len(step) for step in found] == steps
    for first in range(0, len(found) - 2, 3):
        rows = np.concatenate([rows for step in found[first : first + 3] for rows in step])
        assert first or sorted(rows) == list(range(100, 170))
