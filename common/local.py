"""Pieces of a client's local optimisation that more than one study uses."""

import torch


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
