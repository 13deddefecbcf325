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
import sys
import time
import warnings

from common.stopping import code_of, stoppable


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


class Flags(argparse.Namespace):
    """Parsed flags, and three lists that are no flags.

    reads: {flag: when it is read, a function of the flags, or None: always}; given: the flags of the command line
    with another value than the default, and all of --config; notes: lines of what has no effect.
    """

    __slots__ = ("reads", "given", "notes")


class When:
    """When a flag is read, as a function of the flags; made by `only` and `unless`, joined by & and |.

    off: function of the flags to those among them that switch the flag off, none where it is read.
    """

    def __init__(self, off):
        self.off = off

    def __call__(self, args):
        return not self.off(args)

    def __and__(self, other):
        return When(lambda args: self.off(args) or other.off(args))

    def __or__(self, other):
        return When(lambda args: other.off(args) and self.off(args))


def only(**wanted):
    """A flag that is read only where every one of these other flags has its value.

    A value may be a tuple of values, or a function that says whether a value is one of them.
    """
    return When(lambda args: [flag for flag, values in wanted.items() if not _has(args, flag, values)][:1])


def unless(**values):
    """A flag that is not read where all of these flags have their value, given as for `only`.

    Of a flag that came later its own off-value too: runs of before and after are then runs of one method.
    """
    return When(lambda args: list(values) if all(_has(args, flag, v) for flag, v in values.items()) else [])


def _has(args, flag, values):
    value = getattr(args, flag, None)
    return values(value) if callable(values) else value in (values if isinstance(values, tuple) else (values,))


class _Declares:
    """Flags say when a run reads them: add_argument(..., when=only(sharding="dirichlet"), why="what it does then").

    empty: whether '' is a value; else it is refused, as of a shell's variable that is not set.
    """

    def add_argument(self, *names, when=None, why="", empty=False, **options):
        action = super().add_argument(*names, **options)
        action.when, action.why, action.empty = when, why, empty
        return action


class _Group(_Declares, argparse._ArgumentGroup):
    pass


def method_of(args, machine=()):
    """{flag: value} of the flags that a run reads: what makes two runs seeds of one curve, but for the seed.

    A flag that another one switches off is not in it. Args: args: of `Parser`; machine: flags that say how to run.
    """
    reads = getattr(args, "reads", dict.fromkeys(vars(args)))
    rest = {*machine, "device", "threads", "compile"}
    return {
        name: getattr(args, name)
        for name, when in reads.items()
        if name not in rest and hasattr(args, name) and (when is None or when(args))
    }


class Parser(_Declares, argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose flags may be written with hyphens or underscores.

    `--num_clients 4` and `--num-clients 4` are one flag. Abbreviations are off: a flag that a later version
    adds must not change what an old command line means. A bad command line exits with code 2 and one line.

    --help begins with one line of usage and the first commands in the docstring of the script that runs.
    """

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.defaulted = {}  # {flag: how it is called in the file that gives it another default}

    def add_argument_group(self, *args, **kwargs):
        group = _Group(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

    def format_help(self):
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
        given = self.defaulted | self._given(words)
        flags, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} belongs to no flag: drop it")
        if isinstance(flags, Flags):
            flags.given = [n for n in given if n in self.defaulted or getattr(flags, n) != self.get_default(n)]
            flags.notes = list(self._without_effect(flags, given))
        return flags

    def parse_known_args(self, args=None, namespace=None):
        flags = Flags() if namespace is None else namespace
        if isinstance(flags, Flags):
            flags.reads = {a.dest: getattr(a, "when", None) for a in self._actions if a.dest != "help"}
        return super().parse_known_args(_hyphenated(args), flags)

    def _get_values(self, action, words):
        empty = "" in words and action.type is None and not getattr(action, "empty", False)
        if action.option_strings and action.nargs != 0 and ("--" in words or empty):
            given = "'--'" if "--" in words else "an empty text"  # of --flag=-- argparse makes an empty list
            raise argparse.ArgumentError(action, f"{given} is no value of it: give one, or drop the flag")
        return super()._get_values(action, words)

    def _given(self, words):
        """{flag: its spelling} of the words, all of which must be this parser's."""
        known, given = dict(self._option_string_actions), {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for one in action.choices.values():
                    known |= one._option_string_actions
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            if name in known:
                given[known[name].dest] = name
            elif name.startswith("--") and not {"-h", "--help"} & {*words}:
                near = difflib.get_close_matches(name[2:], [one[2:] for one in known], n=1)  # "--" is no likeness
                self.error(f"unknown flag {name}" + "".join(f": did you mean --{one}?" for one in near))
        return given

    def _without_effect(self, flags, given):
        """A line for each reason that flags which were given are not read."""
        lines = {}
        for action in self._actions:
            when = getattr(action, "when", None)
            off = when.off(flags) if action.dest in given and isinstance(when, When) else ()
            if off and action.dest not in off:
                reason = " ".join(_spelled(flag, getattr(flags, flag, None)) for flag in off)
                names = lines.setdefault((reason, action.why), {})
                names[given[action.dest]] = True
        for (reason, why), names in lines.items():
            have = "has" if len(names) == 1 else "have"
            yield f"warning: {' and '.join(names)} {have} no effect {reason}" + (f": {why}" if why else "")


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


def _spelled(flag, value):
    """`with --sharding iid`, `without --hp-search`."""
    name = f"--{flag.replace('_', '-')}"
    if value is None or value is False:
        return f"without {name}"
    return f"with {name}" + ("" if value is True else f" {value}")


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


def add_run_flags(parser, *other_names):
    """The flags of the run itself, the same in every script. other_names: more spellings of --run-name."""
    group = parser.add_argument_group("the run")
    text = "folder of this run (default: made from the flags)"
    group.add_argument("--run-name", *other_names, type=folder_name, metavar="NAME", help=text)
    one = group.add_mutually_exclusive_group()
    one.add_argument("--resume", action="store_true", help="go on with the run of this name, if there is one")
    one.add_argument("--overwrite", action="store_true", help="delete the run of this name and start anew")
    group.add_argument(
        "--keep-checkpoints",
        type=positive_int,
        default=2,
        metavar="N",
        help="the last one is checkpoint/, the one before it checkpoint.1/",
    )
    group.add_argument(
        "--track", choices=["off", "wandb", "tensorboard"], default="off", help="also send the metrics there"
    )
    return group


def add_final_flag(group):
    """Which weights final/ holds."""
    which = "weights that final/ holds: of the last round, or of the best by the validation metric (never of round 0)"
    # no part of the method: what is trained is the same
    group.add_argument("--final", choices=["last", "best"], default="last", when=lambda args: False, help=which)


def add_machine_flags(group, seed=42, federated=False):
    """Seed, device, threads and precision, and for federated scripts processes. Args: seed: the default."""
    group.add_argument("--seed", type=seed_number, default=seed, metavar="N", help="all randomness follows from it")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--threads",
        type=thread_count,
        default=0,
        metavar="N",
        help="CPU threads a process; 0: " + ("one" if federated else "all cores"),
    )
    if federated:
        group.add_argument(
            "--processes",
            type=thread_count,
            default=0,
            metavar="N",
            help="processes that share a round's clients; 0: one a core (on CUDA a GPU), as clients and memory allow",
        )
        group.add_argument(
            "--patience",
            type=positive_float,
            default=30.0,
            metavar="X",
            help="minutes that a process waits for another before it says at which client that one is",
        )
    group.add_argument(
        "--amp", choices=["off", "auto", "bf16", "fp16"], default="off", help="precision of the products"
    )


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


def say_waiting(args=None):
    """Says what waits, and what the flags have to say (once): nothing can be refused any more."""
    waiting, _Waiting.lines = _Waiting.lines or [], None
    notes = getattr(args, "notes", [])
    for line in (*notes, *waiting):
        say(line)
    notes.clear()


@contextlib.contextmanager
def _waiting(args):
    """What is said by `say` and `warnings.warn` waits until the run begins, or until the end of what is not refused."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {_one_line(message)}")
        _Waiting.lines = []
        try:
            yield
            if os.environ.get("RANK", "0") == "0":
                say_waiting(args)
        except RunFailed:
            say_waiting(args)
            raise
        finally:
            _Waiting.lines = None


def checked(function, *args):
    """function(*args); where that is a UsageError, its line on stderr and the end with exit code 2."""
    try:
        return function(*args)
    except UsageError as error:
        end_with(f"error: {error}")


def run_main(main, args, end=sys.exit, reason=lambda: None):
    """Calls `main(args)` and ends the process with the exit code and the one line that users can rely on.

    end: what ends the process, a function of the exit code; reason: as of `common.stopping.stoppable`. What an
    interruption's notes (`add_note`) say of how to go on is part of its line.
    """
    try:
        with stoppable(reason), _waiting(args):
            code = main(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.strerror}: {str(error.filename)[:60]}...: give a shorter one", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        code = code_of(error)
        how = "terminated" if code == 143 else "interrupted"
        print(": ".join([how, *getattr(error, "__notes__", ())[:1]]), file=sys.stderr)
    end(code or 0)
