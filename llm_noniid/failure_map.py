"""Finds where training breaks: for each alpha the largest learning rate, or number of local steps, that still works.

    python llm_noniid/failure_map.py --algorithm fedavg --axis learning_rate --model models/small --num-rounds 20
    python llm_noniid/failure_map.py --axis local_steps --model tiny --dataset demo --num-rounds 5 --budget 8

Instead of a grid: bisection on a log scale. The first alpha is bisected over the whole range, the others are tried at
the bracket of the nearest alpha before them and moved from there, and what is left of the budget halves the widest
brackets. A run fails if it diverges (the detector's alarm, or no finite update) or ends above its first evaluation or
above the model before training (`common.curves.failure`); what fails at one value is assumed to fail at all above
it, and `violations` lists points that say otherwise. Every point is a run folder: finished ones are not run again, so
the command can be given again, also with a larger --budget. Other flags are train.py's.
"""

from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_float, positive_int, run_main
from common.early import parsed
from llm_noniid import flags
from llm_noniid.flags import ALPHAS, MAP_FILE

RANGES = {"learning_rate": (1e-4, 1.0), "local_steps": (1, 256)}


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
    plan = "check flags, data and model, say what is there, and run nothing"
    parser.add_argument("--plan", action="store_true", help=plan)
    parser.add_argument(
        "--output-dir", "--results-dir", metavar="DIR", help="default: results/failure_map_ALGORITHM_AXIS"
    )
    return parser


def parse(argv=None):
    """(own flags, train.py's flags as words). Raises UsageError for alphas given twice, a tolerance of 1 or below,
    and for what train.py refuses."""
    args, given = build_parser().parse_known_args(argv)
    if len(set(args.alphas)) < len(args.alphas):
        raise UsageError(f"--alphas {' '.join(f'{a:g}' for a in args.alphas)}: one is there twice: drop it")
    if args.tolerance <= 1:
        raise UsageError(f"--tolerance {args.tolerance:g} is not above 1: a bracket's ratio never is that small")
    flags.refuse(given, f"{args.axis} alpha algorithm partition seed run_name name resume overwrite".split())
    flags.parse(flags.build_parser("Flags of train.py"), ["--algorithm", args.algorithm, *given])
    return args, given


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(parse)

import math
import sys
from pathlib import Path

from common import grid
from common.checkpoint import read_json, saving, write_json
from common.curves import failure, number, read_metrics
from common.manifest import NOT_COMPARED, check_place

SET_HERE = {"alpha", "run_name", "output_dir", "seed", "algorithm", "partition"}

# ---- the search: a point is {"alpha", "value", "failed"}


def bracket(points, alpha):
    """{"alpha", "works", "fails"}: the smallest value that failed and the largest below it that worked, or None."""
    fails = min((p["value"] for p in points if p["alpha"] == alpha and p["failed"]), default=None)
    worked = [p["value"] for p in points if p["alpha"] == alpha and not p["failed"]]
    works = max((v for v in worked if fails is None or v < fails), default=None)
    return {"alpha": alpha, "works": works, "fails": fails}


def brackets(points):
    """The bracket of each alpha that has points."""
    return [bracket(points, alpha) for alpha in dict.fromkeys(p["alpha"] for p in points)]


def violations(points):
    """[{"alpha", "failed", "worked"}]: values that worked above one that failed, with the smallest that failed."""
    return [
        {"alpha": b["alpha"], "failed": b["fails"], "worked": value}
        for b in brackets(points)
        for value in sorted(p["value"] for p in points if p["alpha"] == b["alpha"] and not p["failed"])
        if b["fails"] is not None and value > b["fails"]
    ]


def next_point(points, alphas, low, high, budget, tolerance=1.5, whole=False):
    """The next (alpha, value) to try, None when nothing is left to try or the budget is spent.

    A pure function of what is known, so that a search that was broken off goes on as it would have.

    Args:
        points: in any order; alphas: in the order of the search; low, high: the range; budget: points in all.
        tolerance: a bracket of at most this ratio is not halved; whole: values are integers.
    """
    if len(points) >= budget:
        return None
    tried = {(p["alpha"], p["value"]) for p in points}
    runs = {alpha: sum(a == alpha for a, _ in tried) for alpha in alphas}

    def new(alpha, *values):
        rounded = (_rounded(value, low, high, whole) for value in values if value is not None)
        return next(((alpha, value) for value in rounded if (alpha, value) not in tried), None)

    for i, alpha in enumerate(alphas):
        mine = bracket(points, alpha)
        kept = sum(max(0, 2 - runs[other]) for other in alphas[i + 1 :])
        if runs[alpha] >= 2 and budget - len(points) <= kept:  # two runs are kept for each alpha to come
            continue
        if i == 0:
            values = _bisected(mine, low, high, tolerance)
        else:
            nearest = min(alphas[:i], key=lambda other: abs(math.log(other / alpha)))
            values = [_moved(mine, runs[alpha], bracket(points, nearest), low, high)]
        if point := new(alpha, *values):
            return point
    both = [b for b in (bracket(points, alpha) for alpha in alphas) if b["works"] and b["fails"]]
    for widest in sorted(both, key=lambda b: -b["fails"] / b["works"]):
        if point := new(widest["alpha"], *_bisected(widest, low, high, tolerance)):
            return point
    return None


def _bisected(b, low, high, tolerance):
    """What to try: the middle, on a log scale, of a bracket whose unknown side is the end of the range; that end."""
    near, far = b["works"] or low, b["fails"] or high
    middle = math.sqrt(near * far) if far / near > tolerance else None
    return [middle, low if b["works"] is None else high if b["fails"] is None else None]


def _moved(b, n, guide, low, high):
    """Where to try next from a neighbour's bracket: its two ends, then away from it in growing steps."""
    works, fails = b["works"], b["fails"]
    ratio = guide["fails"] / guide["works"] if guide["fails"] and guide["works"] else (high / low) ** 0.25
    step = max(ratio, 1.2) ** max(1, n - 1)
    if works is None and fails is None:
        return guide["works"] or low
    if fails is None and works < high:
        return guide["fails"] if (guide["fails"] or 0) > works else min(high, works * step)
    if works is None and fails > low:
        return guide["works"] if (guide["works"] or math.inf) < fails else max(low, fails / step)
    return None


def _rounded(value, low, high, whole):
    # two digits: what a reader compares and a folder's name can hold
    return min(max(round(value) if whole else float(f"{value:.2g}"), low), high)


# ---- the map


class Map:
    """A failure map in a folder: runs its points, keeps failure_map.json whole after each."""

    def __init__(self, args, given):
        self.args, self.given = args, given
        self.folder = Path(args.output_dir or f"results/failure_map_{args.algorithm}_{args.axis}")
        check_place(self.folder)
        self.whole = args.axis == "local_steps"
        low, high = RANGES[args.axis]
        self.low, self.high = (args.low or low), (args.high or high)
        if self.whole:
            self.low, self.high = max(1, round(self.low)), round(self.high)
        if not self.low < self.high:
            raise UsageError(f"--low {self.low:g} is not below --high {self.high:g}: change one")
        train = flags.parse(flags.build_parser("Flags of train.py"), self.run(args.alphas[0], self.low).command[1:])
        self.about = {"algorithm": args.algorithm, "axis": args.axis, "seed": args.seed}
        own = {*NOT_COMPARED, *SET_HERE, args.axis}
        self.setting = {name: value for name, value in vars(train).items() if name not in own}
        self.points, self.start = self.known()

    def known(self):
        """(points of an earlier failure_map.json whose runs are there, the loss before training or None)."""
        path = self.folder / MAP_FILE
        if not path.exists():
            return [], None
        older = vars(flags.parse(flags.build_parser(""), ["--algorithm", self.args.algorithm]))  # may lack a new flag
        try:
            before = read_json(path)
            theirs = older | before | before["setting"]
            points = [p for p in before["points"] if (self.folder / p["run"] / "run.json").exists()]
            if not all(p["alpha"] > 0 and p["value"] > 0 and isinstance(p["failed"], bool) for p in points):
                raise ValueError
            start = before["start_val_loss"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise UsageError(f"{path} is damaged: delete it, what is finished is not run again") from None
        mine = self.about | self.setting
        changed = [f"{name} {theirs.get(name)} -> {value}" for name, value in mine.items() if theirs.get(name) != value]
        if changed:
            raise UsageError(f"{path} was made with other flags: {', '.join(changed)}; choose another --output-dir")
        return points, start

    def run(self, alpha, value):
        """The run of one point."""
        a = self.args
        value = str(value) if self.whole else f"{value:g}"
        name = f"alpha_{alpha:g}_{a.axis}_{value}"
        line = ["llm_noniid/train.py", "--stop-on", "divergence", "--eval-every", "1", *self.given]
        line += ["--algorithm", a.algorithm, "--partition", "topic_skew", "--seed", str(a.seed)]
        line += ["--alpha", f"{alpha:g}", f"--{a.axis.replace('_', '-')}", value]
        return grid.Run(name, (*line, "--output-dir", str(self.folder), "--run-name", name, "--resume"))

    def add(self, alpha, value):
        """Runs one point, if it is not finished, and files it."""
        run = self.run(alpha, value)
        if grid.run_all([run], self.folder, jobs=1, say=lambda text: None):
            raise RunFailed(f"{run.name} did not finish: see {self.folder}/output/{run.name}.txt")
        rows = read_metrics(self.folder / run.name)
        if self.start is None:
            self.start = next((row["val_loss"] for row in rows if row["round"] == 0), None)
        broke_down = grid.broke_down(read_json(self.folder / run.name / "run.json"))
        reason = "no update was finite" if broke_down else failure(rows, self.start)
        loss = math.nan if broke_down else number(rows[-1]["val_loss"])
        point = {"alpha": alpha, "value": value, "failed": bool(reason), "reason": reason}
        point["val_loss"] = loss if math.isfinite(loss) else None
        self.points.append(point | {"run": run.name})
        self.save()
        print(f"alpha {alpha:g}, {self.args.axis} {value:g}: {reason or 'works'}", flush=True)

    def save(self, finished=False):
        """Writes failure_map.json."""
        facts = self.about | {
            "budget": self.args.budget,
            "range": [self.low, self.high],
            "status": "finished" if finished else "running",
            "finished": finished,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "start_val_loss": self.start,
            "points": self.points,
            "boundary": brackets(self.points),
            "violations": violations(self.points),
            "setting": self.setting,
        }
        with saving(self.folder / MAP_FILE):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / MAP_FILE, facts)

    def summary(self):
        """What the search says, a line for each alpha and each violation."""
        for b in sorted((bracket(self.points, alpha) for alpha in self.args.alphas), key=lambda b: -b["alpha"]):
            works, fails = ("-" if b[side] is None else f"{b[side]:g}" for side in ("works", "fails"))
            yield f"alpha {b['alpha']:g}: works at {works}, fails at {fails}"
        for odd in violations(self.points):
            yield f"note: alpha {odd['alpha']:g}: fails at {odd['failed']:g} but works at {odd['worked']:g}"


def main(args, given):
    made = Map(args, given)
    limits = args.alphas, made.low, made.high, args.budget, args.tolerance, made.whole
    if not made.points:
        grid.check([made.run(*next_point([], *limits))], made.folder)
    if args.plan:
        lines = [f"{point['run']}: {point['reason'] or 'works'}" for point in made.points]
        grid.put([*lines, f"at most {max(0, args.budget - len(made.points))} more runs"])
        return
    made.save()  # what is below it belongs to a map from now on
    try:
        while point := next_point(made.points, *limits):
            made.add(*point)
    except KeyboardInterrupt as error:
        error.add_note(grid.GOES_ON)
        raise
    made.save(finished=True)
    grid.collect(made.folder)
    print(*made.summary(), made.folder, sep="\n")


if __name__ == "__main__":
    run_main(lambda given: main(*given), args)
