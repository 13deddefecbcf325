"""A linear head in closed form: ridge regression of one-hot labels on the backbone's frozen CLS features."""

import torch

from common.cli import UsageError

_GRID = tuple(10.0**e for e in range(-6, 2))  # times the mean eigenvalue of the features' scatter matrix


def ridge_head(model, features, labels, l2=None, validation=None):
    """Fits `model.classifier` to features [n, D] and labels [n], and writes its weight and bias.

    W, b = argmin sum_i ||onehot(y_i) - W x_i - b||^2 + l2 ||W||^2, the intercept b not penalised, in fp64:
        W = Y'X (X'X + l2 I)^-1 with X and Y centred, b = mean(y) - W mean(x)
    The outputs approximate probabilities in 0..1, so their softmax over C classes would be nearly uniform and the
    cross-entropy's gradients far too large for a fitted head. So W and b are multiplied by one scale (an inverse
    temperature) that minimises the mean NLL; it changes no prediction.

    Args:
        l2: penalty in sklearn's units (its Ridge(alpha=l2)). None: the best validation accuracy (the smallest l2
            among equals) of 10^-6 .. 10 times the mean eigenvalue of X'X; without `validation` 10^-2 of it.
        validation: (features, labels) that l2 and the scale are fitted on; without it the scale is fitted on the
            training data.
    Returns: dict of floats: l2, scale, train_accuracy, and with validation val_accuracy.
    Raises: UsageError for labels outside the head's classes.
    """
    head = model.classifier
    n_classes = head.out_features
    if labels.min() < 0 or labels.max() >= n_classes:
        raise UsageError(f"labels reach {labels.max().item()}, the head has {n_classes} classes: check --dataset")
    x = features.double()
    y = torch.nn.functional.one_hot(labels, n_classes).double()  # [n, C]
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    # One eigendecomposition serves every l2.
    values, vectors = torch.linalg.eigh(x.T @ x)
    values = values.clamp_min(0.0)
    cross = vectors.T @ (x.T @ (y - mean_y))  # [D, C]
    unit = max(values.mean().item(), torch.finfo(torch.float64).tiny)

    def fit(penalty):
        weight = (vectors @ (cross / (values + penalty)[:, None])).T  # [C, D]
        return weight, mean_y - weight @ mean_x

    def outputs(weight, bias, inputs):
        return inputs.double() @ weight.T + bias

    if l2 is None and validation is None:
        l2 = 1e-2 * unit
    elif l2 is None:
        scores = {unit * g: _accuracy(outputs(*fit(unit * g), validation[0]), validation[1]) for g in _GRID}
        l2 = max(scores, key=scores.get)
    weight, bias = fit(l2)
    result = {"l2": float(l2), "train_accuracy": _accuracy(outputs(weight, bias, features), labels)}
    held = (features, labels) if validation is None else validation
    z = outputs(weight, bias, held[0])
    if validation is not None:
        result["val_accuracy"] = _accuracy(z, held[1])
    result["scale"] = scale = _best_scale(z, held[1])
    with torch.no_grad():
        head.weight.copy_(scale * weight)
        head.bias.copy_(scale * bias)
    return result


def _accuracy(outputs, labels):
    return (outputs.argmax(1) == labels).double().mean().item()


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
