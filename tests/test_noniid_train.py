"""llm_noniid/train.py: rounds against plain loops, identities, what is served, how it ends."""

import harness
import numpy as np
import pytest
import torch
from comparing import near, same_bits
from noniid_script import done, no_dropout, padded, served, spied, token_rows, words

from common.checkpoint import read_json
from common.runlog import read_metrics
from llm_noniid import flags, train
from llm_noniid.data import load_texts, training_batches

pytestmark = pytest.mark.slow


def whole(way):
    """The finished run of tests/harness.py."""
    return harness.whole(f"llm_noniid/{way}")


# ---------------------------------------------------------------------------------- rounds against plain loops


@pytest.mark.parametrize(
    "more",
    [
        "--weight-decay 0.1 --local-steps 0 --local-epochs 0.5",
        "--algorithm fedprox --mu 20 --client-optimizer sgdm --learning-rate 0.02 --max-grad-norm 0.5",
        "--algorithm scaffold --client-optimizer sgd --learning-rate 0.1 --participation-rate 0.5 --num-rounds 4",
        "--algorithm scaffold --client-weights uniform",
    ],
)
def test_rounds_are_those_of_a_plain_loop(more, tmp_path, monkeypatch):
    """torch, peft and transformers used directly, with the batches and clients of the run."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    no_dropout(monkeypatch)
    studies = spied(monkeypatch)
    more += " --lora-dropout 0"
    a = flags.parse(train.build_parser(), words(tmp_path, "a", more))
    folder = done(tmp_path, "a", more)
    # what the run began with: of a run that trains nothing
    begun = done(tmp_path, "begun", "--lora-dropout 0 --client-optimizer sgd --learning-rate 1e-30 --num-rounds 1")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, begun / "final" / "adapter", is_trainable=True).train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = token_rows(tokenizer, load_texts("demo", max_samples=160).splits["train"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mine = studies[0].rows
    sizes = [len(part) if a.client_weights == "examples" else 1 for part in mine]
    theta = start = {name: p.detach().clone() for name, p in trained.items()}
    c = {name: torch.zeros_like(p) for name, p in trained.items()}
    c_k = [c] * len(mine)
    for t, line in enumerate(read_metrics(folder)):
        sums, change = {}, {}
        for k in line["clients"]:
            for name, p in trained.items():
                p.data.copy_(theta[name])
            momentum = 0.9 if a.client_optimizer == "sgdm" else 0.0
            sgd = torch.optim.SGD(trained.values(), lr=a.learning_rate, momentum=momentum)
            adamw = torch.optim.AdamW(trained.values(), lr=a.learning_rate, weight_decay=a.weight_decay, fused=False)
            optimizer = adamw if a.client_optimizer == "adamw" else sgd
            steps = a.local_steps or None
            batches = training_batches(len(mine[k]), 4, a.local_epochs, 42, t, k, steps)
            raw = {name: torch.zeros_like(p) for name, p in trained.items()}
            for at in batches:
                optimizer.zero_grad()
                loss = model(**padded([rows[i] for i in mine[k][at]], tokenizer.eos_token_id)).loss
                if a.algorithm == "fedprox":
                    loss = loss + a.mu / 2 * sum(((p - theta[name]) ** 2).sum() for name, p in trained.items())
                loss.backward()
                for name, p in trained.items():
                    raw[name] += p.grad / len(batches)
                    if a.algorithm == "scaffold":
                        p.grad += c[name] - c_k[k][name]
                if a.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(trained.values(), a.max_grad_norm)
                optimizer.step()
            for name, p in trained.items():
                sums[name] = sums.get(name, 0) + sizes[k] * p.detach().double()
                change[name] = change.get(name, 0) + sizes[k] * (raw[name] - c_k[k][name])
            c_k[k] = raw
        total = sum(sizes[k] for k in line["clients"])
        theta = {name: (s / total).float() for name, s in sums.items()}
        c = {name: c[name] + change[name] / sum(sizes) for name in c}
    left = served(folder)
    assert left.keys() == {name.replace(".default", "") for name in theta}
    for name, expected in theta.items():
        moved = (expected - start[name]).norm()
        assert moved > 0
        assert (left[name.replace(".default", "")] - expected).norm() <= 2e-3 * moved, name


# ------------------------------------------------------------------------------------------------ identities


def test_fedprox_of_mu_zero_is_fedavg(tmp_path):
    assert same_bits(served(done(tmp_path, "prox", "--algorithm fedprox --mu 0")), served(whole("fedavg")))


def test_momentum_of_zero_on_the_server_is_fedavg(tmp_path):
    assert same_bits(served(done(tmp_path, "m", "--algorithm fedavgm --server-momentum 0")), served(whole("fedavg")))


def test_scaffold_begins_as_fedavg_and_then_leaves_it(tmp_path):
    ones = [done(tmp_path, f"{a}1", f"--algorithm {a} --num-rounds 1") for a in ("scaffold", "fedavg")]
    assert same_bits(*map(served, ones))
    lines = [read_metrics(folder)[0] for folder in ones]
    assert lines[0]["client_train_loss"] == lines[1]["client_train_loss"]
    theta = sum(t.numel() for t in served(ones[0]).values())
    assert lines[0]["bytes_up"] == 2 * lines[1]["bytes_up"] == 2 * 4 * 4 * theta
    twos = [served(done(tmp_path, f"{a}2", f"--algorithm {a} --num-rounds 2")) for a in ("scaffold", "fedavg")]
    assert any(not torch.equal(t, twos[1][name]) for name, t in twos[0].items())


def test_scaffolds_two_options_agree_under_sgd(tmp_path):
    more = "--algorithm scaffold --client-optimizer sgd --learning-rate 0.3 --num-rounds 3"
    a, b = (served(done(tmp_path, o, f"{more} --scaffold-option {o}")) for o in ("mean_gradient", "II"))
    plain = served(done(tmp_path, "plain", more.replace("scaffold", "fedavg")))
    for name in a:
        assert (a[name] - b[name]).norm() <= 0.02 * (a[name] - plain[name]).norm(), name


def test_fednova_of_equal_steps_is_fedavg_and_of_unequal_ones_is_not(tmp_path):
    for steps, equal in (("--local-steps 3", True), ("--local-steps 0 --local-epochs 1", False)):
        sgd = f"--client-optimizer sgd --learning-rate 0.3 --num-rounds 2 --overwrite {steps}"
        nova, plain = (served(done(tmp_path, a, f"--algorithm {a} {sgd}")) for a in ("fednova", "fedavg"))
        if equal:
            assert near(nova, plain, 1e-6)
        else:
            name = next(n for n in nova if "lora_B" in n)
            assert (nova[name] - plain[name]).norm() > 1e-2 * plain[name].norm()


@pytest.mark.parametrize("other", ["central", "local"])
def test_one_client_is_central_training_and_local_training(other, tmp_path):
    alone = "--num-clients 1 --num-rounds 2"
    a, b = done(tmp_path, "a", alone), done(tmp_path, "b", f"{alone} --algorithm {other}")
    assert same_bits(served(a), served(b))
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert all(x[name] == y[name] for name in ("train_loss", "val_loss", "client_val_loss", "tokens"))
    assert y["bytes_up"] == y["bytes_down"] == 0 < x["bytes_up"]


def test_central_sees_all_texts_and_takes_the_clients_steps(tmp_path, monkeypatch):
    studies = spied(monkeypatch)
    for a in ("central", "fedavg"):
        done(tmp_path, a, f"--algorithm {a} --num-rounds 1 --participation-rate 0.5")
    central, clients = studies
    assert np.array_equal(central.rows[0], np.sort(np.concatenate(clients.rows)))
    assert len(central.batches(0, 0)) == 2 * len(clients.batches(0, 0)) == 6
    for mine, held in zip(clients.rows, clients.held, strict=True):
        assert len(held) == max(1, (len(mine) + len(held)) // 10) and not set(mine) & set(held)
    everything = np.concatenate([*clients.rows, *clients.held])
    assert np.array_equal(np.sort(everything), np.arange(160))


def test_bytes_tokens_and_groups_are_logged():
    line, other = read_metrics(whole("fedavg"))[-1], read_metrics(whole("clusters"))
    theta = sum(t.numel() for t in served(whole("fedavg")).values())
    assert line["bytes_up"] == line["bytes_down"] == 4 * theta * 4 * 3
    assert 0 < line["tokens"] <= 3 * 4 * 3 * 4 * 95
    assert [len(row["group"]) for row in other] == [4, 4, 4] and set(other[-1]["group"]) == {0, 1}
    assert other[0]["group"] == other[-1]["group"]
    assert (whole("clusters") / "final" / "group_1" / "adapter_config.json").exists()
    assert read_metrics(whole("local"))[-1]["bytes_up"] == 0
    partition = read_json(whole("fedavg") / "partition.json")
    assert sum(partition["counts"]) == 160 and len(partition["vocabulary_overlap"]) == 4
