"""A run on disk: its folder, its manifest (run.json), a line of JSON per evaluated round, progress, resume.

    with start_run("fed_avg", args, name) as run:
        study = load_study(args, run)                    # data, model: bad input ends here, nothing written
        run.begin(data, parameters, clients=facts)       # the folder and run.json
        theta = run.restore(theta, named, server=server) # the last checkpoint, or theta as it is
        run.report(0, theta, evaluate)                   # the metrics before training
        for t in run.rounds(total, every):
            clients = run.sample(weights, participation, t, up=bytes, down=bytes)
            for k in clients: ...
            run.report(t + 1, theta, evaluate)           # left-out clients, counters, metrics.jsonl, checkpoint
        run.finish(results)

Every process of a run calls every function; only the main process writes and prints.
"""

import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import checkpoint, parallel
from common.cli import UsageError, method_of
from common.client_rows import ClientRows
from common.curves import read_metrics
from common.evaluation import pick_device, resolve_amp
from common.participation import participants
from common.provenance import git_commit, tracker, versions
from common.seeding import seed_everything

# Flags that say how to run, not what to compute: --resume may change them.
NOT_COMPARED = {"resume", "overwrite", "data_root", "output_dir", "run_name", "track", "log_dir", "num_workers"}
NOT_COMPARED |= {"use_wandb", "wandb_project", "cache_dir", "processes"}
NOT_COMPARED |= {"config"}  # what it says is in the other flags


def start_run(command, args, name, unit="tokens"):
    """Checks the run folder `args.output_dir/name` against `args` and returns a Run; writes nothing.

    unit: what the run counts its training examples in: "tokens" or "images".

    Raises UsageError if the folder holds another run. Exits with code 0 if that very run is finished already.
    """
    prepare_machine(args)
    name = args.run_name or name
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(f"--run-name {name} is not a name of one folder: put the way to it into --output-dir")
    if args.track != "off" and importlib.util.find_spec(args.track) is None:
        raise UsageError(f"--track {args.track} needs the package {args.track}: pip install {args.track}")
    folder = Path(args.output_dir) / name
    run = Run(command, args, folder, unit)
    manifest = folder / "run.json"
    if not folder.exists():
        return run
    if not manifest.exists():
        if any(folder.iterdir()) and not (folder / "run.json.new").exists():
            raise UsageError(f"{folder} is not a run folder: choose another --run-name or --output-dir")
        return run
    if args.overwrite and not args.resume:
        return run
    try:
        before = checkpoint.read_json(manifest)
    except ValueError:
        raise UsageError(f"{manifest} is not JSON: use --overwrite or another --run-name") from None
    if before["command"] != command:
        raise UsageError(f"{folder} is a run of {before['command']}, not of {command}: choose another --run-name")
    if not args.resume:
        raise UsageError(
            f"{folder} exists ({before['status']}): --resume goes on with it, --overwrite deletes it, "
            "--run-name gives another"
        )
    changed = [
        f"--{key.replace('_', '-')} {before['args'].get(key)} -> {value}"
        for key, value in run.compared_args().items()
        if before["args"].get(key) != value
    ]
    if changed:
        raise UsageError(f"{folder} was started with other flags: {', '.join(changed)}; choose another --run-name")
    if before["status"] == "finished":
        if parallel.is_main():
            print(f"already finished: {folder}\n{folder}")
        sys.exit(0)
    run.before = before
    return run


def prepare_machine(args):
    """Joins the other processes, sets threads and seeds: what comes before anything is computed.

    A federated run has one thread a process, so that its bits do not depend on how many cores a machine has.
    """
    device = pick_device(args.device)
    parallel.init_parallel(device)
    threads = args.threads or (1 if hasattr(args, "processes") else 0)
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    seed_everything(args.seed)


class Run:
    """One run of one script. Made by `start_run`; see this module's docstring."""

    def __init__(self, command, args, folder, unit="tokens"):
        self.command, self.args, self.folder, self.unit = command, args, folder, unit
        self.before = None  # run.json of the interrupted run that this one goes on with
        self.begun = False
        self.start_round = self._at = 0
        self.counters = {"bytes_up": 0, "bytes_down": 0, unit: 0, "left_out_updates": 0}
        self.seconds = self.eval_seconds = 0.0  # of the sessions before this one, then of this one too
        self.total, self.every, self.save_every = 0, 1, 1
        self.device = parallel.world().device(pick_device(args.device))
        self.amp = resolve_amp(args.amp, self.device)
        self.clients = None  # the `Round` that `sample` made last
        self._lasting, self._named, self._ended, self._left_out, self._first = {}, None, None, [], True
        self._bar = self._tracker = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._bar is not None:
            self._bar.close()
        if self.begun and kind is not None and parallel.is_main():
            status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
            reason = str(error) or kind.__name__
            left_out = isinstance(error, parallel.LeftOut)
            self.manifest.update(status=status, reason=reason)
            self.manifest["ended"] = {
                "how": status,
                "by": "left_out" if left_out else None,
                "round": error.round + 1 if left_out else self._at,
                "clients": error.clients if left_out else None,
                "reason": reason,
            }
            try:
                checkpoint.write_json(self.folder / "run.json", self.manifest)
            except OSError as second:  # the disk is full: what is there stays whole
                print(f"run.json not updated: {second}", file=sys.stderr)
        return False

    def compared_args(self):
        """The flags that decide what is computed, as JSON values."""
        return {k: v for k, v in json.loads(json.dumps(vars(self.args), default=str)).items() if k not in NOT_COMPARED}

    # ---- life of a run

    def resolved(self):
        """What flags came to on this machine, for run.json."""
        return {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def begin(self, data, parameters, resolved=None, clients=None):
        """Makes the folder and writes run.json.

        data: what identifies the data, the same for every seed; parameters: counts; clients: facts of the shards, which
        differ from seed to seed; resolved: as `resolved`.
        Raises UsageError where a run that is gone on with was started on other data or came to other choices.
        """
        data = json.loads(json.dumps(data))
        clients = json.loads(json.dumps(clients))
        same = self.before is None or (
            _without_source(self.before["data"]) == _without_source(data) and self.before.get("clients") == clients
        )
        if not same:
            raise UsageError(f"{self.folder} was started on other data (see its run.json): choose another --run-name")
        resolved = json.loads(json.dumps(self.resolved() if resolved is None else resolved))
        self._compare_machine(resolved)
        self.manifest = {
            "command": self.command,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "args": json.loads(json.dumps(vars(self.args), default=str)),
            "method": json.loads(json.dumps(method_of(self.args, NOT_COMPARED), default=str)),
            "status": "running",
            "reason": None,
            "ended": None,
            "results": None,
            "git_commit": git_commit(),
            "processes": parallel.world().size,
            "resolved": resolved,
            "versions": versions(),
            "data": data,
            "clients": clients,
            "parameters": parameters,
        }
        parallel.barrier()  # every process has looked at the folder before it changes
        if parallel.is_main():
            if self.before is None and self.folder.exists():
                # out of the way first: a death while deleting must not leave half a run under this name
                old = self.folder.with_name(f".{self.folder.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.folder, old)
                shutil.rmtree(old)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                checkpoint.write_json(self.folder / "run.json", self.manifest)
            except OSError as error:
                raise UsageError(f"cannot write {self.folder}: {error.strerror}; choose --output-dir") from error
        self.begun = True
        self._tracker = tracker(self.args, self.folder, self.command) if parallel.is_main() else None
        self._t0 = time.perf_counter()
        parallel.barrier()

    def _compare_machine(self, resolved):
        if self.before is None:
            return
        other = [f"{k} {v} -> {resolved.get(k)}" for k, v in self.before["resolved"].items() if resolved.get(k) != v]
        if other:
            raise UsageError(f"{self.folder} was started with {', '.join(other)}: name these flags as they were then")
        now = versions()
        other = [f"{k} {v} -> {now.get(k)}" for k, v in self.before["versions"].items() if now.get(k) != v]
        if other and parallel.is_main():
            print(f"warning: other versions than at the start, bits may differ: {', '.join(other)}", file=sys.stderr)

    def restore(self, theta, named=None, same_shapes=True, **lasting):
        """The weights to go on with: the checkpoint's, loaded into the `lasting` objects too; `theta` if there is none.

        theta: a vector [n], and named: function of it to {name: view} (`common.vector.Weights.named`), so that files
        have names; or {name: tensor} without `named`, whose shapes may change from round to round where same_shapes is
        False. lasting: all else that outlives a round, by name: objects with state_dict() and load_state_dict(tensors),
        or `ClientRows`. What is named here is exactly what a checkpoint holds.
        """
        self._lasting, self._named = lasting, named or (lambda tensors: tensors)
        into = self._named(theta)
        device = next(iter(into.values())).device
        checkpoint_folder = self.folder / "checkpoint"
        state = checkpoint.load(checkpoint_folder, device)
        self._cut_metrics(state[0]["round"] if state else -1)
        if state is None:
            return theta
        meta, shared = state
        saved = shared["theta"]
        if saved.keys() != into.keys() or (same_shapes and any(saved[n].shape != into[n].shape for n in into)):
            raise UsageError(f"{self.folder}/checkpoint is of another model: use --overwrite or another --run-name")
        for name, thing in lasting.items():
            if isinstance(thing, ClientRows):
                thing.load(checkpoint_folder, name, meta["rows"][name])
            else:
                thing.load_state_dict(shared.get(name, {}))
        self.start_round, self.counters = meta["round"], meta["counters"]
        self.seconds, self.eval_seconds = meta["seconds"], meta["eval_seconds"]
        self._ended, self._left_out, self._first = meta["ended"], meta["left_out"], False
        self.note(f"resumed after round {self.start_round}")
        if isinstance(theta, dict):
            return {key: saved[key] for key in theta}
        result = theta.clone()
        for name, view in self._named(result).items():
            view.copy_(saved[name])
        return result

    def sample(self, weights, participation, t, *, up=0, down=0, work=None):
        """The clients of round t (from 0), a `common.parallel.Round`: a share of all, without replacement, by the seed.

        weights: what each of the K clients counts in a mean; up, down: bytes that a client sends and receives in this
        round, a number, a list of all K, or a function of its id; work: size of each client's work, for an even load.
        """
        chosen = participants(self.args.seed, len(weights), participation, t)
        lr = next((name for name in ("lr", "learning_rate") if hasattr(self.args, name)), None)
        hint = "lower the learning rate or --amp off"
        if lr:
            hint = f"lower --{lr.replace('_', '-')} ({getattr(self.args, lr):g}) or --amp off"
        closers = [thing.close_round for thing in self._lasting.values() if isinstance(thing, ClientRows)]
        self.clients = parallel.Round(chosen, work, closers, hint, t)
        self._weights, self._traffic = weights, (up, down)
        return self.clients

    def note(self, text):
        """A line on stderr, by the main process."""
        if parallel.is_main():
            tqdm.write(text, file=sys.stderr)

    def due(self, t):
        """Whether there is an evaluation after t rounds."""
        return t == 0 or t % self.every == 0 or t == self.total

    def stop(self, by, reason=None):
        """Ends the run after this round. by: the alarm or rule."""
        self._ended = {"how": "stopped", "by": by, "round": self._at, "clients": None, "reason": reason}

    def report(self, t, theta, evaluate, complete=None):
        """What follows t rounds: counts the round's clients; where it is due, evaluates, logs and saves.

        evaluate: function without arguments to {metric: value}, called by every process; complete: function of the
        row of metrics.jsonl to more of it. Nothing happens for t = 0 in a run that is gone on with.
        Returns the row, or None.
        """
        clients, self.clients, self._at = self.clients, None, t
        if t == 0 and not self._first:
            return None
        if clients is not None:
            self._count_round(clients)
        row = None
        if self.due(t):
            started = time.perf_counter()
            row = self._client_fields(clients) if clients is not None else {}
            row |= evaluate()
            row |= complete(row) if complete is not None else {}
            self._log(t, row, time.perf_counter() - started)
        if t and (t % self.save_every == 0 or t == self.total or self._ended):
            self._save(theta)
        return row

    def _count_round(self, clients):
        out = clients.left_out
        if out:
            names = ", ".join(map(str, out))
            self.note(f"warning: round {self._at}: update not finite, left out: client {names}")
        self._left_out += [[self._at, k] for k in out]
        up, down = (sum(_amount(bytes_, k) for k in clients.clients) for bytes_ in self._traffic)
        self.count(bytes_up=up, bytes_down=down, left_out_updates=len(out), **{self.unit: clients.amount})

    def _client_fields(self, clients):
        """`clients` (ids), client_NAME of each (null: left out), train_loss: their mean by the clients' weights."""
        notes = clients.notes()
        row = {}
        losses = {k: seen["train_loss"] for k, seen in notes.items() if seen and "train_loss" in seen}
        if losses:
            weight = math.fsum(self._weights[k] for k in losses)
            row["train_loss"] = math.fsum(self._weights[k] * v for k, v in losses.items()) / weight
        row["clients"] = list(notes)
        for name in dict.fromkeys(name for seen in notes.values() if seen for name in seen):
            row[f"client_{name}"] = [seen and seen.get(name) for seen in notes.values()]
        if self._left_out:
            row["left_out"], self._left_out = self._left_out, []
        return row

    def plan(self, total, every=1, save_every=None):
        """How many rounds there are, and after how many there is an evaluation and a checkpoint."""
        self.total, self.every, self.save_every = total, every, save_every or every

    def rounds(self, total=None):
        """The rounds still to do (from 0), with a progress bar, until `stop`."""
        self.total = total or self.total
        main = parallel.is_main()
        if main:
            self._bar = tqdm(total=self.total, initial=self.start_round, unit="round", disable=None, dynamic_ncols=True)
        for t in range(self.start_round, self.total):
            if self._ended:
                break
            yield t
            if main:
                self._bar.update()
        if main:
            self._bar.close()

    def count(self, **amounts):
        """Adds to the run's counters (bytes_up, bytes_down, UNIT, left_out_updates); the same on every process."""
        for name, amount in amounts.items():
            self.counters[name] += int(amount)

    def _log(self, t, metrics, eval_seconds):
        """Appends the line of metrics.jsonl after t rounds."""
        self.eval_seconds += eval_seconds
        seconds = self.seconds + time.perf_counter() - self._t0
        line = {
            "round": t,
            **self.counters,
            **metrics,
            "seconds": seconds,
            f"{self.unit}_per_second": self.counters[self.unit] / max(seconds - self.eval_seconds, 1e-9),
        }
        if not parallel.is_main():
            return
        path = self.folder / "metrics.jsonl"
        with checkpoint.saving(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_json_safe(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts it
        names = ("train_loss", "val_loss", "val_ppl", "val_accuracy", "val_f1", "val_matthews", "val_pearson")
        shown = {k: line[k] for k in names if k in line}
        text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        tqdm.write(
            f"round {t}/{self.total}  {text}  {line[self.unit + '_per_second']:.0f} {self.unit}/s",
            file=sys.stderr,
        )
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if k.startswith("val_")}, refresh=False)
        if self._tracker:
            self._tracker(line)

    def _save(self, theta):
        """Replaces the checkpoint by the state after this round: exactly theta, what is lasting and the counters."""
        rows = {name: thing for name, thing in self._lasting.items() if isinstance(thing, ClientRows)}
        states = {name: thing.state_dict() for name, thing in self._lasting.items() if name not in rows}
        shared = {"theta": self._named(theta)} | {name: tensors for name, tensors in states.items() if tensors}
        meta = {
            "round": self._at,
            "counters": self.counters,
            "seconds": self.seconds + time.perf_counter() - self._t0,
            "eval_seconds": self.eval_seconds,
            "ended": self._ended,
            "left_out": self._left_out,
        }
        checkpoint.save(self.folder / "checkpoint", meta, shared, rows)

    def metrics(self):
        """The lines of metrics.jsonl so far, as a list of dicts."""
        return read_metrics(self.folder)

    def write_final(self, write):
        """Makes `final/` whole or not at all: `write(folder)` fills it. The main process's part only."""
        if not parallel.is_main():
            return
        fresh = self.folder / "final.new"
        shutil.rmtree(fresh, ignore_errors=True)
        with checkpoint.saving(self.folder / "final", fresh):
            write(fresh)
            checkpoint.recover(self.folder / "final")
            checkpoint.swap(fresh, self.folder / "final")

    def finish(self, results):
        """Marks the run finished, with its results; the last line printed is the run folder."""
        for thing in self._lasting.values():
            if isinstance(thing, ClientRows):
                thing.remove()
        if not parallel.is_main():
            return
        ended = self._ended or {"how": "finished", "by": None, "round": self.total, "clients": None, "reason": None}
        self.manifest.update(status="finished", ended=ended, results=_json_safe(results))
        with checkpoint.saving(self.folder / "run.json"):
            checkpoint.write_json(self.folder / "run.json", self.manifest)
        print(self.folder)

    def _cut_metrics(self, rounds):
        # lines past the checkpoint (-1: there is none) are of rounds that will be done again
        path = self.folder / "metrics.jsonl"
        if parallel.is_main() and path.exists():
            lines = [line for line in read_metrics(self.folder) if line["round"] <= rounds]
            fresh = path.with_name("metrics.jsonl.new")
            with checkpoint.saving(path, fresh):
                fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                checkpoint.sync(fresh)
                os.replace(fresh, path)
        parallel.barrier()


def _amount(amounts, k):
    """Client k's of a number for all, a list, or a function of the id."""
    if callable(amounts):
        return amounts(k)
    return amounts if isinstance(amounts, (int, float)) else amounts[k]


def _without_source(data):
    # where the files lie may change between sessions; what is in them may not
    return {key: value for key, value in data.items() if key != "source"}


def _json_safe(value):
    # JSON has no nan and inf: they are written as text, which every reader understands
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value
