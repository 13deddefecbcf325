"""SGD with momentum that changes only the weights in a mask, and leaves every other bit alone."""

import torch


class SparseSGDM:
    """SGD with momentum on the kept weights   (torch.optim.SGD, restricted to a mask):

        u = g + weight_decay * w              only at the kept weights
        buf = momentum * buf + u              (first step: buf = u)
        w -= lr * buf

    Kept weights are gathered, updated and written back, so that a masked weight is never written: weight decay,
    -0.0 or a NaN gradient at a masked place cannot reach it. With a full mask it is torch.optim.SGD, bit for bit.
    Momentum starts at zero in each new optimiser, so that one mask's is never another's.

    Args: weights: `common.vector.Weights`; kept: int64 [kept], the kept weights' places in its vector, ascending.
    """

    def __init__(self, weights, kept, lr, momentum=0.0, weight_decay=0.0):
        self._weights, self._kept, self._buffer = weights, kept, None
        self._lr, self._momentum, self._decay = lr, momentum, weight_decay

    @torch.no_grad()
    def step(self):
        """One update."""
        theta, gradients = self._weights.theta, [p.grad.reshape(-1) for p in self._weights.parameters.values()]
        u, w = (vector.index_select(0, self._kept) for vector in (torch.cat(gradients), theta))  # [kept]
        # the operations and their order are torch's
        if self._decay:
            u.add_(w, alpha=self._decay)
        if self._momentum:
            self._buffer = u.clone() if self._buffer is None else self._buffer.mul_(self._momentum).add_(u)
            u = self._buffer
        theta.index_copy_(0, self._kept, w.add_(u, alpha=-self._lr))
