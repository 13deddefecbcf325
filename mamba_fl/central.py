"""Central training: one model, one AdamW, all the text. What the federated runs are compared with.

    python mamba_fl/central.py --layers 1
    python mamba_fl/central.py --dataset demo        # offline, a CPU, about a minute

The text is the union of the shards of --num-clients clients, without what each holds out, so that central and
federated runs train on the same tokens; batches of 16 are 4 clients' batches of 4.
"""

import torch

from common import parallel
from common.cli import RunFailed, UsageError, parse, run_main
from common.local import OptimizerState, gradients
from common.runlog import start_run
from mamba_fl.fed_core import client_batches, load_study
from mamba_fl.flags import complete_flags, make_parser, run_name
from mamba_fl.measuring import finish, save_deltas, state_space

WINDOW = 10  # cosines that are averaged, as in the source


def build_parser():
    return make_parser(__doc__, federated=False)[0]


def main(args):
    with start_run("central", args, run_name("central", args)) as run:
        if parallel.world().size > 1:
            raise UsageError("central.py trains in one process: start it without torchrun")
        study = load_study(args, run, federated=False)
        weights, watch = study.weights, GradientWatch(study.weights)
        moments = OptimizerState(study.optimizer, weights.parameters)
        theta = run.restore(weights.snapshot(), weights.named, **study.lasting, moments=moments, watch=watch)
        run.report(0, theta, study.evaluate)
        weights.load(theta)
        theta = weights.theta

        for t in run.rounds():
            (batch,), (lr,) = client_batches(study, 0, t), study.learning_rates(t)
            for group in study.optimizer.param_groups:
                group["lr"] = lr
            before = weights.snapshot() if run.due(t + 1) else None
            loss = gradients(study.loss, batch, weights.parameters.values(), run.amp)
            if args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(weights.parameters.values(), args.max_grad_norm)
            if any(run.due(step) for step in range(t + 1, t + WINDOW + 2)):  # the last of the steps to an evaluation
                watch.see()
            study.optimizer.step()
            run.count(tokens=args.batch_size * args.sequence_length)
            if before is None:
                run.report(t + 1, theta, None)
                continue
            if not loss.isfinite():
                raise RunFailed(
                    f"step {t + 1}: the loss is {loss.item()}, not finite: lower --lr ({args.lr}) or --amp off"
                )
            changes = state_space(study, theta - before)
            update = {"train_loss": loss.item(), "grad_cosine": watch.mean_cosine()}
            update["delta_norms"] = {name: change.norm().item() for name, change in changes.items()}
            if args.save_deltas:
                save_deltas(study, "server", before, theta, t)
            run.report(t + 1, theta, lambda theta, t, row: update | study.evaluate(theta.clone(), t, update))

        finish(study, theta.clone())


class GradientWatch:
    """Cosines of the gradients of neighbouring steps. A `lasting` object: a resumed run measures the same.

    Args: weights: `common.vector.Weights` of what is trained.
    """

    def __init__(self, weights):
        self.weights = weights
        self._previous, self._square, self._cosines = None, None, weights.theta.new_empty(0)

    def see(self):
        """Looks at the gradients of this step (after backward); they must not be changed later."""
        gradients = [p.grad for p in self.weights.parameters.values()]
        square = sum((g * g).sum() for g in gradients)
        if self._previous is not None:
            product = sum((g * h).sum() for g, h in zip(gradients, self._previous, strict=True))
            cosine = product / torch.sqrt(square * self._square).clamp_min(1e-30)
            self._cosines = torch.cat([self._cosines, cosine.reshape(1)])[-WINDOW:]
        self._previous, self._square = gradients, square

    def mean_cosine(self):
        """The mean of the last ten cosines (fewer at the start); None before the second step."""
        return self._cosines.mean().item() if len(self._cosines) else None

    def state_dict(self):
        if self._previous is None:
            return {}
        whole = torch.cat([g.reshape(-1) for g in self._previous])
        return {"gradient": whole, "square": self._square.reshape(1), "cosines": self._cosines}

    def load_state_dict(self, state):
        if state:
            self._previous = list(self.weights.named(state["gradient"]).values())
            self._square, self._cosines = state["square"][0], state["cosines"]


if __name__ == "__main__":
    run_main(main, parse(build_parser(), complete_flags))
