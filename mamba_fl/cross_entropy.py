"""Cross-entropy of a linear head over a large vocabulary, without the full-precision logits of a batch.

With hidden h_i (D numbers), head W (V x D) and label y_i:

    nll_i = log sum_v exp(h_i . w_v) - h_i . w_{y_i}        d nll_i / d logit_iv = softmax(logits_i)_v - [v = y_i]

The plain form keeps fp32 logits, their log-softmax and their gradient: three times N x V x 4 bytes. Here a chunk
of tokens makes its logits once (in the autocast dtype where autocast is on), a few rows at a time are turned to
fp32 and overwritten by their own gradient, and two products finish the chunk. All results are exact, not sampled.
"""

import torch

IGNORE = -100  # the label of rows that do not count
CHUNK_BYTES = 256 * 2**20  # logits held at once
BLOCK_NUMBERS = 2**19  # numbers turned to fp32 at once on a CPU: 2 MiB, about one core's second-level cache


def linear_cross_entropy(hidden, weight, labels, vocab_size):
    """The sum of the negative log-likelihoods of `labels` under the head `weight`: a scalar in nats.

    hidden: [N, D]; weight: [V, D]; labels: [N] integers in [0, vocab_size), or IGNORE for rows that do not count.
    Columns of the vocabulary from `vocab_size` on (padding) are cropped: they get probability and gradient zero.
    fp32 (fp64 for fp64 inputs); with no counted label it is zero.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, torch.is_grad_enabled())


@torch.no_grad()
def entropies(hidden, weight, vocab_size):
    """H_i = - sum_v p_iv log p_iv (nats) of softmax(hidden @ weight.T) over `vocab_size` columns: [N], fp64."""
    entropy = []
    for _, logits in _logits(hidden, weight, vocab_size):
        p, highest, log_p_highest = _softmax(logits)  # [n, V'], twice [n, 1]
        below = logits - highest  # [n, V'], at most 0: both terms of the sum are positive
        entropy.append(-log_p_highest.squeeze(-1) - torch.linalg.vecdot(p, below))  # [n]
    return torch.cat(entropy).double()


@torch.no_grad()
def sample_labels(hidden, weight, vocab_size, generator):
    """One label per row, drawn from softmax(hidden @ weight.T) over the first `vocab_size` columns: [N] int64.

    Inverse of the cumulative distribution at one uniform number per row from `generator` (on any device).
    """
    uniform = torch.rand(hidden.shape[0], generator=generator, device=generator.device, dtype=torch.float64)
    uniform = uniform.to(hidden.device)
    drawn = []
    for rows, logits in _logits(hidden, weight, vocab_size):
        cdf = torch.softmax(logits, -1, dtype=torch.float64).cumsum_(-1)
        # Scaled by the last value, not by 1: a cumulative sum that ends at 0.9999 must not run out.
        at = uniform[rows, None] * cdf[:, -1:]
        drawn.append(torch.searchsorted(cdf, at, right=True).squeeze(-1))
    return torch.cat(drawn).clamp_max_(vocab_size - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, grad_enabled):
        dtype = _compute_dtype(hidden)
        need_hidden, need_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, weight.dtype
        counted = labels != IGNORE
        target = labels.masked_fill(~counted, 0).unsqueeze(-1)  # [N, 1]
        nll = hidden.new_empty(hidden.shape[0], dtype=_wide(dtype))
        d_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
        d_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)  # [V, D], uncropped: products are faster where V is a multiple of 8
            for start, stop in _chunks(hidden.shape[0], vocab_size, dtype):
                h = hidden[start:stop].to(dtype)
                logits = h @ head.T  # [n, V]
                real = logits[:, :vocab_size]  # [n, V']
                logits[:, vocab_size:] = 0  # the padding's gradient
                for a, b in _blocks(stop - start, vocab_size, logits.device):
                    rows = slice(start + a, start + b)
                    p, highest, log_p_highest = _softmax(real[a:b])  # [b - a, V'], twice [b - a, 1]
                    at_label = real[a:b].gather(-1, target[rows])
                    nll[rows] = (highest - at_label - log_p_highest).squeeze(-1)
                    if need_hidden or need_weight:
                        p.scatter_add_(-1, target[rows], -torch.ones_like(highest))
                        real[a:b] = p.mul_(counted[rows, None])  # now logits holds d NLL / d logits
                if need_hidden:
                    d_hidden[start:stop] = logits @ head  # [n, D]
                if need_weight:
                    part = logits.T @ h  # [V, D]
                    # The first chunk's product stays in its dtype: where it is the only one, backward widens it.
                    d_weight = part if d_weight is None else d_weight.to(weight.dtype).add_(part)
        ctx.save_for_backward(d_hidden, d_weight)
        return torch.where(counted, nll, 0).sum(dtype=torch.float64).to(nll.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        scaled = [None, None]
        if d_hidden is not None:
            scaled[0] = d_hidden.to(ctx.dtypes[0]) * grad.to(ctx.dtypes[0])
        if d_weight is not None:
            out = torch.empty_like(d_weight, dtype=ctx.dtypes[1])
            for a, b in _blocks(*d_weight.shape, out.device):  # widened and scaled while it is in the cache
                out[a:b].copy_(d_weight[a:b]).mul_(grad)
            scaled[1] = out
        return *scaled, None, None, None


def _logits(hidden, weight, vocab_size):
    """(rows, logits [n, V']) of a few rows at a time, in the autocast dtype where autocast is on."""
    dtype = _compute_dtype(hidden)
    head = weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in _chunks(hidden.shape[0], vocab_size, dtype):
            logits = (hidden[start:stop].to(dtype) @ head.T)[:, :vocab_size]
            for a, b in _blocks(stop - start, vocab_size, logits.device):
                yield slice(start + a, start + b), logits[a:b]


def _softmax(logits):
    """Softmax [n, V] in at least fp32, the highest logit and the log of its probability [n, 1]: log p_v is
    logit_v - highest + log_p_highest, which keeps its digits where p_v itself underflows."""
    p = torch.softmax(logits, -1, dtype=_wide(logits.dtype))
    return p, logits.amax(-1, keepdim=True).to(p.dtype), p.amax(-1, keepdim=True).log_()


def _compute_dtype(tensor):
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(tokens, vocab_size, dtype):
    """(start, stop) of near-equal chunks; at least one."""
    chunk = max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))
    count = max(1, -(-tokens // chunk))
    return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def _blocks(rows, vocab_size, device):
    step = max(1, BLOCK_NUMBERS // vocab_size) if device.type == "cpu" else max(1, rows)
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]
