"""A run from round to round: its folder, its clients, evaluations and checkpoints, progress, resume.

    with start_run("fed_avg", args, name) as run:
        study = load_study(args, run)                    # data, model: bad input ends here, nothing written
        run.begin(data, parameters, clients=facts)       # the folder and run.json
        run.plan(total, every, clients=K)                # how many rounds; says on stderr what runs
        theta = run.restore(theta, named, server=server) # the last checkpoint, or theta as it is
        run.watch(*probes)                               # what is measured of the rounds' clients
        run.report(0, theta, evaluate)                   # the metrics before training
        for t in run.rounds():
            clients = run.sample(study, t)
            for k in clients: ...
            run.report(t + 1, theta, evaluate)           # left-out clients, counters, metrics.jsonl, checkpoint
        run.finish(results)

Every process of a run calls every function; only the main process writes and prints.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import checkpoint, hosts, manifest, metrics_log, parallel, rounds
from common.cli import RunFailed, UsageError, duration, say, say_waiting
from common.client_rows import ClientRows
from common.curves import number, read_metrics
from common.evaluation import pick_device, resolve_amp
from common.participation import participants, participation_of, per_round
from common.seeding import seed_everything

LEAVING = 5  # seconds that a killed process may need until all its files are closed


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
    folder = folder.resolve() if folder.is_symlink() else folder
    if parallel.world().size > 1:  # one process need not hash the code
        manifest.check_alike(manifest.of_process(command, args))
    before = parallel.from_main(manifest.check_folder, folder, command, args)
    if before and before["status"] == "finished":
        if parallel.is_main():
            print(f"already finished: {folder}\n{folder}")
        sys.exit(0)
    return Run(command, args, folder, unit, before)


def prepare_machine(args):
    """Joins the other processes, sets threads and seeds: what comes before anything is computed."""
    device = pick_device(args.device)
    parallel.init_parallel(device)
    threads = args.threads or (1 if hasattr(args, "processes") else 0)
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    seed_everything(args.seed)


class Run:
    """One run of one script. Made by `start_run`; see this module's docstring."""

    def __init__(self, command, args, folder, unit, before):
        self.command, self.args, self.folder, self.unit = command, args, folder, unit
        self.before = before  # run.json of the interrupted run that this one goes on with
        self.manifest = None
        self.begun = False  # from when on run.json is this run's
        self.start_round = self._at = 0
        self.counters = {"bytes_up": 0, "bytes_down": 0, unit: 0, "left_out_updates": 0}
        self.seconds = self.eval_seconds = 0.0  # of the sessions before this one, then of this one too
        self.total, self.every, self.save_every = 0, 1, 1
        self.device = pick_device(args.device)
        self.amp = resolve_amp(args.amp, self.device)
        self.clients = None  # the `Round` that `sample` made last
        self._lasting, self._named, self._ended, self._left_out = {}, None, None, []
        self._probes, self._watching, self._theta = (), (), None  # theta: as the round begins
        self._lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        self._tracker = self._bar = None
        self._shown = ""  # of the last evaluation

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._bar is not None:
            self._bar.close()
        hosts.on_loss(lambda reason: None)
        try:
            if self.begun and kind is not None and parallel.is_main():
                self._note_end(kind, error)
        finally:
            if self._lock.is_locked:
                with contextlib.suppress(OSError):
                    os.unlink(self._lock.lock_file)
                self._lock.release()
        if self.begun and isinstance(error, OSError) and error.errno in checkpoint.DISK:
            with checkpoint.saving(error.filename or self.folder):
                raise error

    def _note_end(self, kind, error):
        """Writes into run.json that the run ended by an exception."""
        how, reason = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed", str(error) or kind.__name__
        if how == "interrupted":
            error.add_note("run the same command with --resume to go on")
        if isinstance(error, rounds.LeftOut):
            ended = manifest.ended(how, error.round + 1, "left_out", error.clients, reason)
        else:
            by = "not_finite" if isinstance(error, parallel.AllFailed) else None
            ended = manifest.ended(how, self._at, by, reason=reason)
        self.manifest.update(status=how, reason=reason, ended=ended)
        try:
            checkpoint.write_json(self.folder / "run.json", self.manifest)
        except OSError as second:  # the disk is full: what is there stays whole
            print(f"run.json not updated: {second}", file=sys.stderr)

    # ---- life of a run

    def resolved(self):
        """What flags came to on this machine, for run.json."""
        return {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def begin(self, data, parameters, resolved=None, clients=None):
        """Makes the folder and writes run.json; in a run that is gone on with that waits until `restore` is through.

        data: what identifies the data, the same for every seed; parameters: counts; clients: facts of the shards, which
        differ from seed to seed; resolved: as `resolved`.
        Raises UsageError where a run that is gone on with was started on other data or came to other choices.
        """
        resolved = resolved or self.resolved()
        self.manifest = manifest.of_run(self.command, self.args, resolved, data, clients, parameters)
        facts = {key: self.manifest[key] for key in ("resolved", "data", "clients", "parameters")}
        manifest.check_alike(facts, self.device)
        self._t0 = time.perf_counter()
        if self.before is not None:
            manifest.check_same(self.folder, self.before, self.manifest)
            return
        parallel.from_main(self._claim)
        self._own_folder()

    def _own_folder(self):
        parallel.from_main(self._write_manifest)
        self.begun = True
        if parallel.is_main():
            hosts.on_loss(lambda reason: self._note_end(RunFailed, RunFailed(reason)))
            say_waiting()
            self._tracker = metrics_log.tracker(self.args, self.folder, self.command)

    def _claim(self):
        """Holds the folder's lock from here on; what `start_run` has found there still holds."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=LEAVING)
        except Timeout:
            raise UsageError(
                f"{self.folder} is in use, another process works in it: wait for its end or choose another --run-name"
            ) from None
        except OSError as error:
            raise self._cannot_write(error) from error
        if manifest.check_folder(self.folder, self.command, self.args) != self.before:
            raise UsageError(f"{self.folder} was changed by another process meanwhile: start again")

    def _write_manifest(self):
        try:
            if self.before is None:
                self._make_folder()
            checkpoint.write_json(self.folder / "run.json", self.manifest)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error):
        return UsageError(f"cannot write {self.folder}: {error.strerror or error}; choose --output-dir")

    def _make_folder(self):
        # out of the way first: a death while deleting must not leave half a run under this name
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
            shutil.rmtree(old)
        self.folder.mkdir(parents=True, exist_ok=True)

    def restore(self, theta, named=None, same_shapes=True, **lasting):
        """The weights to go on with: the checkpoint's, loaded into the `lasting` objects too; `theta` if there is none,
        the main process's.

        theta: a vector [n], and named: function of it to {name: view} (`common.vector.Weights.named`); or without
        `named` {name: tensor}, whose shapes may change from round to round where same_shapes is False. lasting: all
        else that outlives a round, by name: objects with state_dict() and load_state_dict(tensors), or `ClientRows`.
        Raises UsageError for a checkpoint that is damaged or of another model: the folder is then as it was.
        """
        self._lasting, self._named = lasting, named or (lambda tensors: tensors)
        into, state, saved = self._named(theta), None, None
        device = next(iter(into.values())).device
        if self.before is not None:
            parallel.from_main(self._claim)  # before the checkpoint is read, which another process may be writing
            state = checkpoint.load(self.folder / "checkpoint", device)
        if state:
            saved = state[1].get("theta", {})
            if _kinds(saved, same_shapes) != _kinds(into, same_shapes):
                raise UsageError(f"{self.folder}/checkpoint is of another model: use --overwrite or another --run-name")
        if self.before is not None:
            rows = parallel.from_main(metrics_log.lines_to, self.folder, state[0]["round"], self.due) if state else []
            self._own_folder()
            if parallel.is_main():
                metrics_log.cut(self.folder, rows)
        if state:
            self._go_on(*state)
        elif self.before is not None:
            self.note("no checkpoint yet: it starts anew")
        if not state and parallel.world().size > 1:  # another kind of processor may have drawn other last digits
            saved = parallel.broadcast_tensors(into, device)
        if saved is not None:
            if isinstance(theta, dict):
                theta = {key: saved[key] for key in theta}
            else:
                theta = theta.clone()
                for name, view in self._named(theta).items():
                    view.copy_(saved[name])
        self._theta = theta
        return theta

    def _go_on(self, meta, shared):
        for name, thing in self._lasting.items():
            if isinstance(thing, ClientRows):
                thing.load(self.folder / "checkpoint", name, meta["rows"][name])
            else:
                thing.load_state_dict(shared.get(name, {}))
        self.start_round = self._at = meta["round"]
        self.counters = meta["counters"]
        self.seconds, self.eval_seconds = meta["seconds"], meta["eval_seconds"]
        self._ended, self._left_out = meta["ended"], meta["left_out"]
        self.note(f"resumed after round {self.start_round}")
        if self._ended:
            self.note(f"it had ended there, by {self._ended['by']}: no further round is trained")

    def watch(self, *probes):
        """Probes: `Follower`s of the rounds after which there is an evaluation. What `probe.result(clients, theta)`
        returns, {field: value}, joins the line of metrics.jsonl. theta: after the round; every process calls it.
        """
        self._probes = probes

    def sample(self, study, t):
        """The clients of round t (from 0), a `common.rounds.Round`: --participation of all, drawn by the seed.

        study: client_weights, what each of the K clients counts in a mean; bytes_of(t): (up, down), what a client sends
        and receives, each a number, a list of all K, or a function of its id; work, if it has it: the size of each
        client's work, for an even load.
        """
        weights, work = study.client_weights, getattr(study, "work", None)
        chosen = participants(self.args.seed, len(weights), participation_of(self.args), t)
        followers = [thing for thing in self._lasting.values() if isinstance(thing, rounds.Follower)]
        self._watching = self._probes if self.due(t + 1) else ()
        followers += self._watching
        self.clients = rounds.Round(chosen, weights, work, followers, self._theta, self._hint(), t)
        self._traffic = study.bytes_of(t)
        return self.clients

    def _hint(self):
        lr = "lr" if hasattr(self.args, "lr") else "learning_rate"
        return f"lower --{lr.replace('_', '-')} ({getattr(self.args, lr):g}) or --amp off"

    def note(self, text):
        """A line on stderr, by the main process; it waits until the run has begun."""
        if parallel.is_main():
            say(text)

    def due(self, t):
        """Whether there is an evaluation after t rounds."""
        return t == 0 or t % self.every == 0 or t == self.total

    def stop(self, by, reason=None):
        """Ends the run after this round. by: the alarm or rule."""
        self._ended = manifest.ended("stopped", self._at, by, reason=reason)

    def report(self, t, theta, evaluate):
        """What follows t rounds: counts the round's clients; where it is due, evaluates, logs and saves.

        evaluate: function (theta, t, row) to {metric: value}, called by every process; row: what the line of
        metrics.jsonl has so far. Returns the row, or None. Does nothing for t = 0 in a run that is gone on with.
        """
        if t == 0 and self.start_round:
            return None
        clients, self.clients, self._at, self._theta = self.clients, None, t, theta
        if clients is not None:
            self._count_round(clients)
        row = None
        if self.due(t):
            started = time.perf_counter()
            row = metrics_log.client_fields(clients) if clients is not None else {}
            if self._left_out:
                row["left_out"], self._left_out = self._left_out, []
            for probe in self._watching if clients is not None else ():
                row |= probe.result(clients, theta)
            row |= evaluate(theta, t, row)
            row["peak_memory"] = max(parallel.all_gather(metrics_log.peak_memory(self.device)))
            self.eval_seconds += time.perf_counter() - started
            self._log(row)
        if t and (t % self.save_every == 0 or t == self.total or self._ended):
            self._save(theta)
        return row

    def _count_round(self, clients):
        out = clients.left_out
        if out:
            self.note(f"warning: round {self._at}: update not finite, left out: client {', '.join(map(str, out))}")
        self._left_out += [[self._at, k] for k in out]
        up, down = (sum(_amount(bytes_, k) for k in clients.clients) for bytes_ in self._traffic)
        self.count(bytes_up=up, bytes_down=down, left_out_updates=len(out), **{self.unit: clients.amount})

    def plan(self, total, every=1, save_every=None, clients=1):
        """How many rounds there are, and after how many there is an evaluation and a checkpoint; says what runs.

        clients: of the federation, those that are not sampled too.
        """
        self.total, self.every, self.save_every = total, every, save_every or every
        sizes, some = self.manifest["parameters"], per_round(participation_of(self.args), clients)
        self.note(
            f"run: {clients} clients, {some} a round; {sizes.get('trainable', sizes['total']):,} of {sizes['total']:,} "
            f"parameters trained; {self.device}, {parallel.world().size} processes, "
            f"{self.manifest['resolved']['amp']}; {total} rounds"
        )

    def rounds(self):
        """The rounds still to do (from 0), with their progress on stderr, until `stop`.

        Raises RunFailed after them where the last evaluation's val_loss is not finite.
        """
        silent = None if parallel.is_main() else True  # None: where stderr is no terminal
        start, total, self._first = self.start_round, self.total, time.perf_counter()
        self._bar = tqdm(total=total, initial=start, unit="round", disable=silent, dynamic_ncols=True)
        for t in range(start, total):
            if self._ended:
                break
            yield t
            self._bar.set_postfix_str(self._shown, refresh=False)
            self._bar.update()
        self._bar.close()
        if broken := parallel.broadcast(self._broken()):
            raise parallel.AllFailed(broken)

    def _broken(self):
        """Why the run failed by its last evaluation, on the main process; else None."""
        there = parallel.is_main() and (self.folder / "metrics.jsonl").exists()
        last = next(iter(self.metrics()[-1:] if there else ()), {})
        if last.get("val_loss") is not None and math.isnan(number(last["val_loss"])):
            return f"round {last['round']}: val_loss is {last['val_loss']}, not finite: {self._hint()}"
        return None

    def count(self, **amounts):
        """Adds to the run's counters (bytes_up, bytes_down, UNIT, left_out_updates)."""
        for name, amount in amounts.items():
            self.counters[name] += int(amount)

    def _seconds(self):
        return self.seconds + time.perf_counter() - self._t0

    def _log(self, metrics):
        """Appends a line to metrics.jsonl, and says it."""
        if not parallel.is_main():
            return
        seconds, rate = self._seconds(), f"{self.unit}_per_second"
        line = {"round": self._at, **self.counters, **metrics, "seconds": seconds}
        line[rate] = self.counters[self.unit] / max(seconds - self.eval_seconds, 1e-9)
        metrics_log.append(self.folder, line)
        shown = metrics_log.shown(line)
        self._shown = ", ".join(f"{k} {v}" for k, v in shown.items() if k.startswith("val_"))
        words = [f"round {self._at}/{self.total}", *(f"{k} {v}" for k, v in shown.items())]
        if done := self._at - self.start_round:
            left = (time.perf_counter() - self._first) / done * (self.total - self._at)
            words += [f"{line[rate]:.0f} {self.unit}/s", f"{duration(left)} left"]
        self.note("  ".join(words))
        if self._tracker:
            self._tracker(line)

    def _save(self, theta):
        """Replaces the checkpoint by the state after this round: exactly theta, what is lasting and the counters."""
        rows = {name: thing for name, thing in self._lasting.items() if isinstance(thing, ClientRows)}
        states = {name: thing.state_dict() for name, thing in self._lasting.items() if name not in rows}
        shared = {"theta": self._named(theta)} | {name: tensors for name, tensors in states.items() if tensors}
        meta = {"round": self._at, "counters": self.counters, "ended": self._ended, "left_out": self._left_out}
        meta |= {"seconds": self._seconds(), "eval_seconds": self.eval_seconds}
        checkpoint.save(self.folder / "checkpoint", meta, shared, rows)

    def metrics(self):
        """The lines of metrics.jsonl so far, as a list of dicts."""
        return read_metrics(self.folder)

    def write_final(self, write):
        """Makes `final/` whole or not at all: `write(folder)` fills it. The main process's part only."""
        if not parallel.is_main():
            return
        self.note("writing final/")
        fresh = self.folder / "final.new"
        shutil.rmtree(fresh, ignore_errors=True)
        with checkpoint.saving(self.folder / "final", fresh):
            write(fresh)
            checkpoint.swap(fresh, self.folder / "final")

    def finish(self, results):
        """Marks the run finished, with its results; the last line printed is the run folder."""
        for thing in self._lasting.values():
            if isinstance(thing, ClientRows):
                thing.remove()
        if not parallel.is_main():
            return
        if broken := self._broken():  # a model that was evaluated only
            raise parallel.AllFailed(broken)
        hosts.on_loss(lambda reason: None)
        ended = self._ended or manifest.ended("finished", self.total)
        self.manifest.update(status="finished", ended=ended, results=manifest.json_safe(results))
        with checkpoint.saving(self.folder / "run.json"):
            checkpoint.write_json(self.folder / "run.json", self.manifest)
        print(self.folder)


def _kinds(tensors, shapes):
    """What two models of one kind have alike. Args: shapes: also these."""
    return {name: (t.dtype, t.shape if shapes else None) for name, t in tensors.items()}


def _amount(amounts, k):
    """Client k's of a number for all, a list, or a function of the id."""
    if callable(amounts):
        return amounts(k)
    return amounts if isinstance(amounts, (int, float)) else amounts[k]
