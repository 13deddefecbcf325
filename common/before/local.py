"""Pieces of a client's local optimisation that more than one study uses."""

from dataclasses import dataclass

import torch

from common.cli import UsageError

CLIENT_OPTIMIZERS = ("sgd", "sgdm", "adamw")
SCAFFOLD_OPTIONS = ("mean_gradient", "II")


def gradients(loss, batch, parameters, amp=None):
    """Puts the gradients of loss(*batch) into the parameters. Returns the loss, detached.

    Under fp16 (amp torch.float16) the loss is scaled by the largest of four powers of two that leaves the gradients
    finite, found anew for each batch, so that no scale has to be carried from step to step; the gradients are
    divided by it again.

    Args: loss: function of a batch that returns a scalar; parameters: {name: parameter}, those to train.
    """
    if amp != torch.float16:
        return _backward(loss, batch, parameters, 1.0)
    for scale in (2.0**14, 2.0**10, 2.0**6, 1.0):
        value = _backward(loss, batch, parameters, scale)
        norms = torch._foreach_norm([p.grad for p in parameters.values() if p.grad is not None])
        if scale == 1.0 or bool(torch.stack(norms).isfinite().all()):  # one wait for the device
            break
    for p in parameters.values():
        if p.grad is not None:
            p.grad.div_(scale)
    return value


def _backward(loss, batch, parameters, scale):
    for p in parameters.values():
        p.grad = None
    value = loss(*batch)
    (value if scale == 1.0 else value * scale).backward()
    return value.detach()


def proximal_(parameters, anchors, mu):
    """FedProx: adds mu (w - theta) to the gradients of {name: w}   (Li et al. 2020, eq. 2: the objective's mu/2 ||w -
    theta||^2). Before clipping and momentum, as part of the objective; mu 0 changes no bit.

    Args: anchors: {name: theta}, the weights that the round began with.
    """
    if mu == 0:
        return
    leaves, starts = list(parameters.values()), [anchors[name] for name in parameters]
    with torch.no_grad():
        torch._foreach_add_([p.grad for p in leaves], torch._foreach_sub(leaves, starts), alpha=mu)


@dataclass(frozen=True)
class LocalResult:
    """What `local_steps` did, nothing of it waited for: tensors on the parameters' device.

    Attributes: loss: mean over the steps of the batches' losses, FedProx's term not in it; steps: H; mean_gradient:
    {name: mean over the steps of the raw gradient}, None unless recorded; gradient_norms: [H], of the raw gradients
    over all parameters.
    """

    loss: torch.Tensor
    steps: int
    mean_gradient: dict | None
    gradient_norms: torch.Tensor


def local_steps(
    loss,
    batches,
    parameters,
    optimizer,
    *,
    amp=None,
    correction=None,
    mu=0.0,
    anchors=None,
    max_norm=0.0,
    lrs=None,
    record=False,
):
    """A client's local work: one optimiser step a batch. Returns a `LocalResult`; the parameters are left changed.

    In each step, in this order: the raw gradient g of loss(batch) is recorded; SCAFFOLD's correction c - c_k is added
    (Karimireddy et al. 2020, Alg. 1: before momentum or Adam, which would carry a correction made after them into no
    later step); FedProx's mu (w - anchor) is added; the sum is clipped to the norm `max_norm`; optimizer.step().
    Weight decay is the optimiser's. A parameter that a loss does not reach has the gradient 0.

    What is off (correction None, mu 0, max_norm 0) changes no bit, nor does a correction of -0.0.

    Args: loss: function of one batch that returns a scalar; batches: iterable, H of them; parameters: {name:
        parameter} of `optimizer`; amp: as for `gradients`; correction: {name: tensor}, `ControlVariates.correction`;
        anchors: {name: tensor}, by default the parameters as they come in; lrs: learning rate of each step, by
        default what the optimiser has; record: whether to return the mean raw gradient (summed in fp64, rounded once).
    Raises: ValueError without a batch, or when `lrs` has another length.
    """
    leaves = list(parameters.values())
    if mu and anchors is None:
        anchors = {name: p.detach().clone() for name, p in parameters.items()}
    shifts = None if correction is None else [correction[name] for name in parameters]
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in leaves] if record else None
    total, norms = 0.0, []
    for batch, lr in ((b, None) for b in batches) if lrs is None else zip(batches, lrs, strict=True):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        total = total + gradients(loss, (batch,), parameters, amp)
        for p in leaves:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        raw = [p.grad for p in leaves]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(raw))))
        if record:
            torch._foreach_add_(sums, raw)
        if shifts is not None:
            torch._foreach_add_(raw, shifts)
        proximal_(parameters, anchors, mu)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
    if not norms:
        raise ValueError("no batch: local work needs at least one step")
    for p in leaves:
        p.grad = None
    mean = None
    if record:
        mean = {name: s.div_(len(norms)).to(p.dtype) for (name, p), s in zip(parameters.items(), sums, strict=True)}
    return LocalResult(total / len(norms), len(norms), mean, torch.stack(norms))


def client_optimizer(kind, parameters, lr, momentum=0.9, weight_decay=0.0):
    """A new optimiser over {name: parameter}: "sgd", "sgdm" (momentum as torch's: u <- rho u + g), or "adamw".

    New in every round: FedNova's and SCAFFOLD's formulas hold for momentum that starts at zero.
    """
    _check_kind(kind)
    leaves, options = list(parameters.values()), {"lr": lr, "weight_decay": weight_decay}
    options["fused"] = True  # one pass over memory a step
    if kind == "adamw":
        return torch.optim.AdamW(leaves, **options)
    return torch.optim.SGD(leaves, momentum=momentum if kind == "sgdm" else 0.0, **options)


def check_scaffold(kind, option="mean_gradient"):
    """Refuses what SCAFFOLD cannot do: option II, (theta - y) / (H lr), with AdamW.

    AdamW's steps are normalised, so (theta - y) / (H lr) is near 1 however small the gradients are: a control variate
    larger than they by 1 / (sqrt(v) + eps), at most 1 / eps, which is 1e4 for gradients of 1e-4.

    Args: kind: of `client_optimizer`; option: "mean_gradient" or "II". Raises: UsageError.
    """
    _check_kind(kind)
    if option not in SCAFFOLD_OPTIONS:
        raise ValueError(f"option {option!r} is none of {', '.join(SCAFFOLD_OPTIONS)}")
    if option == "II" and kind == "adamw":
        raise UsageError(
            "SCAFFOLD's option II with adamw: Adam's steps are normalised, so (theta - y) / (H lr) is no gradient but "
            "larger by 1 / (sqrt(v) + eps), up to 1 / eps: use option mean_gradient, or sgd or sgdm"
        )


def _check_kind(kind):
    if kind not in CLIENT_OPTIMIZERS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(CLIENT_OPTIMIZERS)}")
