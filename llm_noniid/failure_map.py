"""Finds where training breaks: for each alpha the largest learning rate, or number of local steps, that still works.

    python llm_noniid/failure_map.py --algorithm fedavg --axis learning_rate --model models/small --num-rounds 20
    python llm_noniid/failure_map.py --axis local_steps --model tiny --dataset demo --num-rounds 5 --budget 8

Instead of a grid: bisection (`llm_noniid.boundary`). A run fails if it diverges (the detector's alarm, or no finite
update) or ends above its first evaluation or above the model before training (`common.curves.failure`). Every
point is a run folder: finished ones are not run again, so the command can be given again, also with a larger --budget.
Other flags are train.py's.
"""

import math
import sys
from pathlib import Path

from common import grid
from common.checkpoint import read_json, saving, write_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_float, positive_int, run_main
from common.curves import failure
from llm_noniid import flags
from llm_noniid.boundary import bracket, search, summary, violations
from llm_noniid.outcomes import MAP_FILE, read_outcome

RANGES = {"learning_rate": (1e-4, 1.0), "local_steps": (1, 256)}
ALPHAS = (0.1, 100.0, 1.0, 0.01)
_OWN = {"alpha", "run_name", "output_dir", "seed", "algorithm", "partition"}


class Map:
    """A failure map in a folder: runs its points, keeps failure_map.json whole after each."""

    def __init__(self, args, given):
        self.args, self.given = args, given
        self.folder = Path(args.output_dir or f"results/failure_map_{args.algorithm}_{args.axis}")
        self.whole = args.axis == "local_steps"
        low, high = RANGES[args.axis]
        self.low, self.high = (args.low or low), (args.high or high)
        if self.whole:
            self.low, self.high = max(1, round(self.low)), round(self.high)
        if not self.low < self.high:
            raise UsageError(f"--low {self.low:g} is not below --high {self.high:g}: change one")
        train = flags.parse(flags.build_parser("Flags of train.py"), self.run(args.alphas[0], self.low).command[1:])
        self.setting = {k: v for k, v in flags.compared(train).items() if k not in _OWN | {args.axis}}
        self.points, self.start = self.known()

    def known(self):
        """(points of an earlier failure_map.json whose runs are there, the loss before training or None)."""
        path = self.folder / MAP_FILE
        if not path.exists():
            return [], None
        before = read_json(path)
        mine = {"algorithm": self.args.algorithm, "axis": self.args.axis, "seed": self.args.seed, **self.setting}
        theirs = {name: before.get(name) for name in ("algorithm", "axis", "seed")} | before["setting"]
        changed = [f"{k} {theirs.get(k)} -> {v}" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise UsageError(f"{path} was made with other flags: {', '.join(changed)}; choose another --output-dir")
        return [p for p in before["points"] if (self.folder / p["run"] / "run.json").exists()], before["start_val_loss"]

    def run(self, alpha, value):
        """The run of one point."""
        a = self.args
        name = f"alpha_{alpha:g}_{a.axis}_{value:g}"
        line = ["llm_noniid/train.py", "--stop-on", "divergence", "--eval-every", "1", *self.given]
        line += ["--algorithm", a.algorithm, "--partition", "topic_skew", "--seed", str(a.seed)]
        line += ["--alpha", f"{alpha:g}", f"--{a.axis.replace('_', '-')}", f"{value:g}"]
        return grid.Run(name, (*line, "--output-dir", str(self.folder), "--run-name", name, "--resume"))

    def fails(self, alpha, value):
        """Runs one point, or finds it finished, and files it."""
        run = self.run(alpha, value)
        if grid.run_all([run], self.folder, jobs=1, say=lambda text: None):
            raise RunFailed(f"{run.name} did not finish: see {self.folder}/output/{run.name}.txt")
        outcome = read_outcome(self.folder / run.name)
        if outcome is None:
            raise RunFailed(f"{self.folder / run.name} is no run of train.py: choose another --output-dir")
        self.start = outcome.start_loss if self.start is None else self.start
        reason = "no update was finite" if outcome.blown_up else failure(outcome.rows, self.start)
        loss = outcome.last("val_loss")
        loss = loss if loss is not None and math.isfinite(loss) else None
        point = {"alpha": alpha, "value": value, "failed": bool(reason), "reason": reason, "val_loss": loss}
        self.points.append(point | {"run": run.name})
        self.save()
        print(f"alpha {alpha:g}, {self.args.axis} {value:g}: {reason or 'works'}", flush=True)
        return bool(reason)

    def save(self, finished=False):
        """Writes failure_map.json."""
        a = self.args
        facts = {"algorithm": a.algorithm, "axis": a.axis, "seed": a.seed, "budget": a.budget} | {
            "range": [self.low, self.high],
            "status": "finished" if finished else "running",
            "finished": finished,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "start_val_loss": self.start,
            "points": self.points,
            "boundary": [bracket(self.points, alpha) for alpha in dict.fromkeys(p["alpha"] for p in self.points)],
            "violations": violations(self.points),
            "setting": self.setting,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with saving(self.folder / MAP_FILE):
            write_json(self.folder / MAP_FILE, facts)


def main(args, given):
    made = Map(args, given)
    if args.plan:
        for point in made.points:
            print(f"{point['run']}: {point['reason'] or 'works'}")
        print(f"at most {max(0, args.budget - len(made.points))} more runs")
        return
    made.save()  # what is below it belongs to a map from now on
    search(made.fails, args.alphas, made.low, made.high, args.budget, args.tolerance, made.whole, made.points)
    made.save(finished=True)
    grid.collect(made.folder)
    print(*summary(made.points, args.alphas), made.folder, sep="\n")


def build_parser():
    parser = Parser(__doc__.split("\n")[0] + " Flags that are not listed are train.py's.")
    parser.add_argument("--algorithm", choices=flags.ALGORITHMS, default="fedavg", help="of all runs")
    parser.add_argument("--axis", choices=sorted(RANGES), default="learning_rate", help="what is searched")
    parser.add_argument("--alphas", type=positive_float, nargs="+", default=list(ALPHAS), metavar="X", help="in order")
    parser.add_argument("--low", type=positive_float, metavar="X", help="smallest value (default: 1e-4; 1 step)")
    parser.add_argument("--high", type=positive_float, metavar="X", help="largest value (default: 1; 256 steps)")
    parser.add_argument("--budget", type=positive_int, default=16, metavar="N", help="runs at most, for all alphas")
    parser.add_argument(
        "--tolerance", type=positive_float, default=1.5, metavar="X", help="a bracket of this ratio is narrow enough"
    )
    parser.add_argument("--seed", type=non_negative_int, default=42, metavar="N", help="of all runs")
    parser.add_argument("--start-run", metavar="DIR", help="no effect: every run logs the loss before training")
    parser.add_argument("--plan", action="store_true", help="say what is there, and do nothing")
    parser.add_argument(
        "--output-dir", "--results-dir", metavar="DIR", help="default: results/failure_map_ALGORITHM_AXIS"
    )
    return parser


def parse(argv=None):
    """(own flags, train.py's flags as words). Raises UsageError for alphas given twice, a tolerance of 1 or below."""
    args, given = build_parser().parse_known_args(argv)
    if len(set(args.alphas)) < len(args.alphas):
        raise UsageError(f"--alphas {' '.join(f'{a:g}' for a in args.alphas)}: one is there twice: drop it")
    if args.tolerance <= 1:
        raise UsageError(f"--tolerance {args.tolerance:g} is not above 1: a bracket's ratio never is that small")
    flags.refuse(given, f"{args.axis} alpha algorithm partition seed run_name name resume overwrite".split())
    return args, given


if __name__ == "__main__":
    run_main(lambda argv: main(*parse(argv)), None)
