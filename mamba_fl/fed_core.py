"""What the five scripts of this study share: data and model of a run (`Study`), and a client's work in a round.

The round loop is in each script; an algorithm differs from FedAvg only there. What is measured is in `measuring.py`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from common.allocator import reuse_large_memory
from common.batches import pass_after_pass
from common.best import Best
from common.cli import UsageError, say
from common.client_rows import ClientRows, rows_on_disk
from common.evaluation import amp_context, perplexity
from common.local import Moments, client_optimizer, local_steps
from common.participation import Turns, per_round
from common.schedules import lr_at
from common.seeding import stream
from common.shared_moments import PooledMoments
from common.text import load_tokenizer, tokenizer_fingerprint
from common.vector import Weights
from mamba_fl.data import FederatedText, build_data, inputs_and_labels
from mamba_fl.flags import final_of
from mamba_fl.mamba2 import Mamba2Config
from mamba_fl.measuring import evaluate, save_deltas, statistics
from mamba_fl.ssm_config import make_model, read_pretrained

NOT_DECAYED = ("dt_bias", "A_log", "D")  # Dao & Gu's recipe: no weight decay on the recurrence's own parameters
MOST_PADDING = 128  # rows that an embedding has beyond the tokens, at most, in the models that there are


@dataclass(frozen=True)
class Study:
    """Data and model of a run.

    train: each client's blocks [n_k, T + 1] on the device (central: one client with all); weights: theta's live vector
    and names; loss: mean NLL (nats a token) of blocks [B, T + 1]; total_steps of a client that is always there;
    moments: the clients' optimiser and its moments from round to round (--client-state); sent_vectors: of theta's
    length that a client sends in a round; uniform: whether clients count alike in a mean.
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
    best: Best
    moments: Moments | PooledMoments
    sent_vectors: int
    uniform: bool

    @property
    def optimizer(self):
        """The one of all clients."""
        return self.moments.optimizer

    @property
    def examples(self):
        """n_k: each client's sequences, what it counts in a mean."""
        return [len(blocks) for blocks in self.train]

    @property
    def lasting(self):
        """With theta, all that outlives a round. A script adds its server optimiser."""
        moments = self.moments if isinstance(self.moments, PooledMoments) else self.moments.rows
        return {"best": self.best} | ({} if moments is None else {"moments": moments})

    @property
    def eval_batch(self):
        """Sequences that are evaluated at once. Fixed per device: sums over other batches would round differently."""
        return 8 if self.run.device.type == "cpu" else 32

    def autocast(self):
        """The context of a forward pass in the run's precision."""
        return amp_context(self.run.amp, self.run.device)

    @property
    def client_weights(self):
        """What each client counts in a mean: n_k, or 1."""
        return [1] * len(self.train) if self.uniform else self.examples

    def bytes_of(self, t):
        """(up, down): what a client sends and receives in round t."""
        up, down = self.moments.bytes
        return self.sent_vectors * self.weights.bytes + up, self.weights.bytes + down

    def evaluate(self, theta, t, row):
        """What is logged of theta [n] after t rounds, see `measuring.evaluate`."""
        return evaluate(self, theta, t, row)

    def learning_rates(self, t):
        """The rate of each step of round t, the same for all its clients: --lr where the schedule is the server's."""
        rates = self._scheduled(t)
        return [self.args.lr] * len(rates) if getattr(self.args, "scheduled", None) == "server" else rates

    def server_rate(self, t):
        """The server's rate in round t: --server-lr, with --scheduled server times the schedule's share of --lr."""
        args = self.args
        shared = args.scheduled == "server" and args.lr
        return args.server_lr * (self._scheduled(t)[0] / args.lr if shared else 1)

    def _scheduled(self, t):
        """The schedule of round t's steps, of a client that is always there: by its own steps, one that is drawn rarely
        would be in its warm-up when the others end."""
        args, total = self.args, self.total_steps
        steps = range(t * args.local_updates, min((t + 1) * args.local_updates, total))
        schedule = {"kind": args.lr_scheduler, "warmup": args.warmup_steps, "min_lr": args.min_lr}
        return [lr_at(step, total, args.lr, **schedule) for step in steps]


def load_study(args, run, federated=True, sent_vectors=1, uniform=False):
    """Reads the data, builds the model and begins the run. Raises: UsageError for what is not there or does not fit."""
    reuse_large_memory()
    data = build_data(
        args.dataset, args.tokenizer, args.sequence_length, args.num_clients, args.sharding, args.seed, args.data_root
    )
    train = [blocks.to(run.device) for blocks in data.train]
    if not federated:  # one client with everybody's text
        train = [torch.cat(train)]
    rounds, total_steps = plan_rounds(args, [len(blocks) for blocks in train])
    model = start_model(args, data, run.device)
    weights = Weights(model)

    def loss(blocks):
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(run.amp, run.device):
            return model.nll(inputs, labels) / labels.numel()

    study = Study(
        args=args,
        run=run,
        data=data,
        train=train,
        model=model,
        weights=weights,
        loss=loss,
        turns=Turns(args.seed, len(train), args.participation),
        total_steps=total_steps,
        best=Best(),
        moments=client_moments(args, run, weights, len(train) if federated else 0),
        sent_vectors=sent_vectors,
        uniform=uniform,
    )
    run.begin(data.fingerprint, {"total": weights.size}, run.resolved() | {"kernel": type(model).__name__}, data.shards)
    run.plan(rounds, args.val_freq, args.save_freq, len(train))
    return study


def client_moments(args, run, weights, clients):
    """The clients' optimiser, and what becomes of its moments from round to round: --client-state.

    clients: how many there are, 0 in central training, which keeps its optimiser itself.
    """
    state = args.client_state if args.client_optimizer == "adamw" else "reset"  # SGD has no moments
    decay = {"weight_decay": args.weight_decay, "not_decayed": NOT_DECAYED}
    betas = (args.beta1, args.beta2)
    optimizer = client_optimizer(args.client_optimizer, weights.parameters, args.lr, 0.0, **decay, betas=betas)
    if state == "pooled":
        return PooledMoments(optimizer, weights)
    rows = None
    if clients and state == "keep":
        on_disk = rows_on_disk(clients, per_round(args.participation, clients), 2 * weights.bytes)
        rows = ClientRows(run.folder / "clients" / "moments", on_disk, in_place=True, device=run.device)
    return Moments(optimizer, weights, rows)


def start_model(args, data, device):
    """The model with fresh weights, or those of --init-from.

    Raises: UsageError where these are of another tokenizer.
    """
    config = Mamba2Config(
        d_model=args.d_model,
        n_layer=args.layers,
        vocab_size=data.vocab_size,
        d_state=args.d_state,
        headdim=args.headdim,
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
    others = {name: getattr(theirs, name) for name in ("expand", "d_conv", "ngroups", "norm_eps")}
    config = replace(config, **others, pad_vocab_size_multiple=theirs.pad_vocab_size_multiple if same else rows)
    model = make_model(config, kernel=args.kernel, device=device)
    model.load_state_dict(tensors)
    return model


def plan_rounds(args, examples):
    """(rounds, steps of a client that is always there) of the flags, by default as many tokens as central training.

    Raises: UsageError for a client with fewer sequences than a batch, and a warm-up that is longer than the run.
    """
    fewest = min(examples)
    if args.batch_size > fewest:
        raise UsageError(
            f"client {examples.index(fewest)} has {fewest} sequences, fewer than --batch-size {args.batch_size}: lower "
            f"it, or lower --num-clients ({args.num_clients})"
        )
    steps = int(args.n_epochs * sum(examples) / (per_round(args.participation, len(examples)) * args.batch_size))
    total_steps = args.rounds * args.local_updates if args.rounds else max(1, steps)
    if args.warmup_steps > total_steps:
        raise UsageError(f"--warmup-steps {args.warmup_steps} is more than the run's {total_steps} steps: lower it")
    return -(-total_steps // args.local_updates), total_steps


# ---- a client's work


def client_update(study, theta, k, t):
    """Client k's local steps of round t from theta [n], with its moments. Returns theta_k [n]: the model's own vector,
    valid until the next client."""
    args, run, weights, moments = study.args, study.run, study.weights, study.moments
    weights.load(theta)
    moments.load(k)
    options = {"amp": run.amp, "lrs": study.learning_rates(t), "max_norm": args.max_grad_norm}
    done = local_steps(study.loss, client_batches(study, k, t), weights, moments.optimizer, **options)
    moments.store(k)
    run.clients.work(done.steps * args.batch_size * args.sequence_length)
    if run.due(t + 1):
        run.clients.note(k, train_loss=done.loss)
        if args.client_val_sequences:
            nll, tokens, _ = statistics(study, study.data.validation[: args.client_val_sequences])
            run.clients.note(k, val_ppl=perplexity(nll, tokens))
        if args.save_deltas:
            save_deltas(study, f"client_{k}", theta, weights.theta, t)
    return weights.theta


def client_batches(study, k, t):
    """Client k's batches of round t, each a tuple of blocks [B, T + 1]: H, in the last round what the budget has left.

    Pass after pass over the client's sequences, each in an order of its own, from where the client stands.
    """
    args, blocks = study.args, study.train[k]
    first = int(study.turns.before(t)[k]) * args.local_updates
    steps = min(args.local_updates, study.total_steps - t * args.local_updates)
    rows = pass_after_pass(len(blocks), args.batch_size, first, steps, args.seed, k)
    return ((blocks[batch.to(blocks.device)],) for batch in torch.from_numpy(rows))


def sampled_blocks(study, purpose, blocks, n, k, t):
    """n of client k's blocks (all where it has fewer), in their order, drawn by the seed and the round."""
    rows = stream(study.args.seed, purpose, t, k).choice(len(blocks), min(n, len(blocks)), replace=False)
    return blocks[torch.from_numpy(np.sort(rows)).to(blocks.device)].to(study.run.device)
