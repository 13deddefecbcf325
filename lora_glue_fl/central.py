"""Central training on a GLUE task, of an adapter or of all weights: for `main_glue_lora.py` and `baseline_run.py`.

The optimiser's loop is that of the federated clients (`fitting.fit`); a round of the metrics is an epoch.
"""

import math
import sys
import time

import torch
from tqdm import tqdm

from common.cli import positive_float
from common.compiling import checked_compile
from common.seeding import seed_torch
from lora_glue_fl.fitting import fit, lr_at, make_optimizer, plan_steps, warmup_steps
from lora_glue_fl.flags import add_training_flags, make_parser, refuse
from lora_glue_fl.sharding import load_manifest, subset
from lora_glue_fl.task_model import TaskModel, check_loss


class CentralStudy:
    """Data, model and epochs. Attributes: task_model, trained {name: parameter}, optimizer, epochs (a whole number).

    Args: lora: as `TaskModel`; None: all weights train.
    """

    def __init__(self, args, run, lora=None):
        self.args, self.run = args, run
        self.task_model = found = TaskModel(args, lora, train=args.do_train)
        self.trained = found.adapted.trainable() if found.adapted else dict(found.model.named_parameters())
        self.optimizer = make_optimizer(self.trained, args)
        self.loss = checked_compile(found.loss, self.trained) if args.compile else found.loss
        self.epochs, self.best, facts = 0, None, found.facts()
        if args.do_train:
            self._plan()
            facts["examples"] = len(self.rows)
        run.begin(facts, found.sizes(self.trained), found.resolved())
        for note in found.notes:
            tqdm.write(note, file=sys.stderr)

    def _plan(self):
        a, found = self.args, self.task_model
        if a.shard:
            self.rows = load_manifest(a.shard, found.data)["indices"]
        else:
            self.rows = subset(found.data, a.max_examples, a.seed)
        lengths = found.encoded["train"].lengths()[self.rows]
        self.steps = plan_steps(lengths, a, a.num_train_epochs)
        self.epochs = math.ceil(a.num_train_epochs)
        self.per_epoch = math.ceil(math.ceil(len(lengths) / a.batch_size) / a.gradient_accumulation_steps)

    @property
    def lasting(self):
        """With the weights, all that outlives an epoch."""
        return {"optimizer": OptimizerState(self.optimizer, self.trained)}

    def weights(self):
        """{name: tensor} of what is trained: the model's own tensors."""
        return {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def load(self, weights):
        """Puts {name: tensor} into the model."""
        for name, p in self.trained.items():
            p.copy_(weights[name])

    def train_epoch(self, epoch):
        """One pass over the examples. Returns their mean loss."""
        a, total = self.args, len(self.steps)
        at = range(epoch * self.per_epoch, min((epoch + 1) * self.per_epoch, total))
        steps = [[self.rows[rows] for rows in micro] for micro in self.steps[at.start : at.stop]]
        lrs = [lr_at(i, total, a.learning_rate, warmup_steps(a, total), a.lr_scheduler) for i in at]
        self.task_model.model.train()
        seed_torch(a.seed, "dropout", epoch)
        found = self.task_model
        loss = fit(
            self.loss,
            found.encoded["train"],
            steps,
            self.trained,
            self.optimizer,
            lrs,
            a,
            found.amp,
            found.device,
        ).item()
        self.run.count(examples=sum(len(rows) for micro in steps for rows in micro))
        check_loss(loss, f"epoch {epoch + 1}", a)
        return loss

    def report(self, epoch, loss=None):
        """Evaluates with --do-eval and writes the epoch's line of metrics.jsonl (epoch -1: before training)."""
        started = time.perf_counter()
        metrics = {} if loss is None else {"train_loss": loss}
        if self.args.do_eval:
            metrics |= self.task_model.evaluate()
        self.run.log(epoch, metrics, time.perf_counter() - started)

    def results(self):
        """What run.json says at the end; prints the metrics."""
        lines = self.run.metrics()
        line, headline = lines[-1], self.task_model.headline
        found = {name: v for name, v in line.items() if name.startswith("val_")}
        if found:
            print("  ".join(f"{name} {v:.4f}" for name, v in found.items()))
            best = max(lines, key=lambda row: row[headline])
            found |= {"best_round": best["round"], f"best_{headline}": best[headline]}
        return found | {key: line[key] for key in ("examples", "seconds")} | {"rounds": line["round"]}


class OptimizerState:
    """The state of a torch optimiser as {name/key: tensor}, for a checkpoint.

    Args: optimizer: over the values of parameters; parameters: {name: parameter}.
    """

    def __init__(self, optimizer, parameters):
        self.optimizer, self.parameters = optimizer, parameters

    def state_dict(self):
        """What is there so far."""
        state = self.optimizer.state
        return {
            f"{name}/{key}": value
            for name, p in self.parameters.items()
            if p in state
            for key, value in state[p].items()
        }

    def load_state_dict(self, tensors):
        """Puts it back."""
        for name, value in tensors.items():
            name, key = name.rsplit("/", 1)
            self.optimizer.state[self.parameters[name]][key] = value


def make_central_parser(description, output_dir, learning_rate):
    """The parser of a central script. Returns (parser, group for the script's own flags)."""
    parser, own = make_parser(description, output_dir)
    own.add_argument("--do-train", action="store_true", help="train")
    own.add_argument("--do-eval", action="store_true", help="evaluate every epoch; without --do-train: zero-shot")
    train = add_training_flags(
        parser,
        learning_rate,
        *("--per-device-train-batch-size", "--per-device-eval-batch-size"),
        *("--batch-size", "--eval-batch-size"),
    )
    train.add_argument(
        "--num-train-epochs", type=positive_float, default=3.0, metavar="X", help="passes over the examples"
    )
    train.add_argument("--max-examples", type=int, metavar="N", help="train on a stratified subset of N (default: all)")
    train.add_argument("--shard", metavar="FILE", help="train on a client's examples (client_1.json of sharding.py)")
    return parser, own


def complete(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    refuse(not (args.do_train or args.do_eval), "nothing to do: give --do-train, --do-eval or both")
    refuse(args.shard and args.max_examples, "--shard and --max-examples are both given: choose one")
    args.mu = 0.0  # no FedProx: there is one client
    return args
