"""The linear head, fitted on frozen features before anything else is trained (--head ridge).

It needs sums over images only, so that clients could send theirs and get the same head: X'X, X'Y and the means.
"""

import torch
from torch.nn import functional as F

PENALTIES = tuple(10.0**e for e in range(-6, 2))  # times the mean eigenvalue of the features' scatter matrix


def sums_bytes(head):
    """Bytes that a client would send for its part (fp64 sums). Args: head: the nn.Linear that is fitted."""
    size, classes = head.in_features, head.out_features
    return 8 * (size * (size + 1) // 2 + (size + 1) * (classes + 1))


@torch.no_grad()
def ridge_head(model, features, labels, validation):
    """Fits `model.classifier` to features [n, D] and labels [n] in closed form, in fp64; returns (l2, scale).

    W, b = argmin sum_i ||onehot(y_i) - W x_i - b||^2 + l2 ||W||^2, the intercept b not penalised:
        W = Y'X (X'X + l2 I)^-1 with X and Y centred, b = mean(y) - W mean(x)
    The outputs approximate probabilities in 0..1, so their softmax over C classes would be nearly uniform and the
    cross-entropy's gradients far too large for a fitted head. So W and b are multiplied by one scale (an inverse
    temperature) that minimises the mean NLL of `validation`, (features, labels); it changes no prediction.
    l2: of `PENALTIES` times the mean eigenvalue of X'X the one with the best validation accuracy, the smallest of
    equals, in the units of sklearn's Ridge(alpha=l2).
    """
    held, truth = validation[0].double(), validation[1]
    x = features.double()
    y = F.one_hot(labels, model.classifier.out_features).double()  # [n, C]
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    # One eigendecomposition serves every l2.
    values, vectors = torch.linalg.eigh(x.T @ x)
    values = values.clamp_min(0.0)
    cross = vectors.T @ (x.T @ (y - mean_y))  # [D, C]

    def fit(penalty):
        weight = (vectors @ (cross / (values + penalty)[:, None])).T  # [C, D]
        return weight, mean_y - weight @ mean_x

    def outputs(penalty):
        weight, bias = fit(penalty)
        return held @ weight.T + bias  # [m, C]

    unit = max(values.mean().item(), torch.finfo(torch.float64).tiny)
    l2 = max((unit * g for g in PENALTIES), key=lambda p: (outputs(p).argmax(1) == truth).sum().item())
    scale = _best_scale(outputs(l2), truth)
    weight, bias = fit(l2)
    model.classifier.weight.copy_(scale * weight)
    model.classifier.bias.copy_(scale * bias)
    return l2, scale


def _best_scale(z, labels, low=1e-2, high=1e4, halvings=40):
    """argmin over s in [low, high] of the mean NLL of softmax(s z), z [n, C]: bisection of its derivative.

    The NLL is convex in s; d NLL / d s = mean(sum_c p_c z_c - z_y).
    """
    picked = z.gather(1, labels[:, None]).squeeze(1)  # [n]
    for _ in range(halvings):
        s = (low * high) ** 0.5
        slope = ((torch.softmax(s * z, dim=1) * z).sum(1) - picked).mean()
        low, high = (low, s) if slope > 0 else (s, high)
    return (low * high) ** 0.5
