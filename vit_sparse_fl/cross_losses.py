"""What a client's update does to the other clients' losses: interference itself, where cosines are a proxy of it."""

import numpy as np
import torch
from torch.nn import functional as F

from common.products import one_thread
from common.seeding import stream, torch_stream

MATCHINGS = 1000  # random pairs behind the chance level of cosines
CHANCE = 0.95
BATCH = 125  # images at once


class CrossLosses:
    """Losses of a round's clients on each other's images, of some of its clients.

        M_ij = L_i(theta + delta_j) - L_i(theta)      row i: whose images, column j: whose update, as it is sent
        gap_k = L_k(theta') - L_k(theta_k)            theta': the server's weights after the round

    L_i: mean cross-entropy in nats, in fp32, without smoothing and dropout, on up to --interference-images images of
    the validation split, drawn by the client's own proportions of classes (`held_rows`). M_ii < 0 helps the client
    itself, M_ij > 0 harms another (inter-task affinity, Fifty et al. 2021, is -M_ij / L_i(theta)). The chance level of
    M: the same with random signs, L_i(theta + s delta_j) - L_i(theta): a step as long, in the same weights.

    Cosines of updates, as they were trained, not as they are sent (what error feedback adds is of other rounds), on the
    weights that are trained: between clients, and within a client, whose second update is made from the same weights
    on its next batches, and not sent. Chance: the two are dealt to pairs at random. A client of few images sees the
    same ones twice: then excess is below 0 without any skew, and IID shards are what it is compared with.

        cross = CrossLosses(study, clients, theta, t, kept)
        for k in clients:
            ...
            if cross.add(theta_k, moved):         # of the sample; the model's weights are then others
                cross.add_other(moved by other batches)
        row |= cross.result(theta after the round)

    The same bits for any number of processes; nothing of the run changes by it.

    Args: study: `study.Study`; clients: `common.parallel.Round`; theta [n]; t: the round, from 0; kept: int64 [kept],
        the places that are trained, None: all.
    """

    def __init__(self, study, clients, theta, t, kept=None):
        args, ids = study.args, np.array(sorted(clients.clients))
        self._study, self._clients, self._theta, self._t, self._kept = study, clients, theta, t, kept
        some = min(args.interference_clients, len(ids))
        self.sample = sorted(stream(args.seed, "interference", t).choice(ids, some, replace=False).tolist())
        self._held = [held_rows(study, k) for k in self.sample]
        self._of = {}  # client -> (its column of losses, the same with random signs, its two updates)

    def add(self, theta_k, moved):
        """Adds the client that the round is at. Returns whether it is in the sample.

        Args: theta_k [n], finite: as the server gets it; moved [n]: what training changed.
        """
        k = self._clients.current
        if k not in self.sample:
            return False
        update, moved = theta_k - self._theta, self._counted(moved)  # before the model changes, whose theta_k may be
        generator = torch_stream(self._study.args.seed, "interference signs", self._t, k)
        signs = torch.randint(0, 2, update.shape, generator=generator).to(update) * 2 - 1
        columns = [self._losses(theta) for theta in (theta_k.clone(), self._theta + signs * update)]
        self._of[k] = (*columns, [moved])
        return True

    def add_other(self, moved):
        """Adds what the same client's training on other batches changed, [n]."""
        self._of[self._clients.current][2].append(self._counted(moved))

    def _counted(self, update):
        return (update if self._kept is None else update[self._kept]).cpu()

    def result(self, theta):
        """Fields of metrics.jsonl; every process calls it. Args: theta [n]: after the round.

        interference_clients [S] ids (without those whose update was left out); interference: M, a list of rows [S][S];
        held_loss: mean L_i(theta); interference_own, _others, _chance: means of M_ii, of M_ij (i != j), of that with
        random signs; client_merge_gap [S] and its mean merge_gap;
        cosine_between, cosine_within, cosine_excess: their difference, cosine_chance: the 95 % quantile of its absolute
        value for pairs at random. None where it takes more clients.
        """
        of = self._clients.gather(self._of)
        ids = [k for k in self.sample if k in of]
        if not ids:
            return {}
        at = [self.sample.index(k) for k in ids]
        before, after = (np.array(self._losses(theta_))[at] for theta_ in (self._theta, theta))  # [S]
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
        row |= cosines(gram_of([d for k in ids for d in of[k][2]]), stream(self._study.args.seed, "matchings", self._t))
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
    """Rows of the validation images that stand for client k: int64, `--interference-images` of them by its proportions
    of classes (largest remainders), of a class at most those that there are. The same in every round."""
    wanted, held = study.args.interference_images, study.data.validation_labels.cpu().numpy()
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


def gram_of(updates):
    """Inner products [m, m] of vectors [n], fp64."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    with one_thread():
        for pieces in zip(*(d.split(2**18) for d in updates), strict=True):
            part = torch.stack(pieces).double()  # [m, piece]
            gram += part @ part.T
    return gram.numpy()


def cosines(gram, draws):
    """cosine_between, _within, _excess and _chance (see `CrossLosses.result`) of a Gram matrix [2S, 2S].

    Rows 2k and 2k + 1 are one client's. A client one of whose updates is zero does not count.
    """
    lengths = np.sqrt(gram.diagonal()).reshape(-1, 2)  # [S, 2]
    moved = np.repeat((lengths > 0).all(1), 2)
    cosine = gram[np.ix_(moved, moved)] / np.outer(*2 * [lengths.reshape(-1)[moved]])
    m, names = len(cosine), ("between", "within", "excess", "chance")
    if m < 4:
        return dict.fromkeys(f"cosine_{name}" for name in names)
    total = (cosine.sum() - cosine.trace()) / 2

    def means(order):
        """Mean cosine of pairs that are not matched, and of those that are: order[0] with order[1], and so on."""
        within = cosine[order[::2], order[1::2]].sum()
        return (total - within) / (m * (m - 1) / 2 - m / 2), within / (m / 2)

    between, within = means(np.arange(m))
    random = [np.subtract(*means(draws.permutation(m))) for _ in range(MATCHINGS)]
    chance = np.quantile(np.abs(random), CHANCE)
    return dict(zip((f"cosine_{name}" for name in names), (between, within, between - within, chance), strict=True))
