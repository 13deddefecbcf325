"""The linear head, fitted on frozen features before anything else is trained (--head ridge, --head train).

Both fits need only sums over images, so that clients could send theirs and get the same head: ridge regression once
X'X, X'Y and the means, logistic regression a gradient of the head per step.
"""

import torch
from torch.nn import functional as F

STEPS = 100  # of L-BFGS
PENALTIES = tuple(10.0**e for e in range(-6, 2))  # of ridge, times the mean eigenvalue of the features' scatter matrix


def fit_head(model, kind, features, labels, validation):
    """Writes `model.classifier`. Returns bytes that a client would send for its part (fp64 sums).

    Args: kind: "ridge" or "train"; features: [n, D]; labels: int64 [n]; validation: the same, held out: chooses the
        penalty of ridge.
    """
    head = model.classifier
    size = head.in_features
    if kind == "ridge":
        ridge_head(model, features, labels, validation)
        return 8 * (size * (size + 1) // 2 + (size + 1) * (head.out_features + 1))
    evaluations = logistic_head(model, features, labels)
    return evaluations * 8 * (size + 1) * head.out_features


def logistic_head(model, features, labels, l2=1e-4):
    """Multinomial logistic regression of the labels on the features, by L-BFGS on all images, in fp64.

    W, b = argmin mean_i -log softmax(W x_i + b)[y_i] + l2/2 ||W||^2, the features scaled by one number to a mean
    square of 1 meanwhile: sklearn's LogisticRegression(C=1 / (n l2)). Starts from zeros. Returns how often the loss
    was computed.
    """
    scale = features.double().square().mean().sqrt().clamp_min(1e-12)
    x = features.double() / scale  # [n, D]
    head = model.classifier
    weight = torch.zeros(head.weight.shape, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(head.bias.shape, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7)
    evaluations = 0

    def loss():
        nonlocal evaluations
        evaluations += 1
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    _write(head, weight / scale, bias)
    return evaluations


def ridge_head(model, features, labels, validation, l2=None):
    """Fits `model.classifier` to features [n, D] and labels [n] in closed form, in fp64; returns (l2, scale).

    W, b = argmin sum_i ||onehot(y_i) - W x_i - b||^2 + l2 ||W||^2, the intercept b not penalised:
        W = Y'X (X'X + l2 I)^-1 with X and Y centred, b = mean(y) - W mean(x)
    The outputs approximate probabilities in 0..1, so their softmax over C classes would be nearly uniform and the
    cross-entropy's gradients far too large for a fitted head. So W and b are multiplied by one scale (an inverse
    temperature) that minimises the mean NLL of `validation`, (features, labels); it changes no prediction.

    Args: l2: in the units of sklearn's Ridge(alpha=l2). None: the best validation accuracy (the smallest l2 among
        equals) of `PENALTIES` times the mean eigenvalue of X'X.
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

    if l2 is None:
        unit = max(values.mean().item(), torch.finfo(torch.float64).tiny)
        l2 = max((unit * g for g in PENALTIES), key=lambda p: (outputs(p).argmax(1) == truth).sum().item())
    scale = _best_scale(outputs(l2), truth)
    weight, bias = fit(l2)
    _write(model.classifier, scale * weight, scale * bias)
    return l2, scale


@torch.no_grad()
def _write(head, weight, bias):
    head.weight.copy_(weight)
    head.bias.copy_(bias)


def _best_scale(z, labels, low=1e-2, high=1e4, halvings=40):
    """argmin over s in [low, high] of the mean NLL of softmax(s z), z [n, C]: bisection of its derivative.

    The NLL is convex in s; d NLL / d s = mean(sum_c p_c z_c - z_y).
    """
    picked = z.gather(1, labels[:, None]).squeeze(1)  # [n]
    for _ in range(halvings):
        s = (low * high) ** 0.5
        slope = ((torch.softmax(s * z, dim=1) * z).sum(1) - picked).mean()
        if slope > 0:
            high = s
        else:
            low = s
    return (low * high) ** 0.5
