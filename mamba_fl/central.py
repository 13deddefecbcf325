"""Central training: one model, one AdamW, all the text. What the federated runs are compared with.

    python mamba_fl/central.py --layers 1         # with --dataset demo: offline, a CPU, about a minute

The text is the union of the shards of --num-clients clients, without what each holds out, so that central and
federated runs train on the same tokens; batches of 16 are 4 clients' batches of 4.
"""

import torch

from common import parallel
from common.cli import RunFailed, UsageError, parse, run_main
from common.local import OptimizerState, gradients
from common.runlog import start_run
from mamba_fl import flags
from mamba_fl.fed_core import Study, client_batches
from mamba_fl.measuring import finish, save_deltas, state_space

WINDOW = 10  # cosines that are averaged, as in the source


def build_parser():
    return flags.make_parser(__doc__)


def main(args):
    with start_run("central", args, flags.run_name("central", args)) as run:
        if parallel.world().size > 1:
            raise UsageError("central.py trains in one process: start it without torchrun")
        study = Study(args, run, federated=False)
        weights, optimizer, watch = study.weights, study.moments.optimizer, GradientWatch(study.weights)
        moments = OptimizerState(optimizer, weights.parameters)
        theta = run.restore(weights.snapshot(), weights.named, **study.lasting, moments=moments, watch=watch)
        run.report(0, theta, study.evaluate)
        weights.load(theta)
        theta = weights.theta

        for t in run.rounds():
            (batch,), (lr,) = client_batches(study, 0, t), study.learning_rates(t)
            for group in optimizer.param_groups:
                group["lr"] = lr
            before = weights.snapshot() if run.due(t + 1) else None
            loss = gradients(study.loss, batch, weights.parameters.values(), run.amp)
            if any(run.due(step) for step in range(t + 1, t + WINDOW + 2)):  # the last of the steps to an evaluation
                watch.see()
            optimizer.step()
            run.count(tokens=args.batch_size * args.sequence_length)
            if before is None:
                run.report(t + 1, theta, None)
                continue
            if not loss.isfinite():
                raise RunFailed(
                    f"step {t + 1}: the loss is {loss.item()}, not finite: lower --lr ({args.lr}) or --amp off"
                )
            norms = {name: change.norm().item() for name, change in state_space(study, theta - before).items()}
            update = {"train_loss": loss.item(), "grad_cosine": watch.mean_cosine(), "delta_norms": norms}
            if args.save_deltas:
                save_deltas(study, "server", state_space(study, before), state_space(study, theta), t)
            run.report(t + 1, theta, lambda theta, t, row: update | study.evaluate(theta.clone(), t, update))

        finish(study, theta.clone())


class GradientWatch:
    """Cosines of the gradients of neighbouring steps. A `lasting` object: a resumed run measures the same."""

    def __init__(self, weights):
        self.weights = weights
        self._last, self._cosines = None, weights.theta.new_empty(0)

    def see(self):
        """Looks at the gradients of this step (after backward)."""
        gradient = torch.cat([p.grad.reshape(-1) for p in self.weights.parameters.values()])  # [n]
        if self._last is not None:
            cosine = torch.cosine_similarity(gradient, self._last, 0)
            self._cosines = torch.cat([self._cosines, cosine.reshape(1)])[-WINDOW:]
        self._last = gradient

    def mean_cosine(self):
        """The mean of the last ten cosines (fewer at the start); None before the second step."""
        return self._cosines.mean().item() if len(self._cosines) else None

    def state_dict(self):
        return {} if self._last is None else {"gradient": self._last, "cosines": self._cosines}

    def load_state_dict(self, state):
        self._last, self._cosines = state.get("gradient"), state.get("cosines", self._cosines)


if __name__ == "__main__":
    run_main(main, parse(build_parser(), flags.complete_flags))
