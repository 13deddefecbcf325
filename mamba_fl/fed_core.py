"""What the five scripts of this study share: data and model of a run (`Study`), and a client's start and end.

The round loop and the client's steps are in each script; an algorithm differs from FedAvg only there. What is measured
is in `measuring.py`.
"""

from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.allocator import reuse_large_memory
from common.batches import pass_after_pass
from common.best import Best
from common.cli import UsageError, say
from common.client_rows import ClientRows, rows_on_disk
from common.compiling import checked_compile
from common.evaluation import amp_context, perplexity
from common.local import Moments, client_optimizer
from common.participation import Turns, per_round
from common.personal import Personal, make_personal
from common.schedules import lr_at
from common.seeding import stream
from common.shared_moments import AverageMoments, FedAdamW, FedAdamWMoments, PooledMoments, SharedMoments
from common.text import load_tokenizer, tokenizer_fingerprint
from common.vector import Weights
from mamba_fl.data import FederatedText, build_data, inputs_and_labels
from mamba_fl.flags import final_of
from mamba_fl.mamba2 import Mamba2Config
from mamba_fl.measuring import held_out_ppl, save_deltas, statistics
from mamba_fl.ssm_config import make_model, read_pretrained

NOT_DECAYED = ("dt_bias", "A_log", "D")  # Dao & Gu's recipe: no weight decay on the recurrence's own parameters
PERSONAL = {"none": (), "ssm": NOT_DECAYED, "conv": ("conv1d.weight", "conv1d.bias")}  # of a layer's mixer
MOST_PADDING = 128  # rows that an embedding has beyond the tokens, at most, in the models that there are
SHARED = {"average": AverageMoments, "pooled": PooledMoments}  # --client-state


@dataclass(frozen=True)
class Study:
    """Data and model of a run.

    train: each client's blocks [n_k, T + 1] on the device (central: one client with all); weights: theta's live vector
    and names; loss: mean NLL (nats a token) of blocks [B, T + 1]; total_steps of a client that is always there; epoch:
    rounds that an epoch of the data takes; moments: the clients' optimiser and its moments from round to round
    (--client-state); own_weights: what clients keep with --sync epoch (else None); personal: what --personal keeps with
    each client.
    """

    args: object
    run: object
    data: FederatedText
    train: list
    model: torch.nn.Module
    weights: Weights
    loss: object
    turns: Turns
    total_steps: int
    epoch: int
    best: Best
    moments: Moments | SharedMoments
    own_weights: ClientRows | None
    personal: Personal

    @property
    def optimizer(self):
        """The one of all clients."""
        return self.moments.optimizer

    @property
    def client_weights(self):
        """What each client counts in a mean: n_k, its sequences, or 1 with --client-weights uniform."""
        return [len(blocks) if self.args.client_weights == "examples" else 1 for blocks in self.train]

    @property
    def lasting(self):
        """With theta, all that outlives a round. A script adds its server optimiser."""
        moments = self.moments if isinstance(self.moments, SharedMoments) else self.moments.rows
        others = {"moments": moments, "own_weights": self.own_weights, "personal": self.personal.rows}
        return {"best": self.best} | {name: thing for name, thing in others.items() if thing is not None}

    @property
    def eval_batch(self):
        """Sequences that are evaluated at once. Fixed per device: sums over other batches would round differently."""
        return 8 if self.run.device.type == "cpu" else 32

    def autocast(self):
        """The context of a forward pass in the run's precision."""
        return amp_context(self.run.amp, self.run.device)

    def synced(self, t):
        """Whether the clients get the averaged model at the start of round t."""
        return self.args.sync == "round" or t % self.epoch == 0

    @property
    def sent(self):
        """Bytes of a client's weights that are not personal."""
        return self.weights.bytes - self.personal.bytes

    def bytes_of(self, t):
        """(up, down): what a client sends and receives in round t."""
        up, down = self.moments.bytes
        return self.sent + up, (self.sent if self.synced(t) else 0) + down

    def learning_rates(self, t):
        """The rate of each step of round t, the same for all its clients.

        It goes by the steps of a client that is always there: by its own, one that is drawn rarely would be in its
        warm-up when the others end.
        """
        args, total = self.args, self.total_steps
        steps = range(t * args.local_updates, min((t + 1) * args.local_updates, total))
        schedule = {"kind": args.lr_scheduler, "warmup": args.warmup_steps, "min_lr": args.min_lr}
        return [lr_at(step, total, args.lr, **schedule) for step in steps]


def load_study(args, run, federated=True):
    """Reads the data, builds the model and begins the run. Raises: UsageError for what is not there or does not fit."""
    reuse_large_memory()
    data = build_data(
        args.dataset, args.tokenizer, args.sequence_length, args.num_clients, args.sharding, args.seed, args.data_root
    )
    train = [blocks.to(run.device) for blocks in data.train]
    if not federated:  # one client with everybody's text
        train = [torch.cat(train)]
    rounds, total_steps, epoch = plan_rounds(args, [len(blocks) for blocks in train], run.before)
    model = start_model(args, data, run.device)
    weights = Weights(model)

    def loss(blocks):
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(run.amp, run.device):
            return model.nll(inputs, labels) / labels.numel()

    def rows(name, size, in_place=False):
        on_disk = rows_on_disk(len(train), per_round(args.participation, len(train)), size)
        return ClientRows(run.folder / "clients" / name, on_disk, in_place, run.device)

    endings = tuple(f".mixer.{name}" for name in PERSONAL[args.personal])
    names = [name for name in weights.shapes if name.endswith(endings)]
    personal = make_personal(weights, names, run.folder / "clients" / "personal", len(train), run.device)
    study = Study(
        args=args,
        run=run,
        data=data,
        train=train,
        model=model,
        weights=weights,
        loss=checked_compile(loss, weights.parameters) if args.compile else loss,
        turns=Turns(args.seed, len(train), args.participation),
        total_steps=total_steps,
        epoch=epoch,
        best=Best(),
        moments=client_moments(args, weights, rows, federated),
        own_weights=rows("own_weights", weights.bytes) if args.sync == "epoch" else None,
        personal=personal,
    )
    resolved = run.resolved() | {"kernel": type(model).__name__}
    run.begin(
        data.fingerprint,
        {"total": weights.size} | ({"personal": personal.size} if names else {}),
        resolved,
        data.shards,
    )
    run.plan(rounds, args.val_freq, args.save_freq, len(train))
    return study


def client_moments(args, weights, rows, federated):
    """The clients' optimiser, and what becomes of its moments from round to round: --client-state."""
    betas = (args.beta1, args.beta2)
    state = args.client_state if args.client_optimizer == "adamw" else "reset"  # SGD has no moments
    if state == "fedadamw":
        optimizer = FedAdamW(weights, args.lr, args.weight_decay, args.alpha_global, NOT_DECAYED, betas)
        return FedAdamWMoments(optimizer, weights)
    decay = {"weight_decay": args.weight_decay, "not_decayed": NOT_DECAYED}
    optimizer = client_optimizer(args.client_optimizer, weights.parameters, args.lr, 0.0, **decay, betas=betas)
    if state in SHARED:
        return SHARED[state](optimizer, weights)
    keeps = federated and state == "keep"
    return Moments(optimizer, weights, rows("moments", 2 * weights.bytes, in_place=True) if keeps else None)


def start_model(args, data, device):
    """The model with fresh weights, or those of --init-from.

    Raises: UsageError where these are of another tokenizer.
    """
    config = Mamba2Config(
        d_model=args.d_model,
        n_layer=args.layers,
        vocab_size=data.vocab_size,
        d_state=args.d_state,
        expand=args.expand,
        headdim=args.headdim,
        chunk_size=0 if args.chunk == "auto" else args.chunk,
    )
    if args.init_from is None:
        return make_model(config, kernel=args.kernel, device=device, seed=args.seed)
    folder = final_of(args.init_from)
    theirs, tensors = read_pretrained(folder)
    if (folder / "tokenizer.json").is_file():
        ids = [data.fingerprint["tokenizer_sha256"], tokenizer_fingerprint(load_tokenizer(str(folder), None))]
        if ids[0] != ids[1]:
            raise UsageError(
                f"--tokenizer {args.tokenizer} ({ids[0][:12]}) is not that of --init-from {args.init_from} "
                f"({ids[1][:12]}): drop --tokenizer"
            )
    else:
        say(f"note: --init-from {args.init_from} has no tokenizer.json: --tokenizer {args.tokenizer} is not compared")
    rows = theirs.padded_vocab_size
    if not 0 <= rows - data.vocab_size < MOST_PADDING:
        raise UsageError(
            f"--tokenizer {args.tokenizer} has {data.vocab_size} tokens, the model of --init-from {args.init_from} "
            f"{rows}: give its own --tokenizer"
        )
    same = theirs.vocab_size == data.vocab_size  # else it is known with its padding only
    others = {name: getattr(theirs, name) for name in ("d_conv", "ngroups", "norm_eps")}
    config = replace(config, **others, pad_vocab_size_multiple=theirs.pad_vocab_size_multiple if same else rows)
    model = make_model(config, kernel=args.kernel, device=device)
    model.load_state_dict(tensors)
    return model


def plan_rounds(args, examples, before=None):
    """(rounds, steps of a client that is always there, rounds that an epoch of the data takes) of the flags.

    before: run.json of a run that is gone on with, perhaps for more --n-epochs.
    Raises: UsageError for a client with fewer sequences than a batch, and a warm-up that is longer than the run.
    """
    fewest = min(examples)
    if args.batch_size > fewest:
        raise UsageError(
            f"client {examples.index(fewest)} has {fewest} sequences, fewer than --batch-size {args.batch_size}: lower "
            f"it, or lower --num-clients ({args.num_clients})"
        )
    if args.budget == "source":
        steps = int(10 * args.n_epochs * fewest) // args.batch_size**2
    else:
        steps = int(args.n_epochs * sum(examples) / (per_round(args.participation, len(examples)) * args.batch_size))
    epoch = max(1, round(max(1, steps) / args.local_updates / args.n_epochs))
    total_steps = args.rounds * args.local_updates if args.rounds else max(1, steps)
    if before and (old := before["args"]["n_epochs"]) != args.n_epochs:
        _, steps, as_before = plan_rounds(Namespace(**vars(args) | {"n_epochs": old}), examples)
        if steps % args.local_updates or (args.sync == "epoch" and as_before != epoch):
            reason = f"its last round has {steps % args.local_updates} of {args.local_updates} steps (--local-updates)"
            if not steps % args.local_updates:
                reason = f"an epoch has {as_before} rounds there, and now {epoch}"
            raise UsageError(f"--n-epochs {old:g} -> {args.n_epochs:g}: {reason}: choose another --run-name")
    if args.warmup_steps > total_steps:
        raise UsageError(f"--warmup-steps {args.warmup_steps} is more than the run's {total_steps} steps: lower it")
    return -(-total_steps // args.local_updates), total_steps, epoch


# ---- a client's work: between these two stand the steps, in the script


def begin_client(study, theta, k, t):
    """Puts client k's start into the model and its moments into the optimiser. Returns its batches of round t.

    It starts from theta with its own of what is personal, or with --sync epoch from its own weights of before.
    """
    study.weights.load(_start(study, theta, k, t))
    study.moments.load(k)
    return client_batches(study, k, t)


def _start(study, theta, k, t):
    own = None if study.own_weights is None or study.synced(t) else study.own_weights.get(k)
    return study.personal.own(theta, k) if own is None else own["theta"]


def end_client(study, theta, k, t, clients, done):
    """Keeps what of client k outlives the round, notes what is logged of it. Returns theta_k [n] as it is sent.

    theta_k is the model's own vector, valid until the next client; with --personal a copy with theta's entries in the
    place of what stays with the client. Args: done: of `common.local.local_steps`.
    """
    args, theta_k = study.args, study.weights.theta
    study.moments.store(k)
    study.personal.keep(k, theta_k)
    if study.own_weights is not None:
        study.own_weights.put(k, {"theta": theta_k.clone()})
    clients.work(done.steps * args.batch_size * args.sequence_length)
    if study.run.due(t + 1):
        clients.note(k, train_loss=done.loss)
        if args.client_val_sequences:
            nll, tokens, _ = statistics(study, study.data.validation[: args.client_val_sequences])
            clients.note(k, val_ppl=perplexity(nll, tokens))
        if args.held_out_sequences:
            clients.note(k, held_out_ppl=held_out_ppl(study, k))
        if args.save_deltas:
            save_deltas(study, f"client_{k}", _start(study, theta, k, t), theta_k, t)
    return study.personal.sent(theta_k, theta)


def client_batches(study, k, t):
    """Client k's batches of round t, each a tuple of blocks [B, T + 1]: H, in the last round what the budget has left.

    Equal budget: pass after pass over the client's sequences, each in an order of its own, from where the client
    stands. Source's budget: with replacement.
    """
    args, size, blocks = study.args, study.args.batch_size, study.train[k]
    steps = min(args.local_updates, study.total_steps - t * args.local_updates)
    if args.budget == "source":
        rows = stream(args.seed, "batches with replacement", t, k).integers(len(blocks), size=(steps, size))
    else:
        first = int(study.turns.before(t)[k]) * args.local_updates
        rows = pass_after_pass(len(blocks), size, first, steps, args.seed, k)
    return ((blocks[batch.to(blocks.device)],) for batch in torch.from_numpy(rows))


def sampled_blocks(study, purpose, blocks, n, k, t):
    """n of client k's blocks, in their order, drawn by the seed and the round; n = 0: all of them."""
    rows = stream(study.args.seed, purpose, t, k).choice(len(blocks), min(n or len(blocks), len(blocks)), replace=False)
    return blocks[torch.from_numpy(np.sort(rows)).to(blocks.device)].to(study.run.device)
