"""What the five scripts of this study share: the `Study`, with data, model, local work and evaluation.

The round loop is in each script; an algorithm differs from FedAvg only there.
"""

import math
import os
import time

import numpy as np
import torch

from common import parallel
from common.allocator import reuse_large_memory
from common.before.aggregation import finite
from common.before.local import gradients
from common.checkpoint import saving, write_json
from common.cli import RunFailed, UsageError
from common.compiling import checked_compile
from common.curves import draw_curve
from common.evaluation import amp_context, bits_per_byte, perplexity, pick_device, resolve_amp
from common.seeding import seed_everything, stream, torch_stream
from mamba_fl.client_states import Best, ClientStates
from mamba_fl.cross_entropy import sample_labels, token_statistics
from mamba_fl.data import build_data, inputs_and_labels
from mamba_fl.history import training_history
from mamba_fl.ssm_config import make_config, make_model, save_pretrained

WATCHED = ("in_proj.weight", "A_log", "D", "dt_bias")  # what --save-deltas keeps, per layer


class Study:
    """Data, model and the pieces of a round. Weights travel as {name: tensor}, one entry per storage.

    Attributes: data (FederatedText), model, device, rounds (their number, also central's steps), best.
    """

    def __init__(self, args, run, federated=True):
        self.args, self.run = args, run
        reuse_large_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        kind = pick_device(args.device)
        self.device = parallel.world().device(kind)
        self.amp = resolve_amp(args.amp, self.device)
        seed_everything(args.seed)
        self.data = build_data(
            args.dataset,
            args.tokenizer,
            args.sequence_length,
            args.num_clients,
            args.sharding,
            args.seed,
            args.data_root,
        )
        self.validation = self.data.validation[: args.val_sequences or None].to(self.device)
        self.train = [blocks.to(self.device) for blocks in self.data.train]
        if not federated:  # one client with everybody's text
            self.train = [torch.cat(self.train)]
        self.examples = [len(blocks) for blocks in self.train]
        self.token_bytes = self.data.token_bytes.to(self.device)
        self._plan_rounds()
        config = make_config(
            chunk=args.chunk,
            n_layer=args.layers,
            vocab_size=self.data.vocab_size,
            d_model=args.d_model,
            d_state=args.d_state,
            headdim=args.headdim,
            expand=args.expand,
        )
        self.model = make_model(config, kernel=args.kernel, device=self.device, seed=args.seed)
        self.parameters = dict(self.model.named_parameters())  # tied weights once
        self.loss = checked_compile(self.batch_loss, self.parameters) if args.compile else self.batch_loss
        self.clients = ClientStates(args, self.parameters, self.examples)
        self.best = Best()
        self._observed = {}  # client -> what is logged of it this round
        self._left_out = []  # clients of this round
        self._left_out_since = []  # [round, client] since the last evaluation
        self._bytes = sum(p.numel() * p.element_size() for p in self.parameters.values())
        resolved = {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "kernel": type(self.model).__name__,
            "threads": torch.get_num_threads(),
        }
        run.begin(self.data.fingerprint, {"total": sum(p.numel() for p in self.parameters.values())}, resolved)

    def initial_weights(self):
        """theta before the first round: {name: tensor}, copies."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def lasting(self):
        """With theta, all that outlives a round: what a checkpoint holds. A script adds its server optimiser."""
        return {"clients": self.clients, "best": self.best}

    # ---- plan

    def _plan_rounds(self):
        a, n = self.args, self.examples
        self.per_round = max(1, int(a.participation * len(n) + 0.5))
        if a.batch_size > min(n):
            k = n.index(min(n))
            raise UsageError(
                f"client {k} has {n[k]} sequences, fewer than --batch-size {a.batch_size}: lower it, "
                f"or lower --num-clients ({a.num_clients})"
            )
        if a.budget == "source":
            steps = int(10 * a.n_epochs * min(n)) // a.batch_size**2
        else:
            steps = int(a.n_epochs * sum(n) / (self.per_round * a.batch_size))
        self.total_steps = a.rounds * a.local_updates if a.rounds else max(1, steps)
        self.rounds = -(-self.total_steps // a.local_updates)
        self.rounds_per_epoch = max(1, round(self.rounds / a.n_epochs))
        self._progress = (
            0,
            np.zeros(len(n), dtype=np.int64),
        )  # a round, and the steps each client did before it

    def local_steps(self, round):
        """Steps of a client in this round: H, or what is left of the budget in the last round."""
        return min(self.args.local_updates, self.total_steps - round * self.args.local_updates)

    def sample_clients(self, round):
        """The round's clients, dealt to processes; a client with lasting state stays in one process."""
        self._observed, self._left_out = {}, []
        self._sampled = parallel.Lanes(self._chosen(round), sticky=self.clients.lasting)
        return self._sampled

    def _chosen(self, round):
        everyone = len(self.examples)
        if self.per_round == everyone:
            return range(everyone)
        return stream(self.args.seed, "participation", round).choice(everyone, self.per_round, replace=False).tolist()

    def steps_before(self, k, round):
        """Local steps that client k did before this round. Counted from the draws of the rounds: not carried."""
        at, steps = self._progress
        if at > round:
            at, steps = 0, np.zeros_like(steps)
        for r in range(at, round):
            steps[list(self._chosen(r))] += self.local_steps(r)
        self._progress = (round, steps)
        return int(steps[k])

    def synced(self, round):
        """Whether the clients get the averaged model at the start of this round."""
        return self.args.sync == "round" or round % self.rounds_per_epoch == 0

    def evaluated(self, round):
        """Whether this round ends with an evaluation and a checkpoint."""
        return (round + 1) % self.args.val_freq == 0 or round + 1 == self.rounds

    # ---- local work

    def load(self, theta):
        """Puts the weights theta into the model."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])

    def batch_loss(self, blocks):
        """Mean NLL (nats a token) of blocks [B, T + 1]."""
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(self.amp, self.device):
            return self.model.nll(inputs, labels) / labels.numel()

    def gradients(self, blocks):
        """Puts the gradients of the blocks' loss into the parameters. Returns the loss, detached."""
        return gradients(self.loss, (blocks,), self.parameters, self.amp)

    def local_update(self, theta, k, round):
        """Client k's H optimiser steps from theta. Returns (theta_k, n_k).

        theta_k are the model's own tensors: valid until the next client.
        """
        start = self.clients.start(theta, k, fresh=self.synced(round))
        self.load(start)
        optimizer = self.clients.optimizer(k)
        steps = self.local_steps(round)
        total = torch.zeros((), device=self.device)
        for rows in self.clients.batches(k, self.steps_before(k, round), steps, round):
            total += self.gradients(self.train[k][rows.to(self.device)])
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        theta_k = {name: p.detach() for name, p in self.parameters.items()}
        self.clients.keep(k, theta_k)
        if self.evaluated(round):
            self.observe(k, train_loss=(total / steps).item())
            self._watch_client(start, theta_k, k, round)
        return theta_k, (self.examples[k] if self.args.client_weights == "examples" else 1)

    def left_out(self, k, *weights):
        """True if client k's weights (or what else it sends) are not finite: it is left out of this round."""
        if all(finite(w) for w in weights):
            return False
        self._left_out.append(k)
        self.clients.forget(k)
        return True

    def close_round(self, round, sent=1.0):
        """Counts tokens and bytes (`sent`: models a client sends up) and the clients that were left out.

        Raises RunFailed when more than half of the round's clients were.
        """
        lanes = self._sampled
        out = sorted(lanes.gather({k: 1 for k in self._left_out}))
        if out and parallel.is_main():
            print(
                f"\nround {round + 1}: update not finite, left out: client {', '.join(map(str, out))}",
                flush=True,
            )
        self._left_out_since += [[round + 1, k] for k in out]
        self._left_out = out
        if 2 * len(out) > len(lanes):
            raise RunFailed(
                f"round {round + 1}: updates of {len(out)} of {len(lanes)} clients are not finite "
                f"(clients {', '.join(map(str, out))}): lower --lr ({self.args.lr}) or --amp off"
            )
        self.run.count(
            tokens=len(lanes) * self.local_steps(round) * self.args.batch_size * self.args.sequence_length,
            bytes_up=sent * self._bytes * len(lanes),
            bytes_down=self._bytes * len(lanes) if self.synced(round) else 0,
            left_out_updates=len(out),
        )

    def observe(self, k, **values):
        """Notes what is logged of client k at the next evaluation."""
        self._observed.setdefault(k, {}).update(values)

    # ---- what the methods ask of a client's model (its weights are in self.model)

    def nll(self, model, sample):
        """Summed NLL of one sequence, for the Fisher: sample = (inputs [T], labels [T])."""
        inputs, labels = sample
        with amp_context(self.amp, self.device):
            return model.nll(inputs[None], labels[None])

    def calibration(self, k, round, samples, labels):
        """`samples` training sequences of client k: (inputs [n, T], labels [n, T]).

        labels "model": drawn from the model's own distribution (the Fisher); "data": the text's (the empirical).
        """
        draw = stream(self.args.seed, "fisher", round, k)
        rows = draw.choice(len(self.train[k]), min(samples, len(self.train[k])), replace=False)
        inputs, targets = inputs_and_labels(self.train[k][torch.from_numpy(np.sort(rows)).to(self.device)])
        if labels == "data":
            return inputs, targets
        generator = torch_stream(self.args.seed, "fisher labels", round, k)
        with torch.no_grad(), amp_context(self.amp, self.device):
            hidden = self.model.hidden(inputs).flatten(0, 1)  # [n T, D]
            drawn = sample_labels(hidden, self.model.head_weight, vocab_size=self.data.vocab_size, generator=generator)
        return inputs, drawn.view_as(targets)

    def entropy(self, k, round, samples):
        """Mean entropy (nats a token) of the model's next-token distribution on client k's held-out text."""
        held_out = self.data.held_out[k]
        if 0 < samples < len(held_out):
            rows = stream(self.args.seed, "entropy", round, k).choice(len(held_out), samples, replace=False)
            held_out = held_out[np.sort(rows)]
        inputs, labels = inputs_and_labels(held_out.to(self.device))
        sums = []
        with torch.no_grad(), amp_context(self.amp, self.device):
            for x, y in zip(inputs.split(self._eval_batch()), labels.split(self._eval_batch()), strict=True):
                hidden = self.model.hidden(x).flatten(0, 1)  # [B T, D]
                sums.append(
                    token_statistics(hidden, self.model.head_weight, y.flatten(), vocab_size=self.data.vocab_size)
                )
        return math.fsum(entropy.item() for _, entropy, _ in sums) / labels.numel()

    # ---- evaluation

    def report(self, before, theta, round):
        """Evaluates the round's theta and writes its line of metrics.jsonl; before: theta as the clients got it.

        Lists are in the order of `clients`, with null for one that was left out; `left_out` names (round, client)
        since the last evaluation.
        """
        clients = self._sampled.gather(self._observed)
        sound = {k: seen for k, seen in clients.items() if k not in self._left_out}
        fields = {"clients": list(clients)}
        for field in ("train_loss", "val_ppl", "entropy"):
            if any(field in seen for seen in sound.values()):
                fields["client_" + field] = [sound[k][field] if k in sound else None for k in clients]
        if self._left_out_since:
            fields["left_out"] = self._left_out_since
        train_loss = math.fsum(seen["train_loss"] for seen in sound.values()) / len(sound)
        self._left_out_since = []
        metrics, seconds = self.evaluate(theta, round, train_loss)
        if self.args.save_deltas and parallel.is_main():
            self.save_deltas("server", before, theta, round)
        self.run.log(round, {**metrics, **fields}, seconds)

    def evaluate(self, theta, round, train_loss):
        """({field: value} of theta on the validation text, seconds it took)."""
        started = time.perf_counter()
        self.load(theta)
        metrics = {
            "steps": min(self.total_steps, (round + 1) * self.args.local_updates),
            "train_loss": train_loss,
            "train_ppl": perplexity(train_loss, 1),
            **self.validate(self.validation, "val"),
            "generated": self.generate(),
        }
        self.best.offer(round, metrics["val_loss"], theta)
        return metrics, time.perf_counter() - started

    def validate(self, blocks, split):
        """{split_loss, split_ppl, split_bits_per_byte} of the model on blocks [n, T + 1], over all processes."""
        batches = blocks.split(self._eval_batch())
        lanes = parallel.Lanes(range(len(batches)))
        sums = lanes.gather({b: self._statistics(batches[b].to(self.device)) for b in lanes}).values()
        nll, tokens, size = (math.fsum(s[i] for s in sums) for i in range(3))
        return {
            f"{split}_loss": nll / tokens,
            f"{split}_ppl": perplexity(nll, tokens),
            f"{split}_bits_per_byte": bits_per_byte(nll, size),
        }

    @torch.no_grad()
    def _statistics(self, blocks):
        """(summed NLL, tokens, bytes) of blocks [B, T + 1], as Python numbers."""
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(self.amp, self.device):
            nll = self.model.nll(inputs, labels)
        scored = labels[labels >= 0]
        return nll.item(), len(scored), self.token_bytes[scored].sum().item()

    def _eval_batch(self):
        # Fixed per device: sums over other batches would round differently.
        return 8 if self.device.type == "cpu" else 32

    def generate(self, tokens=100):
        """The greedy continuation of --prompt, on the main process; None elsewhere or when off."""
        if not self.args.prompt or not parallel.is_main():
            return None
        ids = self.data.tokenizer.encode(self.args.prompt, add_special_tokens=False)
        out = self.model.generate(torch.tensor([ids], device=self.device), tokens)
        return self.data.tokenizer.decode(out[0].tolist())

    def _watch_client(self, start, theta_k, k, round):
        if self.args.client_val_sequences:
            blocks = self.data.validation[: self.args.client_val_sequences]
            sums = [self._statistics(b.to(self.device)) for b in blocks.split(self._eval_batch())]
            self.observe(k, val_ppl=perplexity(math.fsum(s[0] for s in sums), sum(s[1] for s in sums)))
        if self.args.save_deltas:
            self.save_deltas(f"client_{k}", start, theta_k, round)

    def save_deltas(self, who, before, after, round):
        """Stores the state-space parameters and their change in this round, arrays `layers.i.NAME`."""
        folder = self.run.folder / who
        kept = {}
        for name in after:
            if name.endswith(WATCHED) and ".mixer." in name:
                _, _, layer, _, rest = name.split(".", 4)
                kept[f"layers.{layer}.{rest.removesuffix('.weight')}"] = name
        for kind in ("params", "deltas"):
            arrays = {
                short: (after[name] - (before[name] if kind == "deltas" else 0)).cpu().numpy()
                for short, name in kept.items()
            }
            path = folder / kind / f"step_{round + 1:06d}.npz"
            fresh = path.with_suffix(".new.npz")
            with saving(path, fresh):
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(fresh, **arrays)
                os.replace(fresh, path)

    # ---- the end

    def finish(self, theta):
        """Test perplexity of the last and of the best weights, final/, training_history.json, curve.png."""
        self.load(theta)
        test_ppl = self.validate(self.data.test, "test")["test_ppl"]
        results = {"best_round": self.best.round + 1, "best_val_ppl": perplexity(self.best.loss, 1)}
        results.update(test_ppl_best=test_ppl, test_ppl_last=test_ppl)
        if self.best.round + 1 < self.rounds:
            self.load(self.best.theta)
            results["test_ppl_best"] = self.validate(self.data.test, "test")["test_ppl"]
            self.load(theta)
        lines = self.run.metrics() if parallel.is_main() else [None]
        if parallel.is_main():
            results.update(final_val_ppl=lines[-1]["val_ppl"], tokens=lines[-1]["tokens"], seconds=lines[-1]["seconds"])
            self.run.write_final(lambda folder: save_pretrained(self.model, self.data.tokenizer, folder))
            with saving(self.run.folder):
                write_json(self.run.folder / "training_history.json", training_history(self.run.command, lines))
                draw_curve(self.run.folder)
            print(
                f"test perplexity {results['test_ppl_last']:.2f} (weights of the best round, "
                f"{results['best_round']}: {results['test_ppl_best']:.2f})"
            )
        self.run.finish(results)
