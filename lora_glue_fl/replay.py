"""--replay: what other rules would serve of one round's clients, its error and its loss, beside what the run serves.

The clients are trained once, by the run's own rule and from what it serves, so that between the rows of a round lies
nothing but the averaging: no other shards, batches or starts. The run itself does not change by a bit. A round's line
of metrics.jsonl gets `replay`, {row: {error, val_loss}}:

    start                     what the round began with, its head too: what a round is worth
    svd, naive                as `common.lowrank`, of the rank that the clients train
    exact                     the mean product itself in the base's weights, no adapter
    exact_half, naive_half    half of the way from start, the head too: for rounds in which all rules go too far

error is ||served - mean(BA)|| / ||mean(BA)||, of the products s B A of all layers. val_loss is over the validation
examples (mnli: of the matched part), in fp32 whatever --amp: bf16 rounds by a tenth of what lies between naive and
exact. The head is the one that the run serves, but for start and the halves.
"""

import math

from common.lowrank import AdapterMean
from common.products import Product, distance
from common.rounds import Follower
from lora_glue_fl.fed_core import base_of, starts_of

RULES = ("svd", "residual")


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
            self.means = {rule: AdapterMean(rule, pairs, study.scale, clients, study.args.seed) for rule in RULES}
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
    residual, found, adapted = served["residual"], {}, study.model.adapted

    def change(factors, updates=None):
        """{layer: what is served minus what the round began with} of factors and an update of the base."""
        delta = {}
        for name, (A, B) in factors.items():
            delta[name] = Product(len(B), A.shape[1]).add(A, B, study.scale).add(*began[name], -study.scale)
            if updates:
                delta[name].add_product(updates[name])
        return delta

    exact, naive = change(residual.factors, residual.updates), change(residual.factors)

    def row(name, factors, error, weights=base, head=head):
        adapted.load_base(weights)
        adapted.load(factors, study.named_head(head), study.scale)
        found[name] = {"error": error, "val_loss": loss(study.model)}

    def merged(name, delta, share, head):
        """A row of a share of {layer: what is added to the round's start}, in the base's weights."""
        delta = {layer: product.scaled(share) for layer, product in delta.items()}
        whole = {layer: product.scaled(1.0).add(*began[layer], study.scale) for layer, product in delta.items()}
        miss = math.hypot(*(distance(delta[layer], exact[layer]) for layer in exact))
        none = {layer: (A, B * 0) for layer, (A, B) in residual.factors.items()}
        row(name, none, miss / residual.norm if residual.norm else 0.0, adapted.updated(base, whole), head)

    missed = math.hypot(*(product.norm() for product in residual.updates.values()))
    row("svd", served["svd"].factors, served["svd"].error)
    row("naive", residual.factors, missed / residual.norm if residual.norm else 0.0)
    merged("start", exact, 0.0, head_before)
    merged("exact", exact, 1.0, head)
    middle = head_before + (head - head_before) / 2
    merged("exact_half", exact, 0.5, middle)
    merged("naive_half", naive, 0.5, middle)
    adapted.load_base(base)
    return found


def loss(model):
    """The validation loss of what is in the model."""
    split = model.task.evaluation_splits[0]
    amp, model.amp = model.amp, None
    outputs = model.outputs(split)
    model.amp = amp
    return model.mean_loss(outputs, model.encoded[split].labels)
