"""How far a round's clients pull apart: cosine, diversity, sign conflicts and drift of their updates."""

import math

import torch

from common.aggregation import fp64_sum
from common.parallel import CHUNK, Follower, OrderedSum, chunks

# Positive and negative updates are counted in one fp64 number, exact for fewer clients than this.
_NEGATIVE = 2.0**20


class Interference(Follower):
    """A probe: interference between the updates d_k = theta_k - theta of a round's m clients, all counted alike.

    update_cosine: mean over pairs of cos(d_i, d_j) = (||sum_k u_k||^2 - m) / (m (m - 1)), u_k = d_k / ||d_k||.
    gradient_diversity: sum_k ||d_k||^2 / ||sum_k d_k||^2   (Yin et al. 2018; 1/m: all alike, 1: orthogonal).
    sign_conflict: mean over the weights that at least two clients moved of 1 - |p - q| / (p + q), p clients having
        moved it up and q down. 0: all agree, 1: as many up as down.
    drift: mean_k ||d_k|| / ||theta||.
    drift_to_mean: sqrt(mean_k ||d_k - d||^2) / ||d||, d = mean_k d_k (root mean square: it needs no second pass
        over the clients; it is sqrt(m gradient_diversity - 1)).

    Clients stream through: memory is three fp64 vectors of the counted weights. The same bits for any number of
    processes and of threads.

    Args: kept: int64 [kept], only these places are counted; None: all of them; frozen: sum of squares of the model's
        weights that are not in theta: ||theta|| in the drift is that of the whole model.
    """

    def __init__(self, kept=None, frozen=0.0):
        self._kept, self._frozen = kept, frozen

    def open_round(self, clients, theta):
        self._old = _counted(theta, self._kept)
        self._sum = OrderedSum(clients, _fold, self._old, sums=3)
        self._size = math.sqrt(fp64_sum(theta, square=True) + self._frozen)

    def accept(self, clients, theta_k):
        new = _counted(theta_k, self._kept)
        squares = math.fsum(float((a.double() - b).square().sum()) for a, b in chunks(new, self._old, size=CHUNK // 4))
        self._sum.add((squares, math.sqrt(squares)), new)

    def result(self, clients, theta):
        """The five numbers, as a dict name -> float; None where one is undefined (fewer than two clients that
        moved, or updates that cancel)."""
        (whole, unit, signs), numbers = self._sum.result()
        self._sum = self._old = None
        m, moved = len(numbers), sum(norm > 0 for _, norm in numbers)
        of_sum, of_units = fp64_sum(whole, square=True), fp64_sum(unit, square=True)
        conflicts, touched = 0.0, 0
        for (part,) in chunks(signs, size=CHUNK // 4):
            down = torch.floor(part / _NEGATIVE)
            up = part - down * _NEGATIVE
            several = up + down > 1
            touched += int(several.sum())
            conflicts += float((1 - (up - down).abs() / (up + down).clamp_(min=1))[several].sum())
        diversity = math.fsum(squares for squares, _ in numbers) / of_sum if of_sum > 0 else None
        return {
            "update_cosine": (of_units - moved) / (moved * (moved - 1)) if moved > 1 else None,
            "gradient_diversity": diversity,
            "sign_conflict": conflicts / touched if touched else None,
            "drift": math.fsum(norm for _, norm in numbers) / m / self._size if self._size > 0 else None,
            "drift_to_mean": math.sqrt(max(0.0, m * diversity - 1)) if diversity is not None else None,
        }


def _counted(vector, kept):
    return vector.detach() if kept is None else vector.detach().index_select(0, kept)  # [counted]


def _fold(sums, old, given, squares, norm):
    whole, unit, signs = sums
    (new,) = given
    change = new.to(torch.float64, copy=True).sub_(old)
    whole.add_(change)
    signs.add_((new > old).double().add_(new < old, alpha=_NEGATIVE))
    if norm > 0:
        unit.add_(change.mul_(1.0 / norm))
