"""What a run of federated LoRA is made of: data and model (`Study`), and functions of them.

The round loop is in `fedavg_rounds.py`, the rules that average are in `common/lowrank.py`.

theta is {name: tensor}: `A.<layer>` [r, k] and `B.<layer>` [d, r] of the adapter that the server serves (r may change
from round to round), `head` [h], all of the head's parameters in one vector, and for stack and residual
`base.<layer>`, the weight under the adapter.
"""

import math
from dataclasses import dataclass

import torch

from common import parallel
from common.evaluation import Best
from common.hub import weight_bytes
from common.local import client_optimizer, local_steps
from common.lowrank import MIXED_RANKS, AdapterMean, Served, trained_factors
from common.participation import check_participation, per_round
from common.rounds import Follower
from common.seeding import seed_torch
from common.text import sha256_of
from common.vector import Weights
from lora_glue_fl.data_prep import MAX_GRAD_NORM, batches, learning_rates, plan_steps
from lora_glue_fl.flags import refuse
from lora_glue_fl.models import TaskModel, named_views, print_values, resized
from lora_glue_fl.round_folders import RoundFolders
from lora_glue_fl.sharding import client_files, load_held_out, load_shards

CHANGES_BASE = ("stack", "residual")


@dataclass
class Study:
    """Data and model of a run.

    model: task, tokens and encoder with its adapter; rows: each client's examples, int64 [n_k] of the training split;
    held_out: examples of it that no client has, int64 [n], or None; ranks: each client's; scale: s of every client's
    adapter; served_as: what the rule serves where it chooses, keywords of `common.lowrank.AdapterMean`; theta: before
    the first round; folders: of the rounds; best: the best round's theta as one vector, for --final best; served: the
    last round's `common.lowrank.Served`.
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
    best: Best
    served: Served | None = None

    @property
    def examples(self):
        """n_k: examples of each client."""
        return [len(rows) for rows in self.rows]

    client_weights = work = examples  # what each client counts in a mean, and the size of its work

    @property
    def lasting(self):
        """With theta, all that outlives a round, and what goes along with the rounds."""
        folders = {"folders": self.folders} if self.args.save_clients else {}
        return {"adapters": Adapters(self)} | folders | ({"best": self.best} if self.args.final == "best" else {})

    def bytes_of(self, t):
        """(up, down) in round t: what its clients send, what the round trains; `serve` counts what all receive."""
        letters, head = trained_factors(self.args.aggregate, t), len(self.theta["head"])
        return lambda k: 4 * (numbers(self, self.ranks[k], letters) + head), 0

    def mean(self, theta, clients):
        """The rule's mean of a round."""
        t, a = clients.number, self.args
        pairs, scale = factors(theta), self.served_scale(t)
        of = {"head": theta["head"], "largest": max(self.ranks)}
        return AdapterMean(a.aggregate, pairs, scale, clients, a.seed, **of, **self.served_as)

    def evaluates(self, t):
        """Whether what is served after t rounds is evaluated."""
        return t in (0, self.args.rounds) or self.args.eval_each_round

    def evaluate(self, theta, t, row):
        """{field: value} that is logged after t rounds; what is served is written too."""
        metrics = {}
        if self.evaluates(t):
            load(self, theta, t)
            metrics = self.model.evaluate()
            if self.held_out is not None:
                metrics |= self.model.held_out(self.held_out)
        if t == 0:
            return metrics
        if metrics and self.args.final == "best":  # it keeps the lowest
            self.best.offer(t, -metrics[self.model.headline], torch.cat([x.reshape(-1) for x in theta.values()]))
        self.folders.server(t - 1, *self.adapter(theta, t), base_of(theta))
        return metrics | {"aggregation_error": self.served.error}

    def served_scale(self, t):
        """s of theta's adapter before round t: the clients', from the second on that of what svd serves."""
        return self.served_as.get("new_scale", self.scale) if t else self.scale

    def adapter(self, theta, t):
        """What is served before round t: (factors, head, alpha)."""
        alpha = self.served_scale(t) * self.served_as["rank"]
        return factors(theta), self.named_head(theta["head"]), alpha

    def named_head(self, vector):
        """{name: view} of a head's vector [h]."""
        return named_views(vector, self.model.adapted.head)


def load_study(args, run):
    """Reads data, shards and model and begins the run. Raises: UsageError for what is not there or does not fit."""
    a = args
    model = TaskModel(a, (a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules))
    shards = load_shards(a.shard_dir, model.data)
    check_participation(a.participation, len(shards))
    ranks = client_ranks(a, len(shards))
    scale = a.lora_alpha / a.lora_r
    start = a.init_adapter and model.start(a.init_adapter, a.lora_r, scale, min(a.lora_r, *ranks))
    served_as = {"rank": a.lora_r, "split": a.split}
    if a.aggregate == "svd":
        served_as |= {"rank": a.svd_rank, "new_scale": a.alpha / a.svd_rank}
    fused = f"fused_r{served_as['rank']}" + "_nosvd" * (a.aggregate == "naive")
    study = Study(
        args=a,
        run=run,
        model=model,
        rows=[shard["indices"] for shard in shards],
        held_out=load_held_out(a.shard_dir, model.data),
        ranks=ranks,
        scale=scale,
        served_as=served_as,
        theta=first_theta(a, model, start),
        folders=RoundFolders(run.folder, a.keep, fused, model.about(run.folder)),
        best=Best(),
    )
    first, n = shards[0], study.examples
    data = model.data.fingerprint | {"model": model.name, "clients": len(n)}
    data |= {key: first.get(key) for key in ("mode", "dirichlet_alpha", "overlap_ratio", "category_key", "sizes")}
    if study.held_out is not None:
        data["held_out"] = len(study.held_out)
    clients = {"examples": study.examples, "ranks": ranks, "shard_seed": first.get("seed")}
    every = [*study.rows, study.held_out if study.held_out is not None else []]
    clients["sha256"] = sha256_of([list(map(int, rows)) for rows in every])
    if start:
        clients["init_adapter_sha256"] = start[-1]
    run.begin(data, model.sizes(model.adapted.trainable()), clients=clients)
    run.plan(a.rounds, clients=len(n))
    for line in (f"{len(n)} clients, examples a client {min(n)} to {max(n)}", *model.notes):
        run.note(line)
    if parallel.is_main():
        model.save_base(run.folder)
    return study


def client_ranks(args, clients):
    """--client-ranks, in turn, of so many clients. Raises UsageError for ranks that do not fit."""
    a, given = args, args.client_ranks or [args.lora_r]
    refuse(len(given) > clients, f"{len(given)} --client-ranks for {clients} clients: give one a client, or fewer")
    ranks = [given[k % len(given)] for k in range(clients)]
    served, together = a.svd_rank if a.aggregate == "svd" else 0, sum(ranks)
    refuse(served > together, f"--svd-rank {served} is above {together}, all clients' ranks together: lower it")
    odd = a.aggregate not in MIXED_RANKS and set(ranks) != {a.lora_r}
    refuse(odd, f"rule {a.aggregate} needs one rank, --lora-r {a.lora_r}: take --aggregate {' or '.join(MIXED_RANKS)}")
    return ranks


def first_theta(args, model, start):
    """theta before the first round: peft's adapter (A random, B zero), or what `TaskModel.start` returned."""
    adapted = model.adapted
    pairs, head, _ = start or (adapted.factors(), adapted.head, None)
    theta = named_factors(pairs) | {"head": torch.cat([head[name].reshape(-1) for name in adapted.head])}
    if args.aggregate in CHANGES_BASE:
        theta |= {f"base.{name}": w for name, w in adapted.base_weights().items()}
    return {name: t.detach().to(model.device, copy=True) for name, t in theta.items()}


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    name = args.model or args.model_size or "base"
    clients = max(1, len(client_files(args.shard_dir)))
    size, width = {"large": (1.5e9, 24 * 1024), "tiny": (0, 2 * 64)}.get(name, (5e8, 12 * 768))  # layers x hidden
    activations = 70 * width * args.batch_size * args.max_length
    return per_round(args.participation, clients), int(6e8 + 2 * (weight_bytes(name) or size) + activations)


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
    options = {"amp": run.amp, "max_norm": MAX_GRAD_NORM, "lrs": learning_rates(a, len(plan))}
    optimizer = client_optimizer("adamw", weights.parameters, a.learning_rate)
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
            study.folders.client(factors_k, head, alpha, base)


def serve(study, theta, mean):
    """theta after a round. Args: mean: its `AdapterMean`."""
    served = study.served = mean.result()
    base = study.model.adapted.updated(base_of(theta), served.updates)
    study.run.count(bytes_down=bytes_down(study, mean.clients))
    named = named_factors(served.factors) | {"head": served.head}
    return named | {f"base.{name}": weight for name, weight in base.items()}


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
        each = numbers(study, study.served_as["rank"], trained_factors(a.aggregate, t))
    first = sum(numbers(study, r, ("A", "B")) + head for r in study.ranks) if t == 0 else 0
    return 4 * ((each + head) * len(study.rows) + first)


def numbers(study, rank, letters):
    """How many numbers these factors of all layers have."""
    return sum(rank * {"A": k, "B": d}[letter] for d, k in _sizes(study) for letter in letters)


def _sizes(study):
    return [(B.shape[0], A.shape[1]) for A, B in study.model.adapted.factors().values()]


# ---- the end


def finish(study, theta):
    """final/ and the results: an adapter, or for stack and residual the merged model. theta: after the last round."""
    run, model, folders, rounds = study.run, study.model, study.folders, study.args.rounds
    if study.args.final == "best":
        theta, rounds = named_views(study.best.theta, theta), study.best.round
        run.note(f"final/ holds the best round's, {rounds}: {model.headline} {-study.best.loss:.4g}")

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
        names = ("aggregation_error", "bytes_up", "bytes_down", "examples", "seconds")
        results = print_values(line) | {name: line[name] for name in names}
        run.finish(results | {"rounds": line["round"], "final_round": rounds})
