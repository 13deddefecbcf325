"""--replay: what every rule would serve of one round's clients, its error and its losses, beside what the run serves.

The clients are trained once, by the run's own rule and from what it serves, so that between the rows of a round lies
nothing but the averaging: no other shards, batches or starts. The run itself does not change by a bit. A round's line
of metrics.jsonl gets `replay`, {row: {error, moved, train_loss, val_loss, val_<metric>}}:

    start                 what the round began with, its head too: what a round is worth
    svd, naive, rotate    as `common.lowrank`, of the rank that the clients train
    exact                 the mean product itself in the base's weights, no adapter
    residual_1            mean A, mean B and residual's correction of the base: differs from exact by rounding alone
    exact_half, naive_half    half of the way from start, the head too: for rounds in which all rules go too far

error is ||served - mean(BA)|| / ||mean(BA)||; moved is ||served - start|| / ||mean(BA) - start||, of the products s B A
of all layers. train_loss is over all clients' training examples, val_loss over the validation examples (mnli: of the
matched part), in fp32 whatever --amp: under bf16 exact and residual_1 differed by a tenth of what lies between naive
and exact. The head is the one that the run serves, but for start and the halves.
"""

import math

import numpy as np
import torch

from common.lowrank import AdapterMean
from common.parallel import Follower
from common.products import Product, distance
from lora_glue_fl.fed_core import base_of, starts_of

RULES = ("svd", "rotate", "residual")


class Replay(Follower):
    """The probe of --replay. A round's base weights are in the model again when `result` is done."""

    def __init__(self, study):
        self.study = study

    def open_round(self, clients, theta):
        study, t = self.study, clients.number
        self.means = {}
        if study.evaluates(t + 1):
            study.model.adapted.load_base(base_of(theta))
            pairs = starts_of(study, theta, t, study.args.lora_r)
            self.means = {rule: AdapterMean(rule, pairs, study.scale, clients, t, study.args.seed) for rule in RULES}
            self.began = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in pairs.items()}
            self.base = {name: w.detach().clone() for name, w in study.model.adapted.base_weights().items()}
            self.head = theta["head"].clone()

    def accept(self, clients, sent):
        for mean in self.means.values():
            mean.add(sent[0])

    def result(self, clients, theta):
        """{"replay": {row: values}} of a round."""
        if not self.means:
            return {}
        means, self.means = self.means, {}
        served = {rule: mean.result() for rule, mean in means.items()}
        return {"replay": rows(self.study, served, self.began, self.base, self.head, theta["head"])}


def rows(study, served, began, base, head_before, head):
    """{row: values} of what each rule `served` and of what the round began with; head: [h], that the run serves."""
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

    for rule in ("svd", "rotate"):
        row(rule, served[rule].factors, served[rule].error, length(change(served[rule].factors)))
    row("naive", residual.factors, naive, length(near))
    moved = length(change(residual.factors, residual.updates))
    row("residual_1", residual.factors, residual.error, moved, adapted.updated(base, residual.updates))
    none = {name: (A, torch.zeros_like(B)) for name, (A, B) in residual.factors.items()}

    def merged(name, delta, head=head):
        """A row of {layer: what is added to the product that the round began with}, in the base's weights."""
        whole = {layer: product.scaled(1.0).add(*began[layer], study.scale) for layer, product in delta.items()}
        miss = math.hypot(*(distance(delta[layer], exact[layer]) for layer in exact))
        error = miss / residual.norm if residual.norm else 0.0
        row(name, none, error, length(delta), adapted.updated(base, whole), head)

    merged("start", scaled(exact, 0.0), head_before)
    merged("exact", exact)
    middle = head_before + (head - head_before) / 2
    merged("exact_half", scaled(exact, 0.5), middle)
    merged("naive_half", scaled(near, 0.5), middle)
    adapted.load_base(base)
    return found


def scaled(products, factor):
    return {name: product.scaled(factor) for name, product in products.items()}


def length(products):
    """The Frobenius norm over all layers of {layer: `common.products.Product`}."""
    return math.hypot(*(product.norm() for product in products.values()))


def losses(study):
    """{train_loss, val_loss, val_<metric>} of what is in the model."""
    model = study.model
    pooled, split = np.unique(np.concatenate(study.rows)), model.task.evaluation_splits[0]
    amp, model.amp = model.amp, None
    train, val = model.outputs("train", rows=pooled), model.outputs(split)
    model.amp = amp
    known, labels = model.encoded["train"].labels[pooled], model.encoded[split].labels
    measured = model.measures(split, val, labels)
    return {"train_loss": model.mean_loss(train, known)} | {key: measured[key] for key in ("val_loss", model.headline)}
