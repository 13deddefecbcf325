"""What a run of federated LoRA is made of: data and model (`Study`), and functions of them.

The round loop is in `fedavg_rounds.py`, the rules that average are in `common/lowrank.py`.

theta is {name: tensor}: `A.<layer>` [r, k] and `B.<layer>` [d, r] of the adapter that the server serves (r may change
from round to round), `head` [h], all of the head's parameters in one vector, and for stack and residual
`base.<layer>`, the weight under the adapter.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common import parallel
from common.cli import UsageError
from common.hub import weight_bytes
from common.local import local_steps
from common.lowrank import MIXED_RANKS, AdapterMean, Served, trained_factors
from common.parallel import Follower
from common.participation import check_participation, per_round
from common.products import scaling
from common.seeding import seed_torch
from common.vector import Weights
from lora_glue_fl.data_prep import MAX_GRAD_NORM, adamw, batches, learning_rates, plan_steps
from lora_glue_fl.models import named_head
from lora_glue_fl.round_folders import RoundFolders, fuse_manifest, size_on_disk
from lora_glue_fl.shards import client_files, load_held_out, load_shards
from lora_glue_fl.task_model import TaskModel, print_values, resized

CHANGES_BASE = ("stack", "residual")


@dataclass
class Study:
    """Data and model of a run.

    model: task, tokens and encoder with its adapter; rows: each client's examples, int64 [n_k] of the training split;
    held_out: examples of it that no client has, int64 [n], or None; ranks: each client's; scale: s of every client's
    adapter; served_as: what the rule serves where it chooses, and the server's learning rate, keywords of
    `common.lowrank.AdapterMean`; theta: before the first round; folders: of the rounds;
    served: the last round's `common.lowrank.Served`.
    """

    args: object
    run: object
    model: TaskModel
    rows: list
    held_out: object
    ranks: list
    scale: float
    served_as: dict
    theta: dict
    folders: RoundFolders
    served: Served | None = None

    @property
    def examples(self):
        """n_k: examples of each client."""
        return [len(rows) for rows in self.rows]

    client_weights = work = examples  # what each client counts in a mean, and the size of its work

    @property
    def lasting(self):
        """With theta, all that outlives a round, and what goes along with the rounds."""
        return {"folders": self.folders, "adapters": Adapters(self)}

    def bytes_of(self, t):
        """(up, down): what a client sends and receives in round t."""
        return partial(bytes_up, self, t), 0  # `serve` counts what all clients receive

    def mean(self, theta, clients):
        """The rule's mean of a round."""
        t, a = clients.number, self.args
        pairs, scale = factors(theta), self.served_scale(t)
        served_as = {"head": theta["head"], "client_scale": self.scale, **self.served_as}
        return AdapterMean(a.aggregate, pairs, scale, clients, t, a.seed, **served_as)

    def evaluate(self, theta, t, row):
        """What is logged of theta after t rounds; what is served is written too."""
        return publish(self, theta, t, row) if t else evaluate(self, theta, t)

    def evaluates(self, t):
        """Whether what is served after t rounds is evaluated."""
        return t in (0, self.args.rounds) or self.args.eval_each_round

    def served_scale(self, t):
        """s of theta's adapter before round t: the clients', from the second on that of what svd serves."""
        return self.served_as.get("new_scale", self.scale) if t else self.scale

    def adapter(self, theta, t):
        """What is served before round t: (factors, head, alpha)."""
        alpha = self.served_scale(t) * self.served_as["rank"]
        return factors(theta), self.named_head(theta["head"]), alpha

    def named_head(self, vector):
        """{name: view} of a head's vector [h]."""
        return named_head(vector, self.model.adapted.head)


def load_study(args, run):
    """Reads data, shards and model and begins the run. Raises: UsageError for what is not there or does not fit."""
    a = args
    model = TaskModel(a, (a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules))
    shards = load_shards(a.shard_dir, model.data)
    check_participation(a.participation, len(shards))
    ranks = client_ranks(a, len(shards))
    check_ranks(a, ranks, model.adapted)
    scale, least = scaling(a.lora_alpha, a.lora_r), min(a.lora_r, *ranks)
    start = a.init_adapter and model.start(a.init_adapter, a.lora_r, scale, least)
    served_as = {"rank": a.lora_r, "server_lr": a.server_lr}
    if a.aggregate == "svd":
        served_as |= {"rank": a.svd_rank, "new_scale": scaling(a.alpha, a.svd_rank), "split": a.svd_split}
    fused = f"fused_r{served_as['rank']}" + "_nosvd" * (a.aggregate == "naive")
    study = Study(
        args=a,
        run=run,
        model=model,
        rows=[shard["indices"] for shard in shards],
        held_out=load_held_out(a.shard_dir, model.data, shards),
        ranks=ranks,
        scale=scale,
        served_as=served_as,
        theta=first_theta(a, model, start),
        folders=RoundFolders(run.folder, a.keep, fused, model.about(run.folder)),
    )
    first, n = shards[0], sorted(study.examples)
    data = model.facts() | {"clients": len(n), "client_examples": sum(n)}
    data |= {key: first.get(key) for key in ("mode", "dirichlet_alpha", "overlap_ratio", "category_key")}
    if first.get("sizes") == "equal":
        data["sizes"] = "equal"
    if study.held_out is not None:
        data["held_out"] = len(study.held_out)
    clients = {"examples": study.examples, "ranks": ranks, "shard_seed": first.get("seed")}
    if start:
        clients["init_adapter_sha256"] = start[-1]
    run.begin(data, model.sizes(model.adapted.trainable()), clients=clients)
    run.plan(a.rounds, clients=len(n))
    notes = [f"{len(n)} clients, examples a client {n[0]} to {n[-1]} (median {n[len(n) // 2]})", *model.notes]
    if a.aggregate == "svd" and a.svd_rank > min(ranks):
        notes.append(f"clients of rank {min(ranks)} get the leading directions of what is served at {a.svd_rank}")
    for line in (*notes, size_on_disk(study)):
        run.note(line)
    if parallel.is_main():
        model.save_base(run.folder)
    return study


def client_ranks(args, clients):
    """--client-ranks, in turn, of so many clients."""
    given = args.client_ranks or [args.lora_r]
    if len(given) > clients:
        raise UsageError(f"{len(given)} --client-ranks for {clients} clients: give one a client, or fewer")
    return [given[k % len(given)] for k in range(clients)]


def check_ranks(args, ranks, adapted):
    """Raises UsageError for ranks that a layer or the rule does not take."""
    a = args
    most = min(min(B.shape[0], A.shape[1]) for A, B in adapted.factors().values())
    highest = max([*ranks, a.svd_rank] if a.aggregate == "svd" else ranks)
    if highest > most:
        raise UsageError(
            f"rank {highest} is above {most}, the smaller side of an adapted layer: lower --lora-r, --client-ranks or "
            "--svd-rank"
        )
    if a.aggregate not in MIXED_RANKS and set(ranks) != {a.lora_r}:
        raise UsageError(
            f"--client-ranks {' '.join(map(str, a.client_ranks))}: rule {a.aggregate} needs rank {a.lora_r} of all "
            f"clients: take --aggregate {' or '.join(MIXED_RANKS)}"
        )
    if a.aggregate == "svd" and a.svd_rank > sum(ranks):
        raise UsageError(
            f"--svd-rank {a.svd_rank} is above {sum(ranks)}, the rank of the mean of {len(ranks)} clients of rank "
            f"{min(ranks)} to {max(ranks)}: lower it"
        )


def first_theta(args, model, start):
    """theta before the first round: peft's adapter (A random, B zero), or what `TaskModel.start` returned."""
    a, adapted = args, model.adapted
    pairs = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in adapted.factors().items()}
    pairs, head, _ = start or (pairs, adapted.head, None)
    theta = named_factors(pairs) | {"head": torch.cat([head[name].detach().reshape(-1) for name in adapted.head])}
    if a.aggregate in CHANGES_BASE:
        theta |= {f"base.{name}": w.detach().clone() for name, w in adapted.base_weights().items()}
    return {name: t.to(model.device) for name, t in theta.items()}


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    folder, model = Path(args.shard_dir), args.model or args.model_size or "base"
    clients = len(client_files(folder)) if os.path.isdir(folder) else 1
    size, width = {"large": (1.5e9, 24 * 1024), "tiny": (0, 2 * 64)}.get(model, (5e8, 12 * 768))  # layers x hidden
    size = weight_bytes(model) or size
    activations = 70 * width * args.batch_size * args.max_length
    return per_round(args.participation, max(1, clients)), int(6e8 + 2 * size + activations)


# ---- theta


def named_factors(pairs):
    """{"A.<layer>": A, "B.<layer>": B} of {layer: (A, B)}."""
    return {f"{x}.{name}": t for name, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}


def factors(theta):
    """{layer: (A, B)} of theta."""
    return {name[2:]: (A, theta["B." + name[2:]]) for name, A in theta.items() if name.startswith("A.")}


def base_of(theta):
    """{layer: weight under the adapter} of theta, empty but for stack and residual."""
    return {name.removeprefix("base."): t for name, t in theta.items() if name.startswith("base.")}


def load(study, theta, t):
    """Puts what is served before round t into the model."""
    study.model.adapted.load_base(base_of(theta))
    study.model.adapted.load(factors(theta), study.named_head(theta["head"]), study.served_scale(t))


# ---- a round


def starts_of(study, theta, t, rank):
    """{layer: (A, B)} that clients of this rank begin round t with, of the clients' scale."""
    return resized(factors(theta), study.served_scale(t), rank, study.scale, study.args.seed, t)


def client_update(study, theta, k, t):
    """Client k's steps of AdamW in round t, on what the rule's round trains and the head.

    Returns (factors_k {layer: (A, B)}, head_k [h]), both in the model, valid until the next client.
    """
    a, model, run = study.args, study.model, study.run
    model.adapted.load(starts_of(study, theta, t, study.ranks[k]), study.named_head(theta["head"]), study.scale)
    weights = Weights(model.model, model.adapted.trainable(trained_factors(a.aggregate, t)))  # the head last
    model.model.train()
    seed_torch(a.seed, "dropout", t, k)
    train = model.encoded["train"]
    plan = plan_steps(train, study.rows[k], a, a.local_epochs, t, k)
    options = {"amp": run.amp, "mu": a.mu, "max_norm": MAX_GRAD_NORM, "lrs": learning_rates(a, len(plan))}
    optimizer = adamw(a, model.model, weights.parameters)
    done = local_steps(model.loss, batches(train, plan, model.device), weights, optimizer, **options)
    run.clients.work(math.ceil(len(study.rows[k]) * a.local_epochs))
    run.clients.note(k, train_loss=done.loss)
    pairs = {name: (A.detach(), B.detach()) for name, (A, B) in model.adapted.factors().items()}
    return pairs, weights.theta[-len(theta["head"]) :]


class Adapters(Follower):
    """Puts a round's base weights into the model, once for all clients; writes the adapters of those that count and,
    with --eval-clients, evaluates them; deletes old rounds'."""

    def __init__(self, study):
        self.study = study

    def open_round(self, clients, theta):
        self.study.model.adapted.load_base(base_of(theta))
        self.study.folders.prune(clients.number - 1)  # the checkpoint of a later round may be needed until here

    def accept(self, clients, sent):
        (factors_k, head_k), study = sent, self.study
        k, t = clients.current, clients.number
        if study.args.eval_clients:
            clients.note(k, **study.model.evaluate(share=False))
        if study.args.save_clients:
            head, alpha = study.named_head(head_k), study.scale * study.ranks[k]
            changed = t and study.args.aggregate in CHANGES_BASE
            base = study.model.adapted.base_weights() if changed else None
            study.folders.client(t, k, factors_k, head, alpha, base)


def serve(study, theta, mean):
    """theta after a round. Args: mean: its `AdapterMean`."""
    served = study.served = mean.result()
    base = study.model.adapted.updated(base_of(theta), served.updates)
    study.run.count(bytes_down=bytes_down(study, mean.clients))
    named = named_factors(served.factors) | {"head": served.head}
    return named | {f"base.{name}": weight for name, weight in base.items()}


def bytes_up(study, t, k):
    """What client k sends in round t: what its round trains."""
    return 4 * (_numbers(study, study.ranks[k], trained_factors(study.args.aggregate, t)) + len(study.theta["head"]))


def bytes_down(study, clients):
    """What all clients together, sampled or not, receive after a round: what changed for them.

    That is what was trained. stack, residual: the sampled clients' stacked factors or, where that is fewer numbers,
    their product [d, k], from which a client has the base's update and mean A, mean B; a fresh A all can draw. Before
    the first round everybody's adapter and head too.
    """
    a, head, t = study.args, len(study.theta["head"]), clients.number
    if a.aggregate in CHANGES_BASE:
        rank = sum(study.ranks[k] for k in clients.clients)
        each = sum(min(rank * (d + k), d * k) for d, k in _sizes(study))
    else:
        each = _numbers(study, study.served_as["rank"], trained_factors(a.aggregate, t))
    first = sum(_numbers(study, r, ("A", "B")) + head for r in study.ranks) if t == 0 else 0
    return 4 * ((each + head) * len(study.rows) + first)


def _numbers(study, rank, letters):
    return sum(rank * {"A": k, "B": d}[letter] for d, k in _sizes(study) for letter in letters)


def _sizes(study):
    return [(B.shape[0], A.shape[1]) for A, B in study.model.adapted.factors().values()]


# ---- evaluation and folders


def evaluate(study, theta, t):
    """{field: value} of what is served after t rounds; {} where it is not asked for."""
    if not study.evaluates(t):
        return {}
    load(study, theta, t)
    return study.model.evaluate() | ({} if study.held_out is None else study.model.held_out(study.held_out))


def publish(study, theta, t, row):
    """Evaluates what is served after t rounds where asked, and writes the server's folder. Returns what is logged."""
    metrics, served = evaluate(study, theta, t), study.served
    if metrics:
        study.folders.offer(t - 1, metrics[study.model.headline], theta if study.args.final == "best" else {})
    fields = {"aggregation_error": served.error, "delta_norm": served.norm}
    if study.args.aggregate == "svd":
        fields |= {"discarded_energy": served.discarded, "missing_directions": served.missing}
    adapter = study.adapter(theta, t)
    manifest = fuse_manifest(study, row, adapter[-1], metrics, t)
    study.folders.server(t - 1, (*adapter, base_of(theta)), manifest)
    return metrics | fields


def finish(study, theta):
    """final/ and the results: an adapter, or for stack and residual the merged model. theta: after the last round."""
    run, model, folders, rounds = study.run, study.model, study.folders, study.args.rounds
    if study.args.final == "best":
        theta, rounds = folders.theta, folders.best + 1
        run.note(f"final/ holds the best round's, {rounds}: {model.headline} {folders.value:.4g}")

    def write(folder):
        if study.args.aggregate in CHANGES_BASE:
            load(study, theta, rounds)
            model.adapted.save_merged(folder)
            model.tokenizer.save_pretrained(folder)
        else:
            folders.write(folder, *study.adapter(theta, rounds))

    run.write_final(write)
    folders.prune(study.args.rounds - 1)
    if parallel.is_main():
        line = run.metrics()[-1]
        results = print_values(line) | {"best_round": folders.best + 1, f"best_{model.headline}": folders.value}
        results |= {name: line[name] for name in ("aggregation_error", "bytes_up", "bytes_down", "examples", "seconds")}
        run.finish(results | {"rounds": line["round"], "final_round": rounds})
