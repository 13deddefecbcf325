"""Central training: one model, one AdamW, all the text. What the federated runs are compared with.

    python mamba_fl/central.py --layers 1
    python mamba_fl/central.py --dataset demo        # offline, a CPU, about a minute

The text is the union of the shards of --num-clients clients, without what each holds out, so that central and
federated runs train on the same tokens; batches of 16 are 4 clients' batches of 4.
"""

from common import parallel
from common.cli import RunFailed, UsageError, checked, run_main
from common.local import OptimizerState, gradients
from common.runlog import start_run
from mamba_fl.fed_core import client_batches, evaluate, finish, load_study, save_deltas, with_perplexity
from mamba_fl.flags import complete_flags, make_parser, run_name
from mamba_fl.gradient_watch import WINDOW, GradientWatch, update_norms


def main(args):
    with start_run("central", args, run_name("central", args)) as run:
        if parallel.world().size > 1:
            raise UsageError("central.py trains in one process: start it without torchrun")
        study = load_study(args, run, federated=False)
        weights, watch = study.weights, GradientWatch(study.weights)
        moments = OptimizerState(study.optimizer, weights.parameters)
        theta = run.restore(weights.snapshot(), weights.named, **study.lasting, moments=moments, watch=watch)
        run.report(0, theta, lambda: evaluate(study, theta, 0))
        weights.load(theta)
        theta = weights.theta

        for t in run.rounds():
            (rows,) = client_batches(study, 0, t)
            before = weights.snapshot() if run.due(t + 1) else None
            loss = gradients(study.loss, (study.train[0][rows.to(run.device)],), weights.parameters.values(), run.amp)
            if any(run.due(step) for step in range(t + 1, t + WINDOW + 2)):  # the last of the steps to an evaluation
                watch.see()
            study.optimizer.step()
            run.count(tokens=args.batch_size * args.sequence_length)
            if before is None:
                run.report(t + 1, theta, None)
                continue
            if not loss.isfinite():
                raise RunFailed(f"step {t + 1}: the loss is {loss.item()}: lower --lr ({args.lr}) or --amp off")
            update = {"train_loss": loss.item(), "grad_cosine": watch.mean_cosine()}
            update["delta_norms"] = update_norms(weights.named(before), weights.named(theta))
            if args.save_deltas:
                save_deltas(study, "server", before, theta, t)
            run.report(t + 1, theta, lambda: update | evaluate(study, theta.clone(), t + 1), with_perplexity)

        finish(study, theta.clone())


def build_parser():
    return make_parser(__doc__.split("\n")[0], federated=False)[0]


if __name__ == "__main__":
    run_main(main, checked(complete_flags, build_parser().parse_args()))
