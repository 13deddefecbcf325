"""Mamba-2 against the plain recurrence, against transformers, and as a model that is saved, loaded and generates."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from common.cli import UsageError
from mamba_fl import mamba2_cpu
from mamba_fl.mamba2 import Mamba2Config, Mamba2LM, Mamba2Mixer, auto_chunk, ssd_chunked
from mamba_fl.ssm_config import MambaSSMLM, find_mamba_ssm, load_pretrained, make_model, save_pretrained

SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 101, "d_state": 16, "headdim": 16}

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**changes):
    """A small model whose vectors are not all ones and zeros, as a trained one's."""
    model = make_model(Mamba2Config(**{**SMALL, **changes}))
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
    repeat = heads // B.shape[2]
    h = x.new_zeros(b, heads, B.shape[3], p)
    out = []
    for t in range(length):
        B_t, C_t = B[:, t].repeat_interleave(repeat, 1), C[:, t].repeat_interleave(repeat, 1)  # [B, H, N]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + torch.einsum("bh,bhn,bhp->bhnp", dt[:, t], B_t, x[:, t])
        out.append(torch.einsum("bhn,bhnp->bhp", C_t, h) + D[:, None] * x[:, t])
    return torch.stack(out, 1), h


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length, chunk", [(1, 4), (3, 8), (8, 8), (21, 4), (32, 8), (33, 32)])
def test_chunks_equal_the_plain_recurrence(length, chunk, groups):
    b, heads, p, n = 2, 4, 5, 6
    x, B, C = (torch.randn(b, length, *size) for size in ((heads, p), (groups, n), (groups, n)))
    dt, A, D = F.softplus(torch.randn(b, length, heads)), -0.8 * torch.rand(heads), torch.randn(heads)
    inputs = [t.double().requires_grad_() for t in (x, dt, A, B, C, D)]
    mine, state = ssd_chunked(*inputs, chunk)
    expected, last = recurrence(*inputs)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(mine)
    expected = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(torch.autograd.grad(mine, inputs, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def reference_mixer(mixer, u):
    """The mixer from library pieces: Conv1d, the plain recurrence, the norm written out."""
    c = mixer.config
    z, xbc, dt = mixer.in_proj(u).split([c.d_inner, mixer.conv_dim, c.n_heads], -1)
    xbc = F.silu(mixer.conv1d(xbc.mT)[..., : u.shape[1]].mT)
    x, B, C = xbc.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], -1)
    x = x.unflatten(-1, (c.n_heads, c.headdim))
    B, C = B.unflatten(-1, (c.ngroups, c.d_state)), C.unflatten(-1, (c.ngroups, c.d_state))
    y, _ = recurrence(x, F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), B, C, mixer.D)
    y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (c.ngroups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return mixer.out_proj(y.flatten(-2) * mixer.norm.weight)


def mixer_in_fp64(groups, chunk):
    mixer = Mamba2Mixer(Mamba2Config(d_model=16, d_state=6, headdim=8, ngroups=groups, chunk_size=chunk)).double()
    with torch.no_grad():
        for p in (mixer.norm.weight, mixer.D):
            p.uniform_(0.5, 2)
    return mixer


@pytest.mark.parametrize("groups, by_hand", [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("length, chunk", [(1, 4), (9, 1), (16, 16), (21, 4), (24, 8), (40, 0)])
def test_mixer_equals_library_pieces_forward_and_backward(length, chunk, groups, by_hand, monkeypatch):
    used, scan = [], mamba2_cpu.mixer_scan
    monkeypatch.setattr(mamba2_cpu, "mixer_scan", lambda *args: used.append(args) or scan(*args))
    mixer = mixer_in_fp64(groups, chunk)
    u = torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True)
    inputs = [u, *mixer.parameters()]
    mine, state = mixer(u, keep_state=not by_hand)
    assert (state is None) == by_hand == bool(used)
    torch.testing.assert_close(mixer(u)[0], mine)
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
    mixer = mixer_in_fp64(1, 8).float()
    with torch.no_grad():
        mixer.A_log.copy_(torch.tensor([math.log(200.0), -3.0, 2.0, 1.0]))
        mixer.dt_bias.copy_(torch.tensor([30.0, -120.0, -25.0, 5.0]))  # exp(-120) is zero in fp32
    u = torch.randn(2, 40, 16, requires_grad=True)
    mine = mixer(u, keep_state=not by_hand)[0]
    torch.testing.assert_close(mine, reference_mixer(mixer, u), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(mine.square().sum(), [u, *mixer.parameters()])
    exact = mixer.double()
    u64 = u.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference_mixer(exact, u64).square().sum(), [u64, *exact.parameters()])
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


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
    assert torch.equal(mine(ids, labels), mine_loss)
    mine_loss.backward()
    loss.backward()
    expected = {k.replace("backbone.embeddings.", "backbone.embedding."): p for k, p in theirs.named_parameters()}
    for name, p in mine.named_parameters():
        assert (p.grad - expected[name].grad).abs().max() <= 1e-5 * expected[name].grad.abs().max(), name


def test_an_export_comes_back_and_so_does_one_of_transformers(tmp_path):
    model, ids = small_model(), torch.randint(0, 101, (2, 30))
    save_pretrained(model, None, tmp_path / "ours")
    back = load_pretrained(tmp_path / "ours")
    assert back.config == model.config and torch.equal(back(ids), model(ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    del theirs.config.mamba_ssm  # a folder that transformers alone wrote has no field of ours
    theirs.save_pretrained(tmp_path / "theirs")
    foreign = load_pretrained(tmp_path / "theirs")
    assert foreign.vocab_size == 104 and torch.equal(foreign(ids), model(ids))


def test_auto_chunk_covers_any_length_with_little_padding():
    for length in range(1, 700):
        chunk = auto_chunk(length)
        assert 1 <= chunk <= 64
        assert -length % chunk < 4 * -(-length // 64)
    assert auto_chunk(128) == auto_chunk(256) == 64


@pytest.mark.parametrize("grad", [True, False])
def test_causality_is_bitwise(grad):
    model = small_model(chunk_size=16)
    ids = torch.randint(0, 101, (2, 50))
    with torch.set_grad_enabled(grad):
        before = model(ids)
        for t in (0, 1, 15, 16, 17, 49):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 101
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("layers, count", [(1, 27_455_792), (2, 29_175_904), (4, 32_616_128)])
def test_parameter_counts_of_the_sources_models(layers, count):
    with torch.device("meta"):
        model = Mamba2LM(Mamba2Config(n_layer=layers))
    assert sum(p.numel() for p in model.parameters()) == count


def test_names_shapes_and_initial_values_are_those_of_mamba_ssm():
    model = make_model(Mamba2Config(**SMALL))
    mixer = {
        "dt_bias": [4], "A_log": [4], "D": [4], "in_proj.weight": [164, 32], "conv1d.weight": [96, 1, 4],
        "conv1d.bias": [96], "norm.weight": [64], "out_proj.weight": [32, 64],
    }  # fmt: skip
    names = ("backbone.embedding.weight", "lm_head.weight", "backbone.norm_f.weight")
    expected = dict(zip(names, ([104, 32], [104, 32], [32]), strict=True))
    for i in range(2):
        expected[f"backbone.layers.{i}.norm.weight"] = [32]
        expected |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected
    assert model.lm_head.weight is model.head_weight and len(list(model.parameters())) == len(expected) - 1

    wide = Mamba2Mixer(Mamba2Config(d_model=512, n_layer=4, headdim=1))  # 1024 heads to look at
    A, dt = wide.A_log.exp(), F.softplus(wide.dt_bias)
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16.001
    assert 9.9e-4 <= dt.min() < 1.1e-3 and 9e-2 < dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.2)  # log-uniform
    assert (wide.D == 1).all()
    bound = 1 / math.sqrt(1024) / math.sqrt(4)  # kaiming_uniform(a = sqrt 5) / sqrt(n_layer)
    assert 0.99 * bound < wide.out_proj.weight.abs().max() <= bound
    assert model.head_weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_fresh_weights_depend_on_the_seed_only():
    first = make_model(Mamba2Config(**SMALL), seed=3)
    torch.rand(5)
    state = torch.get_rng_state()
    second = make_model(Mamba2Config(**SMALL), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head_weight, make_model(Mamba2Config(**SMALL), seed=4).head_weight)


@pytest.mark.parametrize("prompt", [1, 2, 40])
def test_greedy_generation_equals_the_full_forward_and_reads_one_token_at_a_time(prompt):
    model = small_model(ngroups=2).double()
    with torch.no_grad():
        model.head_weight[101:] *= 100  # padding of the vocabulary: would be chosen if it could
    ids = torch.randint(0, 101, (3, prompt))
    read = []
    model.backbone.embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    mine = model.generate(ids, 30)
    assert read == [prompt] + [1] * 29
    for _ in range(30):
        ids = torch.cat([ids, model(ids)[:, -1:, :101].argmax(-1)], 1)
    assert torch.equal(mine, ids)
    assert torch.equal(model.generate(ids, 0), ids)
    with pytest.raises(UsageError, match="prompt is empty"):
        model.generate(ids[:, :0], 3)


def test_a_gradient_per_sample_adds_up_and_vmap_agrees():
    model = small_model()
    ids, labels = torch.randint(0, 101, (2, 3, 20))
    parameters = dict(model.named_parameters())
    together = torch.autograd.grad(model.nll(ids, labels), list(parameters.values()))
    alone = [torch.autograd.grad(model.nll(ids[[i]], labels[[i]]), list(parameters.values())) for i in range(3)]

    def loss(theta, x, y):
        return torch.func.functional_call(model, theta, (x[None], y[None]))

    detached = {name: p.detach() for name, p in parameters.items()}
    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, ids, labels)
    for i, name in enumerate(parameters):
        scale = together[i].abs().max()
        stacked = torch.stack([g[i] for g in alone])
        assert (stacked.sum(0) - together[i]).abs().max() <= 1e-5 * scale
        assert (mapped[name] - stacked).abs().max() <= 1e-5 * scale


def test_bf16_autocast_is_close_repeatable_and_keeps_the_recurrence_in_fp32():
    model = small_model(d_model=64)
    ids, labels = torch.randint(0, 101, (2, 2, 70))
    exact = model.nll(ids, labels)
    expected = torch.autograd.grad(exact, list(model.parameters()))
    runs, seen = [], []
    norm = model.backbone.layers[0].norm
    norm.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.nll(ids, labels)
            assert model(ids).dtype == torch.bfloat16 and model.hidden(ids).dtype == torch.float32
            states = model.backbone(ids, keep_states=True)[1]
        runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert set(seen) == {torch.float32}
    assert all(t.dtype == torch.float32 for state in states for t in state)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0].item() == pytest.approx(exact.item(), rel=1e-2)
    for a, b in zip(runs[0][1:], expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.1 * b.norm()


def test_loading_what_is_not_there_or_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="nothing_here"):
        load_pretrained(tmp_path / "nothing_here")
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match="gpt2"):
        load_pretrained(tmp_path)
    save_pretrained(small_model(), None, tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="no model could be read"):
        load_pretrained(tmp_path)
    weights.write_bytes(whole)
    good = json.loads(config.read_text())
    sizes = {
        "n_layer": 10**8,
        "expand": "2",
        "d_model": None,
        "headdim": 0,
        "d_state": 10**9,
        "other": 1,
        "norm_eps": "x",
    }
    for name, value in [("n_layer", 1), *sizes.items()]:
        config.write_text(json.dumps({**good, "mamba_ssm": {**good["mamba_ssm"], name: value}}))
        with pytest.raises(UsageError, match=r"do not fit its config.json|names no mamba2 model|at least 1"):
            load_pretrained(tmp_path)
    config.write_text(json.dumps({name: value for name, value in good.items() if name != "hidden_size"}))
    with pytest.raises(UsageError, match="names no mamba2 model"):
        load_pretrained(tmp_path)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"2 x 48 = 96.*headdim \(64\)"):
        Mamba2Config(d_model=48)
    with pytest.raises(UsageError, match="n_layer is 0"):
        Mamba2Config(n_layer=0)
    assert Mamba2Config().padded_vocab_size == 50264
    with pytest.raises(UsageError, match="of these sizes cannot be made"):
        make_model(Mamba2Config(**{**SMALL, "d_state": 10**15}))


def test_mamba_ssm_is_never_imported_for_a_cpu(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    for kernel in ("auto", "torch"):
        assert isinstance(make_model(Mamba2Config(**SMALL), kernel=kernel), Mamba2LM)
    with pytest.raises(UsageError, match="CUDA only"):
        make_model(Mamba2Config(**SMALL), kernel="mamba_ssm")


def test_a_missing_mamba_ssm_is_one_line_or_the_torch_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # an import of it fails
    assert find_mamba_ssm("auto", torch.device("cuda")) is None
    with pytest.raises(UsageError, match="does not import .*mamba_ssm.*: install it, or use --kernel torch"):
        find_mamba_ssm("mamba_ssm", torch.device("cuda"))


class FakeMambaLMHeadModel(nn.Module):
    """Takes what mamba-ssm's class takes, computes with ours."""

    def __init__(self, config, device=None):
        super().__init__()
        FakeMambaLMHeadModel.config = self.config = config
        sizes = {k: v for k, v in config.ssm_cfg.items() if k in ("d_state", "headdim", "expand", "ngroups", "d_conv")}
        ours = Mamba2LM(
            Mamba2Config(d_model=config.d_model, n_layer=config.n_layer, vocab_size=config.vocab_size, **sizes)
        )
        self.lm_head = ours.lm_head
        self.backbone = ours.backbone
        self.backbone.forward = lambda ids, inference_params=None: type(ours.backbone).forward(ours.backbone, ids)[0]

    def generate(self, input_ids, max_length, top_k, vocab_size):
        assert top_k == 1 and vocab_size == self.config.vocab_size
        return F.pad(input_ids, (0, max_length - input_ids.shape[1]))


@pytest.mark.parametrize("has_causal_conv1d", [True, False])
def test_the_wrapper_of_mamba_ssm_is_wired_alike(has_causal_conv1d):
    library, ours = SimpleNamespace(MambaLMHeadModel=FakeMambaLMHeadModel), small_model()
    fast = MambaSSMLM(ours.config, (library, SimpleNamespace, has_causal_conv1d), torch.device("cpu"))
    fast.load_state_dict(ours.state_dict())
    theirs = FakeMambaLMHeadModel.config
    assert theirs.ssm_cfg["layer"] == "Mamba2" and theirs.tie_embeddings and theirs.residual_in_fp32
    assert theirs.ssm_cfg.get("use_mem_eff_path", True) == has_causal_conv1d
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert fast.state_dict().keys() == ours.state_dict().keys()
    ids, labels = torch.randint(0, 101, (2, 2, 12))
    assert torch.equal(fast(ids), ours(ids)) and torch.equal(fast.hidden(ids), ours.hidden(ids))
    assert torch.equal(fast.nll(ids, labels), ours.nll(ids, labels))
    assert fast.generate(ids, 5).shape == (2, 17) and fast.vocab_size == 101
