"""How steady central training's gradients are, and how large its updates."""

import torch

WINDOW = 10  # cosines that are averaged, as in the source


class GradientWatch:
    """Cosines of the gradients of neighbouring steps. A `lasting` object: a resumed run measures the same.

    Args: weights: `common.vector.Weights` of what is trained.
    """

    def __init__(self, weights):
        self.weights = weights
        self._previous, self._square, self._cosines = None, None, []

    def see(self):
        """Looks at the gradients of this step (after backward); they must not be changed later."""
        gradients = [p.grad for p in self.weights.parameters.values()]
        square = sum((g * g).sum() for g in gradients)
        if self._previous is not None:
            product = sum((g * h).sum() for g, h in zip(gradients, self._previous, strict=True))
            cosine = product / torch.sqrt(square * self._square).clamp_min(1e-30)
            self._cosines = [*self._cosines, cosine][-WINDOW:]
        self._previous, self._square = gradients, square

    def mean_cosine(self):
        """The mean of the last ten cosines (fewer at the start); None before the second step."""
        return torch.stack(self._cosines).mean().item() if self._cosines else None

    def state_dict(self):
        if self._previous is None:
            return {}
        whole = torch.cat([g.reshape(-1) for g in self._previous])
        return {
            "gradient": whole,
            "square": self._square.reshape(1),
            "cosines": torch.stack(self._cosines) if self._cosines else whole.new_empty(0),
        }

    def load_state_dict(self, state):
        if state:
            self._previous = list(self.weights.named(state["gradient"]).values())
            self._square, self._cosines = state["square"][0], list(state["cosines"])


def update_norms(before, after):
    """{layers.i.NAME: norm of the update} of the state-space parameters. Args: {name: tensor} before and after."""
    return {
        name.removeprefix("backbone.").replace(".mixer", "").removesuffix(".weight"): (after[name] - before[name])
        .norm()
        .item()
        for name in after
        if ".mixer." in name and name.endswith(("in_proj.weight", "A_log", "mixer.D", "dt_bias"))
    }
