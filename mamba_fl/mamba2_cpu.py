"""The inside of a Mamba-2 mixer for a CPU: forward and backward by hand, fewer passes over memory than autograd.

Computes what `Mamba2Mixer.scan` in mamba2.py computes, from the columns [z, x, B, C, dt] of in_proj to the input of
out_proj, and is tested against it. What makes it fast:

- the depthwise convolution is four shifted multiply-adds, one sequence at a time, so that it stays in the cache;
- slices are read and written where they lie in larger tensors: nothing is padded, split, transposed or joined;
- inside a chunk the decay, the step and the skip D are folded into one Q x Q matrix per head, so the recurrence
  is matrix products; the first chunk receives no state and the last one's is not made;
- the gradient of an exponent is the product of a value and its gradient, so nothing is divided or recomputed.

With K_ji = exp(a_{j+1} + .. + a_i) dt_j (zero for j > i), a = dt A, S_ji = B_j . C_i and e_i = exp(a_1 + .. + a_i):

    y_i = sum_j (K_ji S_ji + D [i = j]) x_j + e_i C_i h        h' = e_Q h + sum_j K_jQ B_j x_j^T

Sizes as in mamba2.py; T' is T rounded up to whole chunks, c = T' / Q, E = d_inner + 2 N.
"""

import torch
import torch.nn.functional as F

from mamba_fl.mamba2 import auto_chunk, segment_weights

CHANNEL_BLOCK = 2**18  # numbers in a block of rows of the gated norm: 1 MiB


def mixer_scan(mixer, zxbcdt):
    """[z, x, B, C, dt] [B, T, W] -> the gated, normalised output of the recurrence [B, T, d_inner]."""
    conv = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    vectors = mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight
    return _MixerScan.apply(zxbcdt, *conv, *vectors, mixer.config)


class _MixerScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, config):
        inner, heads = config.d_inner, config.n_heads
        b, length, width = zxbcdt.shape
        chunk = auto_chunk(length)
        padded = length + -length % chunk
        z, xbc, dt_raw = zxbcdt.split([inner, width - inner - heads, heads], -1)

        pre, act = _conv_forward(xbc, conv_weight, conv_bias, padded)
        dt_raw = dt_raw + dt_bias  # [B, T, H]
        dt = F.softplus(dt_raw)
        A = -torch.exp(A_log)
        by_head = dt.new_zeros(heads, b, padded)  # zero in the padding
        by_head[:, :, :length] = dt.permute(2, 0, 1)
        y, kept = _scan_forward(act, by_head.view(heads, -1, chunk), A, D, config)
        y = y[:, :length]
        out, scale = _gate_forward(y, z, norm_weight, config.norm_eps)

        ctx.save_for_backward(zxbcdt, conv_weight, dt_raw, dt, A, D, norm_weight, pre, act, y, scale, *kept)
        ctx.config = config
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        zxbcdt, conv_weight, dt_raw, dt, A, D, norm_weight, pre, act, y, scale, *kept = ctx.saved_tensors
        inner, heads = ctx.config.d_inner, ctx.config.n_heads
        b, length, width = zxbcdt.shape
        z, xbc, _ = zxbcdt.split([inner, width - inner - heads, heads], -1)
        d_all = torch.empty_like(zxbcdt)
        d_z, d_xbc, d_dt_raw = d_all.split([inner, width - inner - heads, heads], -1)

        d_y = act.new_empty(b, act.shape[1], inner)
        d_y[:, length:] = 0
        d_norm = _gate_backward(grad.contiguous(), y, z, norm_weight, scale, d_y[:, :length], d_z)
        d_act, *by_head, d_D = _scan_backward(d_y, act, D, ctx.config, kept)
        d_log_dt, d_a = (d.reshape(heads, b, -1)[:, :, :length].permute(1, 2, 0) for d in by_head)  # [B, T, H]
        # d log dt / d raw = sigmoid(raw) / softplus(raw), which tends to 1 where both underflow.
        slope = torch.sigmoid(dt_raw)
        ratio = torch.where(dt_raw < -20, torch.ones_like(dt), slope / dt)
        torch.addcmul(d_log_dt * ratio, d_a * A, slope, out=d_dt_raw)
        d_A_log = (d_a * dt).sum((0, 1)) * A
        d_conv_weight, d_conv_bias = _conv_backward(d_act, pre, xbc, conv_weight, d_xbc)
        return d_all, d_conv_weight, d_conv_bias, d_dt_raw.sum((0, 1)), d_A_log, d_D, d_norm, None


def _conv_forward(x, weight, bias, padded):
    """y_t = bias + sum_s weight[K-1-s] x_{t-s} and SiLU(y), zero in the padding. x: [B, T, E], strided."""
    b, length, channels = x.shape
    taps = weight.shape[1]
    columns = weight.T.contiguous()  # [K, E]
    pre = x.new_empty(b, length, channels)
    act = x.new_empty(b, padded, channels)
    act[:, length:] = 0
    for i in range(b):
        torch.addcmul(bias, x[i], columns[taps - 1], out=pre[i])
        for s in range(1, min(taps, length)):
            pre[i, s:].addcmul_(x[i, : length - s], columns[taps - 1 - s])
        torch.ops.aten.silu.out(pre[i], out=act[i, :length])
    return pre, act


def _conv_backward(d_act, pre, x, weight, d_x):
    """Writes d_x [B, T, E]; returns the gradients of weight [E, K] and bias [E]."""
    b, length, channels = x.shape
    taps = weight.shape[1]
    columns = weight.T.contiguous()  # [K, E]
    d_columns, d_bias = torch.zeros_like(columns), x.new_zeros(channels)
    d_pre, product = x.new_empty(length, channels), x.new_empty(length, channels)
    for i in range(b):
        torch.ops.aten.silu_backward.grad_input(d_act[i, :length], pre[i], grad_input=d_pre)
        d_bias += d_pre.sum(0)
        torch.mul(d_pre, columns[taps - 1], out=d_x[i])
        for s in range(min(taps, length)):
            part = torch.mul(d_pre[s:], x[i, : length - s], out=product[s:])
            d_columns[taps - 1 - s] += part.sum(0)
            if s:
                d_x[i, : length - s].addcmul_(d_pre[s:], columns[taps - 1 - s])
    return d_columns.T, d_bias


def _scan_forward(act, dt, A, D, config):
    """act: [B, T', E] = [x, B, C]; dt: [H, B*c, Q], zero in the padding. Returns y [B, T', d_inner] and tensors for
    the backward pass."""
    h, n, p, q = config.n_heads, config.d_state, config.headdim, dt.shape[-1]
    b, c = act.shape[0], act.shape[1] // q
    x, B, C = _parts(act, config, q)

    weights, offset = segment_weights(q, act.dtype, act.device)
    decay = torch.addmm(offset, (dt * A[:, None, None]).view(-1, q), weights).exp_()  # [H*B*c, (Q + 1) * Q]
    decay = decay.view(h, b * c, q + 1, q)
    decay[:, :, 1:] *= dt.unsqueeze(-1)  # from now on K in rows 1.., e in row 0
    e, K = decay[:, :, 0], decay[:, :, 1:]  # [H, B*c, Q], [H, B*c, Q(from), Q(to)]

    y = act.new_empty(b, c, q, h, p)
    y[:, 0] = 0
    scores = torch.bmm(B.flatten(0, 1), C.flatten(0, 1).transpose(1, 2))  # [B*c, Q(from), Q(to)]
    mix = K * scores
    states = kept = carried = act.new_empty(0)
    if c > 1:
        kept = x[:, :-1] * _over_tokens(K[..., -1], b)[:, :-1]  # [B, c - 1, Q, H, P]
        states = B[:, :-1].flatten(0, 1).transpose(1, 2) @ kept.view(-1, q, h * p)
        states = states.view(b, c - 1, n, h, p)
        total = e[..., -1].view(h, b, c).permute(1, 2, 0)[:, :, None, :, None]  # [B, c, 1, H, 1]
        for k in range(1, c - 1):
            states[:, k].addcmul_(states[:, k - 1], total[:, k])
        carried = C[:, 1:].flatten(0, 1) @ states.view(-1, n, h * p)
        carried = carried.view(b, c - 1, q, h, p)
        torch.mul(carried, _over_tokens(e, b)[:, 1:], out=y[:, 1:])
    mix.diagonal(dim1=-2, dim2=-1).add_(D[:, None, None])
    for i, (x_i, y_i) in enumerate(zip(_heads(x), _heads(y), strict=True)):
        y_i.baddbmm_(mix[i].transpose(1, 2), x_i)
    return y.view(b, c * q, h * p), (decay, scores, mix, states, kept, carried)


def _scan_backward(d_y, act, D, config, saved):
    """Returns d_act [B, T', E], the gradients of log dt and of a = dt A, both [H, B*c, Q], and of D [H]."""
    decay, scores, mix, states, kept, carried = saved
    h, n, p, q = config.n_heads, config.d_state, config.headdim, decay.shape[-1]
    b, c = act.shape[0], act.shape[1] // q
    x, B, C = _parts(act, config, q)
    e, K = decay[:, :, 0], decay[:, :, 1:]
    d_act = torch.empty_like(act)
    d_x, d_B, d_C = _parts(d_act, config, q)
    d_y = d_y.view(b, c, q, h, p)

    d_sums = torch.empty_like(decay)  # of the exponents: row 0 of e, rows 1.. of K
    d_sums[:, :, 0] = 0
    d_x[:, -1], d_B[:, -1], d_C[:, 0] = 0, 0, 0
    d_ends = d_sums.new_zeros(h, b, c, q)  # of the exponents of K's last column
    if c > 1:
        d_e = d_sums.view(h, b, c, q + 1, q)[:, :, :, 0]  # [H, B, c, Q]
        d_carried = d_y[:, 1:] * _over_tokens(e, b)[:, 1:]  # [B, c - 1, Q, H, P]
        d_e[:, :, 1:] = (d_carried * carried).sum(-1).permute(3, 0, 1, 2)
        d_carried, flat = d_carried.view(-1, q, h * p), states.view(-1, n, h * p)
        d_C[:, 1:] = (d_carried @ flat.transpose(1, 2)).view(b, c - 1, q, n)
        d_states = (C[:, 1:].flatten(0, 1).transpose(1, 2) @ d_carried).view(b, c - 1, n, h, p)
        total = e[..., -1].view(h, b, c).permute(1, 2, 0)[:, :, None, :, None]  # [B, c, 1, H, 1]
        for k in range(c - 2, 0, -1):
            d_total = (d_states[:, k] * states[:, k - 1]).sum((1, 3)) * total[:, k, 0, :, 0]  # [B, H]
            d_e[:, :, k, -1] += d_total.T
            d_states[:, k - 1].addcmul_(d_states[:, k], total[:, k])
        flat = d_states.view(-1, n, h * p)
        d_B[:, :-1] = (kept.view(-1, q, h * p) @ flat.transpose(1, 2)).view(b, c - 1, q, n)
        d_kept = (B[:, :-1].flatten(0, 1) @ flat).view(b, c - 1, q, h, p)
        torch.mul(d_kept, _over_tokens(K[..., -1], b)[:, :-1], out=d_x[:, :-1])
        d_ends[:, :, :-1] = d_kept.mul_(kept).sum(-1).permute(3, 0, 1, 2)

    d_mix = d_sums[:, :, 1:]  # [H, B*c, Q(from), Q(to)]
    for i, (x_i, d_x_i, d_y_i) in enumerate(zip(_heads(x), _heads(d_x), _heads(d_y), strict=True)):
        torch.bmm(x_i, d_y_i.transpose(1, 2), out=d_mix[i])
        d_x_i.baddbmm_(mix[i], d_y_i)
    d_D = d_mix.diagonal(dim1=-2, dim2=-1).sum((1, 2))  # [H]
    d_mix *= K
    d_scores = d_mix.sum(0)  # [B*c, Q(from), Q(to)]
    d_mix *= scores
    d_B.flatten(0, 1).baddbmm_(d_scores, C.flatten(0, 1))
    d_C.flatten(0, 1).baddbmm_(d_scores.transpose(1, 2), B.flatten(0, 1))
    d_mix[..., -1] += d_ends.view(h, b * c, q)
    weights, _ = segment_weights(q, act.dtype, act.device)
    d_a = (d_sums.view(h * b * c, -1) @ weights.T).view(h, b * c, q)
    return d_act, d_mix.sum(-1), d_a, d_D


def _gate_forward(y, z, weight, eps):
    """v = y SiLU(z); v / sqrt(mean(v^2) + eps) * weight. Returns it and 1 / sqrt."""
    b, length, inner = z.shape
    out, scale = y.new_empty(b, length, inner), y.new_empty(b, length, 1)
    for rows in _row_blocks(length, inner):
        for i in range(b):
            v = F.silu(z[i, rows]).mul_(y[i, rows])
            mean = torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_().div_(inner)
            scale[i, rows] = mean.add_(eps).rsqrt_()
            torch.mul(v.mul_(scale[i, rows]), weight, out=out[i, rows])
    return out, scale


def _gate_backward(grad, y, z, weight, scale, d_y, d_z):
    """Writes d_y and d_z; returns the gradient of weight.

    With v = y s, s = SiLU(z), r = scale, n = v r and f = grad weight:   d_v = r (f - n mean(f n)).
    """
    b, length, inner = z.shape
    d_weight = torch.zeros_like(weight)
    for rows in _row_blocks(length, inner):
        for i in range(b):
            gate = F.silu(z[i, rows])
            r = scale[i, rows]
            n = (gate * y[i, rows]).mul_(r)
            product = n * grad[i, rows]
            d_weight += product.sum(0)
            mean = product.mul_(weight).mean(-1, keepdim=True)
            d_v = torch.mul(grad[i, rows], weight, out=product).addcmul_(n, mean, value=-1).mul_(r)
            torch.mul(d_v, gate, out=d_y[i, rows])
            torch.ops.aten.silu_backward.grad_input(d_v.mul_(y[i, rows]), z[i, rows], grad_input=d_z[i, rows])
    return d_weight


def _row_blocks(length, inner):
    step = max(1, CHANNEL_BLOCK // inner)
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _parts(act, config, q):
    """Views x [B, c, Q, H, P], B and C [B, c, Q, N] of act [B, T', E]."""
    x, B, C = act.unflatten(1, (-1, q)).split([config.d_inner, config.d_state, config.d_state], -1)
    return x.unflatten(-1, (-1, config.headdim)), B, C


def _heads(t):
    """[B, c, Q, H, P] -> views [B*c, Q, P], one per head."""
    return t.flatten(0, 1).unbind(2)


def _over_tokens(t, b):
    """[H, B*c, Q] -> [B, c, Q, H, 1]."""
    return t.unflatten(1, (b, -1)).permute(1, 2, 3, 0).unsqueeze(-1)
