"""Mamba-2 against the plain recurrence, against transformers, and as a model that is saved and generates."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from mamba_fl import mamba2_cpu
from mamba_fl.mamba2 import Mamba2Config, Mamba2LM, Mamba2Mixer
from mamba_fl.ssm_config import MambaSSMLM, make_model, save_pretrained

SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 101, "d_state": 16, "headdim": 16}

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**changes):
    """A small model whose vectors are not all ones and zeros, as a trained one's."""
    model = make_model(Mamba2Config(**SMALL | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                p.uniform_(0.5, 2)
            if name.endswith("embedding.weight"):
                p.mul_(20)
    return model


def recurrence(x, dt, A, B, C, D):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t + D x_t, one token after the other."""
    b, length, heads, p = x.shape
    h = x.new_zeros(b, heads, B.shape[2], p)
    out = []
    for t in range(length):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + torch.einsum("bh,bn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
        out.append(torch.einsum("bn,bhnp->bhp", C[:, t], h) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def reference_mixer(mixer, u):
    """The mixer from library pieces: Conv1d, the plain recurrence, the norm written out."""
    c = mixer.config
    z, xbc, dt = mixer.in_proj(u).split([c.d_inner, mixer.conv_dim, c.n_heads], -1)
    xbc = F.silu(mixer.conv1d(xbc.mT)[..., : u.shape[1]].mT)
    x, B, C = xbc.split([c.d_inner, c.d_state, c.d_state], -1)
    x = x.unflatten(-1, (c.n_heads, c.headdim))
    y = recurrence(x, F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), B, C, mixer.D)
    y = y.flatten(-2) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return mixer.out_proj(y * mixer.norm.weight)


def plainly(mixer, u):
    """The mixer as it is on a GPU."""
    return mixer.out_proj(mixer.scan(mixer.in_proj(u)))


def mixer_in_fp64():
    mixer = Mamba2Mixer(Mamba2Config(d_model=16, d_state=6, headdim=8)).double()
    with torch.no_grad():
        for p in (mixer.norm.weight, mixer.D):
            p.uniform_(0.5, 2)
    return mixer


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("length", [1, 9, 70, 130])  # one chunk, two, three, each with padding
def test_mixer_equals_library_pieces_forward_and_backward(length, by_hand, monkeypatch):
    used, scan = [], mamba2_cpu.mixer_scan
    monkeypatch.setattr(mamba2_cpu, "mixer_scan", lambda *args: used.append(args) or scan(*args))
    mixer = mixer_in_fp64()
    u = torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True)
    inputs = [u, *mixer.parameters()]
    mine = mixer(u) if by_hand else plainly(mixer, u)
    assert by_hand == bool(used)
    expected = reference_mixer(mixer, u)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)
    grad = torch.randn_like(mine)
    mine_grad = torch.autograd.grad(mine, inputs, grad, retain_graph=True)
    for a, b in zip(mine_grad, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    again = torch.autograd.grad(mine, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(mine_grad, again, strict=True))  # nothing was overwritten


@pytest.mark.parametrize("by_hand", [True, False])
def test_strong_decay_and_vanishing_steps_stay_finite_and_right(by_hand):
    mixer = mixer_in_fp64().float()
    with torch.no_grad():
        mixer.A_log.copy_(torch.tensor([math.log(200.0), -3.0, 2.0, 1.0]))
        mixer.dt_bias.copy_(torch.tensor([30.0, -120.0, -25.0, 5.0]))  # exp(-120) is zero in fp32
    u = torch.randn(2, 70, 16, requires_grad=True)
    mine = mixer(u) if by_hand else plainly(mixer, u)
    gradients = torch.autograd.grad(mine.square().sum(), [u, *mixer.parameters()])
    expected = reference_mixer(mixer, u)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), [u, *mixer.parameters()]), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_transformers_loads_the_export_and_computes_the_same_logits_and_gradients(tmp_path):
    mine = small_model()
    save_pretrained(mine, None, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.backbone.embeddings.weight
    ids, labels = torch.randint(0, 101, (2, 3, 75))
    labels[0, :9] = -100
    logits = theirs(ids).logits
    torch.testing.assert_close(mine(ids), logits, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(logits[..., :101].flatten(0, 1), labels.flatten(), reduction="sum")
    mine_loss = mine.nll(ids, labels)
    torch.testing.assert_close(mine_loss, loss, rtol=1e-5, atol=0)
    mine_loss.backward()
    loss.backward()
    expected = {k.replace("backbone.embeddings.", "backbone.embedding."): p for k, p in theirs.named_parameters()}
    for name, p in mine.named_parameters():
        assert (p.grad - expected[name].grad).abs().max() <= 1e-5 * expected[name].grad.abs().max(), name


def test_parameter_counts_of_the_sources_models():
    for layers, count in ((1, 27_455_792), (2, 29_175_904), (4, 32_616_128)):
        with torch.device("meta"):
            model = Mamba2LM(Mamba2Config(n_layer=layers))
        assert sum(p.numel() for p in model.parameters()) == count


def test_initial_values_are_those_of_mamba_ssm():
    wide = Mamba2Mixer(Mamba2Config(d_model=512, n_layer=4, headdim=1))  # 1024 heads to look at
    A, dt = wide.A_log.exp(), F.softplus(wide.dt_bias)
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16.001
    assert 9.9e-4 <= dt.min() < 1.1e-3 and 9e-2 < dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.2)  # log-uniform
    assert (wide.D == 1).all()
    bound = 1 / math.sqrt(1024) / math.sqrt(4)  # kaiming_uniform(a = sqrt 5) / sqrt(n_layer)
    assert 0.99 * bound < wide.out_proj.weight.abs().max() <= bound
    embedding = make_model(Mamba2Config(**SMALL)).head_weight
    assert embedding.shape == (104, 32) and embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(embedding, make_model(Mamba2Config(**SMALL), seed=1).head_weight)


def test_greedy_generation_chooses_the_likeliest_token_of_the_vocabulary():
    model = small_model().double()
    with torch.no_grad():
        model.head_weight[101:] *= 100  # padding of the vocabulary: would be chosen if it could
    ids = torch.randint(0, 101, (3, 7))
    mine = model.generate(ids, 20)
    assert mine.shape == (3, 27) and torch.equal(mine[:, :7], ids)
    assert torch.equal(mine[:, 7:], model(mine)[:, 6:-1, :101].argmax(-1))  # the model is causal


def test_bf16_autocast_is_close_and_keeps_the_recurrence_in_fp32(monkeypatch):
    model = small_model(d_model=64)
    ids, labels = torch.randint(0, 101, (2, 2, 70))
    exact = model.nll(ids, labels)
    expected = torch.autograd.grad(exact, list(model.parameters()))
    seen, scan = [], mamba2_cpu.mixer_scan
    norm = model.backbone.layers[0].norm
    norm.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    monkeypatch.setattr(mamba2_cpu, "mixer_scan", lambda mixer, x: seen.append(x.dtype) or scan(mixer, x))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.nll(ids, labels)
    assert set(seen) == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.1 * b.norm()


class FakeMambaLMHeadModel(nn.Module):
    """Takes what mamba-ssm's class takes, computes with ours."""

    def __init__(self, config, device=None):
        super().__init__()
        FakeMambaLMHeadModel.config = self.config = config
        sizes = {name: value for name, value in config.ssm_cfg.items() if name != "layer"}
        sizes |= {name: getattr(config, name) for name in ("d_model", "n_layer", "vocab_size")}
        ours = Mamba2LM(Mamba2Config(**sizes))
        self.lm_head = ours.lm_head
        self.backbone = ours.backbone
        self.backbone.forward = lambda ids, inference_params=None: type(ours.backbone).forward(ours.backbone, ids)


def test_the_wrapper_of_mamba_ssm_is_wired_alike():
    ours = small_model()
    fast = MambaSSMLM(ours.config, FakeMambaLMHeadModel, SimpleNamespace, torch.device("cpu"))
    fast.load_state_dict(ours.state_dict())
    theirs = FakeMambaLMHeadModel.config
    assert theirs.ssm_cfg["layer"] == "Mamba2" and theirs.tie_embeddings and theirs.residual_in_fp32
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert fast.state_dict().keys() == ours.state_dict().keys()
    ids, labels = torch.randint(0, 101, (2, 2, 12))
    assert torch.equal(fast(ids), ours(ids)) and torch.equal(fast.hidden(ids), ours.hidden(ids))
    assert torch.equal(fast.nll(ids, labels), ours.nll(ids, labels))
