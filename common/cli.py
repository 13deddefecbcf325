"""Command lines: one parser for every script, so that flags, errors and exit codes are alike everywhere.

Exit codes: 0 finished, 1 failed while running, 2 bad usage or input (one line on stderr, nothing written),
130 interrupted (resumable).
"""

import argparse
import errno
import math
import sys


class _OneLine(Exception):
    """What it says may hold a path or another's message of several lines."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())


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
    """Parsed flags. `reads`, which is no flag: {flag: when it is read, a function of the flags, or None: always}."""

    __slots__ = ("reads",)


class _Declares:
    """Flags say when a run reads them: add_argument(..., when=lambda args: args.sharding == "dirichlet")."""

    def add_argument(self, *names, when=None, **options):
        action = super().add_argument(*names, **options)
        action.when = when
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
    """

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument_group(self, *args, **kwargs):
        group = _Group(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(args):
            if word == "--":
                break
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                args[i] = "--" + name[2:].replace("_", "-") + equals + value
        flags = Flags() if namespace is None else namespace
        if isinstance(flags, Flags):
            flags.reads = {a.dest: getattr(a, "when", None) for a in self._actions if a.dest != "help"}
        return super().parse_known_args(args, flags)


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
positive_float = _number(float, lambda v: v > 0, "a number above 0")
non_negative_float = _number(float, lambda v: v >= 0, "a number of at least 0")
fraction = _number(float, lambda v: 0 < v <= 1, "a number above 0 and at most 1")
half_open_fraction = _number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def add_run_flags(parser, *other_names):
    """The flags of the run itself, the same in every script. other_names: more spellings of --run-name."""
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--run-name", *other_names, metavar="NAME", help="folder of this run (default: made from the flags)"
    )
    group.add_argument("--resume", action="store_true", help="go on with the run of this name, if there is one")
    group.add_argument("--overwrite", action="store_true", help="delete the run of this name and start anew")
    group.add_argument(
        "--track", choices=["off", "wandb", "tensorboard"], default="off", help="also send the metrics there"
    )
    return group


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
        "--amp", choices=["off", "auto", "bf16", "fp16"], default="off", help="precision of the products"
    )


def checked(function, *args):
    """function(*args); where that is a UsageError, its line on stderr and the end with exit code 2."""
    try:
        return function(*args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_main(main, args, end=sys.exit):
    """Calls `main(args)` and ends the process with the exit code and the one line that users can rely on.

    end: what ends the process, a function of the exit code.
    """
    try:
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
    except KeyboardInterrupt:
        print("interrupted: run the same command with --resume to go on", file=sys.stderr)
        code = 130
    end(code or 0)
