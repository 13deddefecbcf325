"""The optimiser's loop of this study: AdamW on short fits, the same in federated and central training."""

import math

import torch

from common.before.local import gradients, proximal_
from lora_glue_fl.data_prep import training_batches


def lr_at(step, total, lr, warmup=0, scheduler="linear"):
    """The learning rate of step `step` (from 0) of `total`, as transformers' schedules: warm-up from 0 over `warmup`
    steps, then constant, or linear to 0."""
    if step < warmup:
        return lr * step / warmup
    if scheduler == "constant":
        return lr
    return lr * max(0.0, (total - step) / max(1, total - warmup))


def plan_steps(lengths, args, epochs, round=0, client=0):
    """Which examples each optimiser step takes: a list (a step) of lists of row arrays (its micro-batches).

    The last step of an epoch has fewer micro-batches where they do not come out even.
    """
    batches = training_batches(lengths, args.batch_size, epochs, args.seed, round, client)
    n, per_epoch = args.gradient_accumulation_steps, math.ceil(len(lengths) / args.batch_size)
    parts = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    return [part[i : i + n] for part in parts for i in range(0, len(part), n)]


def warmup_steps(args, total):
    """Steps of the warm-up: a share of all."""
    return math.ceil(args.warmup_ratio * total)


def make_optimizer(parameters, args):
    """AdamW (Loshchilov & Hutter 2019) with torch's betas and epsilon over {name: parameter}."""
    return torch.optim.AdamW(parameters.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)


def fit(loss, encoded, steps, parameters, optimizer, lrs, args, amp, device, anchors=None):
    """Optimiser steps on a task's examples. Returns the mean loss over examples, a tensor.

    A step's gradient is that of the mean loss over its examples, whatever its micro-batches; with --mu it is that of
    FedProx's local objective, loss + mu/2 ||w - anchors||^2 (Li et al. 2020), then it is clipped to a norm of
    --max-grad-norm. The loss that is returned is without FedProx's term.

    Args: loss: function of a batch that returns the mean over its examples; encoded: an `Encoded`; steps: as
        `plan_steps`; parameters: {name: parameter} of `optimizer`; lrs: learning rate of each step; anchors: {name:
        tensor}, where FedProx pulls to.
    """
    leaves = list(parameters.values())
    total, seen = torch.zeros((), device=device), 0
    for rows_of, lr in zip(steps, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples, sums = sum(map(len, rows_of)), None
        for rows in rows_of:
            batch = {name: t.to(device, non_blocking=True) for name, t in encoded.batch(rows).items()}
            value = gradients(loss, (batch,), parameters, amp)
            total += value * len(rows)
            if len(rows_of) > 1:
                parts = torch._foreach_mul([p.grad for p in leaves], len(rows) / examples)
                sums = parts if sums is None else torch._foreach_add(sums, parts)
        if sums is not None:
            for p, gradient in zip(leaves, sums, strict=True):
                p.grad = gradient
        seen += examples
        if args.mu:
            proximal_(parameters, anchors, args.mu)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(leaves, args.max_grad_norm)
        optimizer.step()
    for p in leaves:
        p.grad = None
    return total / max(1, seen)
