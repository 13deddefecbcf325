"""Finds where training breaks: for each alpha the largest learning rate, or number of local steps, that still works.

    python llm_noniid/failure_map.py --algorithm fedavg --axis learning_rate --model models/small --num-rounds 20
    python llm_noniid/failure_map.py --axis local_steps --model tiny --dataset demo --num-rounds 5 --budget 8

Instead of a grid: bisection on a log scale. The first alpha is bisected from --low to --high, the others are tried at
the bracket of the nearest alpha before them and moved from there, and what is left of --budget halves the widest
brackets. A run fails if it diverges (the detector's alarm, or no finite update) or ends above its first evaluation or
above the model before training (`llm_noniid.outcomes.failure`). Every point is a run folder: finished ones are not run
again, so the command can be given again, also with a larger --budget. Other flags are train.py's. The map assumes that
training which breaks at one value breaks at all above it; `violations` lists the points that say otherwise.
"""

import math
from pathlib import Path

from common.checkpoint import read_json, saving, write_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_float, positive_int, run_main
from llm_noniid import flags, launching
from llm_noniid.outcomes import MAP_FILE, START_RATE, failure, read_outcome, start_key

RANGES = {"learning_rate": (1e-4, 1.0), "local_steps": (1, 256)}
ALPHAS = (0.1, 100.0, 1.0, 0.01)
_OWN = {"alpha", "run_name", "output_dir", "seed", "algorithm", "partition", "resume", "overwrite"}


# ------------------------------------------------------------------------------------------------ the search


def bracket(points, alpha):
    """{"alpha", "works", "fails"}: the smallest value that failed and the largest below it that worked, or None."""
    fails = min((p["value"] for p in points if p["alpha"] == alpha and p["failed"]), default=None)
    worked = [p["value"] for p in points if p["alpha"] == alpha and not p["failed"]]
    works = max((v for v in worked if fails is None or v < fails), default=None)
    return {"alpha": alpha, "works": works, "fails": fails}


def violations(points):
    """[{"alpha", "failed", "worked"}]: values that worked above one that failed, with the smallest that failed."""
    found = []
    for alpha in dict.fromkeys(p["alpha"] for p in points):
        fails = bracket(points, alpha)["fails"]
        above = sorted(p["value"] for p in points if p["alpha"] == alpha and not p["failed"] and fails is not None)
        found += [{"alpha": alpha, "failed": fails, "worked": value} for value in above if value > fails]
    return found


def next_point(points, alphas, low, high, budget, tolerance=1.5, whole=False):
    """The next (alpha, value) to try, None when nothing is left to try or the budget is spent.

    A pure function of what is known, so that a search that was broken off goes on as it would have.

    Args:
        points: [{"alpha", "value", "failed"}], in any order; alphas: in the order of the search; low, high: the range.
        budget: points in all; tolerance: a bracket of at most this ratio is not halved; whole: values are integers.
    """
    if len(points) >= budget:
        return None
    tried = {(p["alpha"], p["value"]) for p in points}

    def new(alpha, *values):
        rounded = (_rounded(value, low, high, whole) for value in values if value is not None)
        return next(((alpha, value) for value in rounded if (alpha, value) not in tried), None)

    for i, alpha in enumerate(alphas):
        mine = bracket(points, alpha)
        n = sum(a == alpha for a, _ in tried)
        kept = sum(max(0, 2 - sum(a == other for a, _ in tried)) for other in alphas[i + 1 :])
        if n >= 2 and budget - len(points) <= kept:  # two runs are kept for each alpha to come
            continue
        if i == 0:
            values = _bisected(mine, low, high, tolerance)
        else:
            nearest = min(alphas[:i], key=lambda other: abs(math.log(other / alpha)))
            values = [_moved(mine, n, bracket(points, nearest), low, high)]
        if found := new(alpha, *values):
            return found
    ends = [bracket(points, alpha) for alpha in alphas]
    both = [b for b in ends if b["works"] is not None and b["fails"] is not None]
    for widest in sorted(both, key=lambda b: -b["fails"] / b["works"]):
        if found := new(widest["alpha"], *_bisected(widest, low, high, tolerance)):
            return found
    return None


def _bisected(b, low, high, tolerance):
    """What to try: the middle, on a log scale, of a bracket whose unknown side is the end of the range; that end."""
    works, fails = b["works"], b["fails"]
    near, far = low if works is None else works, high if fails is None else fails
    middle = math.sqrt(near * far) if far / near > tolerance else None
    if works is None and fails is None:
        return [middle, near]
    return [middle, high if fails is None else low if works is None else None]


def _moved(b, n, guide, low, high):
    """Where to try next from a neighbour's bracket: its two ends, then away from it in growing steps."""
    works, fails = b["works"], b["fails"]
    if works is not None and fails is not None:
        return None
    known = guide["works"] is not None and guide["fails"] is not None
    ratio = guide["fails"] / guide["works"] if known else (high / low) ** 0.25
    step = max(ratio, 1.2) ** max(1, n - 1)
    if works is None and fails is None:
        return low if guide["works"] is None else guide["works"]
    if fails is None:
        if works >= high:
            return None
        return guide["fails"] if guide["fails"] is not None and guide["fails"] > works else min(high, works * step)
    if fails <= low:
        return None
    return guide["works"] if guide["works"] is not None and guide["works"] < fails else max(low, fails / step)


def _rounded(value, low, high, whole):
    # two digits: what a reader compares and a folder's name can hold
    return min(max(round(value) if whole else float(f"{value:.2g}"), low), high)


def search(fails, alphas, low, high, budget, tolerance=1.5, whole=False, points=()):
    """All points of the search: fails(alpha, value) -> bool is asked for each new one."""
    points = list(points)
    while (found := next_point(points, alphas, low, high, budget, tolerance, whole)) is not None:
        points.append({"alpha": found[0], "value": found[1], "failed": fails(*found)})
    return points


# -------------------------------------------------------------------------------------------------- the runs


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
        parsed = launching.train_flags(self.words(self.args.alphas[0], self.low, "x")[1:])
        self.setting = {
            name: value
            for name, value in launching.compared(parsed, self.folder).items()
            if name not in _OWN | {args.axis}
        }
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
        points = [p for p in before["points"] if launching.done(self.folder / p["run"])]
        return points, before["start_val_loss"]

    def words(self, alpha, value, name):
        """The command line of one point, after `python`."""
        a = self.args
        line = ["llm_noniid/train.py", "--stop-on", "divergence", "--eval-every", "1", *self.given]
        line += ["--algorithm", a.algorithm, "--partition", "topic_skew", "--seed", str(a.seed)]
        line += ["--alpha", f"{alpha:g}", f"--{a.axis.replace('_', '-')}", f"{value:g}"]
        return [*line, "--output-dir", str(self.folder), "--run-name", name, "--resume"]

    def outcome(self, alpha, value, name, more=()):
        """Runs a point (or finds it finished) and reads it."""
        line = [*self.words(alpha, value, name), *more]
        _, code = launching.run_one(name, self.folder / name, line, self.folder)
        if code:
            raise RunFailed(f"{name} ended with exit code {code}: see {self.folder}/output/{name}.txt")
        found = read_outcome(self.folder / name)
        if found is None:
            raise RunFailed(f"{self.folder / name} is no run of train.py: choose another --output-dir")
        return found

    def start_loss(self):
        """The model's validation loss before training: --start-run's, or after one step of no size."""
        if self.start is None and self.args.start_run and launching.done(self.args.start_run):
            run = read_outcome(self.args.start_run)
            if run and start_key(run.args) == start_key(self.setting | {"seed": self.args.seed}):
                self.start = run.last("val_loss")
        if self.start is None:
            more = ["--num-rounds", "1", "--local-steps", "1", "--learning-rate", f"{START_RATE / 1e10:g}"]
            self.start = self.outcome(100.0, self.low, "start", more).last("val_loss")
        return self.start

    def fails(self, alpha, value):
        """Runs one point and files it."""
        name = f"alpha_{alpha:g}_{self.args.axis}_{value:g}"
        run = self.outcome(alpha, value, name)
        reason = "no update was finite" if run.blown_up else failure(run.rows, self.start)
        loss = run.last("val_loss")
        self.points.append(
            {
                "alpha": alpha,
                "value": value,
                "failed": bool(reason),
                "reason": reason,
                "val_loss": loss if loss is not None and math.isfinite(loss) else None,
                "run": name,
            }
        )
        self.save()
        print(f"alpha {alpha:g}, {self.args.axis} {value:g}: {reason or 'works'}", flush=True)
        return bool(reason)

    def save(self, finished=False):
        """Writes failure_map.json."""
        a = self.args
        found = {
            "algorithm": a.algorithm,
            "axis": a.axis,
            "seed": a.seed,
            "range": [self.low, self.high],
            "budget": a.budget,
            "finished": finished,
            "start_val_loss": self.start,
            "points": self.points,
            "boundary": [bracket(self.points, alpha) for alpha in dict.fromkeys(p["alpha"] for p in self.points)],
            "violations": violations(self.points),
            "setting": self.setting,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with saving(self.folder / MAP_FILE):
            write_json(self.folder / MAP_FILE, found)


def main(args, given):
    found = Map(args, given)
    if args.plan:
        for point in found.points:
            print(f"{point['run']}: {point['reason'] or 'works'}")
        print(f"at most {max(0, args.budget - len(found.points))} more runs")
        return
    found.save()  # what is below it belongs to a map from now on
    found.start_loss()
    search(found.fails, args.alphas, found.low, found.high, args.budget, args.tolerance, found.whole, found.points)
    found.save(finished=True)
    for b in sorted((bracket(found.points, alpha) for alpha in args.alphas), key=lambda b: -b["alpha"]):
        works, fails = ("-" if b[side] is None else f"{b[side]:g}" for side in ("works", "fails"))
        print(f"alpha {b['alpha']:g}: works at {works}, fails at {fails}")
    for odd in violations(found.points):
        print(f"note: alpha {odd['alpha']:g}: fails at {odd['failed']:g} but works at {odd['worked']:g}")
    print(found.folder)


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
    parser.add_argument(
        "--start-run", metavar="DIR", help="a run that tells the loss before training (default: one more, of one step)"
    )
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
    launching.refuse(given, f"{args.axis} alpha algorithm partition seed run_name name resume overwrite".split())
    return args, given


if __name__ == "__main__":
    run_main(lambda argv: main(*parse(argv)), None)
