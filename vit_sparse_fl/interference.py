"""Probes of a round's clients: how far their updates pull apart, and what an update does to the others' losses."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from common.aggregation import fp64_sum
from common.parallel import CHUNK, Follower, OrderedSum, chunks
from common.seeding import stream, torch_stream

CLIENTS, IMAGES = 10, 64  # at most, in losses: of a round's clients, and validation images of each
BATCH = 125  # images at once


class Interference(Follower):
    """A probe: interference between the updates d_k = theta_k - theta of a round's m clients, all counted alike.

    update_cosine: mean over pairs of cos(d_i, d_j) = (||sum_k u_k||^2 - m) / (m (m - 1)), u_k = d_k / ||d_k||.
    gradient_diversity: sum_k ||d_k||^2 / ||sum_k d_k||^2   (Yin et al. 2018; 1/m: all alike, 1: orthogonal).
    drift: mean_k ||d_k|| / ||theta||.

    Memory is two fp64 vectors of the counted weights. The same bits for any number of processes and of threads.
    Args: kept: int64 [kept], only these places are counted; None: all of them; frozen: sum of squares of the model's
        weights that are not in theta: ||theta|| in the drift is that of the whole model.
    """

    def __init__(self, kept=None, frozen=0.0):
        self._kept, self._frozen = kept, frozen

    def open_round(self, clients, theta):
        self._old = _counted(theta, self._kept)
        self._sum = OrderedSum(clients, _fold, self._old, sums=2)
        self._size = math.sqrt(fp64_sum(theta, square=True) + self._frozen)

    def accept(self, clients, theta_k):
        new = _counted(theta_k, self._kept)
        squares = math.fsum(float((a.double() - b).square().sum()) for a, b in chunks(new, self._old, size=CHUNK // 4))
        self._sum.add((squares, math.sqrt(squares)), new)

    def result(self, clients, theta):
        """{name: float}; None where one is undefined (fewer than two clients moved, or updates cancel)."""
        (whole, unit), numbers = self._sum.result()
        self._sum = self._old = None
        m, moved = len(numbers), sum(norm > 0 for _, norm in numbers)
        of_sum, of_units = fp64_sum(whole, square=True), fp64_sum(unit, square=True)
        return {
            "update_cosine": (of_units - moved) / (moved * (moved - 1)) if moved > 1 else None,
            "gradient_diversity": math.fsum(squares for squares, _ in numbers) / of_sum if of_sum > 0 else None,
            "drift": math.fsum(norm for _, norm in numbers) / m / self._size if self._size > 0 else None,
        }


def _counted(vector, kept):
    return vector.detach() if kept is None else vector.detach().index_select(0, kept)  # [counted]


def _fold(sums, old, given, squares, norm):
    whole, unit = sums
    (new,) = given
    change = new.to(torch.float64, copy=True).sub_(old)
    whole.add_(change)
    if norm > 0:
        unit.add_(change.mul_(1.0 / norm))


class CrossLosses(Follower):
    """A probe: losses of some of a round's clients on each other's images, every --interference-every rounds.

        M_ij = L_i(theta + delta_j) - L_i(theta)      row i: whose images, column j: whose update, as it is sent
        gap_k = L_k(theta') - L_k(theta_k)            theta': the server's weights after the round

    L_i: mean cross-entropy in nats, in fp32, without smoothing and dropout, on up to 64 images of the validation split,
    drawn by the client's own proportions of classes (`held_rows`). M_ii < 0 helps the client itself, M_ij > 0 harms
    another (inter-task affinity, Fifty et al. 2021, is -M_ij / L_i(theta)). The chance level of M is the same with
    random signs, L_i(theta + s delta_j) - L_i(theta): a step as long, in the same weights.

    The same bits for any number of processes; nothing of the run changes by it.
    """

    def __init__(self, study):
        self._study = study

    def open_round(self, clients, theta):
        study, args = self._study, self._study.args
        self._theta, self._of = theta, {}  # client -> its column of losses, with random signs
        self.sample = []
        if (clients.number + 1) % args.interference_every == 0:
            ids, draws = np.array(sorted(clients.clients)), stream(args.seed, "interference", clients.number)
            some = min(CLIENTS, len(ids))
            self.sample = sorted(draws.choice(ids, some, replace=False).tolist())
        self._held = [held_rows(study, k) for k in self.sample]

    def accept(self, clients, theta_k):
        k = clients.current
        if k not in self.sample:
            return
        theta_k = theta_k.clone()  # it may lie in the model, which gets other weights now
        update = theta_k - self._theta
        generator = torch_stream(self._study.args.seed, "interference signs", clients.number, k)
        signs = torch.randint(0, 2, update.shape, generator=generator).to(update) * 2 - 1
        self._of[k] = [self._losses(theta) for theta in (theta_k, self._theta + signs * update)]

    def result(self, clients, theta):
        """Fields of metrics.jsonl, None where it takes more clients. Args: theta [n]: after the round.

        interference_clients [S] ids (without those whose update was left out); interference: M; interference_own,
        _others, _chance: means of M_ii, of M_ij (i != j), of that with random signs; merge_gap: mean of gap_k.
        """
        of = clients.gather(self._of)
        ids = [k for k in self.sample if k in of]
        if not ids:
            return {}
        at = [self.sample.index(k) for k in ids]
        before, after = (np.array(self._losses(theta_))[at] for theta_ in (self._theta, theta))  # [S]
        self._theta = self._of = None
        losses, random = (np.array([of[k][i] for k in ids]).T[at] for i in (0, 1))  # [S, S], row: whose images
        change, chance = losses - before[:, None], random - before[:, None]
        others = ~np.eye(len(ids), dtype=bool)
        return {
            "interference_own": _rounded(change.diagonal().mean()),
            "interference_others": _rounded(change[others].mean()) if others.any() else None,
            "interference_chance": _rounded(chance[others].mean()) if others.any() else None,
            "merge_gap": _rounded((after - losses.diagonal()).mean()),
            "interference_clients": ids,
            "interference": [[_rounded(m) for m in line] for line in change],
        }

    def _losses(self, theta):
        """[S] L_i(theta) of the sample's clients, in its order."""
        self._study.weights.load(theta)
        return held_losses(self._study, self._held)


def _rounded(x):
    """x to six digits: a log holds many of them."""
    return float(f"{x:.6g}")


def held_rows(study, k):
    """Rows of the validation images that stand for client k: int64, `IMAGES` of them by its proportions
    of classes (largest remainders), of a class at most those that there are. The same in every round."""
    wanted, held = IMAGES, study.data.validation_labels.cpu().numpy()
    counts = np.bincount(study.data.train_labels[study.rows[k]].cpu().numpy(), minlength=study.data.n_classes)
    ideal = wanted * counts / counts.sum()
    of_class = np.floor(ideal).astype(int)
    of_class[np.argsort(of_class - ideal, kind="stable")[: wanted - of_class.sum()]] += 1
    draws = stream(study.args.seed, "held images", 0, k)
    rows = [draws.permutation(np.flatnonzero(held == c))[:m] for c, m in enumerate(of_class) if m]
    return torch.from_numpy(np.concatenate(rows)).to(study.device)


@torch.no_grad()
def held_losses(study, held):
    """Mean cross-entropy of the model on each of some lists of rows of the validation images, in nats."""
    study.model.eval()
    data, rows = study.data, torch.cat(held)
    logits = torch.cat([study.model(study.pixels(data.validation[some])) for some in rows.split(BATCH)])  # [n, C]
    losses = F.cross_entropy(logits, data.validation_labels[rows], reduction="none")  # [n]
    return [part.double().mean().item() for part in losses.split([*map(len, held)])]
