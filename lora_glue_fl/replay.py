"""--replay: what every rule would serve of one round's clients, its error and its losses, beside what the run serves.

The clients are trained once, by the run's own rule and from what it serves, so that between the rows of a round lies
nothing but the averaging: no other shards, batches or starts. The run itself does not change by a bit. A round's line
of metrics.jsonl gets `replay`, {row: {error, train_loss, val_loss, val_<metric>}}:

    svd, naive, rotate    as `common.lowrank`, of the rank that the clients train
    florana               mean A, mean B with coefficients that fit the mean product (`common.factors.combined`)
    exact                 the mean product itself in the base's weights, no adapter
    residual_0.5, _1, _2  mean A, mean B and that many times residual's correction of the base: naive is 0 times, exact
                          once, of which residual_1 differs by rounding alone: the noise of a row

error is ||served - mean(BA)|| / ||mean(BA)||; train_loss is over the training examples of all clients, val_loss over
the task's validation examples, both computed in fp32 whatever --amp: under bf16 exact and residual_1 differed by a
tenth of what lies between naive and exact. The head is the one that the run serves, in every row.
"""

import math

import numpy as np
import torch

from common.lowrank import AdapterMean

RULES = ("svd", "rotate", "florana", "residual")
DOSES = (0.5, 1.0, 2.0)


def begin(study, starts, clients, t):
    """The rules' means of round t and the base's weights in it, for `add` and `rows`; None where nothing is replayed.

    starts: of `fed_core.begin_round`, with the base in the model.
    """
    a = study.args
    if not (a.replay and study.evaluates(t + 1)):
        return None
    pairs, options = starts[a.lora_r], {"rotate": {"rotation": a.rotate_lambda}}
    means = {rule: AdapterMean(rule, pairs, study.scale, clients, t, a.seed, **options.get(rule, {})) for rule in RULES}
    return means, {name: w.detach().clone() for name, w in study.model.adapted.base_weights().items()}


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
    means, base = replayed
    served = {rule: mean.result() for rule, mean in means.items()}
    residual = served["residual"]
    missed = math.hypot(*(update.norm() for update in residual.updates.values()))
    naive = missed / residual.norm if residual.norm else 0.0
    found, adapted = {}, study.model.adapted

    def row(name, factors, error, weights=base):
        adapted.load_base(weights)
        adapted.load(factors, study.named_head(head), study.scale)
        found[name] = {"error": error, **losses(study)}

    for rule in ("svd", "rotate", "florana"):
        row(rule, served[rule].factors, served[rule].error)
    row("naive", residual.factors, naive)
    for dose in DOSES:
        updates = {name: update.scaled(dose) for name, update in residual.updates.items()}
        error = residual.error if dose == 1 else abs(1 - dose) * naive
        row(f"residual_{dose:g}", residual.factors, error, adapted.updated(base, updates))
    whole = {
        name: update.scaled(1.0).add(*residual.factors[name], study.scale) for name, update in residual.updates.items()
    }
    none = {name: (A, torch.zeros_like(B)) for name, (A, B) in residual.factors.items()}
    row("exact", none, 0.0, adapted.updated(base, whole))
    adapted.load_base(base)
    return {"replay": found}


def losses(study):
    """{train_loss, val_loss, val_<metric>} of what is in the model; train_loss: of all clients' training examples."""
    model = study.model
    pooled = np.unique(np.concatenate(study.rows))
    amp, model.amp = model.amp, None
    values = model.evaluate()
    train = model.mean_loss(model.outputs("train", rows=pooled), model.encoded["train"].labels[pooled])
    model.amp = amp
    return {"train_loss": train, "val_loss": values["val_loss"], model.headline: values[model.headline]}
