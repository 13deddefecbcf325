"""What a run of federated LoRA is made of: data and model (`Study`), and functions of them.

The round loop and the client's steps are in `fedavg_rounds.py`, the rules that average are in `common/lowrank.py`.

theta is {name: tensor}: `A.<layer>` [r, k] and `B.<layer>` [d, r] of the adapter that the server serves (r may change
from round to round), `head` [h], all of the head's parameters in one vector, and for stack and residual
`base.<layer>`, the weight under the adapter.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from common import parallel
from common.aggregation import ServerAdam, ServerMomentum
from common.cli import UsageError
from common.hub import weight_bytes
from common.lowrank import MIXED_RANKS, STEPPED, trained_factors
from common.participation import check_participation, per_round
from common.products import scaling
from common.seeding import seed_torch
from common.vector import Weights
from lora_glue_fl.data_prep import batches, learning_rates, plan_steps
from lora_glue_fl.models import named_head
from lora_glue_fl.round_folders import RoundFolders, fuse_manifest, size_on_disk
from lora_glue_fl.shards import client_files, load_held_out, load_shards
from lora_glue_fl.task_model import TaskModel, print_values, resized

CHANGES_BASE = ("stack", "residual")


@dataclass(frozen=True)
class Study:
    """Data and model of a run.

    model: task, tokens and encoder with its adapter; rows: each client's examples, int64 [n_k] of the training split;
    held_out: examples of it that no client has, int64 [n], or None; ranks: each client's; scale: s of every client's
    adapter; served_as: what the rule serves where it chooses, and the server's learning rate, keywords of
    `common.lowrank.AdapterMean`; theta: before the first round; loss: mean over the examples of a batch; servers: {part
    of theta: server optimiser}, empty for plain averaging; folders: of the rounds.
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
    loss: object
    servers: dict
    folders: RoundFolders

    @property
    def examples(self):
        """n_k: examples of each client."""
        return [len(rows) for rows in self.rows]

    @property
    def client_weights(self):
        """What each client counts in a mean: n_k, or 1 with --client-weights uniform."""
        return self.examples if self.args.client_weights == "examples" else [1] * len(self.rows)

    @property
    def lasting(self):
        """With theta, all that outlives a round."""
        return {"folders": self.folders} | {f"server_{part}": server for part, server in self.servers.items()}

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

    def step(self, part):
        """The server optimiser's step(theta, delta) for this part of theta, None for plain averaging."""
        server = self.servers.get("".join(part))
        return server and server.step


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
    served_as = {"rank": a.lora_r, "server_lr": a.server_lr if a.server_optimizer == "none" else 1.0}
    if a.aggregate == "rotate":
        served_as["rotation"] = a.rotate_lambda
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
        loss=model.training_loss(),
        servers=server_optimizers(a),
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


def server_optimizers(args):
    """{part of theta that a round trains: its server optimiser}: moments of B must not move A."""
    a = args
    if a.server_optimizer == "none":
        return {}
    if a.aggregate not in STEPPED:
        raise UsageError(
            f"--server-optimizer {a.server_optimizer} with --aggregate {a.aggregate}: its factors are new in every "
            f"round, or never, moments of them mean nothing: take {', '.join(STEPPED[:-1])} or {STEPPED[-1]}"
        )
    parts = {"".join(trained_factors(a.aggregate, t)) for t in (0, 1)} | {"head"}
    if a.server_optimizer == "momentum":
        return {part: ServerMomentum(a.server_lr, a.server_beta) for part in sorted(parts)}
    return {part: ServerAdam(a.server_optimizer, a.server_lr) for part in sorted(parts)}


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


# ---- a round: between `begin_client` and `end_client` stand the steps, in the script


def begin_round(study, theta, t):
    """The base weights go into the model. Returns {rank: factors that its clients begin with}."""
    study.model.adapted.load_base(base_of(theta))
    pairs, scale, seed = factors(theta), study.served_scale(t), study.args.seed
    return {r: resized(pairs, scale, r, study.scale, seed, t) for r in set(study.ranks)}


def begin_client(study, theta, starts, k, t):
    """Puts client k's start into the model. Returns (weights, steps, lrs) of its work in round t.

    weights: `common.vector.Weights` of what the rule's round trains, the head last.
    """
    a, model = study.args, study.model
    model.adapted.load(starts[study.ranks[k]], study.named_head(theta["head"]), study.scale)
    weights = Weights(model.model, model.adapted.trainable(trained_factors(a.aggregate, t)))
    model.model.train()
    seed_torch(a.seed, "dropout", t, k)
    train = model.encoded["train"]
    plan = plan_steps(train, study.rows[k], a, a.local_epochs, t, k)
    return weights, batches(train, plan, model.device), learning_rates(a, len(plan))


def end_client(study, weights, k, clients, done):
    """Notes what is logged of client k. Returns (factors_k, head_k [h]), valid until the next client."""
    clients.work(math.ceil(len(study.rows[k]) * study.args.local_epochs))
    clients.note(k, train_loss=done.loss)
    pairs = {name: (A.detach(), B.detach()) for name, (A, B) in study.model.adapted.factors().items()}
    return pairs, weights.theta[-len(study.theta["head"]) :]


def keep_client(study, factors_k, head_k, k, t, clients):
    """Writes client k's adapter and, with --eval-clients, evaluates it."""
    if study.args.eval_clients:
        clients.note(k, **study.model.evaluate(share=False))
    if study.args.save_clients:
        head, alpha = study.named_head(head_k), study.scale * study.ranks[k]
        changed = t and study.args.aggregate in CHANGES_BASE
        study.folders.client(t, k, factors_k, head, alpha, study.model.adapted.base_weights() if changed else None)


def serve(study, theta, served, heads):
    """theta after a round. Args: served: of `AdapterMean.result`; heads: a `WeightedMean` of the heads."""
    step = study.step("head")
    head = step(theta["head"], heads.delta()) if step else heads.result(study.served_as["server_lr"])
    base = study.model.adapted.updated(base_of(theta), served.updates)
    return named_factors(served.factors) | {"head": head} | {f"base.{name}": weight for name, weight in base.items()}


def bytes_up(study, t, k):
    """What client k sends in round t: what its round trains."""
    return 4 * (_numbers(study, study.ranks[k], trained_factors(study.args.aggregate, t)) + len(study.theta["head"]))


def bytes_down(study, clients, t):
    """What all clients together, sampled or not, receive after round t: what changed for them.

    That is what was trained. stack, residual: the sampled clients' stacked factors or, where that is fewer numbers,
    their product [d, k], from which a client has the base's update and mean A, mean B; a fresh A all can draw. Before
    the first round everybody's adapter and head too.
    """
    a, head = study.args, len(study.theta["head"])
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


def publish(study, theta, served, clients, t, more):
    """Evaluates what is served after round t where asked, and writes the server's folder. Returns what is logged.

    more: function without arguments to more of it, after which the model holds anything.
    """
    metrics = evaluate(study, theta, t + 1)
    if metrics:
        study.folders.offer(t, metrics[study.model.headline], theta if study.args.final == "best" else {})
    fields = {"aggregation_error": served.error, "delta_norm": served.norm}
    if study.args.aggregate == "svd":
        fields |= {"discarded_energy": served.discarded, "missing_directions": served.missing}
    adapter = study.adapter(theta, t + 1)
    study.folders.server(t, (*adapter, base_of(theta)), fuse_manifest(study, served, clients, adapter[-1], metrics, t))
    return metrics | fields | more()


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
    if parallel.is_main():
        line = run.metrics()[-1]
        results = print_values(line) | {"best_round": folders.best + 1, f"best_{model.headline}": folders.value}
        results |= {name: line[name] for name in ("aggregation_error", "bytes_up", "bytes_down", "examples", "seconds")}
        run.finish(results | {"rounds": line["round"], "final_round": rounds})
