"""What the five scripts of this study share: data and model of a run (`Study`), and a client's work in a round.

The round loop is in each script; an algorithm differs from FedAvg only there. What is measured is in `measuring.py`.
"""

import math

import numpy as np
import torch

from common.aggregation import ServerAdam, ServerMomentum
from common.batches import pass_after_pass
from common.cli import UsageError
from common.client_rows import ClientRows, rows_on_disk
from common.evaluation import Best, amp_context, perplexity, reuse_large_memory
from common.fisher import diagonal_fisher
from common.local import Moments, client_optimizer, local_steps, lr_at
from common.participation import Turns, per_round
from common.seeding import stream, torch_stream
from common.shared_moments import PooledMoments
from common.vector import Weights
from mamba_fl.cross_entropy import entropies, sample_labels
from mamba_fl.data import build_data, inputs_and_labels
from mamba_fl.flags import GROUPS
from mamba_fl.mamba2 import Mamba2Config
from mamba_fl.measuring import ClientDeltas, evaluate, statistics
from mamba_fl.own_parts import OwnParts
from mamba_fl.ssm_config import make_model

NOT_DECAYED = ("dt_bias", "A_log", "D")  # Dao & Gu's recipe: no weight decay on the recurrence's own parameters
ENTROPY_SEQUENCES = 8  # of a client's held-out text, for its entropy


class Study:
    """Data and model of a run, which it begins; bad input ends here, with nothing written.

    Attributes: args: flags; run; data; train: each client's blocks [n_k, T + 1] on the device; model; weights: theta's
    live vector and names; client_weights: what each client counts in a mean, n_k or 1; turns: who took part before;
    total_steps: of a client that is always there; ends: how many of them before each round; best; moments: the clients'
    optimiser, --client-state; parts: what is averaged after which round; sent_vectors: of theta's length that a client
    sends a round.
    Args: federated: False: one client with everybody's text; uniform: whether clients count alike in a mean.
    Raises: UsageError for what is not there or does not fit.
    """

    evaluate = evaluate  # what is logged of theta [n] after t rounds

    def __init__(self, args, run, federated=True, sent_vectors=1, uniform=False):
        reuse_large_memory()
        self.args, self.run, self.sent_vectors = args, run, sent_vectors
        dealt = (args.num_clients, args.sharding, args.seed, args.data_root)
        self.data = data = build_data(args.dataset, args.tokenizer, args.sequence_length, *dealt)
        train = [blocks.to(run.device) for blocks in data.train]
        self.train = train if federated else [torch.cat(train)]
        examples = [len(blocks) for blocks in self.train]
        rounds, self.total_steps = plan_rounds(args, examples)
        self.ends = round_ends(args, rounds, self.total_steps)
        sizes = {"d_model": args.d_model, "n_layer": args.layers, "d_state": args.d_state, "headdim": args.headdim}
        config = Mamba2Config(vocab_size=data.vocab_size, **sizes)
        self.model = make_model(config, kernel=args.kernel, device=run.device, seed=args.seed)
        self.weights = Weights(self.model)
        self.client_weights = [1] * len(examples) if uniform else examples
        self.turns = Turns(args.seed, len(examples), args.participation)
        self.best = Best()
        self.moments = client_moments(args, run, self.weights, len(examples) if federated else 0)
        self.parts = own_parts(args, run, self.weights, rounds, len(examples))
        facts = run.resolved() | {"kernel": type(self.model).__name__}
        run.begin(data.fingerprint, {"total": self.weights.size}, facts, data.shards)
        run.plan(rounds, args.val_freq, args.save_freq, len(examples))

    @property
    def lasting(self):
        """With theta, all that outlives a round. A script adds its server optimiser."""
        deltas = {"deltas": ClientDeltas(self)} if self.args.save_deltas else {}
        parts = {"parts": self.parts.rows} if self.parts.held else {}
        return {"best": self.best} | self.moments.lasting | parts | deltas

    @property
    def eval_batch(self):
        """Sequences that are evaluated at once. Fixed per device: sums over other batches would round differently."""
        return 8 if self.run.device.type == "cpu" else 32

    def autocast(self):
        """The context of a forward pass in the run's precision."""
        return amp_context(self.run.amp, self.run.device)

    def loss(self, blocks):
        """The mean NLL (nats a token) of blocks [B, T + 1]."""
        inputs, labels = inputs_and_labels(blocks)
        with self.autocast():
            return self.model.nll(inputs, labels) / labels.numel()

    def bytes_of(self, t):
        """(up, down): what a client sends and receives in round t: it begins with what the last one has averaged."""
        (up, down), n = self.moments.bytes_of(t), self.sent_vectors
        return n * self.parts.bytes_after(t) + up, self.parts.bytes_after(t - 1) + down

    def learning_rates(self, t):
        """The rate of each step of round t, the same for all its clients: --lr where the schedule is the server's."""
        rates = self._scheduled(t)
        return [self.args.lr] * len(rates) if getattr(self.args, "scheduled", None) == "server" else rates

    def server_rate(self, t):
        """The server's rate in round t: --server-lr, with --scheduled server times the schedule's share of --lr."""
        args = self.args
        return args.server_lr * (self._scheduled(t)[0] / args.lr if args.scheduled == "server" and args.lr else 1)

    def _scheduled(self, t):
        """The schedule of round t's steps, of a client that is always there: by its own steps, one that is drawn rarely
        would be in its warm-up when the others end."""
        return [scheduled_rate(self.args, step, self.total_steps) for step in range(self.ends[t], self.ends[t + 1])]


def client_moments(args, run, weights, clients):
    """The clients' optimiser, and what becomes of its moments from round to round: --client-state.

    clients: how many there are, 0 in central training, which keeps its optimiser itself.
    """
    state = args.client_state if args.client_optimizer == "adamw" else "reset"  # SGD has no moments
    more = {"weight_decay": args.weight_decay, "not_decayed": NOT_DECAYED, "betas": (args.beta1, args.beta2)}
    optimizer = client_optimizer(args.client_optimizer, weights.parameters, args.lr, 0.0, **more)
    every, rows = vars(args).get("moments_every", 1), None
    if clients and (state == "keep" or (state == "pooled" and every > 1)):
        rows = rows_of(args, run, "moments", clients, 2 * weights.bytes, in_place=True)
    return PooledMoments(optimizer, weights, rows, every) if state == "pooled" else Moments(optimizer, weights, rows)


def rows_of(args, run, name, clients, row_bytes, in_place=False):
    """What each client keeps from round to round under a name: `ClientRows`."""
    on_disk = rows_on_disk(clients, per_round(args.participation, clients), row_bytes)
    return ClientRows(run.folder / "clients" / name, on_disk, in_place=in_place, device=run.device)


def own_parts(args, run, weights, rounds, clients):
    """--average-every in rounds."""
    every = {group: steps // args.local_updates for group, steps in vars(args).get("average_every", ())}
    rows = rows_of(args, run, "parts", clients, weights.bytes)
    return OwnParts(weights, {GROUPS[group]: n for group, n in every.items() if n > 1}, rounds, rows)


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


def scheduled_rate(args, step, total):
    """The learning rate of step `step` of `total`."""
    return lr_at(step, total, args.lr, args.lr_scheduler, warmup=args.warmup_steps)


def round_ends(args, rounds, total):
    """[R + 1]: the steps that a client that is always there has made after 0, 1, ... R rounds, of `total`.

    --rounds-by steps: H a round. drift: round i ends at the first step at which the sum of the squared rates is i / R
    of the whole sum, and has one step at least. After QSR (Gu et al., arXiv 2310.14423), whose H is proportional to the
    rate's power -2, as weights drift apart by eta sqrt(H) in H steps of independent noise; here the warm-up counts like
    the rest.
    """
    if vars(args).get("rounds_by") != "drift":
        return [min(t * args.local_updates, total) for t in range(rounds + 1)]
    sums, ends = np.cumsum([scheduled_rate(args, step, total) ** 2 for step in range(total)]), [0]
    for i in range(1, rounds):
        end = 1 + int(np.searchsorted(sums, sums[-1] * i / rounds * (1 - 1e-12)))
        ends.append(min(max(end, ends[-1] + 1), total - rounds + i))
    return [*ends, total]


# ---- a client's work


def client_update(study, theta, k, t):
    """Client k's local steps of round t from theta [n], with its moments. Returns theta_k [n]: the model's own vector,
    valid until the next client."""
    args, run, weights, moments = study.args, study.run, study.weights, study.moments
    weights.load(theta)
    study.parts.load(k, t)
    moments.load(k)
    options = {"amp": run.amp, "lrs": study.learning_rates(t)}
    done = local_steps(study.loss, client_batches(study, k, t), weights, moments.optimizer, **options)
    moments.store(k)
    study.parts.store(k, t)
    run.clients.work(done.steps * args.batch_size * args.sequence_length)
    if run.due(t + 1):
        run.clients.note(k, train_loss=done.loss)
        if args.client_val_sequences:
            nll, tokens, _ = statistics(study, study.data.validation[: args.client_val_sequences])
            run.clients.note(k, val_ppl=perplexity(nll, tokens))
    return weights.theta


def client_batches(study, k, t):
    """Client k's batches of round t, each a tuple of blocks [B, T + 1]: H, in the last round what the budget has left.

    Pass after pass over the client's sequences, each in an order of its own, from where the client stands.
    """
    args, blocks = study.args, study.train[k]
    first, steps = study.ends[study.turns.before(t)[k]], study.ends[t + 1] - study.ends[t]
    rows = pass_after_pass(len(blocks), args.batch_size, first, steps, args.seed, k)
    return ((blocks[batch.to(blocks.device)],) for batch in torch.from_numpy(rows))


# ---- what a client counts in a mean, at the weights in the model


@torch.no_grad()
def entropy(study, k, t):
    """H_k: mean entropy (nats a token) of the model's next-token distribution on client k's held-out text."""
    held_out = sampled_blocks(study, "entropy", study.data.held_out[k], ENTROPY_SEQUENCES, k, t)
    sums = []
    for blocks in held_out.split(study.eval_batch):
        inputs, _ = inputs_and_labels(blocks)
        with study.autocast():
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [B T, D]
            sums.append(entropies(hidden, study.model.head_weight, study.data.vocab_size).sum().item())
    value = math.fsum(sums) / (len(held_out) * study.args.sequence_length)
    study.run.clients.note(k, entropy=value)
    return value


def fisher(study, k, t):
    """F_k [n]: the diagonal of the Fisher information, per sequence, over some training sequences of client k."""
    blocks = sampled_blocks(study, "fisher", study.train[k], study.args.fisher_samples, k, t)  # [n, T + 1]
    inputs, labels = inputs_and_labels(blocks)
    if study.args.fisher_labels == "model":  # else the text's: the empirical Fisher
        generator = torch_stream(study.args.seed, "fisher labels", t, k)
        with torch.no_grad(), study.autocast():
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [n T, D]
            labels = sample_labels(hidden, study.model.head_weight, study.data.vocab_size, generator).view_as(inputs)

    def nll(model, sample):  # summed over one sequence
        with study.autocast():
            return model.nll(*(part[None] for part in sample))

    return diagonal_fisher(study.model, study.weights, nll, (inputs, labels), method="loop")


def sampled_blocks(study, purpose, blocks, n, k, t):
    """n of client k's blocks (all where it has fewer), in their order, drawn by the seed and the round."""
    rows = stream(study.args.seed, purpose, t, k).choice(len(blocks), min(n, len(blocks)), replace=False)
    return blocks[torch.from_numpy(np.sort(rows)).to(blocks.device)].to(study.run.device)


# ---- the server's optimiser


def server_optimizer(args):
    """What FedMomentum's flags ask for."""
    kind, lr, b1 = args.server_optimizer, args.server_lr, args.server_momentum
    if kind == "adam":
        more = {"tau": args.server_tau, "bias_correction": args.server_bias_correction}
        return ServerAdam(lr, b1=b1, b2=args.server_beta2, **more)
    return ServerMomentum(lr, b1, nesterov=kind == "nesterov", form=args.momentum_form)
