"""A client's local work: the one loop of optimiser steps that every study uses, its optimisers and learning rates."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from common.cli import CLIENT_OPTIMIZERS


def gradients(loss, batch, leaves, amp=None):
    """Puts the gradients of loss(*batch) into the parameters `leaves`. Returns the loss, detached.

    Under fp16 (amp torch.float16) the loss is scaled by the largest of four powers of two that leaves the gradients
    finite, found anew for each batch, so that no scale is carried from step to step.
    """
    if amp != torch.float16:
        return _backward(loss, batch, leaves, 1.0)
    for scale in (2.0**14, 2.0**10, 2.0**6, 1.0):
        value = _backward(loss, batch, leaves, scale)
        norms = torch._foreach_norm([p.grad for p in leaves if p.grad is not None])
        if scale == 1.0 or bool(torch.stack(norms).isfinite().all()):  # one wait for the device
            break
    for p in leaves:
        if p.grad is not None:
            p.grad.div_(scale)
    return value


def _backward(loss, batch, leaves, scale):
    for p in leaves:
        p.grad = None
    value = loss(*batch)
    (value if scale == 1.0 else value * scale).backward()
    return value.detach()


@dataclass(frozen=True)
class LocalResult:
    """What `local_steps` did, nothing of it waited for: tensors on the parameters' device.

    Attributes: loss: mean of the batches' losses, FedProx's term not in it; steps: H; mean_gradient [n] and
    gradient_norms [H]: of the raw gradients; None unless recorded.
    """

    loss: torch.Tensor
    steps: int
    mean_gradient: torch.Tensor | None
    gradient_norms: torch.Tensor | None


def local_steps(
    loss,
    steps,
    weights,
    optimizer,
    *,
    amp=None,
    correction=None,
    mu=0.0,
    max_norm=0.0,
    lrs=None,
    record=False,
    norms=False,
    after_step=None,
):
    """A client's local work: one optimiser step for each of `steps`. Returns a `LocalResult`; the weights are changed.

    In each step, in this order: the raw gradient g is recorded; SCAFFOLD's correction c - c_k is added (Karimireddy et
    al. 2020, Alg. 1: before momentum or Adam, which would carry a correction made after them into no later step);
    FedProx's mu (w - w_0) is added, w_0 the weights as they come in (Li et al. 2020, eq. 2); the sum is clipped to the
    norm `max_norm`; optimizer.step(). Weight decay is the optimiser's. A parameter that a loss does not reach has the
    gradient 0.
    What is off (correction None, mu 0, max_norm 0) changes no bit, nor does a correction of -0.0.

    Args: loss: function of a batch's items that returns the mean over its examples; steps: iterable of H batches, each
        a tuple of the loss's arguments; weights: `common.vector.Weights` of the optimiser's parameters; amp: of
        `gradients`; correction [n]; lrs: learning rate of each step, by default what the optimiser has; record: whether
        to return the mean raw gradient (summed in fp64, rounded once); norms: and the gradients' norms; after_step:
        called after each step.
    Raises: ValueError without a step, or when `lrs` has another length.
    """
    leaves = list(weights.parameters.values())
    shifts = None if correction is None else list(weights.named(correction).values())
    starts = list(weights.named(weights.snapshot()).values()) if mu else None
    whole = torch.zeros_like(weights.theta, dtype=torch.float64) if record else None
    sums = list(weights.named(whole).values()) if record else None
    total, count, norm_list = 0.0, 0, []
    for batch, lr in ((batch, None) for batch in steps) if lrs is None else zip(steps, lrs, strict=True):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        total, count = total + gradients(loss, batch, leaves, amp), count + 1
        for p in leaves:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        with torch.no_grad():
            raw = [p.grad for p in leaves]
            if norms:
                norm_list.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(raw))))
            if record:
                torch._foreach_add_(sums, raw)
            if shifts is not None:
                torch._foreach_add_(raw, shifts)
            if mu:
                torch._foreach_add_(raw, torch._foreach_sub(leaves, starts), alpha=mu)
            if max_norm:
                torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
        if after_step is not None:
            after_step()
    if not count:
        raise ValueError("no batch: local work needs at least one step")
    for p in leaves:
        p.grad = None
    mean = whole.div_(count).to(weights.theta.dtype) if record else None
    return LocalResult(total / count, count, mean, torch.stack(norm_list) if norms else None)


def client_optimizer(kind, parameters, lr, momentum=0.9, weight_decay=0.0, not_decayed=(), betas=(0.9, 0.999)):
    """A new optimiser over {name: parameter}: "sgd", "sgdm" (momentum as torch's: u <- rho u + g), or "adamw".

    Without state: FedNova's and SCAFFOLD's formulas hold for momentum that starts at zero in every round.
    Args: not_decayed: endings of names that weight decay leaves alone; betas: AdamW's.
    """
    if kind not in CLIENT_OPTIMIZERS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(CLIENT_OPTIMIZERS)}")
    rest = [p for name, p in parameters.items() if name.endswith(tuple(not_decayed))]
    decayed = [p for name, p in parameters.items() if not name.endswith(tuple(not_decayed))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr, betas, fused=True)  # one pass over memory a step
    return torch.optim.SGD(groups, lr, momentum=momentum if kind == "sgdm" else 0.0, fused=True)


class Moments:
    """AdamW's moments of clients from round to round, one optimiser for all: a client's turn puts its own into it.

    A row is {"m" [n], "v" [n], "step" []}, as vectors. Without rows every client starts anew in every round. Nothing of
    it is sent; moments that clients share have the same functions (`common.shared_moments`).
    Args: optimizer: over the parameters of `weights`; weights: `common.vector.Weights`; rows: `ClientRows` (in_place).
    """

    def __init__(self, optimizer, weights, rows=None):
        self.optimizer, self.weights, self.rows = optimizer, weights, rows
        self.lasting = {} if rows is None else {"moments": rows}
        self._row = None

    def bytes_of(self, t):
        """(up, down): what a client sends and receives beside theta in round t."""
        return 0, 0

    def load(self, k):
        """Puts client k's moments into the optimiser: views of its row, so that steps change it where it lies."""
        self.optimizer.state = defaultdict(dict)
        if self.rows is None:
            return
        theta = self.weights.theta
        zeros = {"m": torch.zeros_like(theta), "v": torch.zeros_like(theta), "step": torch.zeros(())}
        self._row = self.rows.get(k) or zeros
        put_moments(self.optimizer, self.weights, **self._row)

    def store(self, k):
        """Keeps client k's moments after its steps."""
        if self.rows is not None:
            self.rows.put(k, {**self._row, "step": steps_taken(self.optimizer, self.weights)})


def put_moments(optimizer, weights, m, v, step):
    """Puts AdamW's moments m, v [n] and step [] into an optimiser: views of the vectors, which its steps change."""
    m, v, optimizer.state = weights.named(m), weights.named(v), defaultdict(dict)
    for name, p in weights.parameters.items():
        # every parameter counts its own steps, on its device where the optimiser is fused
        count = step.to(weights.theta.device, copy=True)
        optimizer.state[p] = {"step": count, "exp_avg": m[name], "exp_avg_sq": v[name]}


def steps_taken(optimizer, weights):
    """AdamW's count of steps, alike for all parameters: a tensor [] on the CPU."""
    return optimizer.state[next(iter(weights.parameters.values()))]["step"].cpu()


class OptimizerState:
    """A torch optimiser's state as {"parameter/field": tensor}: a `lasting` object of central training.

    Args: optimizer: over the values of `parameters`; parameters: {name: parameter}.
    """

    def __init__(self, optimizer, parameters):
        self.optimizer, self.parameters = optimizer, parameters

    def state_dict(self):
        """What is there so far."""
        state = self.optimizer.state
        return {f"{n}/{f}": t for n, p in self.parameters.items() if p in state for f, t in state[p].items()}

    def load_state_dict(self, tensors):
        """Puts the state back."""
        for name, tensor in tensors.items():
            parameter, _, field = name.rpartition("/")
            self.optimizer.state[self.parameters[parameter]][field] = tensor


def lr_at(step, total, base, kind="cosine", *, warmup=0, min_lr=0.0):
    """The learning rate of step (or epoch, or round) `step` = 0, 1, ... of `total`.

    warm-up, t < warmup: base (t + 1) / warmup. After it, with u = t - warmup and T = total - warmup:
        cosine: min_lr + (base - min_lr) (1 + cos(pi u / T)) / 2     (Loshchilov & Hutter 2017, eq. 5, no restart)
        step:   max(min_lr, base 0.1^floor(u / ceil(T / 3)))
        linear: min_lr + (base - min_lr) (1 - u / T)
        constant, none: base
    Cosine, step and linear are torch's CosineAnnealingLR(T_max=T, eta_min=min_lr), StepLR and LinearLR in closed form.
    The last step of a cosine or a line is one short of min_lr, as torch's is.

    Raises: ValueError for a step outside 0..total-1 and for another kind.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not in 0..{total - 1}")
    if step < warmup:
        return base * (step + 1) / warmup
    u, length = step - warmup, total - warmup
    if kind == "cosine":
        return min_lr + (base - min_lr) * (1 + math.cos(math.pi * u / length)) / 2
    if kind == "step":
        return max(min_lr, base * 0.1 ** (u // math.ceil(length / 3)))
    if kind == "linear":
        return min_lr + (base - min_lr) * ((length - u) / length)
    if kind in ("constant", "none"):
        return base
    raise ValueError(f"schedule {kind!r} is not cosine, step, linear, constant or none")
