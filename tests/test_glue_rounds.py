"""fedavg_rounds.py: whole rounds of every rule against a plain loop in fp64, what a run serves, keeps and logs."""

import importlib
import math
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes
from torch.nn import functional as F

from common.checkpoint import read_json
from common.cli import RULES, checked, run_main
from common.lora import write_adapter
from common.runlog import read_metrics
from common.seeding import stream, torch_stream
from lora_glue_fl import fed_core, flags
from lora_glue_fl.data_prep import encode, load_task, training_batches
from lora_glue_fl.glue_tasks import demo_task, demo_tokenizer
from lora_glue_fl.models import TaskModel, read_mean
from lora_glue_fl.sharding import make_client_splits, save_shard_manifests

TINY = "--model tiny --dataset demo --task-name sst2 --lora-r 4 --svd-rank 4 --learning-rate 5e-3 --threads 1".split()
TINY += "--rounds 3 --local-epochs 0.5 --eval-each-round --max-length 32 --batch-size 8".split()


def words(shards, *more):
    return [*TINY, "--shard-dir", str(shards), *map(str, more)]


def call(*line, script="fedavg_rounds"):
    """The exit code of a script of this study in this process."""
    module = importlib.import_module(f"lora_glue_fl.{script}")
    args = module.build_parser().parse_args([str(word) for word in line])
    with pytest.raises(SystemExit) as stop:
        run_main(module.main, checked(flags.complete_rounds, args) if script == "fedavg_rounds" else args)
    return stop.value.code


@pytest.fixture(scope="session")
def shards():
    return harness.whole("lora_glue_fl/sharding")


def runs(rule):
    """The finished run of tests/harness.py."""
    return harness.whole(f"lora_glue_fl/{rule}")


# ---- rounds against a plain loop: torch, transformers' model, the data and the keys of the random streams

SEED, K, LR, EPOCHS, S, S_SVD = 3, 5, 5e-3, 0.5, 8 / 4, 6 / 4
LAYERS = [f"roberta.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
BAD = {4}  # the second client of the second round
ROUNDS = f"--dataset demo --task-name sst2 --seed {SEED} --threads 1 --rounds 2 --participation 0.5 "
ROUNDS += f"--max-length 32 --batch-size 8 --learning-rate {LR} --local-epochs {EPOCHS} --lora-r 4 --lora-alpha 8 "


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A RoBERTa without dropout, an adapter of rank 2 with a head, the shards of five unequal clients."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("given")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    ids = {"pad_token_id": demo_tokenizer().pad_token_id, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=len(demo_tokenizer()), **sizes, **off, **ids))
    model.save_pretrained(folder / "model")
    demo_tokenizer().save_pretrained(folder / "model")
    factors = {layer: (torch.randn(2, 32) / 6, torch.randn(32, 2) / 6) for layer in LAYERS}
    head = {name: p.detach() for name, p in model.named_parameters() if name.startswith("classifier.")}
    about = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "base_model": None}
    for pooling in ("cls", "mean"):
        write_adapter(folder / f"adapter_{pooling}", factors, head, alpha=3, head_pooling=pooling, **about)
    info = make_client_splits("sst2", K, "dirichlet", seed=1, dirichlet_alpha=2.0, max_examples=120, dataset="demo")
    save_shard_manifests(folder / "shards", info)
    rows = [np.array(part) for part in info["client_indices"]]
    encoded = encode(load_task("sst2", "demo"), demo_tokenizer(), 32)["train"]
    return SimpleNamespace(folder=folder, model=model.double().eval(), factors=factors, rows=rows, encoded=encoded)


def sampled(given, t):
    """The round's clients in the script's order: the longest first."""
    chosen = stream(SEED, "participation", t).choice(K, 3, replace=False).tolist()
    return sorted(chosen, key=lambda k: (-len(given.rows[k]), k))


def start_of(given):
    """theta before the first round in fp64: A of rank 4, whose third and fourth row are drawn, B, head, weights W."""
    theta = {name: p.detach().clone() for name, p in given.model.named_parameters() if name.startswith("classifier.")}
    for layer, (A, B) in given.factors.items():
        rows = (2 * torch.rand(2, 32, generator=torch_stream(SEED, f"new rows of {layer}")) - 1) / math.sqrt(32)
        theta[f"A.{layer}"] = torch.cat([A, rows]).double()
        theta[f"B.{layer}"] = torch.cat([B.double() * (3 / 2) / S, torch.zeros(32, 2).double()], dim=1)
        theta[f"W.{layer}"] = given.model.get_parameter(f"{layer}.weight").detach().clone()
    return theta


def weights_of(theta, scale):
    """{name: weight} that the model computes with."""
    named = {
        f"{layer}.weight": theta[f"W.{layer}"] + scale * theta[f"B.{layer}"] @ theta[f"A.{layer}"] for layer in LAYERS
    }
    return named | {name: t for name, t in theta.items() if name.startswith("classifier.")}


def logits_of(model, weights, batch, pooling):
    """transformers' own, or its hidden states, averaged example by example, and the head written out."""
    if pooling == "cls":
        return torch.func.functional_call(model, weights, kwargs=batch).logits
    inside = {name.removeprefix("roberta."): w for name, w in weights.items() if name.startswith("roberta.")}
    h = torch.func.functional_call(model.roberta, inside, kwargs=batch).last_hidden_state  # [B, L, H]
    h = torch.stack([one[: int(n)].mean(dim=0) for one, n in zip(h, batch["attention_mask"].sum(dim=1), strict=True)])
    for name in ("dense", "out_proj"):
        h = h @ weights[f"classifier.{name}.weight"].T + weights[f"classifier.{name}.bias"]
        h = h.tanh() if name == "dense" else h
    return h


def local(given, theta, k, t, letters, pooling="cls"):
    """theta_k after the client's steps of AdamW on A, B as the round trains them, and the head."""
    from transformers import get_scheduler

    mine = {name: p.clone().requires_grad_(name[0] in (*letters, "c")) for name, p in theta.items()}
    trained = {name: p for name, p in mine.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0, foreach=False)
    rows = given.rows[k]
    steps = training_batches(given.encoded.lengths()[rows], 8, EPOCHS, SEED, t, k)
    schedule = get_scheduler("linear", optimizer, 0, len(steps))
    for step in steps:
        batch = given.encoded.batch(rows[step])
        labels = batch.pop("labels")
        optimizer.zero_grad()
        F.cross_entropy(logits_of(given.model, weights_of(mine, S), batch, pooling), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in mine.items()}


def served(rule, theta, means, deltas, t, split=""):
    """The rule's theta of {name: mean of the clients'} and {layer: mean of s B A}."""
    new = dict(means)
    for layer, delta in deltas.items():
        A, B, W = (f"{letter}.{layer}" for letter in "ABW")
        if rule == "residual":
            new[W] = theta[W] + delta - S * means[B] @ means[A]
        if rule == "stack":
            draw = torch_stream(SEED, f"lowrank: fresh adapter of {layer}", t)
            new[A] = ((2 * torch.rand(4, 32, generator=draw) - 1) / math.sqrt(32)).double()
            new[B], new[W] = torch.zeros(32, 4).double(), theta[W] + delta
        if rule == "svd" or split:
            U, sigma, Vh = torch.linalg.svd(delta if rule == "svd" else S * new[B] @ new[A])
            sigma, balance = sigma[:4] / (S_SVD if rule == "svd" else S), {"sv": 1.0, "balanced": 0.5}.get(split, 0.0)
            new[A], new[B] = (Vh[:4].T * sigma**balance).T, U[:, :4] * sigma ** (1 - balance)
    return new


def turn(theta_k, theta, letter):
    """Rotates a client's factors to agree with theta's."""
    for A, B in ((f"A.{layer}", f"B.{layer}") for layer in LAYERS):
        pairs = (theta_k[A].T, theta[A].T) if letter == "A" else (theta_k[B], theta[B])
        R = torch.from_numpy(orthogonal_procrustes(*(t.numpy() for t in pairs))[0])
        theta_k[A], theta_k[B] = R.T @ theta_k[A], theta_k[B] @ R


def plain(given, rule, split="", **options):
    """(weights that the model computes with after two rounds, and before): the reference."""
    theta, ranks = start_of(given), [3, 2, 4, 3, 2] if rule == "svd" else [4] * K
    start, place = weights_of(theta, S), 0
    for t in range(2):
        letters = {"ffa": "B", "rolora": "BA"[t], "head": ""}.get(rule, "AB")
        ratio = S_SVD / S if rule == "svd" and t else 1.0
        sums, deltas, total = {n: 0.0 for n in theta}, dict.fromkeys(LAYERS, 0.0), 0.0
        for k in sampled(given, t):
            begin = {n: p[: ranks[k]] if n[0] == "A" else p for n, p in theta.items()}
            begin = {n: p[:, : ranks[k]] * ratio if n[0] == "B" else p for n, p in begin.items()}
            theta_k = local(given, begin, k, t, letters, **options)
            if place not in BAD:
                w = len(given.rows[k])
                total += w
                for layer in LAYERS:
                    deltas[layer] = deltas[layer] + w * S * theta_k[f"B.{layer}"] @ theta_k[f"A.{layer}"]
                if rule == "rotate":
                    turn(theta_k, theta, "AB"[t])
                for n in sums:
                    if theta_k[n].shape == theta[n].shape:
                        sums[n] = sums[n] + w * theta_k[n]
            place += 1
        means = {n: p / total if torch.is_tensor(p) else theta[n] for n, p in sums.items()}
        deltas = {layer: delta / total for layer, delta in deltas.items()}
        theta = served(rule, theta, means, deltas, t, split)
    return weights_of(theta, S_SVD if rule == "svd" else S), start


def spoil(monkeypatch, bad, place):
    """The clients of these turns train this place of their vector to NaN. Returns a list of all turns."""
    steps, seen = fed_core.local_steps, []

    def local_steps(loss, batches, weights, *rest, **options):
        done = steps(loss, batches, weights, *rest, **options)
        if len(seen) in bad:
            weights.theta[place] = math.nan
        seen.append(len(seen))
        return done

    monkeypatch.setattr(fed_core, "local_steps", local_steps)
    return seen


def run_rounds(given, folder, monkeypatch, rule, more=""):
    """(weights that the served model computes with, lines of metrics.jsonl): the script, the clients of `BAD` NaN."""
    spoil(monkeypatch, BAD, 7 if rule != "ffa" else -1)  # a factor, or the head's last number
    line = f"{ROUNDS} --aggregate {rule} {more} --model {given.folder}/model --shard-dir {given.folder}/shards "
    pooling = "mean" if "mean" in more else "cls"
    line += f"--init-adapter {given.folder}/adapter_{pooling} --output-root {folder} --run-name r"
    assert call(*line.split()) == 0
    tensors = load_file(folder / "r" / "checkpoint" / "theta.safetensors")
    theta = {f"W.{layer}": given.model.get_parameter(f"{layer}.weight").detach() for layer in LAYERS}
    theta |= {name.replace("base.", "W."): t.double() for name, t in tensors.items()}
    head = [(name, p) for name, p in given.model.named_parameters() if name.startswith("classifier.")]
    pieces = theta.pop("head").split([p.numel() for _, p in head])
    theta |= {name: piece.view(p.shape) for (name, p), piece in zip(head, pieces, strict=True)}
    return weights_of(theta, S_SVD if rule == "svd" else S), read_metrics(folder / "r")


CASES = {
    "svd": ("svd", "--svd-rank 4 --alpha 6 --client-ranks 3 2 4", {}),
    "naive": ("naive", "", {}),
    "ffa": ("ffa", "", {}),
    "stack": ("stack", "", {}),
    "residual": ("residual", "", {}),
    "rolora": ("rolora", "", {}),
    "rotate": ("rotate", "", {}),
    "head": ("head", "", {}),
    "svd, all of S in A": ("svd", "--svd-rank 4 --alpha 6 --client-ranks 3 2 4 --split sv", {"split": "sv"}),
    "naive, split": ("naive", "--split us", {"split": "us"}),
    "residual, split": ("residual", "--split balanced", {"split": "balanced"}),
    "rotate, split": ("rotate", "--split sv", {"split": "sv"}),
    "mean pooling": ("naive", "--pooling mean", {"pooling": "mean"}),
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_are_the_plain_loop(case, given, tmp_path, monkeypatch):
    rule, more, options = CASES[case]
    assert len({len(rows) for rows in given.rows}) > 2 and sampled(given, 0) != sampled(given, 1)
    found, rows = run_rounds(given, tmp_path, monkeypatch, rule, more)
    expected, start = plain(given, rule, **options)
    for part in ("query", "value", "classifier"):
        names = [n for n in start if part in n]
        if rule == "head" and part != "classifier":
            assert all(torch.allclose(found[n], start[n], rtol=1e-6, atol=1e-7) for n in names)
            continue
        moved = sum((expected[n] - start[n]).square().sum() for n in names) ** 0.5
        missed = sum((found[n] - expected[n]).square().sum() for n in names) ** 0.5
        assert moved > 0.02 and missed < 5e-3 * moved, (missed / moved).item()

    last, bad = sorted(sampled(given, 1)), sampled(given, 1)[1]
    assert [row["round"] for row in rows] == [0, 1, 2] and rows[0]["val_loss"] > 0 and "train_loss" not in rows[0]
    assert rows[0]["bytes_up"] == rows[0]["bytes_down"] == 0
    assert rows[2]["left_out"] == [[2, bad]] and rows[2]["clients"] == last
    losses = dict(zip(last, rows[2]["client_train_loss"], strict=True))
    assert losses.pop(bad) is None
    examples = [len(given.rows[k]) for k in losses]
    assert rows[2]["train_loss"] == pytest.approx(np.average(list(losses.values()), weights=examples))
    assert rows[2]["examples"] == sum(math.ceil(len(given.rows[k]) / 2) for t in (0, 1) for k in sampled(given, t))

    # what is sampled sends, and all receive what changed: 32 x 32 layers, a client's rank; stacked factors of three
    ranks, side = [3, 2, 4, 3, 2] if rule == "svd" else [4] * K, 32 * len(LAYERS)
    head, letters = sum(start[n].numel() for n in start if n[0] == "c"), {"ffa": 1, "rolora": 1, "head": 0}.get(rule, 2)
    up = sum(ranks[k] * letters * side + head for t in (0, 1) for k in sampled(given, t))
    down = 2 * K * ((12 * 2 if rule in ("stack", "residual") else 4 * letters) * side + head)
    assert rows[2]["bytes_up"] == 4 * up
    assert rows[2]["bytes_down"] == 4 * (down + sum(ranks) * 2 * side + K * head)
    written = sorted(path.name for path in (tmp_path / "r" / "round_2").glob("client_*"))
    assert written == [f"client_{k + 1}" for k in last if k != bad]


# ---- what a run serves, keeps and logs


def validation(model, tokenizer, split=None):
    """(accuracy, mean loss) of a transformers model on the demo's validation examples, padded by its tokenizer."""
    split = split or demo_task("sst2")["validation"]
    batch = tokenizer(split.texts["sentence"], return_tensors="pt", padding=True, truncation=True, max_length=32)
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    labels = torch.tensor(split.labels)
    return (logits.argmax(dim=1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


def same_metrics(measured, accuracy, loss):
    assert measured == (pytest.approx(accuracy, abs=1e-12), pytest.approx(loss, rel=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_serves_gives_the_logged_metric_without_this_project(rule):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = runs(rule)
    last, load = read_metrics(folder)[-1], AutoModelForSequenceClassification.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if rule in ("stack", "residual"):
        model = load(folder / "final")
    else:
        model = PeftModel.from_pretrained(load(folder / "base"), folder / "final")
    same_metrics(validation(model, tokenizer), last["val_accuracy"], last["val_loss"])
    assert read_json(folder / "run.json")["results"]["val_accuracy"] == last["val_accuracy"]

    # the round's own folder serves the same, and a client's adapter gives its own: over whatever base it is loaded
    fused = next((folder / "round_3").glob("fused_*"))
    client = folder / "round_3" / "client_2" / "adapter"
    base = load(folder / "base")
    if rule in ("stack", "residual"):
        for layer in LAYERS:
            base.get_submodule(layer).weight.data.mul_(2)
    model = PeftModel.from_pretrained(base, fused / "adapter")
    same_metrics(validation(model, tokenizer), last["val_accuracy"], last["val_loss"])
    model = PeftModel.from_pretrained(load(folder / "base"), client)
    same_metrics(validation(model, tokenizer), last["client_val_accuracy"][1], last["client_val_loss"][1])


EVAL = "--model tiny --dataset demo --task-name sst2 --max-length 32 --threads 1".split()


def evaluated(adapter, out):
    """(accuracy, loss) that adapters_eval.py gives."""
    assert call("--adapter-path", adapter, "--output-dir", out, *EVAL, script="adapters_eval") == 0
    found = read_json(out / "sst2_tiny" / "metrics.json")
    return found["val_accuracy"], found["val_loss"]


SHOWN = ("val_accuracy", "val_loss")


def ever_worse(monkeypatch, module, turn):
    """The accuracy falls with every evaluation, and the first session is interrupted in this turn of local steps."""
    evaluate, steps, calls, turns = TaskModel.evaluate, module.local_steps, [], []

    def worse(self, share=True):
        calls.append(0)
        return evaluate(self, share) | {"val_accuracy": 1 - len(calls) / 100}

    def local_steps(*given, **options):
        turns.append(0)
        if len(turns) == turn:
            raise KeyboardInterrupt
        return steps(*given, **options)

    monkeypatch.setattr(TaskModel, "evaluate", worse)
    monkeypatch.setattr(module, "local_steps", local_steps)


@pytest.mark.parametrize("rule", ["svd", "residual"])
def test_final_holds_the_best_rounds_weights_where_asked(rule, shards, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ever_worse(monkeypatch, fed_core, 8)
    more = "--final best --keep last --no-save-clients --processes 1".split()
    line = words(shards, "--output-root", tmp_path, "--run-name", "x", "--aggregate", rule, *more)
    assert call(*line) == 130 and call(*line, "--resume") == 0
    folder = tmp_path / "x"
    _, best, _, last = (row["val_loss"] for row in read_metrics(folder))
    results = read_json(folder / "run.json")["results"]
    assert [path.name for path in folder.glob("round_*")] == ["round_3"]
    assert results["final_round"] == 1 < results["rounds"]
    if rule == "svd":
        _, loss = evaluated(folder / "final", tmp_path / "eval")
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
        _, loss = validation(model, AutoTokenizer.from_pretrained(folder / "final"))
    assert loss == pytest.approx(best, rel=1e-4) != pytest.approx(last, rel=1e-3)


@pytest.mark.slow
def test_adapters_of_a_changed_base_are_evaluated_and_merged_on_it(tmp_path, capsys):
    row, out, folder = read_metrics(runs("residual"))[2], tmp_path / "merged", runs("residual")
    fused = evaluated(folder / "round_2/fused_r4/adapter", tmp_path / "eval")
    same_metrics(fused, row["val_accuracy"], row["val_loss"])
    # with all the weight a client's adapter comes back, with the base that it belongs to
    clients = [folder / f"round_2/client_{k}/adapter" for k in (1, 2)]
    merge = ["--svd-rank", 4, "--alpha", 4, "--save-adapter", out, "--weights", 0, 1, "--adapters", clients[0]]
    assert call(*merge, clients[1], script="fedavg_merge") == 0
    same_metrics(evaluated(out, tmp_path / "eval"), row["client_val_accuracy"][1], row["client_val_loss"][1])
    capsys.readouterr()
    assert call(*merge, folder / "round_1/client_2/adapter", script="fedavg_merge") == 2
    assert "base weights" in capsys.readouterr().err


def test_folders_of_a_round_without_a_client(shards, tmp_path, capsys, monkeypatch):
    """What was trained to NaN is not written; folders of earlier rounds go, unless all are kept."""
    seen = spoil(monkeypatch, {0}, 3)
    line = words(shards, "--output-root", tmp_path, "--rounds", 2, "--eval-clients")
    assert call(*line, "--run-name", "x", "--keep", "all") == 0 and len(seen) == 6
    n = [len(read_json(shards / f"client_{k}.json")["indices"]) for k in (1, 2, 3)]
    bad, one = n.index(max(n)), tmp_path / "x" / "round_1"
    assert f"round 1: update not finite, left out: client {bad}" in capsys.readouterr().err
    _, first, second = read_metrics(tmp_path / "x")
    assert first["left_out"] == [[1, bad]] and first["left_out_updates"] == 1 == second["left_out_updates"]
    assert [value is None for value in first["client_val_accuracy"]] == [k == bad for k in range(3)]
    others = [k for k in range(3) if k != bad]
    assert sorted(path.name for path in one.glob("client_*")) == [f"client_{k + 1}" for k in others]
    assert call(*line, "--run-name", "y", "--no-save-clients") == 0
    assert [str(path.relative_to(tmp_path / "y")) for path in (tmp_path / "y").glob("round_*/*")] == [
        "round_2/fused_r4"
    ]


def test_a_run_begins_with_an_adapter_a_round_or_a_run(shards, tmp_path):
    folder = runs("svd")
    last = read_metrics(folder)[-1]
    line = words(shards, "--rounds", 1, "--output-root", tmp_path, "--run-name", "x")
    assert call(*line, "--seed", 7, "--init-from", folder) == 0
    same_metrics((last["val_accuracy"], last["val_loss"]), *(read_metrics(tmp_path / "x")[0][n] for n in SHOWN))
    central = [*EVAL, *"--seed 7 --lora-r 4 --do-eval --output-dir".split(), tmp_path / "c"]
    assert call(*central, "--init-adapter", folder / "round_3/fused_r4", script="main_glue_lora") == 0
    row = read_metrics(tmp_path / "c" / "sst2_tiny" / "r4")[0]
    same_metrics((last["val_accuracy"], last["val_loss"]), *(row[n] for n in SHOWN))
    same_metrics(evaluated(folder, tmp_path / "eval"), last["val_accuracy"], last["val_loss"])


def test_what_is_saved_says_that_its_head_reads_the_mean(tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # beside: examples that no client has are evaluated, and change nothing
    info = make_client_splits("sst2", 2, max_examples=40, held_out_examples=30, dataset="demo")
    save_shard_manifests(tmp_path / "shards", info)
    line = words(tmp_path / "shards", "--rounds", 1, "--output-root", tmp_path, "--pooling", "mean")
    assert call(*line, "--run-name", "naive", "--aggregate", "naive") == 0
    (tmp_path / "shards" / "held_out.json").unlink()
    assert call(*line, "--run-name", "without", "--aggregate", "naive") == 0
    last, without = (read_metrics(tmp_path / name)[-1] for name in ("naive", "without"))
    assert last.keys() - without.keys() == {"held_out_loss", "held_out_accuracy"}
    assert all(last[n] == without[n] for n in SHOWN)

    folder, train = tmp_path / "naive", demo_task("sst2")["train"]
    same_metrics(evaluated(folder, tmp_path / "eval"), *(last[n] for n in SHOWN))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    with pytest.warns(UserWarning, match="head_pooling"):  # peft's, whose model reads the first token
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(model, folder / "final")
    assert validation(model, tokenizer)[1] != pytest.approx(last["val_loss"], rel=1e-3)
    read_mean(model.base_model.model)
    same_metrics(validation(model, tokenizer), *(last[n] for n in SHOWN))
    texts = [train.texts["sentence"][i] for i in info["held_out"]]
    split = SimpleNamespace(texts={"sentence": texts}, labels=train.labels[info["held_out"]])
    same_metrics((last["held_out_accuracy"], last["held_out_loss"]), *validation(model, tokenizer, split))

    line = [*EVAL, "--lora-r", 4, "--do-eval", "--output-dir", tmp_path / "c", "--init-from", folder]
    assert call(*line, script="main_glue_lora") == 2
    assert f"{folder} was trained with --pooling mean, not cls" in capsys.readouterr().err
