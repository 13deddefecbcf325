"""Mamba-2 in plain PyTorch, with the state dict of mamba-ssm's `MambaLMHeadModel`.

A head with state h (N x P), input x_t (P), B_t, C_t (N) and step dt_t computes (Dao & Gu 2024, "Transformers are
SSMs", section 6)

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        y_t = C_t^T h_t + D x_t

Sizes: B batch, T length, D d_model, H heads, P headdim, N d_state, Q chunk, V vocabulary. B_t and C_t are those of all
heads (one group, mamba-ssm's default).
Under autocast only the products with weight matrices change dtype; recurrence, norms and residual stay in fp32.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.cli import UsageError
from mamba_fl.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 language model, in the names of mamba-ssm."""

    d_model: int = 512
    n_layer: int = 1
    vocab_size: int = 50257
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    pad_vocab_size_multiple: int = 8
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.d_inner % self.headdim:
            raise UsageError(f"--headdim {self.headdim} does not divide {self.d_inner}, twice --d-model: change one")

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def n_heads(self):
        return self.d_inner // self.headdim

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class Mamba2Mixer(nn.Module):
    """in_proj -> causal depthwise convolution, SiLU -> state recurrence -> gated norm -> out_proj."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.conv_dim = c.d_inner + 2 * c.d_state
        self.in_proj = nn.Linear(c.d_model, c.d_inner + self.conv_dim + c.n_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, c.d_conv, groups=self.conv_dim, padding=c.d_conv - 1)
        step = torch.exp(torch.rand(c.n_heads) * (math.log(1e-1) - math.log(1e-3)) + math.log(1e-3))
        step = step.clamp_min(1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.A_log = nn.Parameter(torch.log(torch.empty(c.n_heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(c.n_heads))
        self.norm = nn.RMSNorm(c.d_inner, eps=c.norm_eps)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(c.n_layer)

    def forward(self, u):
        """[B, T, D] -> [B, T, D]."""
        zxbcdt = self.in_proj(u)  # [B, T, d_inner + conv_dim + H]
        zxbcdt = zxbcdt if zxbcdt.dtype == torch.float64 else zxbcdt.float()
        with torch.autocast(u.device.type, enabled=False):
            if u.device.type == "cpu":
                from mamba_fl.mamba2_cpu import mixer_scan  # the same as `scan`, faster; that module imports this one

                y = mixer_scan(self, zxbcdt)  # [B, T, d_inner]
            else:
                y = self.scan(zxbcdt)
        return self.out_proj(y)

    def scan(self, zxbcdt):
        """From the columns of in_proj to the input of out_proj: [B, T, d_inner]."""
        c = self.config
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias  # [conv_dim, d_conv]
        z, xbc, dt = zxbcdt.split([c.d_inner, self.conv_dim, c.n_heads], -1)
        x, B, C = F.silu(causal_conv(xbc, weight, bias)).split([c.d_inner, c.d_state, c.d_state], -1)  # B, C: [B, T, N]
        x = x.unflatten(-1, (c.n_heads, c.headdim))  # [B, T, H, P]
        dt = F.softplus(dt + self.dt_bias)  # [B, T, H]
        A = -torch.exp(self.A_log)  # [H]
        y = ssd_chunked(x, dt, A, B, C, self.D, auto_chunk(x.shape[1]))  # [B, T, H, P]
        return self.norm(y.flatten(-2) * F.silu(z))


class Block(nn.Module):
    """x + mixer(norm(x)), the residual in fp32."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mamba2Mixer(config)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class Backbone(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, input_ids):
        x = self.embedding(input_ids)  # [B, T, D]
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class LanguageModel(nn.Module):
    """What every kernel's model offers; subclasses set `config`, `backbone`, `lm_head` and `hidden`.

    `config.vocab_size` is the tokenizer's; the head has `config.padded_vocab_size` columns.
    """

    @property
    def head_weight(self):
        """The tied embedding, [V padded, D]."""
        return self.backbone.embedding.weight

    def forward(self, input_ids):
        """[B, T] token ids -> logits [B, T, V padded]."""
        return F.linear(self.hidden(input_ids), self.head_weight)  # [B, T, V]

    def nll(self, input_ids, labels):
        """Summed NLL in nats of labels [B, T] (-100: not counted) given input_ids [B, T]: labels[t] follows
        input_ids[..t], they are not shifted here. Scalar, fp32."""
        hidden = self.hidden(input_ids).flatten(0, 1)  # [B*T, D]
        return linear_cross_entropy(hidden, self.head_weight, labels.flatten(), self.config.vocab_size)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens):
        """Greedy continuation, the whole text read for each token: [B, T] -> [B, T + max_new_tokens]."""
        for _ in range(max_new_tokens):
            last = self.hidden(input_ids)[:, -1:]  # [B, 1, D]
            logits = F.linear(last, self.head_weight)[..., : self.config.vocab_size]  # [B, 1, V]
            input_ids = torch.cat([input_ids, logits.argmax(-1)], 1)
        return input_ids


class Mamba2LM(LanguageModel):
    """Mamba-2 with a head tied to the embedding; state dict keys and shapes are mamba-ssm's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def hidden(self, input_ids):
        """[B, T] token ids -> [B, T, D], after the last norm."""
        return self.backbone(input_ids)


def causal_conv(x, weight, bias):
    """y_t = bias + sum_k weight[:, k] x_{t - K + 1 + k}, per channel, x zero before the start.

    x: [B, T, E]; weight: [E, K]; bias: [E]. Returns y [B, T, E].
    """
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))  # [B, K - 1 + T, E]
    y = torch.addcmul(bias, padded[:, :length], weight[:, 0])  # [B, T, E]
    for k in range(1, width):
        y = torch.addcmul(y, padded[:, k : k + length], weight[:, k])
    return y


def auto_chunk(length):
    """The chunk for a sequence of `length` tokens: equal chunks of at most 64 (benchmarks/parts.py), so that
    a length just above a multiple of 64 is not padded to the next."""
    chunks = -(-length // 64)
    return -(-length // (4 * chunks)) * 4


@functools.cache
def segment_weights(q, dtype, device):
    """0/1 weights [Q, (Q + 1) * Q] that sum a_k over j < k <= i for every start j = -1 .. Q-1 and end i = 0 .. Q-1,
    and an offset [(Q + 1) * Q], -inf where i < j.

    The sums are made as one product, and each holds only its own terms: a difference of two cumulative sums would
    lose digits, and could make exp of a positive number.
    """
    j = torch.arange(-1, q, device=device)[:, None]  # [Q + 1, 1]
    i = torch.arange(q, device=device)  # [Q]
    k = torch.arange(q, device=device)[:, None, None]  # [Q, 1, 1]
    weights = ((k > j) & (k <= i)).to(dtype).flatten(1)  # [Q, (Q + 1) * Q]
    offset = torch.zeros(q + 1, q, dtype=dtype, device=device).masked_fill_(i < j, -math.inf)
    return weights, offset.flatten()


def ssd_chunked(x, dt, A, B, C, D, chunk):
    """The recurrence in chunks (Dao & Gu 2024, section 6): inside a chunk as products, between chunks by its state.

    x: [B, T, H, P]; dt: [B, T, H], positive; A: [H], negative; B, C: [B, T, N]; D: [H]; any T >= 1.
    Returns y [B, T, H, P].
    """
    length = x.shape[1]
    pad = -length % chunk
    if pad:
        # dt = 0 in the padding: it neither decays the state nor adds to it.
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        dt, B, C = (F.pad(t, (0, 0, 0, pad)) for t in (dt, B, C))
    x, dt, B, C = (t.unflatten(1, (-1, chunk)) for t in (x, dt, B, C))  # [B, c, Q, ...]
    b, c, q, h, p = x.shape

    weights, offset = segment_weights(q, x.dtype, x.device)
    a = (dt * A).transpose(2, 3)  # [B, c, H, Q]
    decay = torch.addmm(offset, a.reshape(-1, q), weights).exp()  # [B*c*H, (Q + 1) * Q]
    decay = decay.view(b, c, h, q + 1, q)
    from_start, inside = decay[..., 0, :], decay[..., 1:, :]  # [B, c, H, Q], [B, c, H, Q(from), Q(to)]
    to_end = inside[..., -1]  # [B, c, H, Q]

    # Inside the chunk: y_i = sum_{j <= i} (C_i . B_j) exp(a_{j+1} + .. + a_i) dt_j x_j, and D x_i on the diagonal.
    scores = B @ C.transpose(-1, -2)  # [B, c, Q(from), Q(to)]
    dt_heads = dt.transpose(2, 3)  # [B, c, H, Q]
    mix = inside * scores.unsqueeze(2) * dt_heads.unsqueeze(-1)  # [B, c, H, Q(from), Q(to)]
    mix = mix + torch.diag_embed(D[:, None].expand(h, q))
    y = (mix.transpose(-1, -2) @ x.transpose(2, 3)).transpose(2, 3)  # [B, c, Q, H, P]

    # What each chunk adds to the state, then the state at the start of each chunk.
    kept = (dt_heads * to_end).transpose(2, 3).unsqueeze(-1) * x  # [B, c, Q, H, P]
    added = (B.transpose(-1, -2) @ kept.flatten(-2)).unflatten(-1, (h, p))  # [B, c, N, H, P]
    total = from_start[:, :, None, :, -1:]  # [B, c, 1, H, 1]
    state, before = torch.zeros_like(added[:, 0]), []
    for i in range(c):
        before.append(state)
        state = torch.addcmul(added[:, i], state, total[:, i])  # [B, N, H, P]
    if c > 1:
        carried = (C @ torch.stack(before, 1).flatten(-2)).unflatten(-1, (h, p))  # [B, c, Q, H, P]
        y = torch.addcmul(y, carried, from_start.transpose(2, 3).unsqueeze(-1))
    return y.flatten(1, 2)[:, :length]  # [B, T, H, P]
