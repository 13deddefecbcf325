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
        self._theta, self._kept = weights.theta, kept
        self._lr, self._momentum, self._decay = lr, momentum, weight_decay
        self._u, self._buffer = weights.theta.new_zeros(len(kept)), None  # [kept]
        self._parts, start = [], 0  # of each parameter: its kept places in itself, and where they are in u
        sizes = [p.numel() for p in weights.parameters.values()]
        ends = torch.tensor(sizes, device=kept.device).cumsum(0)
        counts = torch.searchsorted(kept, ends).diff(prepend=ends.new_zeros(1)).tolist()
        pieces = zip(kept.split(counts), self._u.split(counts), strict=True)
        for p, size, (rows, u) in zip(weights.parameters.values(), sizes, pieces, strict=True):
            if len(rows):
                self._parts.append((p, rows - start, u))
            start += size

    @torch.no_grad()
    def step(self):
        """One update. A parameter without a gradient counts as one whose gradient is zero."""
        for p, rows, u in self._parts:
            if p.grad is None:
                u.zero_()
            else:
                torch.index_select(p.grad.reshape(-1), 0, rows, out=u)
        u = self._u
        w = self._theta.index_select(0, self._kept)  # [kept]
        # the operations and their order are torch's
        if self._decay:
            u.add_(w, alpha=self._decay)
        if self._momentum:
            self._buffer = u.clone() if self._buffer is None else self._buffer.mul_(self._momentum).add_(u)
            u = self._buffer
        self._theta.index_copy_(0, self._kept, w.add_(u, alpha=-self._lr))
