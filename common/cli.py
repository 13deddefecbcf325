"""Command lines: one parser for every script, so that flags, errors and exit codes are alike everywhere.

Exit codes: 0 finished, 1 failed while running, 2 bad usage or input (one line on stderr, nothing written),
130 interrupted, 143 terminated (a run is resumable).

Nothing heavy is imported here: a typo and --help are answered at once.
"""

import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import time
import warnings

CLIENT_OPTIMIZERS = ("sgd", "sgdm", "adamw")
RULES = ("svd", "naive", "ffa", "stack", "residual", "rolora", "rotate", "head")  # of `common.lowrank`
RESPLIT = ("naive", "residual", "rotate")  # rules that serve a mean of both factors, which may be split anew
SIZES = ("dirichlet", "equal")  # of clients whose labels a Dirichlet draw deals, `common.sharding.equal_parts`
SPLITS = ("us", "balanced", "sv")  # of the singular values, `common.products.truncate`
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
    """Shows the default of every flag that has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action):
        text = action.help or ""
        if "default" in text or action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return text
        return text + " (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "TEXT")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` for which `--num_clients 4` and `--num-clients 4` are one flag, without abbreviations.

    --help begins with the first commands in the docstring of the script that runs. It leaves out the flags of the group
    `RARE`, which --help-all shows. A bad command line exits with code 2 and one line.
    """

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._groups = {}
        if self.add_help:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help=f"also the flags that are {RARE}")

    def group(self, title):
        """The group of flags of this title: there is one."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def format_help(self, everything=False):
        needed = [f"{a.option_strings[0]} {a.metavar}" for a in self._actions if a.required and a.option_strings]
        self.usage = " ".join(["%(prog)s", *needed, "[--flag value ...]"])
        groups, rare = self._action_groups, [g for g in self._action_groups if g.title == RARE]
        self._action_groups = [g for g in groups if g not in rare] + rare * everything
        usage, gap, rest = super().format_help().partition("\n\n")
        self._action_groups = groups
        doc = re.sub(r"\\\n *", "", getattr(sys.modules["__main__"], "__doc__", None) or "")
        commands = [line.strip() for line in doc.split("\n") if line.strip().startswith("python ")]
        return "\n    ".join([usage, *commands[:2]]) + gap + rest

    def error(self, message):
        end_with(f"{self.prog}: error: {_one_line(message)} (see --help)")

    def parse_args(self, args=None, namespace=None):
        flags, rest = self.parse_known_args(args, namespace)
        if rest and rest[0].startswith("--"):
            name, known = rest[0].partition("=")[0], [flag[2:] for flag in self._option_string_actions]
            near = difflib.get_close_matches(name[2:], known, n=1)  # "--" is no likeness
            self.error(f"unknown flag {name}" + "".join(f": did you mean --{one}?" for one in near))
        if rest:
            self.error(f"{rest[0]!r} belongs to no flag: drop it")
        return flags

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(_hyphenated(args), namespace)

    def taken(self, action, value):
        """What a flag makes of a yaml file's value. Raises: ValueError, argparse.ArgumentError."""
        if isinstance(value, bool) != (action.nargs == 0) or isinstance(value, list) != (action.nargs == "+"):
            raise ValueError("not what this flag takes: true or false, one value, or a list")
        words = value if isinstance(value, list) else [value]
        return value if action.nargs == 0 else self._get_values(action, [str(word) for word in words])


def apply_config(parser, path, keys, known=(), switches=None):
    """Makes the values of the yaml file at `path` (--config) the defaults of the flags; null leaves a flag's own.

    Args: keys: {"section.key": name of the flag in the parsed arguments, None where it has no effect}; known: further
        keys, of other scripts that the same file serves, which are checked for their names only; switches: {flag:
        (other flag, value)}, switches that only set another flag.
    Raises UsageError for an unknown key (with the nearest known one), a value of the wrong kind, no yaml file.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read as yaml: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: the file must hold keys and values")
    values = {}
    for name, value in content.items():
        values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {str(name): value}
    for key, value in values.items():
        if value is not None and key not in (every := sorted({*keys, *known})):
            near = difflib.get_close_matches(key, every, n=1, cutoff=0.0)[0]
            raise UsageError(f"--config {path}: unknown key {key}: did you mean {near}?")
        dest = keys.get(key)
        if dest in (switches or {}) and isinstance(value, bool):
            dest, value = switches[dest][0], switches[dest][1] if value else None
        for action in [action for action in parser._actions if action.dest == dest and value is not None]:
            try:
                parser.set_defaults(**{dest: parser.taken(action, value)})
            except (ValueError, argparse.ArgumentError) as error:
                raise UsageError(f"--config {path}: {key}: {value!r}: {error}") from None


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
        add("--processes", type=non_negative_int, default=0, metavar="N", help=shared)
    add("--amp", choices=["off", "auto", "bf16", "fp16"], default="off", help="precision of the products")
    threads = "CPU threads a process; 0: " + ("one" if federated else "all cores")
    parser.group(RARE).add_argument("--threads", type=non_negative_int, default=0, metavar="N", help=threads)


def end_with(line):
    """This line on stderr and the end with exit code 2; of several processes that end alike, the main one says it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # torchrun ends this process, unless the main one sees nothing wrong
        line = f"process {os.environ['RANK']}: {line}"
    print(line, file=sys.stderr)
    sys.exit(2)


_waiting = None  # lines of information that wait until a run has begun, so that a refusal is the only line on stderr


def say(line):
    """A line of information on stderr, above a progress bar: at once, or when the run that is checked has begun."""
    if _waiting is not None:
        _waiting.append(line)
        return
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def duration(seconds):
    """`45 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def say_waiting():
    """Says what waits: nothing can be refused any more."""
    global _waiting
    lines, _waiting = _waiting or [], None
    for line in lines:
        say(line)


@contextlib.contextmanager
def _said_later():
    """What is said by `say` and `warnings.warn` waits until the run begins, or until the end of what is not refused."""
    global _waiting
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {_one_line(message)}")
        _waiting = []
        try:
            yield
        except UsageError:
            _waiting = None
            raise
        finally:
            say_waiting()


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
        with stoppable(), _said_later():
            return main(args) or 0, "", None
    except UsageError as error:
        return 2, f"error: {error}", error
    except RunFailed as error:
        return 1, f"failed: {error}", error
    except KeyboardInterrupt as error:
        code, how = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        return code, ": ".join([how, *getattr(error, "__notes__", ())[:1]]), error


@contextlib.contextmanager
def stoppable():
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`; once more, later, ends the process at once.

    A signal that is ignored stays so.
    """
    came = []  # when

    def stop(number, frame):
        if not came:
            came.append(time.monotonic())
            raise Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        if time.monotonic() > came[0] + AGAIN:
            os._exit(128 + number)

    with _handled_by(stop):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # who started this process may have held them back
        yield


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
