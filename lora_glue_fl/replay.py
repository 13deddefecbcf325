"""--replay: what every rule would serve of one round's clients, its error and its losses, beside what the run serves.

The clients are trained once, by the run's own rule and from what it serves, so that between the rows of a round lies
nothing but the averaging: no other shards, batches or starts. The run itself does not change by a bit. A round's line
of metrics.jsonl gets `replay`, {row: {error, moved, train_loss, val_loss, val_<metric>, val_loss_refit}}:

    start                 what the round began with, its head too: what a round is worth
    svd, naive, rotate    as `common.lowrank`, of the rank that the clients train
    florana               mean A, mean B with coefficients that fit the mean product (`common.factors.combined`)
    exact                 the mean product itself in the base's weights, no adapter
    residual_0.5, _1, _2  mean A, mean B and that many times residual's correction of the base: naive is 0 times, exact
                          once, of which residual_1 differs by rounding alone: the noise of a row
    exact_as_far          start + c (mean(BA) - start), c such that it moves as far as naive: what is left between the
                          two is direction, and between this row and exact the length of the step alone
    exact_half, naive_half    start + (exact - start) / 2, and naive's, the head too: the same at a shorter step, for
                          rounds in which all rules go too far
    noise                 exact with Gaussian noise, in each layer as long as what naive misses there: chance

error is ||served - mean(BA)|| / ||mean(BA)||; moved is ||served - start|| / ||mean(BA) - start||, start: the product
s B A that the round began with, norms over all layers; train_loss is over the training examples of all clients,
val_loss over the task's validation examples, both computed in fp32 whatever --amp: under bf16 exact and residual_1
differed by a tenth of what lies between naive and exact. val_loss_refit (not of regression) is the validation loss
after a logistic regression on the outputs, fitted to the training examples: what a row loses by being too sure, or by
preferring a class, is not in it. The head is the one that the run serves, but for start and the halves.
"""

import math

import numpy as np
import torch

from common.lowrank import AdapterMean
from common.products import Product, distance
from common.seeding import torch_stream

RULES = ("svd", "rotate", "florana", "residual")
DOSES = (0.5, 1.0, 2.0)


def begin(study, theta, starts, clients, t):
    """The rules' means of round t and what it begins with, for `add` and `rows`; None where nothing is replayed.

    theta: as `Study.theta`; starts: of `fed_core.begin_round`, with the base in the model.
    """
    a = study.args
    if not (a.replay and study.evaluates(t + 1)):
        return None
    pairs, options = starts[a.lora_r], {"rotate": {"rotation": a.rotate_lambda}}
    means = {rule: AdapterMean(rule, pairs, study.scale, clients, t, a.seed, **options.get(rule, {})) for rule in RULES}
    began = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in pairs.items()}
    base = {name: w.detach().clone() for name, w in study.model.adapted.base_weights().items()}
    return means, began, base, theta["head"].clone(), t


def add(replayed, factors_k, weight, scale):
    """Adds the client that the round is at to every mean."""
    for mean in replayed[0].values() if replayed else ():
        mean.add(factors_k, weight, scale)


def rows(study, replayed, head):
    """{"replay": {row: values}} of a round, {} without. Every process calls it; the base's weights are as they were.

    head: the vector [h] that the run serves.
    """
    if not replayed:
        return {}
    means, began, base, head_before, t = replayed
    served = {rule: mean.result() for rule, mean in means.items()}
    residual = served["residual"]
    naive = length(residual.updates) / residual.norm if residual.norm else 0.0
    found, adapted = {}, study.model.adapted

    def change(factors, updates=None):
        """{layer: what is served minus what the round began with} of factors and an update of the base."""
        delta = {}
        for name, (A, B) in factors.items():
            delta[name] = Product(len(B), A.shape[1]).add(A, B, study.scale).add(*began[name], -study.scale)
            if updates:
                delta[name].add_product(updates[name])
        return delta

    exact, near = change(residual.factors, residual.updates), change(residual.factors)
    far = length(exact)

    def row(name, factors, error, moved, weights=base, head=head):
        adapted.load_base(weights)
        adapted.load(factors, study.named_head(head), study.scale)
        found[name] = {"error": error, "moved": moved / far if far else 0.0, **losses(study)}

    for rule in ("svd", "rotate", "florana"):
        row(rule, served[rule].factors, served[rule].error, length(change(served[rule].factors)))
    row("naive", residual.factors, naive, length(near))
    for dose in DOSES:
        updates = {name: update.scaled(dose) for name, update in residual.updates.items()}
        error = residual.error if dose == 1 else abs(1 - dose) * naive
        moved = length(change(residual.factors, updates))
        row(f"residual_{dose:g}", residual.factors, error, moved, adapted.updated(base, updates))
    none = {name: (A, torch.zeros_like(B)) for name, (A, B) in residual.factors.items()}

    def merged(name, delta, head=head):
        """A row of {layer: what is added to the product that the round began with}, in the base's weights."""
        whole = {layer: product.scaled(1.0).add(*began[layer], study.scale) for layer, product in delta.items()}
        miss = math.hypot(*(distance(delta[layer], exact[layer]) for layer in exact))
        error = miss / residual.norm if residual.norm else 0.0
        row(name, none, error, length(delta), adapted.updated(base, whole), head)

    merged("start", scaled(exact, 0.0), head_before)
    merged("exact", exact)
    merged("exact_as_far", scaled(exact, length(near) / far if far else 1.0))
    middle = head_before + (head - head_before) / 2
    merged("exact_half", scaled(exact, 0.5), middle)
    merged("naive_half", scaled(near, 0.5), middle)
    generator = torch_stream(study.args.seed, "noise of a replay", t)
    merged("noise", {layer: noisy(exact[layer], residual.updates[layer].norm(), generator) for layer in exact})
    adapted.load_base(base)
    return {"replay": found}


def scaled(products, factor):
    return {name: product.scaled(factor) for name, product in products.items()}


def noisy(product, norm, generator):
    """A `Product` plus a Gaussian matrix of that Frobenius norm."""
    d, k = product.shape
    noise = torch.randn(d, k, generator=generator, dtype=torch.float64)
    return product.scaled(1.0).add(noise, torch.eye(d), norm / noise.norm().item())


def length(products):
    """The Frobenius norm over all layers of {layer: `common.products.Product`}."""
    return math.hypot(*(product.norm() for product in products.values()))


def losses(study):
    """{train_loss, val_loss, val_<metric>, val_loss_refit} of what is in the model; train_loss: of all clients'
    training examples; mnli: of the matched part."""
    model = study.model
    pooled, split = np.unique(np.concatenate(study.rows)), model.task.evaluation_splits[0]
    amp, model.amp = model.amp, None
    train, val = model.outputs("train", rows=pooled), model.outputs(split)
    model.amp = amp
    known, labels = model.encoded["train"].labels[pooled], model.encoded[split].labels
    measured = model.measures(split, val, labels)
    values = {"train_loss": model.mean_loss(train, known)}
    values |= {key: measured[key] for key in ("val_loss", model.headline)}
    if not model.task.regression:
        values["val_loss_refit"] = refit_loss(train.double().numpy(), known, val.double().numpy(), labels)
    return values


def refit_loss(train, known, val, labels):
    """The loss on outputs `val` [m, C] of a logistic regression on outputs `train` [n, C]; nan where one class is known
    or an output is not finite. Its penalty, sklearn's default, is felt by outputs far below 1 only."""
    from sklearn.linear_model import LogisticRegression  # only here: it takes a while to import
    from sklearn.metrics import log_loss

    if len(np.unique(known)) < 2 or not (np.isfinite(train).all() and np.isfinite(val).all()):
        return math.nan
    fitted = LogisticRegression(max_iter=1000).fit(train, known)
    here = np.isin(labels, fitted.classes_)  # a class that no client has has no probability
    return float(log_loss(labels[here], fitted.predict_proba(val[here]), labels=fitted.classes_))
