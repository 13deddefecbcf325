"""What a client's update does to the other clients' losses: interference itself, where cosines are a proxy of it."""

import numpy as np
import torch
from torch.nn import functional as F

from common.parallel import Follower
from common.seeding import stream, torch_stream

CLIENTS, IMAGES = 10, 64  # at most: of a round's clients, and validation images of each
BATCH = 125  # images at once


class CrossLosses(Follower):
    """A probe: losses of a round's clients on each other's images, of some of its clients, every --interference-every
    rounds.

        M_ij = L_i(theta + delta_j) - L_i(theta)      row i: whose images, column j: whose update, as it is sent
        gap_k = L_k(theta') - L_k(theta_k)            theta': the server's weights after the round

    L_i: mean cross-entropy in nats, in fp32, without smoothing and dropout, on up to 64 images of
    the validation split, drawn by the client's own proportions of classes (`held_rows`). M_ii < 0 helps the client
    itself, M_ij > 0 harms another (inter-task affinity, Fifty et al. 2021, is -M_ij / L_i(theta)). The chance level of
    M: the same with random signs, L_i(theta + s delta_j) - L_i(theta): a step as long, in the same weights.

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
        """Fields of metrics.jsonl. Args: theta [n]: after the round.

        interference_clients [S] ids (without those whose update was left out); interference: M, a list of rows [S][S];
        held_loss: mean L_i(theta); interference_own, _others, _chance: means of M_ii, of M_ij (i != j), of that with
        random signs; client_merge_gap [S] and its mean merge_gap. None where it takes more clients.
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
        gap = after - losses.diagonal()
        row = {
            "held_loss": before.mean(),
            "interference_own": change.diagonal().mean(),
            "interference_others": change[others].mean() if others.any() else None,
            "interference_chance": chance[others].mean() if others.any() else None,
            "merge_gap": gap.mean(),
        }
        row = {name: None if value is None else rounded(value) for name, value in row.items()}
        row |= {"interference_clients": ids, "client_merge_gap": [rounded(g) for g in gap]}
        return row | {"interference": [[rounded(m) for m in line] for line in change]}

    def _losses(self, theta):
        """[S] L_i(theta) of the sample's clients, in its order."""
        self._study.weights.load(theta)
        return held_losses(self._study, self._held)


def rounded(x):
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
    parts = [
        F.cross_entropy(
            study.model(study.pixels(data.validation[some])), data.validation_labels[some], reduction="none"
        )
        for some in rows.split(BATCH)
    ]
    return [part.double().mean().item() for part in torch.cat(parts).split([len(some) for some in held])]
