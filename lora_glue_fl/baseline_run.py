"""Central fine-tuning of all weights on a GLUE task, without LoRA. main_glue_lora.py trains an adapter the same way.

    python lora_glue_fl/baseline_run.py --model_size base --task_name sst2 --do_train --do_eval
    python lora_glue_fl/baseline_run.py --model tiny --dataset demo --task_name sst2 --do_train --do_eval     # offline

AdamW (Loshchilov & Hutter 2019) on the mean loss over a batch, the rate going down linearly to 0: the steps of a
federated client (`common.local.local_steps`). A round of the metrics is an epoch.
"""

import math

import numpy as np

from common import parallel
from common.cli import RunFailed, parse, positive_float, positive_int, run_main
from common.evaluation import Best
from common.hub import quiet
from common.local import OptimizerState, client_optimizer, local_steps
from common.runlog import start_run
from common.seeding import seed_torch
from common.vector import Weights
from lora_glue_fl.data_prep import MAX_GRAD_NORM, batches, learning_rates, plan_steps
from lora_glue_fl.flags import add_training_flags, make_parser, refuse, size_label
from lora_glue_fl.models import TaskModel, print_values
from lora_glue_fl.sharding import subset_of


def build_parser(doc=__doc__, output_dir="./out_baseline", learning_rate=2e-5):
    parser = make_parser(doc.split("\n")[0], output_dir)
    add = parser.group("the method").add_argument
    add("--do-train", action="store_true", help="train")
    add("--do-eval", action="store_true", help="evaluate every epoch; without --do-train: zero-shot")
    add_training_flags(parser, learning_rate)
    add = parser.group("training").add_argument
    add("--num-train-epochs", type=positive_float, default=3.0, metavar="X", help="passes over the examples")
    add("--max-examples", type=positive_int, metavar="N", help="train on a stratified subset of N (default: all)")
    return parser


def complete(args):
    """The flags. Raises UsageError for flags that contradict each other."""
    refuse(not (args.do_train or args.do_eval), "nothing to do: give --do-train, --do-eval or both")
    unknown = args.final == "best" and not (args.do_train and args.do_eval)
    refuse(unknown, "--final best: the best epoch is known of --do-train with --do-eval: give both")
    return args


def main(args):
    name = f"{args.task_name.lower()}_{size_label(args)}"
    with start_run("baseline_run", args, name, unit="examples") as run:
        model = train(args, run)

        if args.do_train:
            run.write_final(lambda folder: save(model, folder))
        run.finish(results(run))


def train(args, run, lora=None):
    """Epochs of AdamW with one schedule over all of them, evaluated before and after each with --do-eval.

    Args: lora: as `TaskModel`; None: all weights train. Returns the `TaskModel` with the last epoch's weights, with
    --final best those of the best validation metric.
    """
    a = args
    refuse(parallel.world().size > 1, "central training is one process: start it without torchrun")
    model = TaskModel(a, lora, train=a.do_train)
    adapted = model.adapted
    rows = subset_of(model.data, a.max_examples, a.seed) if a.do_train else np.empty(0, dtype=np.int64)
    clients = {"examples": len(rows)} if a.do_train else {}
    if lora and a.init_adapter:
        factors, head, clients["init_adapter_sha256"] = model.start(a.init_adapter, a.lora_r, adapted.scale, a.lora_r)
        adapted.load(factors, head, adapted.scale)
    trained = adapted.trainable() if lora else dict(model.model.named_parameters())
    weights = Weights(model.model, trained)
    run.begin(model.data.fingerprint | {"model": model.name}, model.sizes(trained), clients=clients or None)
    run.plan(math.ceil(a.num_train_epochs) if a.do_train else 0)
    for line in model.notes:
        run.note(line)
    optimizer = client_optimizer("adamw", weights.parameters, a.learning_rate)
    lasting, best = {"optimizer": OptimizerState(optimizer, weights.parameters)}, Best()
    if a.final == "best":
        lasting["best"] = best
    weights.load(run.restore(weights.snapshot(), weights.named, **lasting))

    def evaluate(theta, t, row):
        metrics = row | model.evaluate() if a.do_eval else row
        if t and a.final == "best":
            best.offer(t, -metrics[model.headline], theta)  # it keeps the lowest
        return metrics

    run.report(0, weights.theta, evaluate)
    if not a.do_train:
        return model
    plan = plan_steps(model.encoded["train"], rows, a, a.num_train_epochs)
    lrs, epoch = learning_rates(a, len(plan)), math.ceil(len(rows) / a.batch_size)  # steps of an epoch
    for t in run.rounds():
        now = slice(t * epoch, (t + 1) * epoch)
        model.model.train()
        seed_torch(a.seed, "dropout", t)
        steps = batches(model.encoded["train"], plan[now], model.device)
        options = {"amp": run.amp, "max_norm": MAX_GRAD_NORM, "lrs": lrs[now]}
        done = local_steps(model.loss, steps, weights, optimizer, **options).loss.item()
        run.count(examples=sum(map(len, plan[now])))
        if not math.isfinite(done):
            hint = f"lower --learning-rate ({a.learning_rate:g}) or --amp off"
            raise RunFailed(f"epoch {t + 1}: the loss is {done}: {hint}")
        run.report(t + 1, weights.theta, lambda theta, t, row: evaluate(theta, t, {"train_loss": done}))
    if a.final == "best":
        weights.load(best.theta)
        run.note(f"what is saved is the best epoch's, {best.round}: {model.headline} {-best.loss:.4g}")
    return model


def results(run):
    """What run.json says at the end; prints the metrics."""
    last = run.metrics()[-1]
    return print_values(last) | {name: last[name] for name in ("examples", "seconds")} | {"rounds": last["round"]}


def save(model, folder):
    """The model and its tokenizer, as transformers loads them."""
    with quiet():
        model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    args = parse(build_parser(), complete)
    run_main(main, args)
