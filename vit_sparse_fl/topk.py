"""Sending the largest changes only:  theta <- theta + sum_k p_k C(theta_k - theta),  C: the largest entries."""

import torch


def largest(change, size):
    """bool [n]: the `size` largest entries of |change| [n], among equal ones the first."""
    change = change.abs()
    edge = change.topk(size).values[-1]
    sent = ~(change <= edge)  # with a nan among them all: the client is then seen not to be finite
    ties = (change == edge).nonzero().view(-1)
    sent[ties[: size - int(sent.sum())]] = True
    return sent


def top_k(theta, theta_k, size):
    """theta [n] with the `size` largest changes of the client: what the server gets, a new vector."""
    return torch.where(largest(theta_k - theta, size), theta_k, theta)
