"""What the rounds of federated LoRA are made of: the `Study`, with clients, local work, evaluation and folders.

The round loop is in `fedavg_rounds.py`, the rules that average are in `common/lowrank.py`.
"""

import math
import sys
import time

from tqdm import tqdm

from common import parallel
from common.adapter_files import read_adapter, write_adapter
from common.before.aggregation import ServerAdam, ServerMomentum, finite
from common.before.lowrank import MIXED_RANKS, AdapterMean, trained_factors
from common.cli import RunFailed, UsageError
from common.compiling import checked_compile
from common.products import fit_rank, scaling
from common.seeding import seed_torch, torch_stream
from lora_glue_fl.fitting import fit, lr_at, make_optimizer, plan_steps, warmup_steps
from lora_glue_fl.round_folders import RoundFolders
from lora_glue_fl.sharding import load_shards
from lora_glue_fl.task_model import TaskModel, check_fits

CHANGES_BASE = ("stack", "residual")


class Study:
    """Data, model and the pieces of a round.

    theta is {name: tensor}: `A.<layer>` [r, k] and `B.<layer>` [d, r] of the adapter that the server serves,
    `head.<name>`, and for stack and residual `base.<layer>`, the weight under the adapter.
    """

    def __init__(self, args, run):
        self.args, self.run = args, run
        self.task_model = TaskModel(
            args, (args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules), train=True
        )
        self.adapted, self.device = self.task_model.adapted, self.task_model.device
        self.amp = self.task_model.amp
        shards = load_shards(args.shard_dir, self.task_model.data)
        self.rows = [shard["indices"] for shard in shards]
        self.examples = [len(rows) for rows in self.rows]
        self.lengths = [self.task_model.encoded["train"].lengths()[rows] for rows in self.rows]
        self.ranks = self._client_ranks()
        self.client_scale = scaling(args.lora_alpha, args.lora_r)
        self._check_ranks()
        self.init_adapter = read_adapter(args.init_adapter) if args.init_adapter else None
        self.initial = self._initial_weights()
        self.server = _server_optimizer(args)
        self.folders = RoundFolders(run.folder, args.keep, self._fused_name(), self._about())
        loss = self.task_model.loss
        self.loss = checked_compile(loss, self._with_gradients) if args.compile else loss
        self._observed, self._left_out, self._left_out_since = {}, [], []
        self._client_metrics = {}
        self._begin(shards)

    def _with_gradients(self):
        # asked for when there is a first batch: rules train other factors in other rounds
        return {name: p for name, p in self.adapted.model.named_parameters() if p.requires_grad}

    def _client_ranks(self):
        given, clients = self.args.client_ranks or [self.args.lora_r], len(self.examples)
        if len(given) > clients:
            raise UsageError(f"{len(given)} --client-ranks for {clients} clients: give one a client, or fewer")
        return [given[k % len(given)] for k in range(clients)]

    def _check_ranks(self):
        a = self.args
        most = min(min(B.shape[0], A.shape[1]) for A, B in self.adapted.factors().values())
        served = [a.svd_rank] if a.aggregate == "svd" else []
        if max([*self.ranks, *served]) > most:
            raise UsageError(
                f"rank {max([*self.ranks, *served])} is above {most}, the smaller side of an adapted layer: lower "
                "--lora-r, --client-ranks or --svd-rank"
            )
        if a.aggregate not in MIXED_RANKS and set(self.ranks) != {a.lora_r}:
            raise UsageError(
                f"--client-ranks {' '.join(map(str, a.client_ranks))}: rule {a.aggregate} needs rank {a.lora_r} of all "
                f"clients: take --aggregate {' or '.join(MIXED_RANKS)}"
            )
        if a.aggregate == "svd" and a.svd_rank > sum(self.ranks):
            raise UsageError(
                f"--svd-rank {a.svd_rank} is above {sum(self.ranks)}, the rank of the mean of {len(self.ranks)} "
                f"clients of rank {min(self.ranks)} to {max(self.ranks)}: lower it"
            )

    def _begin(self, shards):
        a, found = self.args, self.task_model
        first = shards[0]
        facts = {
            **found.facts(),
            "clients": len(self.examples),
            "examples": self.examples,
            "ranks": self.ranks,
            **{key: first.get(key) for key in ("mode", "dirichlet_alpha", "overlap_ratio", "category_key")},
            "shard_seed": first.get("seed"),
        }
        if a.init_adapter:
            facts["init_adapter_sha256"] = self.init_adapter.sha256
        self.run.begin(facts, found.sizes(self.adapted.trainable()), found.resolved())
        n = sorted(self.examples)
        self.note(f"{len(n)} clients, examples a client {n[0]} to {n[-1]} (median {n[len(n) // 2]})")
        for note in found.notes:
            self.note(note)
        if a.aggregate == "svd" and a.svd_rank > min(self.ranks):
            self.note(f"clients of rank {min(self.ranks)} get the leading directions of what is served at {a.svd_rank}")
        self.note(self._size_on_disk())
        if parallel.is_main():
            found.save_base(self.run.folder)

    def note(self, text):
        """A line on stderr, by the main process."""
        if parallel.is_main():
            tqdm.write(text, file=sys.stderr)

    def _about(self):
        return self.adapted.about() | {"base_model": self.task_model.base_model(self.run.folder)}

    def _fused_name(self):
        a = self.args
        return (
            f"fused_r{a.svd_rank}"
            if a.aggregate == "svd"
            else f"fused_r{a.lora_r}" + "_nosvd" * (a.aggregate == "naive")
        )

    def _size_on_disk(self):
        theta = self.initial
        adapter = 4 * sum(t.numel() for name, t in theta.items() if not name.startswith("base."))
        base = 4 * sum(t.numel() for name, t in theta.items() if name.startswith("base."))
        whole = 4 * self.run.manifest["parameters"]["total"] if base else adapter  # final/
        rounds = self.folders.rounds_kept(self.args.rounds)
        clients = len(self.examples) if self.args.save_clients else 0
        total = rounds * ((clients + 1) * adapter + base) + adapter + base + whole
        return (
            f"on disk at the end: about {total / 2**20:,.1f} MiB ({rounds} rounds (--keep {' '.join(self.args.keep)}) "
            f"of {clients} + 1 adapters of {adapter / 2**20:.2f} MiB, a checkpoint, final/)"
        )

    # ---- theta

    def _initial_weights(self):
        """theta before the first round, on the device: peft's adapter (A random, B zero), or --init-adapter's."""
        a = self.args
        factors = {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in self.adapted.factors().items()}
        head = {name: p.detach().clone() for name, p in self.adapted.head.items()}
        if a.init_adapter:
            file = self.init_adapter
            check_fits(file, self.adapted)
            least = min(a.lora_r, *self.ranks)
            if file.r > least:
                flag = "--lora-r" if least == a.lora_r else "--client-ranks"
                raise UsageError(
                    f"--init-adapter has rank {file.r}, above {flag} {least}: raise {flag}, or compress it with "
                    f"fedavg_merge.py --adapters {a.init_adapter} --svd-rank {least}"
                )
            factors = self._resized(file.factors, file.scale, a.lora_r, self.client_scale, 0)
            head = {name: t.clone() for name, t in file.head.items()}
        theta = self._theta(factors, head)
        if a.aggregate in CHANGES_BASE:
            theta |= {f"base.{name}": w.detach().clone() for name, w in self.adapted.base_weights().items()}
        return {name: t.to(self.device) for name, t in theta.items()}

    def initial_weights(self):
        """theta before the first round."""
        return self.initial

    @property
    def lasting(self):
        """With theta, all that outlives a round: what a checkpoint holds."""
        return {"folders": self.folders} | ({"server": self.server} if self.server else {})

    @staticmethod
    def _theta(factors, head):
        theta = {f"{x}.{name}": t for name, pair in factors.items() for x, t in zip("AB", pair, strict=True)}
        return theta | {f"head.{name}": t for name, t in head.items()}

    def split(self, theta):
        """(factors, head, base) of theta: {layer: (A, B)}, {name: tensor}, {layer: weight}."""
        factors = {name: (theta[f"A.{name}"], theta[f"B.{name}"]) for name in self.adapted.layers}
        parts = [{n.removeprefix(p): t for n, t in theta.items() if n.startswith(p)} for p in ("head.", "base.")]
        return factors, *parts

    def scale_before(self, round):
        """s of theta's adapter before a round: the clients', from the second on that of what svd serves."""
        a = self.args
        return scaling(a.alpha, a.svd_rank) if a.aggregate == "svd" and round > 0 else self.client_scale

    def _resized(self, factors, scale, rank, new_scale, round):
        """An adapter for clients of another rank or scale; new rows of A are the same for all clients of a round."""
        if scale == new_scale and all(A.shape[0] == rank for A, _ in factors.values()):
            return factors
        return {
            name: fit_rank(A, B, rank, torch_stream(self.args.seed, f"new rows of {name}", round), scale / new_scale)
            for name, (A, B) in factors.items()
        }

    # ---- a round

    def begin_round(self, theta, round):
        """The round's clients, dealt to processes; their base weights are loaded."""
        self._observed, self._left_out, self._client_metrics = {}, [], {}
        self._sampled = parallel.Lanes(range(len(self.examples)))
        factors, _, base = self.split(theta)
        self.adapted.load_base(base)
        self._broadcast = {
            r: self._resized(factors, self.scale_before(round), r, self.client_scale, round) for r in set(self.ranks)
        }
        self._letters = trained_factors(self.args.aggregate, round)
        return self._sampled

    def adapter_mean(self, theta, round):
        """The round's `AdapterMean`, by --aggregate."""
        a = self.args
        about = {"round": round, "seed": a.seed, "split": a.svd_split}
        if a.aggregate == "svd":
            about |= {"rank": a.svd_rank, "new_scale": scaling(a.alpha, a.svd_rank)}
        elif a.aggregate == "stack":
            about |= {"rank": a.lora_r}
        return AdapterMean(a.aggregate, self.split(theta)[0], self.client_scale, self._sampled, **about)

    def local_update(self, theta, k, round):
        """Client k's epochs of AdamW from theta. Returns (factors_k, head_k, n_k).

        What it returns are the model's own tensors: valid until the next client.
        """
        a, adapted = self.args, self.adapted
        head = self.split(theta)[1]
        adapted.load(self._broadcast[self.ranks[k]], head, self.client_scale)
        trained = adapted.trainable(self._letters)
        anchors = {name: p.detach().clone() for name, p in trained.items()} if a.mu else None
        steps = plan_steps(self.lengths[k], a, a.local_epochs, round, k)
        steps = [[self.rows[k][rows] for rows in micro] for micro in steps]
        total = len(steps)
        lrs = [lr_at(i, total, a.learning_rate, warmup_steps(a, total), a.lr_scheduler) for i in range(total)]
        self.task_model.model.train()
        seed_torch(a.seed, "dropout", round, k)
        loss = fit(
            self.loss,
            self.task_model.encoded["train"],
            steps,
            trained,
            make_optimizer(trained, a),
            lrs,
            a,
            self.amp,
            self.device,
            anchors,
        )
        self._observed[k] = loss.item()
        factors_k = {name: (A.detach(), B.detach()) for name, (A, B) in adapted.factors().items()}
        head_k = {f"head.{name}": p.detach() for name, p in adapted.head.items()}
        return factors_k, head_k, self.examples[k] if a.client_weights == "examples" else 1

    def left_out(self, k, factors_k, head_k):
        """True if what client k trained is not finite: it is left out of this round."""
        if finite(self._theta(factors_k, {}) | head_k):
            return False
        self._left_out.append(k)
        return True

    def keep_client(self, k, factors_k, head_k, round):
        """Writes client k's adapter and, with --eval-clients, evaluates it."""
        if self.args.eval_clients:
            self._client_metrics[k] = self.task_model.evaluate(share=False)
        if self.args.save_clients:
            head = {name.removeprefix("head."): t for name, t in head_k.items()}
            self.folders.client(round, k, factors_k, head, self.client_scale * self.ranks[k])

    def check_left_out(self, round):
        """Names the clients that were left out. Raises RunFailed when they are more than half of all."""
        out = sorted(self._sampled.gather({k: 1 for k in self._left_out}))
        names = ", ".join(str(k + 1) for k in out)
        if out:
            self.note(f"warning: round {round + 1}: update not finite, left out: client {names}")
        self._left_out = out
        self._left_out_since += [[round + 1, k] for k in out]
        if 2 * len(out) > len(self.examples):
            raise RunFailed(
                f"round {round + 1}: updates of {len(out)} of {len(self.examples)} clients are not finite (clients "
                f"{names}): lower --learning-rate ({self.args.learning_rate:g}) or --amp off"
            )

    def close_round(self, served, round):
        """Counts examples and bytes."""
        head = sum(p.numel() for p in self.adapted.head.values())
        up = sum(self._numbers(r, self._letters) + head for r in self.ranks)
        # what changed for the clients. stack, residual: everybody's stacked factors or their product, from which a
        # client has the base's update and mean A, mean B; a fresh A all can draw
        letters = {"ffa": "B", "rolora": self._letters, "stack": "", "residual": ""}.get(self.args.aggregate, "AB")
        down = self._numbers(self._served_rank(), letters) + head
        if served.updates:
            down += self._stacked()
        # once, before the first round: everybody's adapter and head
        first = sum(self._numbers(r, "AB") + head for r in self.ranks) if round == 0 else 0
        self.run.count(
            examples=sum(self._trained_examples(k) for k in range(len(self.examples))),
            bytes_up=4 * up,
            bytes_down=4 * (down * len(self.examples) + first),
            left_out_updates=len(self._left_out),
        )

    def _trained_examples(self, k):
        return math.ceil(self.examples[k] * self.args.local_epochs)

    def _stacked(self):
        """Numbers of all clients' factors, or where they are fewer of their products [d, k]."""
        rank, sizes = sum(self.ranks), [(B.shape[0], A.shape[1]) for A, B in self.adapted.factors().values()]
        return sum(min(rank * (d + k), d * k) for d, k in sizes)

    def _served_rank(self):
        return self.args.svd_rank if self.args.aggregate == "svd" else self.args.lora_r

    def _numbers(self, rank, letters):
        return sum(
            rank * {"A": A.shape[1], "B": B.shape[0]}[x] for A, B in self.adapted.factors().values() for x in letters
        )

    def step(self):
        """The server optimiser's step(theta, delta), None for plain averaging."""
        return self.server.step if self.server else None

    def serve(self, theta, served, heads):
        """theta after the round. Args: served: of `AdapterMean.result`; heads: a `WeightedMean` of the heads."""
        mean = self.step()(self.head(theta), heads.delta()) if self.server else heads.result()
        new = self._theta(served.factors, {}) | mean
        if self.args.aggregate in CHANGES_BASE:
            base = self.adapted.updated(self.split(theta)[2], served.updates)
            new |= {f"base.{name}": weight for name, weight in base.items()}
        return new

    @staticmethod
    def head(theta):
        """The head's entries of theta."""
        return {name: t for name, t in theta.items() if name.startswith("head.")}

    # ---- evaluation and folders

    def load(self, theta, round):
        """Puts what is served after `round` into the model."""
        factors, head, base = self.split(theta)
        self.adapted.load_base(base)
        self.adapted.load(factors, head, self.scale_before(round + 1))

    def report(self, theta, served, round):
        """Evaluates theta where asked, and writes the round's line of metrics.jsonl and the server's folder."""
        a, started = self.args, time.perf_counter()
        last = round + 1 == a.rounds
        losses = self._sampled.gather({k: v for k, v in self._observed.items() if k not in self._left_out})
        weights = [self.examples[k] for k in losses]
        fields = {
            "train_loss": math.fsum(w * v for w, v in zip(weights, losses.values(), strict=True)) / sum(weights),
            "clients": list(losses),
            "client_train_loss": list(losses.values()),
            "aggregation_error": served.error,
            "delta_norm": served.norm,
        }
        if a.aggregate == "svd":
            fields |= {"discarded_energy": served.discarded, "missing_directions": served.missing}
        if self._left_out_since:
            fields["left_out"], self._left_out_since = self._left_out_since, []
        metrics = {}
        if a.eval_each_round or last:
            self.load(theta, round)
            metrics = self.task_model.evaluate()
            self.folders.offer(round, metrics[self.task_model.headline])
        clients = self._sampled.gather(self._client_metrics)
        for name in next(iter(clients.values()), {}):
            fields[f"client_{name}"] = [found[name] for found in clients.values()]
        self.run.log(round, {**metrics, **fields}, time.perf_counter() - started)
        factors, head, base = self.split(theta)
        changed = {f"{name}.weight": weight for name, weight in base.items()}
        alpha = self.scale_before(round + 1) * self._served_rank()
        self.folders.server(round, factors, head, alpha, changed, self._fuse_manifest(round, served, metrics))

    def _fuse_manifest(self, round, served, metrics):
        a = self.args
        clients = [k for k in range(len(self.examples)) if k not in self._left_out]
        weights = [self.examples[k] if a.client_weights == "examples" else 1 for k in clients]
        return {
            "dataset": "glue" if a.dataset == "glue" else a.dataset,
            "model_id": self.task_model.encoder.name,
            "task": self.task_model.task.name,
            "round": round + 1,
            "k_adapters": len(clients),
            "adapters": [f"../client_{k + 1}/adapter" for k in clients] if a.save_clients else [],
            "weights": [w / sum(weights) for w in weights],
            "left_out": [k + 1 for k in self._left_out],
            "aggregate": a.aggregate,
            "svd_rank": a.svd_rank if a.aggregate == "svd" else None,
            "alpha": self.scale_before(round + 1) * self._served_rank(),
            "target_modules": list(self.adapted.targets),
            "aggregation_error": served.error,
            "discarded_energy": served.discarded,
            "metrics": metrics,
        }

    def finish(self, theta):
        """final/ and the results: an adapter, or for stack and residual the merged model."""
        lines = self.run.metrics() if parallel.is_main() else []
        self.load(theta, self.args.rounds - 1)
        self.run.write_final(lambda folder: self._write_final(folder, theta))
        if parallel.is_main():
            line = lines[-1]
            results = {name: v for name, v in line.items() if name.startswith("val_")}
            results |= {"best_round": self.folders.best + 1, f"best_{self.task_model.headline}": self.folders.value}
            results |= {
                key: line[key] for key in ("aggregation_error", "bytes_up", "bytes_down", "examples", "seconds")
            }
            results["rounds"] = line["round"]
            print("  ".join(f"{name} {v:.4f}" for name, v in results.items() if name.startswith("val_")))
            self.run.finish(results)

    def _write_final(self, folder, theta):
        if self.args.aggregate in CHANGES_BASE:
            self.adapted.save_merged(folder)
            self.task_model.tokenizer.save_pretrained(folder)
            return
        factors, head, _ = self.split(theta)
        alpha = self.scale_before(self.args.rounds) * self._served_rank()
        write_adapter(folder, factors, head, alpha=alpha, **self._about())


def _server_optimizer(args):
    if args.server_optimizer == "none":
        return None
    if args.aggregate not in ("naive", "ffa", "rolora"):
        raise UsageError(
            f"--server-optimizer {args.server_optimizer} with --aggregate {args.aggregate}: its factors are new in "
            "every round, moments of them mean nothing: take naive, ffa or rolora"
        )
    if args.server_optimizer == "momentum":
        return ServerMomentum(args.server_lr, args.server_beta)
    return ServerAdam(args.server_optimizer, args.server_lr)
