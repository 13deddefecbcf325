"""The Study: what its pieces compute, against plain loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mamba_fl.client_states import Best, ClientStates, make_optimizer

from mamba_fl import central, fed_avg
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags
from mamba_fl.gradient_watch import GradientWatch
from mamba_fl.history import training_history

TINY = "--dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 --sequence-length 32 --batch-size 2 "
TINY += "--threads 1 --rounds 6 --seed 3"


class NoRun:
    def begin(self, *_):
        pass


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDQUARTET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make(*more, module=fed_avg):
    args = module.build_parser().parse_args([*TINY.split(), *map(str, more)])
    return Study(complete_flags(args), NoRun(), federated=module is fed_avg)


def test_entropy_is_the_token_mean_over_the_clients_own_held_out_text():
    study = make("--num-clients", 2)
    inputs, _ = inputs_and_labels(study.data.held_out[1])
    p = torch.softmax(study.model(inputs)[..., :400].double(), -1)
    expected = -(p * p.log()).sum(-1).mean().item()
    assert study.entropy(1, round=0, samples=0) == pytest.approx(expected, rel=1e-5)
    few = study.entropy(1, round=0, samples=3)
    assert few == study.entropy(1, round=0, samples=3) != study.entropy(1, round=1, samples=3)


def test_validation_counts_tokens_not_batches():
    study = make("--num-clients", 2)
    blocks = study.data.validation[-11:]  # two batches, the last one with padding
    inputs, labels = inputs_and_labels(blocks)
    logits = study.model(inputs)[..., :400].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    scored = labels[labels >= 0]
    metrics = study.validate(blocks, "val")
    assert metrics["val_loss"] == pytest.approx(nll / len(scored), rel=1e-6)
    assert metrics["val_ppl"] == pytest.approx(math.exp(nll / len(scored)), rel=1e-5)
    text = study.data.tokenizer.decode(scored.tolist(), skip_special_tokens=True)
    bits = nll / math.log(2) / len(text.encode())
    assert metrics["val_bits_per_byte"] == pytest.approx(bits, rel=1e-2)  # a cut character at a block's start


def test_calibration_draws_the_clients_text_and_the_models_labels():
    study = make("--num-clients", 2)
    inputs, text = study.calibration(1, round=0, samples=5, labels="data")
    own = {tuple(block.tolist()) for block in study.data.train[1]}
    assert all((*x.tolist(), y[-1].item()) in own for x, y in zip(inputs, text, strict=True))
    same, drawn = study.calibration(1, round=0, samples=5, labels="model")
    assert torch.equal(same, inputs) and drawn.shape == text.shape and not torch.equal(drawn, text)
    with torch.no_grad():  # a head that is sure of one token
        study.model.head_weight.zero_()
        study.model.backbone.norm_f.weight.fill_(1)
        hidden = study.model.hidden(inputs)
        assert (study.calibration(1, 0, 5, "model")[1] < 400).all() and hidden.isfinite().all()


def test_an_epoch_of_batches_is_every_sequence_once():
    args = SimpleNamespace(batch_size=3, seed=1, lr=0.1, weight_decay=0.0, budget="equal")
    states = ClientStates(args, {"w": torch.nn.Parameter(torch.zeros(1))}, [7, 10])
    first = torch.cat(list(states.batches(1, 0, 7, 0)))  # 21 of an endless row: two passes and one more
    assert sorted(first[:10].tolist()) == sorted(first[10:20].tolist()) == list(range(10))
    assert first[:10].tolist() != first[10:20].tolist()
    # in steps of any size, from any point: the same row
    pieces = [rows for at, n in ((0, 2), (2, 1), (3, 4)) for rows in states.batches(1, at, n, 0)]
    assert torch.equal(torch.cat(pieces), first)
    args.budget = "source"
    drawn = torch.cat(list(states.batches(1, 0, 20, 0)))
    assert len(drawn) == 60 and len(set(drawn[:10].tolist())) < 10  # with replacement


def test_a_client_left_out_under_sync_epoch_goes_on_from_before():
    study = make("--num-clients", 2, "--sync", "epoch", "--n-epochs", 1)
    theta = study.initial_weights()
    study.sample_clients(0)
    for k in range(2):
        study.local_update(theta, k, 0)
    kept = {n: w.clone() for n, w in study.clients.start(theta, 1, fresh=False).items()}
    study.sample_clients(1)
    theta_k, _ = study.local_update(theta, 1, 1)
    theta_k["backbone.norm_f.weight"][0] = math.nan
    assert study.left_out(1, theta_k)
    again = study.clients.start(theta, 1, fresh=False)
    assert all(torch.equal(again[n], kept[n]) for n in kept) and not torch.equal(
        kept["backbone.embedding.weight"], theta["backbone.embedding.weight"]
    )


def test_steps_before_counts_the_clients_own_rounds():
    study = make("--num-clients", 5, "--participation", 0.4, "--local-updates", 2, "--rounds", 8)
    seen = np.zeros(5, dtype=int)
    for round in range(8):
        clients = study.sample_clients(round).clients
        assert len(clients) == 2
        assert [study.steps_before(k, round) for k in range(5)] == seen.tolist()
        seen[list(clients)] += 2
    assert study.steps_before(0, 3) == make(
        "--num-clients", 5, "--participation", 0.4, "--local-updates", 2, "--rounds", 8
    ).steps_before(0, 3)


def test_the_last_round_has_what_is_left_of_the_budget():
    study = make("--num-clients", 2, "--local-updates", 4, "--n-epochs", 1)
    study.total_steps, study.rounds = 10, 3
    assert [study.local_steps(r) for r in range(3)] == [4, 4, 2]


def test_no_weight_decay_on_the_recurrence_and_adamw_is_torchs():
    study = make("--num-clients", 2)
    decayed, others = make_optimizer("adamw", study.parameters, 0.1, 0.5).param_groups
    names = {p: name.rpartition(".")[2] for name, p in study.parameters.items()}
    assert {names[p] for p in others["params"]} == {"dt_bias", "A_log", "D"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(study.parameters)


def test_a_round_of_one_client_is_torchs_adamw_loop():
    study = make("--num-clients", 1, "--local-updates", 3, "--lr", 1e-2)
    theta = study.initial_weights()
    study.sample_clients(0)
    theta_k = {k: v.clone() for k, v in study.local_update(theta, 0, 0)[0].items()}
    study.load(theta)
    decayed = [p for n, p in study.parameters.items() if not n.endswith(("dt_bias", "A_log", "D"))]
    rest = [p for n, p in study.parameters.items() if n.endswith(("dt_bias", "A_log", "D"))]
    plain = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0}], lr=1e-2)
    for rows in study.clients.batches(0, 0, 3, 0):
        inputs, labels = inputs_and_labels(study.train[0][rows])
        logits = study.model(inputs)[..., :400]
        plain.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        plain.step()
    for name, p in study.parameters.items():
        assert torch.allclose(p, theta_k[name], atol=2e-5), name


def test_fp16_gradients_are_scaled_back():
    study = make("--num-clients", 1)
    blocks = study.train[0][:2]
    loss = study.gradients(blocks)
    expected = {n: p.grad.clone() for n, p in study.parameters.items()}
    study.amp, scales = torch.float16, []
    study.loss = lambda b, plain=study.batch_loss: Overflowing.apply(plain(b), scales)
    with pytest.MonkeyPatch.context() as patch:  # full precision under the scaling of fp16
        patch.setattr("mamba_fl.fed_core.amp_context", lambda *_: torch.autocast("cpu", enabled=False))
        scaled = study.gradients(blocks)
    assert scales == [2.0**14, 2.0**10] and scaled.item() == pytest.approx(loss.item())
    for name, p in study.parameters.items():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-7), name


class Overflowing(torch.autograd.Function):
    """Turns gradients above 2^12 into inf, as fp16 would."""

    @staticmethod
    def forward(ctx, loss, scales):
        ctx.scales = scales
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.scales.append(grad.item())
        return grad * (math.inf if grad > 2**12 else 1.0), None


def test_gradient_watch_is_the_cosine_of_neighbours():
    w = torch.nn.Parameter(torch.zeros(2))
    watch = GradientWatch({"w": w})
    for gradient in ([1.0, 0.0], [1.0, 1.0], [0.0, 2.0]):
        w.grad = torch.tensor(gradient)
        watch.see()
    assert watch.mean_cosine() == pytest.approx(math.sqrt(0.5))
    w.grad = torch.tensor([1.0, 0.0])
    watch.see()
    assert watch.mean_cosine() is None  # nothing is carried over an evaluation
    name = "backbone.layers.0.mixer.in_proj.weight"
    norms = watch.norms({name: torch.zeros(2, 2)}, {name: torch.full((2, 2), 3.0)})
    assert norms == {"layers.0.in_proj": 6.0}


def test_best_keeps_a_copy_of_the_first_lowest():
    best, w = Best(), torch.zeros(2)
    for round, loss in enumerate((3.0, 2.0, 2.0, 2.5)):
        w.fill_(round)
        best.offer(round, loss, {"w": w})
    assert (best.round, best.loss) == (1, 2.0) and best.theta["w"].tolist() == [1, 1]
    hopeful = Best()
    hopeful.offer(0, math.nan, {"w": w})
    hopeful.offer(1, 9.0, {"w": w})
    assert hopeful.round == 1
    again = Best()
    again.load_state_dict(best.state_dict())
    assert (again.round, again.loss) == (1, 2.0) and again.theta["w"].tolist() == [1, 1]


def test_training_history_has_the_sources_fields():
    line = {"round": 8, "steps": 8, "val_ppl": 5.0, "train_ppl": 6.0, "client_entropy": [1.0, 2.0]}
    history = training_history("fed_entropy", [{**line, "client_val_ppl": [7.0, 8.0], "generated": "x"}])
    assert history["global_step"] == [8] and history["server_val_ppl"] == [5.0]
    assert history["client_val_ppls"] == [[7.0, 8.0]] and history["avg_client_entropy"] == [1.5]
    assert set(training_history("central", [line])) == {
        "step", "val_loss", "val_ppl", "train_loss", "generated", "grad_cosine", "delta_norms",
    }  # fmt: skip


def test_central_trains_on_the_clients_text_and_nothing_else():
    whole, parts = make("--num-clients", 3, module=central), make("--num-clients", 3)
    assert torch.equal(whole.train[0], torch.cat(parts.train))
    held_out = {tuple(b.tolist()) for blocks in parts.data.held_out for b in blocks}
    assert not held_out & {tuple(b.tolist()) for b in whole.train[0]}
