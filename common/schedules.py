"""Learning rates by step or round: functions of the position, so that a resumed run needs nothing else."""

import math


def lr_at(step, total, base, kind="cosine", *, warmup=0, min_lr=0.0, from_zero=False):
    """The learning rate of step (or epoch, or round) `step` = 0, 1, ... of `total`.

    warm-up, t < warmup: base (t + 1) / warmup, or base t / warmup (`from_zero`, as transformers' schedules). After it,
    with u = t - warmup and T = total - warmup:
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
        return base * (step if from_zero else step + 1) / warmup
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
