"""Command lines: one parser for every script, so that flags, errors and exit codes are alike everywhere.

Exit codes: 0 finished, 1 failed while running, 2 bad usage or input (one line on stderr, nothing written),
130 interrupted, 143 terminated (a run is resumable).

Nothing heavy is imported here: a typo and --help are answered at once.
"""

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import signal
import sys
import time
import warnings

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RARE = "rarely changed"  # the title of a group of flags that --help leaves out and --help-all shows
AGAIN = 1.0  # seconds: a terminal, a launcher and a queue may send the same signal; one that comes later means it


class _OneLine(Exception):
    """What it says may hold a path or another's message of several lines."""

    def __str__(self):
        return _one_line(super().__str__())


class UsageError(_OneLine):
    """Bad usage or input. The message is one line: the values that clash and what to do next."""


class RunFailed(_OneLine):
    """A run that started could not go on (exit code 1). The message is one line: the reason and what to do next."""


class _HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every flag that has one, and the values after the last spelling only."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action):
        text = action.help or ""
        if "default" in text or action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return text
        return text + " (default: %(default)s)"

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(action.option_strings) + " " + values

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "TEXT")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose flags may be written with hyphens or underscores.

    `--num_clients 4` and `--num-clients 4` are one flag. Abbreviations are off: a flag that a later version
    adds must not change what an old command line means. A bad command line exits with code 2 and one line.

    --help begins with one line of usage and the first commands in the docstring of the script that runs. It leaves out
    the flags of the group `RARE`, which --help-all shows.
    """

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._groups = {}

    def group(self, title):
        """The group of flags of this title: there is one."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
            if title == RARE:
                self.add_argument("--help-all", action=_HelpAll, nargs=0, help=f"also the flags that are {RARE}")
        return self._groups[title]

    def format_help(self, everything=False):
        groups, rare = self._action_groups, [g for g in self._action_groups if g.title == RARE]
        self._action_groups = [g for g in groups if g not in rare] + rare * everything
        try:
            return self._format_help()
        finally:
            self._action_groups = groups

    def _format_help(self):
        needed = [[*a.option_strings[:1], a.metavar or a.dest.upper()] for a in self._actions if a.required]
        self.usage = " ".join(["%(prog)s", *(word for words in needed for word in words), "[--flag value ...]"])
        usage, gap, rest = super().format_help().partition("\n\n")
        return "\n    ".join([usage, *self._examples()]) + gap + rest

    def _examples(self):
        doc = re.sub(r"\\\n *", "", getattr(sys.modules["__main__"], "__doc__", None) or "")
        commands = [line.strip() for line in doc.split("\n") if line.strip().startswith("python ")]
        return ([line for line in commands if self.prog in line] or commands)[:2]

    def error(self, message):
        end_with(f"{self.prog}: error: {_one_line(message)} (see --help)")

    def parse_args(self, args=None, namespace=None):
        words = _hyphenated(args)
        unknown = [word for word in words if word.partition("=")[0] not in self._option_string_actions]
        if not self._subparsers and (flags := [word for word in unknown if word[:2] == "--" != word]):
            self.error(self._unknown(flags[0]))  # before what is missing
        flags, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} belongs to no flag: drop it")
        return flags

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(_hyphenated(args), namespace)

    def _unknown(self, word):
        name, flags = word.partition("=")[0], [flag[2:] for flag in self._option_string_actions]
        near = difflib.get_close_matches(name[2:], flags, n=1)  # "--" is no likeness
        return f"unknown flag {name}" + "".join(f": did you mean --{one}?" for one in near)

    def _get_values(self, action, words):
        """type=str says that '' is a value; else it is refused, as of a shell's variable that is not set."""
        if action.option_strings and action.nargs != 0 and ("--" in words or "" in words and action.type is None):
            given = "'--'" if "--" in words else "an empty text"  # of --flag=-- argparse makes an empty list
            raise argparse.ArgumentError(action, f"{given} is no value of it: give one, or drop the flag")
        return super()._get_values(action, words)


class _HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _hyphenated(args):
    """The words of a command line (None: of this process's), flags with hyphens."""
    words = list(sys.argv[1:] if args is None else args)
    for i, word in enumerate(words):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[i] = "--" + name[2:].replace("_", "-") + equals + value
    return words


def _one_line(message):
    """The message in one line that can be printed, whatever it quotes (bytes of a command line that are no utf-8)."""
    return " ".join(str(message).splitlines()).encode(errors="backslashreplace").decode()


def _number(kind, holds, wanted):
    """A type of flags: a finite number for which `holds`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda v: v >= 1, "an integer of at least 1")
non_negative_int = _number(int, lambda v: v >= 0, "an integer of at least 0")
seed_number = _number(int, lambda v: 0 <= v < 2**63, "an integer from 0 to 2^63 - 1")
thread_count = _number(int, lambda v: 0 <= v <= 1024, "an integer from 0 to 1024")
layer_count = _number(int, lambda v: 1 <= v <= 1000, "an integer from 1 to 1000")
positive_float = _number(float, lambda v: v > 0, "a number above 0")
non_negative_float = _number(float, lambda v: v >= 0, "a number of at least 0")
fraction = _number(float, lambda v: 0 < v <= 1, "a number above 0 and at most 1")
half_open_fraction = _number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def folder_name(text):
    """A type of flags: the name of one folder."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder: give one line of text")
    return text


def add_run_flags(parser, seed=42, federated=False, names=(), folders=()):
    """The flags of the run itself, the same in every script: its name, its folder, and the machine's.

    Args: seed: the default; names, folders: more spellings of --run-name and --output-dir.
    """
    add = parser.group("the run").add_argument
    text = "folder of this run (default: made from the flags)"
    add("--run-name", *names, type=folder_name, metavar="NAME", help=text)
    add("--output-dir", *folders, default="results", metavar="DIR", help="where run folders go")
    one = parser.group("the run").add_mutually_exclusive_group()
    one.add_argument("--resume", action="store_true", help="go on with the run of this name, if there is one")
    one.add_argument("--overwrite", action="store_true", help="delete the run of this name and start anew")
    add_machine_flags(parser, seed, federated)
    add = parser.group(RARE).add_argument
    add("--track", choices=["off", "wandb", "tensorboard"], default="off", help="also send the metrics there")
    which = "weights that final/ holds: of the last round, or of the best by the validation metric (never of round 0)"
    add("--final", choices=["last", "best"], default="last", help=which)


def add_machine_flags(parser, seed=42, federated=False):
    """Seed, device, threads and precision, and for federated scripts processes. Args: seed: the default."""
    add = parser.group("the run").add_argument
    add("--seed", type=seed_number, default=seed, metavar="N", help="all randomness follows from it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    shared = "processes that share a round's clients; 0: one a core (on CUDA a GPU), as clients and memory allow"
    if federated:
        add("--processes", type=thread_count, default=0, metavar="N", help=shared)
    add("--amp", choices=["off", "auto", "bf16", "fp16"], default="off", help="precision of the products")
    threads = "CPU threads a process; 0: " + ("one" if federated else "all cores")
    parser.group(RARE).add_argument("--threads", type=thread_count, default=0, metavar="N", help=threads)


def end_with(line):
    """This line on stderr and the end with exit code 2. Under torchrun all end alike, and the main process says it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # torchrun ends this process, unless the main one sees nothing wrong
        line = f"process {os.environ['RANK']}: {line}"
    print(line, file=sys.stderr)
    sys.exit(2)


class _Waiting:
    """Lines of information that wait until a run has begun, so that a refusal is the only line on stderr."""

    lines = None  # None: nothing is waited for


def say(line):
    """A line of information on stderr, above a progress bar: at once, or when the run that is checked has begun."""
    if _Waiting.lines is not None:
        _Waiting.lines.append(line)
        return
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def say_waiting():
    """Says what waits: nothing can be refused any more."""
    waiting, _Waiting.lines = _Waiting.lines or [], None
    for line in waiting:
        say(line)


@contextlib.contextmanager
def _waiting():
    """What is said by `say` and `warnings.warn` waits until the run begins, or until the end of what is not refused."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {_one_line(message)}")
        _Waiting.lines = []
        try:
            yield
            if os.environ.get("RANK", "0") == "0":
                say_waiting()
        except RunFailed:
            say_waiting()
            raise
        finally:
            _Waiting.lines = None


def parse(parser, complete=lambda args: args):
    """The flags of this process's command line, completed; where that is a UsageError, its line and exit code 2."""
    return checked(complete, parser.parse_args())


def checked(function, *args):
    """function(*args); where that is a UsageError, its line on stderr and the end with exit code 2."""
    try:
        return function(*args)
    except UsageError as error:
        end_with(f"error: {error}")


# ---- how a script is called, and how it is stopped


class Terminated(KeyboardInterrupt):
    """SIGTERM, which queues send before they take a machine away: like Ctrl-C (SIGINT), but for the exit code."""


class _Stop:
    waiting = None  # signals that came while `undisturbed`


def run_main(main, args):
    """Calls `main(args)` and ends the process with the exit code and the one line that users can rely on."""
    code, line, _ = outcome(main, args)
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def outcome(main, args):
    """Calls `main(args)`. Returns (exit code, the line that says why, "" for 0, its exception or None).

    What an interruption's notes (`add_note`) say of how to go on is part of its line.
    """
    try:
        with stoppable(), _waiting():
            return main(args) or 0, "", None
    except UsageError as error:
        return 2, f"error: {error}", error
    except RunFailed as error:
        return 1, f"failed: {error}", error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return 2, f"error: {error.strerror}: {str(error.filename)[:60]}...: give a shorter one", error
    except KeyboardInterrupt as error:
        code, how = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        return code, ": ".join([how, *getattr(error, "__notes__", ())[:1]]), error


@contextlib.contextmanager
def stoppable():
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`; once more, later, ends the process at once.

    An error that follows from the interruption (a library turned it into one of its own) is raised as the interruption.
    C++ code is not broken off: the exception comes when it returns. A signal that was ignored from outside stays so.
    """
    came = []  # when, and what was raised

    def stop(number, frame):
        if _Stop.waiting is not None:
            _Stop.waiting.append(number)
        elif not came:
            came.extend((time.monotonic(), Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()))
            raise came[1]
        elif time.monotonic() > came[0] + AGAIN:
            os._exit(128 + number)

    with _handled_by(stop):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # who started this process may have held them back
        try:
            yield
        except Exception as error:
            if came and error is not came[1]:
                raise came[1] from error
            raise


@contextlib.contextmanager
def undisturbed():
    """Inside, what `stoppable` raises waits; other programs that are started inside get their signals as ever."""
    outer, _Stop.waiting = _Stop.waiting, []
    try:
        yield
    finally:
        came, _Stop.waiting = _Stop.waiting, outer
        if came:
            signal.raise_signal(came[0])


def ended_at_once():
    """A block in which a signal ends the process: while C++ code waits for another process, no exception comes."""
    return _handled_by(signal.SIG_DFL)


@contextlib.contextmanager
def _handled_by(handler):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
