"""Probes of a round's clients: how far they move, and what an update does to the others' losses."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from common.aggregation import fp64_sum
from common.rounds import Follower
from common.seeding import stream

CLIENTS, IMAGES = 10, 64  # at most, in losses: of a round's clients, and validation images of each
BATCH = 125  # images at once


class Drift(Follower):
    """A probe: how far a round's clients move, mean_k ||theta_k - theta|| / ||theta||, all counted alike.

    The same bits for any number of processes and of threads.
    Args: frozen: sum of squares of the model's weights that are not in theta: ||theta|| is that of the whole model.
    """

    def __init__(self, frozen=0.0):
        self._frozen = frozen

    def open_round(self, clients, theta):
        self._theta, self._lengths = theta, {}  # client -> ||theta_k - theta||

    def accept(self, clients, theta_k):
        self._lengths[clients.current] = math.sqrt(fp64_sum(theta_k - self._theta, square=True))

    def result(self, clients, theta):
        """{"drift": float}, 0 where no client counted."""
        lengths, size = clients.gather(self._lengths), math.sqrt(fp64_sum(self._theta, square=True) + self._frozen)
        self._theta = None
        return {"drift": math.fsum(lengths.values()) / max(1, len(lengths)) / size}


class CrossLosses(Follower):
    """A probe: losses of some of a round's clients on each other's images, every --interference-every rounds.

        M_ij = L_i(theta + delta_j) - L_i(theta)      row i: whose images, column j: whose update, as it is sent

    L_i: mean cross-entropy in nats, in fp32, without smoothing and dropout, on up to 64 images of the validation split,
    drawn by the client's own proportions of classes (`held_rows`). M_ii < 0 helps the client itself, M_ij > 0 harms
    another (inter-task affinity, Fifty et al. 2021, is -M_ij / L_i(theta)).

    The same bits for any number of processes; nothing of the run changes by it.
    """

    def __init__(self, study):
        self._study = study

    def open_round(self, clients, theta):
        study, args = self._study, self._study.args
        self._theta, self._of = theta, {}  # client -> its column of losses
        self.sample = []
        if (clients.number + 1) % args.interference_every == 0:
            ids, draws = np.array(sorted(clients.clients)), stream(args.seed, "interference", clients.number)
            self.sample = sorted(draws.choice(ids, min(CLIENTS, len(ids)), replace=False).tolist())
        self._held = [held_rows(study, k) for k in self.sample]

    def accept(self, clients, theta_k):
        if clients.current in self.sample:
            self._of[clients.current] = self._losses(theta_k)

    def result(self, clients, theta):
        """Fields of metrics.jsonl: interference_clients [S], ids (without those whose update was left out);
        interference: M; interference_own, _others: means of M_ii, of M_ij (i != j; None for one client)."""
        of = clients.gather(self._of)
        ids = [k for k in self.sample if k in of]
        if not ids:
            return {}
        at = [self.sample.index(k) for k in ids]
        before = np.array(self._losses(self._theta))[at]  # [S]
        self._theta = self._of = None
        change = (np.array([of[k] for k in ids]).T[at] - before[:, None]).round(7)  # [S, S], row: whose images
        others = change[~np.eye(len(ids), dtype=bool)]
        return {
            "interference_own": change.diagonal().mean(),
            "interference_others": others.mean() if len(others) else None,
            "interference_clients": ids,
            "interference": change.tolist(),
        }

    def _losses(self, theta):
        """[S] L_i(theta) of the sample's clients, in its order."""
        self._study.weights.load(theta)
        return held_losses(self._study, self._held)


def held_rows(study, k):
    """Rows of the validation images that stand for client k: int64, `IMAGES` of them by its proportions
    of classes (largest remainders), of a class at most those that there are. The same in every round."""
    held = study.data.validation_labels.cpu().numpy()
    counts = np.bincount(study.data.train_labels[study.rows[k]].cpu().numpy(), minlength=study.data.n_classes)
    ideal = IMAGES * counts / counts.sum()
    of_class = np.floor(ideal).astype(int)
    of_class[np.argsort(of_class - ideal, kind="stable")[: IMAGES - of_class.sum()]] += 1
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
