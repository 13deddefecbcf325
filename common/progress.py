"""How far a run is, on stderr: a bar in a terminal, elsewhere a line a minute at most; and the time left.

Rounds and evaluations have a pace each, so that an evaluation is no jump in the time left: a round's is this session's,
an evaluation's that of all sessions, which a run that goes on knows from the start.
"""

import time

MINUTE = 60.0  # seconds


class Progress:
    """Rounds start to total, with an evaluation before the first, after every `every` and after the last.

    Args: evaluating: seconds of evaluations so far; say: function of a line; silent: no bar and no line.
    """

    def __init__(self, start, total, every, evaluating, say, silent=False):
        from tqdm import tqdm  # not for those who need only `duration`

        self._start, self._total, self._every, self._say, self._silent = start, total, every, say, silent
        self._began = self._said = time.perf_counter()
        self._evaluated = evaluating
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} rounds [{elapsed}{postfix}]"
        off = silent or None  # None: where stderr is no terminal
        self._bar = tqdm(total=total, initial=start, bar_format=form, disable=off, dynamic_ncols=True)

    def left(self, t, evaluating):
        """Seconds that the rounds after round t will take; None before a round of this session has ended."""
        if t <= self._start:
            return None
        training = time.perf_counter() - self._began - (evaluating - self._evaluated)
        done = self._evaluations(t)
        more = self._evaluations(self._total) - done
        return (self._total - t) * training / (t - self._start) + more * evaluating / done

    def _evaluations(self, t):
        return 1 + t // self._every + (t == self._total and t % self._every > 0)

    def after_round(self, t, evaluating, shown):
        """The bar, or a line where the last is a minute old. Args: shown: the metrics in words."""
        words = [f"{duration(self.left(t, evaluating))} left"] + [shown] * bool(shown)
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update()
        elif not self._silent and t < self._total and time.perf_counter() - self._said >= MINUTE:
            self._said = time.perf_counter()
            self._say("  ".join([f"round {t}/{self._total}", f"{100 * t // self._total} %", *words]))

    def in_line(self, t, evaluating):
        """What the line of an evaluation ends with where there is no bar: the time left. It is this minute's line."""
        self._said, left = time.perf_counter(), self.left(t, evaluating)
        return f"  {duration(left)} left" if self._bar.disable and left is not None and t < self._total else ""

    def close(self):
        self._bar.close()


def duration(seconds):
    """`45 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
