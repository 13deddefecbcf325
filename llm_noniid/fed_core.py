"""What a run of this study is made of: texts, clients and model (`Study`), a client's work, and what is measured.

The rounds are in `train.py`, the algorithms in `algorithms.py`, the model and its evaluation in `text_model.py`. A run
has one or more models, thetas [G, n]: one for all clients, one for each group of them, or one for each client.
"""

from dataclasses import dataclass

import numpy as np

from common import parallel
from common.checkpoint import saving, write_json
from common.curves import number
from common.evaluation import Best, best_line, reuse_large_memory
from common.local import client_optimizer, local_steps
from common.participation import per_round
from common.rounds import Follower
from common.runlog import Run
from common.seeding import seed_torch, stream
from common.sharding import class_counts
from common.text import tokenizer_fingerprint
from common.vector import fingerprint
from llm_noniid import diagnostics, text_model
from llm_noniid.data import Texts, load_texts
from llm_noniid.partition import clients_of, statistics
from llm_noniid.text_model import TextModel
from llm_noniid.tokens import training_batches

WATCHED = 64  # clients whose updates are compared with each other in a round, at most, drawn


@dataclass(frozen=True)
class Study:
    """Data and model of a run; texts are rows of their split, int64.

    rows, held: each client's training texts and those that it is judged by; trained: the texts of each client that
    trains, rows but in central training, which has one client with all; seen, tested: validation and test texts that
    are evaluated; group [K]: which model serves each client. best: with --final best, else None.
    """

    args: object
    run: Run
    texts: Texts
    model: TextModel
    rows: list[np.ndarray]
    held: list[np.ndarray]
    trained: list[np.ndarray]
    seen: np.ndarray
    tested: np.ndarray
    group: np.ndarray
    best: Best | None

    @property
    def weights(self):
        """What is trained, as one vector (`common.vector.Weights`)."""
        return self.model.weights

    @property
    def models(self):
        """G, how many models there are."""
        return int(self.group.max()) + 1

    def shares(self, thetas, group):
        """How many training texts the clients of each theta have: [G]."""
        return np.bincount(group, [len(rows) for rows in self.rows], len(thetas))

    @property
    def lasting(self):
        """With the thetas, what of every algorithm outlives a round."""
        return {"best": self.best} if self.best else {}

    def batches(self, k, t):
        """The rows of client k's batches in round t, each int64."""
        a, rows = self.args, self.trained[k]
        steps = a.local_steps * (per_round(a.participation_rate, a.num_clients) if a.algorithm == "central" else 1)
        batches = training_batches(len(rows), a.batch_size, a.local_epochs, a.seed, t, k, steps or None)
        return [rows[batch] for batch in batches]

    def names(self, thetas):
        """{"g/<name>": view} of thetas [G, n]."""
        return {f"{g}/{name}": t for g, theta in enumerate(thetas) for name, t in self.weights.named(theta).items()}

    def facts(self):
        """`partition.statistics` of the clients."""
        return statistics(self.texts, self.rows, self.held)

    def evaluate(self, thetas, t, row):
        """What is logged of thetas [G, n] after t rounds, beside `row`; before the first all are one.

        Losses on the validation texts, as a random client would see them, and on each client's own held-out texts;
        variance of the clients' gradient norms; "alarms" where one is new; the source's generalization_gap, val_loss
        less train_loss: no gap of one model, as train_loss is the clients' during their steps. Offers thetas to `best`.
        """
        run, group = self.run, self.group
        served, by = (thetas, group) if t else (thetas[:1], 0 * group)
        figures = text_model.quality(self.model, served, self.shares(served, by), "validation", self.seen, "val")
        figures |= text_model.clients_quality(self.model, served, by, self.held)
        if self.best:
            self.best.offer(t, figures["val_loss"], thetas)
        if t:
            norms = [norm for norm in row["client_gradient_norm"] if norm is not None]
            figures["gradient_norm_variance"] = diagnostics.gradient_norm_variance(norms)
            figures["generalization_gap"] = figures["val_loss"] - row["train_loss"]
        if parallel.is_main():
            before = run.metrics() if t else []
            alarms = diagnostics.alarms_of([*before, {"round": t, **figures}], 1 - -run.total // run.every)
            if alarms and alarms[0]["round"] == t:
                run.note(f"alarm: {alarms[0]['message']}")
                figures["alarms"] = alarms
        return figures


def load_study(args, run):
    """The `Study` of a command line; begins the run: its folder with run.json."""
    a = args
    reuse_large_memory()
    texts = load_texts(a.dataset, a.data_root, a.max_samples, a.seed)
    rows, held, notes = clients_of(a, texts)
    model = text_model.load_text_model(a, texts, run.device, run.amp)
    wanted = {"validation": a.eval_samples, "test": a.eval_samples if a.test_samples is None else a.test_samples}
    seen, tested = (evaluated(len(model.tokens[s]), n, a.seed, s) for s, n in wanted.items())
    trained = [np.sort(np.concatenate(rows))] if a.algorithm == "central" else rows
    best = Best() if a.final == "best" else None
    study = Study(a, run, texts, model, rows, held, trained, seen, tested, grouped(a, texts, rows), best)
    splits = texts.fingerprint["sha256"]  # training and validation texts are drawn by the seed
    data = texts.fingerprint | {"sha256": {"test": splits["test"]}, "tokenizer_tokens": len(model.tokenizer)}
    shards = {"examples": [len(mine) + len(kept) for mine, kept in zip(rows, held, strict=True)], "sha256": splits}
    sizes = {"total": sum(p.numel() for p in model.module.parameters()), "trainable": model.weights.size}
    frozen = {name: p for name, p in model.module.named_parameters() if not p.requires_grad}
    alike = {"frozen_sha256": fingerprint(frozen), "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer)}
    run.begin(data, sizes | alike, clients=shards)
    for line in notes:
        run.note(line)
    return study


def grouped(a, texts, rows):
    """Which model serves each client, int64 [K]: one all of them, one each, or one a group of like topics."""
    if a.algorithm == "local":
        return np.arange(len(rows))
    if a.cluster == "none":
        return np.zeros(len(rows), dtype=np.int64)
    counts = class_counts(rows, texts.labels["train"], len(texts.label_names))  # [K, topics]
    return diagnostics.cluster_labels(counts, a.num_clusters)


def describe_clients(run, study):
    """Writes partition.json: each client's topics and model, and what always saying its commonest topic would score."""
    if parallel.is_main():
        path = run.folder / "partition.json"
        with saving(path):
            write_json(path, study.facts() | {"group": study.group.tolist()})


def evaluated(n, wanted, seed, split):
    """The texts of a split that are evaluated: all n (wanted 0), or so many drawn once."""
    if not 0 < wanted < n:
        return np.arange(n)
    return np.sort(stream(seed, f"evaluated {split}").choice(n, wanted, replace=False))


# ---- a client's work


def new_optimizer(study):
    """A client's optimiser, without state."""
    a = study.args
    return client_optimizer(a.client_optimizer, study.weights.parameters, a.learning_rate)


def client_update(study, theta, k, t, optimizer=None, **method):
    """Client k's steps of round t from theta [n]; theta_k is then in the model. Returns `common.local.LocalResult`.

    Args: optimizer: by default a new one; method: what an algorithm asks of `common.local.local_steps`.
    """
    a, model, clients = study.args, study.model, study.run.clients
    model.weights.load(theta)
    model.module.train()
    seed_torch(a.seed, "dropout", t, k)
    batches = study.batches(k, t)
    steps = ((model.batch("train", rows),) for rows in batches)
    options = {"amp": model.amp, "norms": True, **method}
    done = local_steps(model.loss, steps, model.weights, optimizer or new_optimizer(study), **options)
    clients.work(model.tokens["train"].scored(np.concatenate(batches)).sum())
    clients.note(k, train_loss=done.loss, gradient_norm=done.gradient_norms.double().mean())
    return done


# ---- a round's updates


class Drift(Follower):
    """How far the clients' updates of a round pull apart, a probe: `diagnostics.update_figures`, the source's
    weight_cosine_drift, and mean_cka of the clients' hidden states with those of the model after the round."""

    def __init__(self, study):
        self.study = study

    def open_round(self, clients, thetas):
        self.start, self.seen, self.wanted = thetas[0], {}, set(clients.clients)
        if len(clients) > WATCHED:  # drawn: by number they may be sorted by their skew
            draw = stream(self.study.args.seed, "watched", clients.number)
            self.wanted = set(draw.choice(sorted(self.wanted), WATCHED, replace=False).tolist())

    def accept(self, clients, theta_k):
        k = clients.current
        if k in self.wanted:
            self.seen[k] = theta_k.to("cpu", copy=True), probe(self.study)

    def result(self, clients, thetas):
        study, start, seen = self.study, self.start, clients.gather(self.seen)
        self.start = self.seen = None
        if len(seen) < 2:
            return {}
        updated, states = zip(*seen.values(), strict=True)
        figures = diagnostics.update_figures(gram_of(study, start, updated), [clients.weights[k] for k in seen])
        figures["weight_cosine_drift"] = diagnostics.weight_cosine_drift(thetas[0], updated)
        if study.args.probe_samples:
            study.weights.load(thetas[0])
            figures["mean_cka"] = diagnostics.mean_cka(probe(study), states)
        return figures


def probe(study):
    """Hidden states of --probe-samples validation texts' tokens under what the model has loaded; None of no texts."""
    rows = study.seen[: study.args.probe_samples]
    return text_model.hidden_states(study.model, "validation", rows) if len(rows) else None


def gram_of(study, theta, updated):
    """Inner products of the clients' updates from theta [n] to `updated`, a list of theta_k [n]."""
    if study.model.lora is None:
        return diagnostics.plain_gram(theta, updated)
    named = study.weights.named
    return diagnostics.update_gram(named(theta), [named(theta_k) for theta_k in updated], study.model.lora.scale)


def finish(study, thetas):
    """final/, test metrics, results: of the last round; with --final best final/ and test_..._best are the best's."""
    run, model, group, best = study.run, study.model, study.group, study.best

    def tested(thetas):
        return text_model.quality(model, thetas, study.shares(thetas, group), "test", study.tested, "test")

    run.note("evaluating on the test texts")
    quality = tested(thetas)
    if best:
        thetas = best.theta
        quality |= {f"{name}_best": value for name, value in tested(thetas).items()}
    run.write_final(lambda folder: text_model.write(model, folder, thetas, run.folder / "base"))
    results = {}
    if parallel.is_main():
        lines = run.metrics()
        last, lowest = lines[-1], best_line(lines, "val_loss")
        names = ("val_loss", "val_ppl", "mean_client_val_loss", "bytes_up", "bytes_down", "tokens", "seconds")
        results = {name: last[name] for name in names} | quality
        results |= {"best_round": lowest["round"], "best_val_loss": number(lowest["val_loss"])}
        results |= {"rounds": last["round"], "final_round": best.round if best else last["round"]}
        results["commonest_topic_accuracy"] = study.facts()["commonest_topic_accuracy"]
        results["alarms"] = [alarm for line in lines for alarm in line.get("alarms", [])]
        print(f"val_ppl {float(results['val_ppl']):.2f}  test_ppl {results['test_ppl']:.2f}")
    run.finish(results)
