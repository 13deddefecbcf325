"""Sending the largest changes only, up and down, and what the two ends remember of the rest.

    theta <- theta + sum_k p_k C(d_k),   d_k = theta_k - x_k + e_k,   e_k <- d_k - C(d_k)      C: the largest entries

Without error feedback e_k = 0 (Stich et al. 2018, with it). x_k, from which client k starts, is theta, or with
`--download topk` what the client has of it: x_k <- x_k + C(theta - x_k), of each client its own, as not all take part
(EF21-P, Gruntkowska et al. 2023); the whole theta in its first round.
"""

import torch

from common.client_rows import ClientRows, rows_on_disk
from common.participation import per_round


def client_rows(run, args, weights):
    """`ClientRows` with {"residual": e_k [n], "copy": x_k [n]}, of these what the flags ask for; None for neither."""
    kept = args.error_feedback + (args.download == "topk")
    if args.upload != "topk" or not kept:
        return None
    some = per_round(args.participation_rate, args.num_clients)
    on_disk = rows_on_disk(args.num_clients, some, kept * weights.bytes)
    return ClientRows(run.folder / "clients" / "topk", on_disk, device=run.device)


def largest(change, size):
    """bool [n]: the `size` largest entries of |change| [n], among equal ones the first."""
    change = change.abs()
    edge = change.topk(size).values[-1]
    sent = change > edge
    ties = (change == edge).nonzero().view(-1)
    sent[ties[: size - int(sent.sum())]] = True
    return sent


def received(theta, copy, size):
    """What a client starts from [n]: theta, or its copy with the `size` entries of theta in which they differ most."""
    return theta if copy is None else torch.where(largest(theta - copy, size), theta, copy)


def uploaded(theta, start, theta_k, size, residual=None):
    """(theta with the `size` largest changes of the client added [n], the changes that are not sent [n]).

    Args: start [n]: what the client began with; residual [n]: what it did not send in earlier rounds, None: nothing.
    """
    change = theta_k - start
    if residual is not None:
        change = change + residual
    sent = largest(change, size)
    plain = start is theta and residual is None  # theta + (theta_k - theta) would round
    return torch.where(sent, theta_k if plain else theta + change, theta), change.masked_fill_(sent, 0.0)


def remembered(args, residual, copy):
    """A client's row: what it has to keep until its next round."""
    return ({"residual": residual} if args.error_feedback else {}) | ({"copy": copy} if args.download == "topk" else {})
