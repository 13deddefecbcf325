"""llm_noniid/train.py: what a run serves and logs, its memory, groups of clients, the source's commands."""

import math
import shlex

import numpy as np
import pytest
import torch
from noniid_script import call, done, losses, parsed, spied, token_rows, words
from running import ROOT

from common.checkpoint import read_json
from common.runlog import read_metrics
from llm_noniid import text_model
from llm_noniid.data import load_texts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("adapter", ["adapter", "group_1"])
def test_what_is_served_gives_the_logged_losses_in_plain_peft(adapter, tmp_path, monkeypatch):
    """Text by text, so without any padding: padding that was scored, or an end that was not, would show."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    studies = spied(monkeypatch)
    cluster, rounds = ("updates", 2) if adapter == "group_1" else ("none", 1)
    folder = done(
        tmp_path,
        "a",
        f"--cluster {cluster} --eval-samples 0 --learning-rate 0.02 --num-rounds {rounds} --probe-samples 0",
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts, lines = load_texts("demo", max_samples=160), read_metrics(folder)
    last, results = lines[-1], read_json(folder / "run.json")["results"]
    validation = token_rows(tokenizer, texts.splits["validation"])
    if cluster == "none":
        nll, n = losses(base, validation)
        assert lines[0]["val_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)  # round 0: before training
    model = PeftModel.from_pretrained(base, folder / "final" / adapter)
    assert read_json(folder / "final" / adapter / "adapter_config.json")["task_type"] == "CAUSAL_LM"

    # each client's own texts under the model that serves it
    train_rows = token_rows(tokenizer, texts.splits["train"])
    group = last.get("group", [0] * 4)
    mine = [k for k in range(4) if group[k] == (cluster == "updates")]
    assert mine
    for k in mine:
        nll, n = losses(model, [train_rows[i] for i in studies[0].held[k]])
        assert last["client_val_loss"][k] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
    assert last["worst_client_val_loss"] is None  # each holds out fewer than 30 texts
    assert last["mean_client_val_loss"] == pytest.approx(np.mean(last["client_val_loss"]), rel=1e-12)
    mine = np.concatenate([studies[0].learnt[k] for k in range(4) if group[k] == (cluster == "updates")])
    assert sum(map(len, studies[0].learnt)) == min(len(validation), sum(studies[0].examples))
    if cluster == "updates":
        total = 0.0  # a random client sees the validation texts under its own group's model
        for g, examples in enumerate(np.bincount(group, studies[0].examples)):
            fresh = AutoModelForCausalLM.from_pretrained(folder / "base")
            nll, n = losses(PeftModel.from_pretrained(fresh, folder / "final" / f"group_{g}"), validation)
            total += examples / sum(studies[0].examples) * nll.sum()
        assert last["val_loss"] == pytest.approx(total / n.sum(), rel=1e-5)
        assert len(mine) and all(set(a) <= set(b) for a, b in zip(studies[0].learnt, studies[0].rows, strict=True))
        return

    nll, n = losses(model, [train_rows[i] for i in mine])
    assert last["train_eval_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
    assert last["generalization_gap"] == pytest.approx(last["val_loss"] - last["train_eval_loss"], abs=1e-12)
    for split, name, logged in (("validation", "val", last), ("test", "test", results)):
        rows = token_rows(tokenizer, texts.splits[split])
        nll, n = losses(model, rows)
        assert logged[f"{name}_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
        assert logged[f"{name}_ppl"] == pytest.approx(math.exp(nll.sum() / n.sum()), rel=1e-4)
        n_bytes = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
        assert logged[f"{name}_bits_per_byte"] == pytest.approx(nll.sum() / n_bytes / math.log(2), rel=2e-3)


def test_the_worst_client_is_one_with_thirty_held_out_texts_or_more(tmp_path):
    args, texts = parsed(*words(tmp_path, "a")), load_texts("demo", max_samples=160)
    model = text_model.load_text_model(args, texts, torch.device("cpu"), None)
    held = [np.arange(29), np.arange(29, 59), np.arange(60, 95), np.arange(100, 105)]
    theta = model.weights.snapshot()[None]
    row = text_model.clients_quality(model, theta, np.zeros(4, int), held)
    assert row["worst_client_val_loss"] == max(row["client_val_loss"][1:3])
    assert row["mean_client_val_loss"] == pytest.approx(np.mean(row["client_val_loss"]))
    assert text_model.clients_quality(model, theta, np.zeros(2, int), held[::3])["worst_client_val_loss"] is None


def test_the_loss_on_training_texts_is_of_each_under_its_own_clients_model(tmp_path):
    args, texts = parsed(*words(tmp_path, "a")), load_texts("demo", max_samples=160)
    model = text_model.load_text_model(args, texts, torch.device("cpu"), None)
    theta = model.weights.snapshot()
    thetas, rows = (
        torch.stack([theta, theta + 0.3, theta]),
        [np.arange(5), np.arange(0), np.arange(9, 40), np.arange(7)],
    )
    group, nll, n = np.array([0, 2, 1, 1]), 0.0, 0
    for g, mine in ((0, rows[0]), (1, rows[2]), (1, rows[3])):
        model.weights.load(thetas[g])
        some, counts = losses(model.module, token_rows(model.tokenizer, [texts.splits["train"][i] for i in mine]))
        nll, n = nll + some.sum(), n + counts.sum()
    assert text_model.own_loss(model, thetas, group, rows) == pytest.approx(nll / n, rel=1e-5)


def test_hidden_states_are_those_of_the_tokens_without_padding(tmp_path):
    args, texts = parsed(*words(tmp_path, "a")), load_texts("demo", max_samples=160)
    model = text_model.load_text_model(args, texts, torch.device("cpu"), None)
    states = text_model.hidden_states(model, "validation", np.arange(20))
    with torch.no_grad():
        one = [torch.tensor([ids]) for ids in token_rows(model.tokenizer, texts.splits["validation"][:20])]
        alone = torch.cat([model.module(input_ids=i, output_hidden_states=True).hidden_states[-1][0] for i in one])
    torch.testing.assert_close(states, alone, rtol=1e-3, atol=1e-4)


def test_evaluation_does_not_depend_on_the_batches(tmp_path, monkeypatch):
    args, texts = parsed(*words(tmp_path, "a")), load_texts("demo", max_samples=160)
    model = text_model.load_text_model(args, texts, torch.device("cpu"), None)
    rows, lengths = np.arange(len(model.tokens["validation"])), model.tokens["validation"].lengths()
    assert len(set(lengths.tolist())) > 1 and lengths.min() < 96  # so that padding has something to do
    nll = text_model.text_losses(model, "validation", rows)
    order = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(text_model.text_losses(model, "validation", order), nll[order], rtol=1e-5)
    monkeypatch.setattr(text_model, "EVAL_BATCH", 5)
    np.testing.assert_allclose(text_model.text_losses(model, "validation", rows), nll, rtol=1e-5)


# ------------------------------------------------------------------------------------- groups, compared clients


def test_groups_of_clients_by_their_topics(tmp_path):
    folder = done(tmp_path, "a", "--cluster labels --num-clusters 2 --num-rounds 1 --local-steps 1 --alpha 0.05")
    partition, group = read_json(folder / "partition.json"), read_metrics(folder)[-1]["group"]
    topic = [int(np.argmax(row)) for row in partition["label_histograms"]]
    assert set(group) == {0, 1} and group[0] == 0
    large = [k for k, row in enumerate(partition["label_histograms"]) if max(row) > 30]
    assert all(group[i] == group[j] for i in large for j in large if topic[i] == topic[j])


# -------------------------------------------------------------------------------------- the source's commands

SMALL = "--model tiny --dataset demo --tokenizer bpe:400 --max-length 24 --max-samples 200 --eval-samples 4"
SMALL += " --local-steps 1 --batch-size 2 --participation-rate 0.1 --threads 1"


@pytest.mark.parametrize(
    "documented, name",
    [
        ("--algorithm fedavg --partition topic_skew --num-rounds 50", "fedavg_topic_skew_alpha_0.1"),
        ("--algorithm fedprox --partition style_skew --mu 0.01 --num-rounds 5", "fedprox_style_skew_length"),
        ("--algorithm scaffold --partition token_skew --num-rounds 5", "scaffold_token_skew_frequency"),
        ("--config configs/default.yaml --num-rounds 5", "fedavg_topic_skew_alpha_0.1"),
    ],
)
def test_documented_commands(documented, name, tmp_path, capsys):
    documented = documented.replace("configs", shlex.quote(str(ROOT / "llm_noniid" / "configs")))
    assert call(*shlex.split(f"{documented} {SMALL} --output-dir {tmp_path}")) == 0
    folder = tmp_path / f"{name}_demo_tiny_participation_0.1_lr_5e-05_seed_42"
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(folder) and "warning" not in said.err
    rounds = [line["round"] for line in read_metrics(folder)]
    assert rounds == (list(range(0, 51, 5)) if "50" in documented else [0, 5])
    assert len(read_metrics(folder)[-1]["client_val_loss"]) == 10
    assert {f.name for f in folder.iterdir()} >= {"run.json", "partition.json", "final", "checkpoint", "base"}
