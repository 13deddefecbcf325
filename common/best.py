"""Which round of a run is its best: of those after which it was evaluated, the earlier of equals, never round 0."""

import math

import torch

from common.curves import number


def lower(loss, than):
    """Whether a loss is lower than another one, as every loss is than nan."""
    return loss < than or math.isnan(than) and not math.isnan(loss)


def best_line(lines, field, highest=False):
    """The best round's line of metrics.jsonl, by a field; of a run that was not trained its only line."""

    def rank(line):
        value = number(line[field])
        return math.isnan(value), -value if highest else value

    return min([line for line in lines if line["round"]] or lines, key=rank)


class Best:
    """The weights with the lowest validation loss so far: `theta` [n], `loss` (nats a token), `round` (after how many
    rounds; 0 until there was one). A `lasting` object."""

    def __init__(self):
        self.theta, self.loss, self.round = None, math.inf, 0

    def offer(self, t, loss, theta):
        """Takes a copy of theta if its loss is the lowest so far, or it is the first that was trained."""
        if not self.round or lower(loss, self.loss):
            self.theta, self.loss, self.round = theta.clone(), loss, t

    def state_dict(self):
        loss, t = torch.tensor(self.loss, dtype=torch.float64), torch.tensor(self.round)
        return {"theta": self.theta, "loss": loss, "round": t}

    def load_state_dict(self, state):
        self.theta, self.loss, self.round = state["theta"], state["loss"].item(), state["round"].item()
