"""--average-every: groups of parameters that are averaged less often than the rest.

Between two averages of a group a client goes on with its own values of it; the server's stand still.
"""

import torch


class OwnParts:
    """Which of theta's entries are averaged after which round, and clients' own values of the rest.

    In round t client k begins with theta_k of round t - 1 where that round's average left an entry out, else with
    theta; entries of a group are averaged after rounds n, 2n, ... and after the last. A client that was left out of the
    mean begins with theta. Related: DES-LOC (arXiv 2505.22549), which averages moments less often than weights.

    Args: weights: `common.vector.Weights`; every: {words in parameters' names: n}; rounds: R; rows: `ClientRows`.
    """

    def __init__(self, weights, every, rounds, rows):
        self.weights, self.rows, self.rounds, self.held, self._kept = weights, rows, rounds, [], {}
        for words, n in every.items():
            mask = torch.zeros_like(weights.theta, dtype=torch.bool)
            for name, entries in weights.named(mask).items():
                entries.fill_(any(word in name for word in words))
            self.held.append((mask, n))

    def kept(self, t):
        """bool [n], entries that the average after round t leaves out; None where it has all."""
        out = tuple(i for i, (_, n) in enumerate(self.held) if (t + 1) % n and 0 <= t < self.rounds - 1)
        if out and out not in self._kept:
            self._kept[out] = torch.stack([self.held[i][0] for i in out]).any(0)
        return self._kept.get(out)

    def load(self, k, t):
        """Puts client k's own values into the model, which holds theta, at the beginning of round t."""
        kept = self.kept(t - 1)
        row = None if kept is None else self.rows.get(k)
        if row is not None and row["round"] == t - 1:
            self.weights.theta[kept] = row["theta"]

    def store(self, k, t):
        """Keeps what round t does not average of client k's weights in the model."""
        kept = self.kept(t)
        if kept is not None:
            self.rows.put(k, {"theta": self.weights.theta[kept], "round": torch.tensor(t)})

    def merge(self, theta, mean, t):
        """theta [n] after round t: the mean where the round averages."""
        kept = self.kept(t)
        return mean if kept is None else torch.where(kept, theta, mean)

    def bytes_after(self, t):
        """Of the entries that are averaged after round t; of all for t = -1."""
        kept = self.kept(t)
        return self.weights.bytes - (0 if kept is None else self.weights.theta.element_size() * int(kept.sum()))
