"""Bisection on a log scale for the values at which training begins to fail, one boundary for each alpha.

The first alpha is bisected over the whole range, the others are tried at the bracket of the nearest alpha before them
and moved from there, and what is left of the budget halves the widest brackets. A point is {"alpha", "value",
"failed"}; what fails at one value is assumed to fail at all above it, and `violations` lists points that say otherwise.
"""

import math


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


def summary(points, alphas):
    """What the search says, a line for each alpha and each violation."""
    ends = sorted((bracket(points, alpha) for alpha in alphas), key=lambda b: -b["alpha"])
    lines = []
    for b in ends:
        works, fails = ("-" if b[side] is None else f"{b[side]:g}" for side in ("works", "fails"))
        lines.append(f"alpha {b['alpha']:g}: works at {works}, fails at {fails}")
    for odd in violations(points):
        lines.append(f"note: alpha {odd['alpha']:g}: fails at {odd['failed']:g} but works at {odd['worked']:g}")
    return lines


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
