"""What the five scripts of this study share: data and model (`Study`), and functions of them.

The round loop and the client's steps are in each script; an algorithm differs from FedAvg only there.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from common import parallel
from common.allocator import reuse_large_memory
from common.batches import pass_after_pass
from common.checkpoint import saving, write_json
from common.cli import UsageError
from common.client_rows import ClientRows, rows_on_disk
from common.compiling import checked_compile
from common.curves import draw_curve
from common.evaluation import amp_context, bits_per_byte, perplexity
from common.local import Moments, client_optimizer
from common.participation import Turns, per_round
from common.seeding import stream
from common.vector import Weights
from mamba_fl.best import Best
from mamba_fl.data import FederatedText, build_data, inputs_and_labels
from mamba_fl.history import training_history
from mamba_fl.ssm_config import make_config, make_model, save_pretrained

NOT_DECAYED = ("dt_bias", "A_log", "D")  # Dao & Gu's recipe: no weight decay on the recurrence's own parameters
WATCHED = ("in_proj.weight", "A_log", "D", "dt_bias")  # what --save-deltas keeps, per layer


@dataclass(frozen=True)
class Study:
    """Data and model of a run.

    train: each client's blocks [n_k, T + 1] on the device (central: one client with all); weights: theta's live vector
    and names; loss: mean NLL (nats a token) of blocks [B, T + 1]; optimizer: the one of all clients; rounds (central:
    steps), total_steps of a client that is always there, epoch: rounds that an epoch of the data takes.
    moments, own_weights: what clients keep with --client-state keep, and with --sync epoch (else None).
    """

    args: object
    run: object
    data: FederatedText
    train: list
    model: torch.nn.Module
    weights: Weights
    loss: object
    optimizer: torch.optim.Optimizer
    turns: Turns
    rounds: int
    total_steps: int
    epoch: int
    best: Best
    moments: Moments
    own_weights: ClientRows | None

    @property
    def examples(self):
        """n_k: sequences of each client."""
        return [len(blocks) for blocks in self.train]

    @property
    def client_weights(self):
        """What each client counts in a mean: n_k, or 1 with --client-weights uniform."""
        return self.examples if self.args.client_weights == "examples" else [1] * len(self.train)

    @property
    def lasting(self):
        """With theta, all that outlives a round. A script adds its server optimiser."""
        rows = {"moments": self.moments.rows, "own_weights": self.own_weights}
        return {"best": self.best} | {name: thing for name, thing in rows.items() if thing is not None}

    def steps(self, t):
        """Steps of a client in round t: H, or what is left of the budget in the last round."""
        return min(self.args.local_updates, self.total_steps - t * self.args.local_updates)

    def synced(self, t):
        """Whether the clients get the averaged model at the start of round t."""
        return self.args.sync == "round" or t % self.epoch == 0

    def bytes_down(self, t):
        """What a client receives in round t."""
        return self.weights.bytes if self.synced(t) else 0


def load_study(args, run, federated=True):
    """Reads the data, builds the model and begins the run. Raises: UsageError for what is not there or does not fit."""
    reuse_large_memory()
    data = build_data(
        args.dataset,
        args.tokenizer,
        args.sequence_length,
        args.num_clients,
        args.sharding,
        args.seed,
        args.data_root,
    )
    train = [blocks.to(run.device) for blocks in data.train]
    if not federated:  # one client with everybody's text
        train = [torch.cat(train)]
    rounds, total_steps, epoch = plan_rounds(args, [len(blocks) for blocks in train])
    config = make_config(
        chunk=args.chunk,
        n_layer=args.layers,
        vocab_size=data.vocab_size,
        d_model=args.d_model,
        d_state=args.d_state,
        headdim=args.headdim,
        expand=args.expand,
    )
    model = make_model(config, kernel=args.kernel, device=run.device, seed=args.seed)
    weights = Weights(model)

    def loss(blocks):
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(run.amp, run.device):
            return model.nll(inputs, labels) / labels.numel()

    sampled = per_round(args.participation, len(train))

    def rows(name, size, in_place=False):
        on_disk = rows_on_disk(len(train), sampled, size)
        return ClientRows(run.folder / "clients" / name, on_disk, in_place, run.device)

    optimizer = client_optimizer(
        args.client_optimizer, weights.parameters, args.lr, 0.0, args.weight_decay, NOT_DECAYED
    )
    keeps = federated and args.client_optimizer == "adamw" and args.client_state == "keep"
    study = Study(
        args=args,
        run=run,
        data=data,
        train=train,
        model=model,
        weights=weights,
        loss=checked_compile(loss, weights.parameters) if args.compile else loss,
        optimizer=optimizer,
        turns=Turns(args.seed, len(train), args.participation),
        rounds=rounds,
        total_steps=total_steps,
        epoch=epoch,
        best=Best(),
        moments=Moments(optimizer, weights, rows("moments", 2 * weights.bytes, in_place=True) if keeps else None),
        own_weights=rows("own_weights", weights.bytes) if args.sync == "epoch" else None,
    )
    resolved = run.resolved() | {"kernel": type(model).__name__}
    run.begin(data.fingerprint, {"total": weights.size}, resolved, data.shards)
    run.plan(rounds, args.val_freq, args.save_freq)
    return study


def plan_rounds(args, examples):
    """(rounds, steps of a client that is always there, rounds that an epoch of the data takes) of the flags.

    Raises: UsageError for a client with fewer sequences than a batch.
    """
    if args.batch_size > min(examples):
        k = examples.index(min(examples))
        raise UsageError(
            f"client {k} has {examples[k]} sequences, fewer than --batch-size {args.batch_size}: lower it, "
            f"or lower --num-clients ({args.num_clients})"
        )
    if args.budget == "source":
        steps = int(10 * args.n_epochs * min(examples)) // args.batch_size**2
    else:
        steps = int(args.n_epochs * sum(examples) / (per_round(args.participation, len(examples)) * args.batch_size))
    epoch = max(1, round(max(1, steps) / args.local_updates / args.n_epochs))
    total_steps = args.rounds * args.local_updates if args.rounds else max(1, steps)
    return -(-total_steps // args.local_updates), total_steps, epoch


# ---- a client's work: between these two stand the steps, in the script


def begin_client(study, theta, k, t):
    """Puts client k's start into the model and its moments into the optimiser. Returns its batches of round t.

    It starts from theta, or with --sync epoch from its own weights of before.
    """
    study.weights.load(_start(study, theta, k, t))
    study.moments.load(k)
    return ((study.train[k][rows.to(study.run.device)],) for rows in client_batches(study, k, t))


def _start(study, theta, k, t):
    own = None if study.own_weights is None or study.synced(t) else study.own_weights.get(k)
    return theta if own is None else own["theta"]


def end_client(study, theta, k, t, clients, done):
    """Keeps what of client k outlives the round, notes what is logged of it. Returns theta_k [n].

    theta_k is the model's own vector: valid until the next client. Args: done: of `common.local.local_steps`.
    """
    args, theta_k = study.args, study.weights.theta
    study.moments.store(k)
    if study.own_weights is not None:
        study.own_weights.put(k, {"theta": theta_k.clone()})
    clients.work(done.steps * args.batch_size * args.sequence_length)
    if study.run.due(t + 1):
        clients.note(k, train_loss=done.loss)
        if args.client_val_sequences:
            nll, tokens, _ = statistics(study, study.data.validation[: args.client_val_sequences])
            clients.note(k, val_ppl=perplexity(nll, tokens))
        if args.save_deltas:
            save_deltas(study, f"client_{k}", _start(study, theta, k, t), theta_k, t)
    return theta_k


def client_batches(study, k, t):
    """Rows of client k's text for its batches of round t: a list of int64 [B].

    Equal budget: pass after pass over the client's sequences, each in an order of its own, from where the client
    stands. Source's budget: with replacement.
    """
    args, size, n, steps = study.args, study.args.batch_size, len(study.train[k]), study.steps(t)
    if args.budget == "source":
        rows = stream(args.seed, "batches with replacement", t, k).integers(n, size=(steps, size))
    else:
        first = int(study.turns.before(t)[k]) * args.local_updates
        rows = pass_after_pass(n, size, first, steps, args.seed, k)
    return list(torch.from_numpy(rows))


# ---- evaluation


def evaluate(study, theta, t):
    """{field: value} of theta [n] after t rounds on the validation text; offers it as the best."""
    study.weights.load(theta)
    metrics = {
        "steps": min(study.total_steps, t * study.args.local_updates),
        **validate(study, study.data.validation[: study.args.val_sequences or None], "val"),
        "generated": generate(study),
    }
    study.best.offer(t, metrics["val_loss"], theta)
    return metrics


def with_perplexity(row):
    """train_ppl of the row's train_loss."""
    return {"train_ppl": perplexity(row["train_loss"], 1)} if "train_loss" in row else {}


def validate(study, blocks, split):
    """{split_loss, split_ppl, split_bits_per_byte} of the model on blocks [n, T + 1], over all processes."""
    batches = list(enumerate(blocks.split(eval_batch(study.run.device))))
    parts = parallel.all_gather({b: statistics(study, rows) for b, rows in parallel.my_share(batches)})
    sums = [values for part in parts for values in part.values()]
    nll, tokens, size = (math.fsum(s[i] for s in sums) for i in range(3))
    return {
        f"{split}_loss": nll / tokens,
        f"{split}_ppl": perplexity(nll, tokens),
        f"{split}_bits_per_byte": bits_per_byte(nll, size),
    }


@torch.no_grad()
def statistics(study, blocks):
    """(summed NLL, tokens, bytes) of blocks [n, T + 1], as Python numbers."""
    nll, tokens, size = [], 0, 0
    for part in blocks.to(study.run.device).split(eval_batch(study.run.device)):
        inputs, labels = inputs_and_labels(part)
        with amp_context(study.run.amp, study.run.device):
            nll.append(study.model.nll(inputs, labels).item())
        scored = labels[labels >= 0]
        tokens += len(scored)
        size += study.data.token_bytes[scored.cpu()].sum().item()
    return math.fsum(nll), tokens, size


def eval_batch(device):
    """Sequences that are evaluated at once. Fixed per device: sums over other batches would round differently."""
    return 8 if device.type == "cpu" else 32


def generate(study, tokens=100):
    """The greedy continuation of --prompt, on the main process; None elsewhere or when off."""
    if not study.args.prompt or not parallel.is_main():
        return None
    ids = study.data.tokenizer.encode(study.args.prompt, add_special_tokens=False)
    out = study.model.generate(torch.tensor([ids], device=study.run.device), tokens)
    return study.data.tokenizer.decode(out[0].tolist())


def save_deltas(study, who, before, after, t):
    """Stores the state-space parameters and their change in round t, arrays `layers.i.NAME`."""
    old, new = study.weights.named(before), study.weights.named(after)
    for kind in ("params", "deltas"):
        arrays = {}
        for name in new:
            if name.endswith(WATCHED) and ".mixer." in name:
                _, _, layer, _, rest = name.split(".", 4)
                value = new[name] - (old[name] if kind == "deltas" else 0)
                arrays[f"layers.{layer}.{rest.removesuffix('.weight')}"] = value.cpu().numpy()
        path = study.run.folder / who / kind / f"step_{t + 1:06d}.npz"
        fresh = path.with_suffix(".new.npz")
        with saving(path, fresh):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(fresh, **arrays)
            os.replace(fresh, path)


def finish(study, theta):
    """Test and validation perplexity on all text, of the last and the best weights; final/, the history, curve.png."""
    run, best = study.run, study.best
    study.weights.load(theta)
    test_ppl = validate(study, study.data.test, "test")["test_ppl"]
    results = {"best_round": best.round, "best_val_ppl": perplexity(best.loss, 1)}
    results.update(test_ppl_best=test_ppl, test_ppl_last=test_ppl)
    results["final_val_ppl"] = validate(study, study.data.validation, "val")["val_ppl"]
    if best.round < study.rounds:
        study.weights.load(best.theta)
        results["test_ppl_best"] = validate(study, study.data.test, "test")["test_ppl"]
        study.weights.load(theta)
    if parallel.is_main():
        lines = run.metrics()
        results.update(tokens=lines[-1]["tokens"], seconds=lines[-1]["seconds"])
        run.write_final(lambda folder: save_pretrained(study.model, study.data.tokenizer, folder))
        with saving(run.folder):
            write_json(run.folder / "training_history.json", training_history(run.command, lines))
            draw_curve(run.folder)
        print(
            f"test perplexity {results['test_ppl_last']:.2f} (weights of the best round, "
            f"{results['best_round']}: {results['test_ppl_best']:.2f})"
        )
    run.finish(results)
