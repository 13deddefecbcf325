"""torch.compile, used only after its first step was checked against eager mode."""

import sys

import torch


def checked_compile(loss, parameters, tolerance=0.02):
    """`loss` compiled, or `loss` itself if its first gradients are not those of eager mode.

    torch.compile was seen to return convolution gradients of zero on a CPU at some batch sizes, silently. So the
    first call computes loss and gradients both ways; a relative difference above `tolerance` in any parameter's
    gradient (norm of the difference over the norm, or over a thousandth of the norm of all) falls back to eager, with
    a warning.

    loss: a function of a batch that returns a scalar; parameters: {name: parameter} that it depends on, or a function
    that returns them, called at the first batch.
    """
    state = {"chosen": None}

    def first(*batch):
        # dropout must draw the same masks in both passes and leave the generators as it found them
        compiled = torch.compile(loss, options={"fallback_random": True})
        named = parameters() if callable(parameters) else parameters
        leaves = list(named.values())
        devices = [] if leaves[0].device.type == "cpu" else [leaves[0].device]
        with torch.random.fork_rng(devices):
            expected = torch.autograd.grad(loss(*batch), leaves)
        try:
            with torch.random.fork_rng(devices):
                found = torch.autograd.grad(compiled(*batch), leaves)
        except RuntimeError as error:  # no compiler, an operation that it does not know
            return _fall_back(f"it failed: {str(error).splitlines()[0]}")
        # against all gradients: one that is zero but for rounding says nothing (attention's key bias)
        size = torch.stack(torch._foreach_norm(expected)).norm().item()
        for name, a, b in zip(named, expected, found, strict=True):
            difference, own = (a - b).norm().item(), a.norm().item()
            if not difference <= tolerance * max(own, 1e-3 * size):
                return _fall_back(f"the gradient of {name} differs by {difference:.3g} of {own:.3g}")
        return compiled

    def _fall_back(reason):
        print(f"warning: --compile is turned off: {reason}", file=sys.stderr)
        return loss

    def call(*batch):
        if state["chosen"] is None:
            state["chosen"] = first(*batch)
        return state["chosen"](*batch)

    return call
