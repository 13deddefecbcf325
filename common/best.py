"""The best weights of a run so far, by validation loss."""

import math

import torch


class Best:
    """The weights with the lowest validation loss so far: `theta` [n], `loss` (nats a token), `round` (after how many
    rounds; 0: before training). A `lasting` object."""

    def __init__(self):
        self.theta, self.loss, self.round = None, math.inf, 0

    def offer(self, t, loss, theta):
        """Takes a copy of theta if its loss is the lowest so far."""
        if self.theta is None or loss < self.loss or math.isnan(self.loss) and not math.isnan(loss):
            self.theta, self.loss, self.round = theta.clone(), loss, t

    def state_dict(self):
        loss, t = torch.tensor(self.loss, dtype=torch.float64), torch.tensor(self.round)
        return {"theta": self.theta, "loss": loss, "round": t}

    def load_state_dict(self, state):
        self.theta, self.loss, self.round = state["theta"], state["loss"].item(), state["round"].item()
