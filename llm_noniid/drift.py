"""How far the clients' gradients pull apart at a round's start, against chance, and whether SCAFFOLD corrects for it.

grad f_k(theta): of the mean NLL a scored token (of labels: a text) of up to --drift-samples N texts of client k, in
eval mode, at the theta [n] that the round begins with; grad f = sum_k p_k grad f_k over the round's clients (at most
`fed_core.WATCHED`), p_k their weights in the round's mean. The texts are drawn by the seed for this round: held-out
ones where each of these clients holds out N, else ones that it trains on, though not in this round's batches where it
has N such.

    drift_ratio         sqrt(sum_k p_k ||grad f_k - grad f||^2) / ||grad f||
    drift_ratio_chance  the same with the texts of all these clients pooled and dealt at random to groups of their sizes
    correction_ratio    SCAFFOLD: mean over clients of ||c - c_k|| / ||g_k||, g_k the mean raw gradient of its steps
    correction_cosine   SCAFFOLD: mean over clients of cos(c - c_k, grad f - grad f_k): of the true drift; the noise of
                        N texts lowers it, and without c - c_k (before a client's first round ends) there is none
    drift_held_out      whether the texts were held-out ones

Clients that are alike have a drift_ratio about drift_ratio_chance: with few texts both are far above 0, and near an
optimum both grow. `relative_drift`, of updates of many steps, has no such level that a round could afford (clients that
are alike would have to be trained beside the others): benchmarks/detectors.py reads these two. Gradients are of the
factors A and B, all at one theta, as SCAFFOLD's corrections are; hence none with --personal, where texts dealt anew
would meet another client's own tensors.
"""

import numpy as np
import torch

from common.local import gradients
from common.seeding import stream
from llm_noniid import diagnostics
from llm_noniid.text_model import EVAL_BATCH


def draw(study, clients, batches_of, t):
    """(texts of each client, texts of each group of the chance level: {client: rows}, whether they are held out).

    Args: clients: ids; batches_of: function of an id to its batches of this round, lists of rows.
    """
    seed, n, own = study.args.seed, study.args.drift_samples, {}
    held_out = min(len(study.held[k]) for k in clients) >= n
    for k in sorted(clients):
        pool = study.held[k] if held_out else np.setdiff1d(study.rows[k], np.concatenate(batches_of(k)))
        pool = pool if len(pool) >= n else study.rows[k]
        own[k] = stream(seed, "drift texts", t, k).choice(pool, min(n, len(pool)), replace=False)
    pooled = stream(seed, "drift chance", t).permutation(np.concatenate(list(own.values())))
    cuts = np.cumsum([len(rows) for rows in own.values()])[:-1]
    return own, dict(zip(own, np.split(pooled, cuts), strict=True)), held_out


def measured(model, theta, drawn, k, correction=None, mean_gradient=None):
    """What client k adds: {"own", "dealt": gradients [n]; of SCAFFOLD "correction" [n] and "recorded", a norm}.

    Args: theta [n]; drawn: of `draw`; correction: c - c_k [n]; mean_gradient: g_k [n]. On the CPU; the model is left as
    it was.
    """
    own, dealt, _ = drawn
    figures = {"own": gradient(model, theta, own[k]), "dealt": gradient(model, theta, dealt[k])}
    if correction is not None:
        figures |= {"correction": correction.cpu(), "recorded": float(mean_gradient.norm())}
    return figures


def gradient(model, theta, rows):
    """grad f(theta) [n] of the training texts `rows`, on the CPU; the model is left as it was."""
    weights, module = model.weights, model.module
    before, training = weights.snapshot(), module.training
    weights.load(theta)
    module.eval()
    whole, units = torch.zeros_like(theta, dtype=torch.float64), model.tokens["train"].units(rows)
    sums = weights.named(whole)
    for i in range(0, len(rows), EVAL_BATCH):
        part = slice(i, i + EVAL_BATCH)
        gradients(model.loss, (model.batch("train", rows[part]),), list(weights.parameters.values()), model.amp)
        for name, p in weights.parameters.items():
            if p.grad is not None:
                sums[name].add_(p.grad, alpha=float(units[part].sum() / units.sum()))
            p.grad = None
    weights.load(before)
    module.train(training)
    return whole.to("cpu", theta.dtype)


def figures(pulls, weights, held_out):
    """The fields of metrics.jsonl (above), None where undefined; {} of fewer than two clients.

    Args: pulls: {client: of `measured`}; weights: of every client in the mean; held_out: of `draw`.
    """
    if len(pulls) < 2:
        return {}
    p = np.array([weights[k] for k in pulls], dtype=np.float64)

    def ratio(name):
        vectors = [pull[name] for pull in pulls.values()]
        gram = diagnostics.plain_gram(torch.zeros_like(vectors[0]), vectors)
        return diagnostics.update_figures(gram, p)["relative_drift"] if np.isfinite(gram).all() else None

    row = {"drift_ratio": ratio("own"), "drift_ratio_chance": ratio("dealt"), "drift_held_out": held_out}
    if all("correction" in pull for pull in pulls.values()):
        row |= corrections(list(pulls.values()), p / p.sum())
    return row


def corrections(pulls, p):
    """{correction_ratio, correction_cosine} of the clients where each is defined, None of none. p [m]: sums to 1."""
    mean = sum(share * pull["own"].double() for share, pull in zip(p, pulls, strict=True))
    ratios, cosines = [], []
    for pull in pulls:
        correction, drift = pull["correction"].double(), mean - pull["own"].double()
        ratios.append(float(correction.norm()) / pull["recorded"] if pull["recorded"] else np.nan)
        lengths = float(correction.norm() * drift.norm())
        cosines.append(float(correction @ drift) / lengths if lengths else np.nan)
    known = {"correction_ratio": ratios, "correction_cosine": cosines}
    known = {name: [value for value in values if np.isfinite(value)] for name, values in known.items()}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}
