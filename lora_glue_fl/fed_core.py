"""What a run of federated LoRA is made of: data and model (`Study`), and functions of them.

The round loop and the client's steps are in `fedavg_rounds.py`, the rules that average are in `common/lowrank.py`.

theta is {name: tensor}: `A.<layer>` [r, k] and `B.<layer>` [d, r] of the adapter that the server serves (r may change
from round to round), `head` [h], all of the head's parameters in one vector, and for stack and residual
`base.<layer>`, the weight under the adapter.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import parallel
from common.adapter_files import read_adapter, write_adapter
from common.aggregation import ServerAdam, ServerMomentum
from common.cli import UsageError
from common.compiling import checked_compile
from common.lowrank import MIXED_RANKS, trained_factors
from common.participation import per_round
from common.products import fit_rank, scaling
from common.seeding import seed_torch, torch_stream
from common.vector import Weights
from lora_glue_fl.fitting import batches, learning_rates, plan_steps
from lora_glue_fl.round_folders import RoundFolders
from lora_glue_fl.sharding import client_files, load_shards
from lora_glue_fl.task_model import TaskModel, check_fits

CHANGES_BASE = ("stack", "residual")
# What of the factors changes for the clients after a round. stack, residual: nothing, they get everybody's stacked
# factors or their product, from which a client has the base's update and mean A, mean B; a fresh A all can draw.
RECEIVED = {"ffa": ("B",), "stack": (), "residual": ()}


@dataclass(frozen=True)
class Study:
    """Data and model of a run.

    model: task, tokens and encoder with its adapter; rows: each client's examples, int64 [n_k] of the training split;
    ranks: each client's; scale: s of every client's adapter; theta: before the first round; loss: mean over the
    examples of a batch; servers: {part of theta: server optimiser}, empty for plain averaging; folders: of the rounds.
    """

    args: object
    run: object
    model: TaskModel
    rows: list
    ranks: list
    scale: float
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

    @property
    def served_rank(self):
        return self.args.svd_rank if self.args.aggregate == "svd" else self.args.lora_r

    def served_scale(self, t):
        """s of theta's adapter before round t: the clients', from the second on that of what svd serves."""
        a = self.args
        return scaling(a.alpha, a.svd_rank) if a.aggregate == "svd" and t > 0 else self.scale

    def step(self, letters):
        """The server optimiser's step(theta, delta) for these factors, None for plain averaging."""
        server = self.servers.get("".join(letters))
        return server.step if server else None


def load_study(args, run):
    """Reads data, shards and model and begins the run. Raises: UsageError for what is not there or does not fit."""
    a = args
    model = TaskModel(a, (a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules))
    adapted = model.adapted
    shards = load_shards(a.shard_dir, model.data)
    rows, ranks = [shard["indices"] for shard in shards], client_ranks(a, len(shards))
    check_ranks(a, ranks, adapted)
    scale = scaling(a.lora_alpha, a.lora_r)
    start = read_adapter(a.init_adapter) if a.init_adapter else None
    fused = f"fused_r{a.svd_rank if a.aggregate == 'svd' else a.lora_r}" + "_nosvd" * (a.aggregate == "naive")
    about = adapted.about() | {"base_model": model.base_model(run.folder)}
    # rules train other factors in other rounds: compiled is asked for its leaves when there is a first batch
    compiled = checked_compile(model.loss, model.leaves) if a.compile else model.loss
    study = Study(
        args=a,
        run=run,
        model=model,
        rows=rows,
        ranks=ranks,
        scale=scale,
        theta=first_theta(a, adapted, start, ranks, scale, run.device),
        loss=compiled,
        servers=server_optimizers(a),
        folders=RoundFolders(run.folder, a.keep, fused, about),
    )
    first, n = shards[0], sorted(study.examples)
    data = model.facts() | {"clients": len(n), "client_examples": sum(n)}
    data |= {key: first.get(key) for key in ("mode", "dirichlet_alpha", "overlap_ratio", "category_key")}
    clients = {"examples": study.examples, "ranks": ranks, "shard_seed": first.get("seed")}
    if start:
        clients["init_adapter_sha256"] = start.sha256
    run.begin(data, model.sizes(adapted.trainable()), clients=clients)
    run.plan(a.rounds)
    run.note(f"{len(n)} clients, examples a client {n[0]} to {n[-1]} (median {n[len(n) // 2]})")
    for line in model.notes:
        run.note(line)
    if a.aggregate == "svd" and a.svd_rank > min(ranks):
        run.note(f"clients of rank {min(ranks)} get the leading directions of what is served at {a.svd_rank}")
    run.note(size_on_disk(study))
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


def first_theta(args, adapted, start, ranks, scale, device):
    """theta before the first round: peft's adapter (A random, B zero), or --init-adapter's, the `AdapterFile` start."""
    a = args
    pairs = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in adapted.factors().items()}
    head = adapted.head
    if start:
        check_fits(start, adapted)
        least = min(a.lora_r, *ranks)
        if start.r > least:
            flag = "--lora-r" if least == a.lora_r else "--client-ranks"
            raise UsageError(
                f"--init-adapter has rank {start.r}, above {flag} {least}: raise {flag}, or compress it with "
                f"fedavg_merge.py --adapters {a.init_adapter} --svd-rank {least}"
            )
        pairs, head = resized(start.factors, start.scale, a.lora_r, scale, a.seed, 0), start.head
    theta = named_factors(pairs) | {"head": torch.cat([head[name].detach().reshape(-1) for name in adapted.head])}
    if a.aggregate in CHANGES_BASE:
        theta |= {f"base.{name}": w.detach().clone() for name, w in adapted.base_weights().items()}
    return {name: t.to(device) for name, t in theta.items()}


def server_optimizers(args):
    """{part of theta that a round trains: its server optimiser}: moments of B must not move A."""
    a = args
    if a.server_optimizer == "none":
        return {}
    if a.aggregate not in ("naive", "ffa", "rolora"):
        raise UsageError(
            f"--server-optimizer {a.server_optimizer} with --aggregate {a.aggregate}: its factors are new in every "
            "round, moments of them mean nothing: take naive, ffa or rolora"
        )
    parts = {"".join(trained_factors(a.aggregate, t)) for t in (0, 1)} | {"head"}
    if a.server_optimizer == "momentum":
        return {part: ServerMomentum(a.server_lr, a.server_beta) for part in sorted(parts)}
    return {part: ServerAdam(a.server_optimizer, a.server_lr) for part in sorted(parts)}


def size_on_disk(study):
    """A line on what the run will leave."""
    a, theta = study.args, study.theta
    adapter = 4 * sum(t.numel() for name, t in theta.items() if not name.startswith("base."))
    base = 4 * sum(t.numel() for name, t in theta.items() if name.startswith("base."))
    whole = 4 * study.run.manifest["parameters"]["total"] if base else adapter  # final/
    rounds = study.folders.rounds_kept(a.rounds)
    clients = per_round(a.participation, len(study.rows)) if a.save_clients else 0
    total = rounds * ((clients + 1) * adapter + base) + adapter + base + whole
    return (
        f"on disk at the end: about {total / 2**20:,.1f} MiB ({rounds} rounds (--keep {' '.join(a.keep)}) of {clients} "
        f"+ 1 adapters of {adapter / 2**20:.2f} MiB, a checkpoint, final/)"
    )


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    folder, model = Path(args.shard_dir), args.model or args.model_size or "base"
    clients = len(client_files(folder)) if folder.is_dir() else 1
    size, width = {"large": (1.5e9, 24 * 1024), "tiny": (0, 2 * 64)}.get(model, (5e8, 12 * 768))  # layers x hidden
    if Path(model).is_dir():
        size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
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


def named_head(study, vector):
    """{name: view} of a head's vector [h]."""
    head = study.model.adapted.head
    pieces = vector.split([p.numel() for p in head.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(head.items(), pieces, strict=True)}


def resized(pairs, scale, rank, new_scale, seed, t):
    """An adapter for clients of another rank or scale; new rows of A are the same for all clients of round t."""
    if scale == new_scale and all(A.shape[0] == rank for A, _ in pairs.values()):
        return pairs
    return {
        name: fit_rank(A, B, rank, torch_stream(seed, f"new rows of {name}", t), scale / new_scale)
        for name, (A, B) in pairs.items()
    }


def served_as(args):
    """What the rule serves where it chooses: keywords of `common.lowrank.AdapterMean`."""
    if args.aggregate == "svd":
        return {"rank": args.svd_rank, "new_scale": scaling(args.alpha, args.svd_rank), "split": args.svd_split}
    return {"rank": args.lora_r}


def load(study, theta, t):
    """Puts what is served before round t into the model."""
    study.model.adapted.load_base(base_of(theta))
    study.model.adapted.load(factors(theta), named_head(study, theta["head"]), study.served_scale(t))


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
    model.adapted.load(starts[study.ranks[k]], named_head(study, theta["head"]), study.scale)
    weights = Weights(model.model, model.adapted.trainable(trained_factors(a.aggregate, t)))
    model.model.train()
    seed_torch(a.seed, "dropout", t, k)
    rows, train = study.rows[k], model.encoded["train"]
    plan = plan_steps(train.lengths()[rows], a, a.local_epochs, t, k)
    return weights, batches(train, rows, plan, model.device), learning_rates(a, len(plan))


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
        study.folders.client(t, k, factors_k, named_head(study, head_k), study.scale * study.ranks[k])


def serve(study, theta, served, heads):
    """theta after a round. Args: served: of `AdapterMean.result`; heads: a `WeightedMean` of the heads."""
    step = study.step("head")
    new = named_factors(served.factors) | {"head": step(theta["head"], heads.delta()) if step else heads.result()}
    if study.args.aggregate in CHANGES_BASE:
        base = study.model.adapted.updated(base_of(theta), served.updates)
        new |= {f"base.{name}": weight for name, weight in base.items()}
    return new


def bytes_up(study, t, k):
    """What client k sends in round t: what its round trains."""
    return 4 * (_numbers(study, study.ranks[k], trained_factors(study.args.aggregate, t)) + len(study.theta["head"]))


def bytes_down(study, clients, t):
    """What all clients together, sampled or not, receive after round t: what changed for them.

    Before the first round everybody's adapter and head too.
    """
    a, head = study.args, len(study.theta["head"])
    letters = trained_factors("rolora", t) if a.aggregate == "rolora" else RECEIVED.get(a.aggregate, ("A", "B"))
    each = _numbers(study, study.served_rank, letters) + head
    if (
        a.aggregate in CHANGES_BASE
    ):  # the sampled clients' factors, or where they are fewer numbers their product [d, k]
        rank = sum(study.ranks[k] for k in clients.clients)
        each += sum(min(rank * (d + k), d * k) for d, k in _sizes(study))
    first = sum(_numbers(study, r, ("A", "B")) + head for r in study.ranks) if t == 0 else 0
    return 4 * (each * len(study.rows) + first)


def _numbers(study, rank, letters):
    return sum(rank * {"A": k, "B": d}[letter] for d, k in _sizes(study) for letter in letters)


def _sizes(study):
    return [(B.shape[0], A.shape[1]) for A, B in study.model.adapted.factors().values()]


# ---- evaluation and folders


def evaluate(study, theta, t):
    """{field: value} of what is served after t rounds; {} where it is not asked for."""
    if t and t < study.args.rounds and not study.args.eval_each_round:
        return {}
    load(study, theta, t)
    return study.model.evaluate()


def publish(study, theta, served, clients, t):
    """Evaluates what is served after round t where asked, and writes the server's folder. Returns what is logged."""
    metrics = evaluate(study, theta, t + 1)
    if metrics:
        study.folders.offer(t, metrics[study.model.headline])
    fields = {"aggregation_error": served.error, "delta_norm": served.norm}
    if study.args.aggregate == "svd":
        fields |= {"discarded_energy": served.discarded, "missing_directions": served.missing}
    alpha = study.served_scale(t + 1) * study.served_rank
    manifest = fuse_manifest(study, served, clients, alpha, metrics, t)
    changed = {f"{name}.weight": weight for name, weight in base_of(theta).items()}
    study.folders.server(t, factors(theta), named_head(study, theta["head"]), alpha, changed, manifest)
    return metrics | fields


def fuse_manifest(study, served, clients, alpha, metrics, t):
    """What the server's folder says of itself; clients and rounds count from 1."""
    a, model = study.args, study.model
    counted = [k for k in sorted(clients.clients) if k not in clients.left_out]
    weights = [study.client_weights[k] for k in counted]
    return {
        "dataset": a.dataset,
        "model_id": model.encoder.name,
        "task": model.task.name,
        "round": t + 1,
        "k_adapters": len(counted),
        "adapters": [f"../client_{k + 1}/adapter" for k in counted] if a.save_clients else [],
        "weights": [w / sum(weights) for w in weights],
        "left_out": [k + 1 for k in clients.left_out],
        "aggregate": a.aggregate,
        "svd_rank": a.svd_rank if a.aggregate == "svd" else None,
        "alpha": alpha,
        "target_modules": list(model.adapted.targets),
        "aggregation_error": served.error,
        "discarded_energy": served.discarded,
        "metrics": metrics,
    }


def finish(study, theta):
    """final/ and the results: an adapter, or for stack and residual the merged model."""
    run, adapted = study.run, study.model.adapted
    load(study, theta, study.args.rounds)

    def write(folder):
        if study.args.aggregate in CHANGES_BASE:
            adapted.save_merged(folder)
            study.model.tokenizer.save_pretrained(folder)
        else:
            alpha = study.served_scale(study.args.rounds) * study.served_rank
            head = named_head(study, theta["head"])
            write_adapter(folder, factors(theta), head, alpha=alpha, **study.folders.about)

    run.write_final(write)
    if parallel.is_main():
        line, folders = run.metrics()[-1], study.folders
        results = {name: v for name, v in line.items() if name.startswith("val_")}
        print("  ".join(f"{name} {v:.4f}" for name, v in results.items()))
        results |= {"best_round": folders.best + 1, f"best_{study.model.headline}": folders.value}
        results |= {name: line[name] for name in ("aggregation_error", "bytes_up", "bytes_down", "examples", "seconds")}
        run.finish(results | {"rounds": line["round"]})
