"""Who takes part in a round: drawn by the seed and the round, so that nothing is carried."""

from common.cli import UsageError


def participants(seed, total, participation, t):
    """The ids of the clients of round t (from 0): all, or a share of `total` drawn by the seed, unsorted."""
    some = per_round(participation, total)
    if some >= total:
        return list(range(total))
    from common.seeding import stream  # numpy, which flags must not wait for

    return stream(seed, "participation", t).choice(total, some, replace=False).tolist()


def per_round(participation, total):
    """How many of `total` clients take part in a round."""
    return max(1, int(participation * total + 0.5))


def participation_of(args):
    """The share of the clients that takes part in a round, as a script's flags call it; 1 without such a flag."""
    flags = vars(args)
    return flags.get("participation", flags.get("participation_rate", 1.0))


def check_participation(participation, total):
    """Raises UsageError for a share of `total` clients that is nearer to nobody than to one."""
    if participation * total < 0.5:
        raise UsageError(
            f"--participation {participation:g} of {total} clients samples nobody: raise it to {1 / total:g}"
        )


class Turns:
    """How often each client took part before a round: counted from the draws of the rounds, so nothing is carried."""

    def __init__(self, seed, total, participation):
        import numpy as np

        self._draw = (seed, total, participation)
        self._at, self._counts = 0, np.zeros(total, dtype=np.int64)

    def before(self, t):
        """int64 [K]: rounds among 0 to t - 1 that each client took part in. Not to be changed."""
        if t < self._at:
            self._at, self._counts = 0, 0 * self._counts
        for earlier in range(self._at, t):
            self._counts[participants(*self._draw, earlier)] += 1
        self._at = t
        return self._counts
