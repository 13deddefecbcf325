"""--config FILE: a yaml file's keys as defaults of the flags."""

import argparse
import difflib

import yaml

from common.cli import UsageError


def apply_config(parser, path, keys, known=(), switches=None):
    """Makes the values in the yaml file at `path` the defaults of `parser`'s flags; null leaves a flag's own.

    Args: keys: {"section.key": name of the flag in the parsed arguments, None where it has no effect}; known: further
        keys, of other scripts that the same file serves, which are checked for their names only; switches: {flag:
        (other flag, value)}, switches that only set another flag.
    Raises UsageError for an unknown key (with the nearest known one), a value of the wrong kind, no yaml file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read as yaml: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: the file must hold keys and values")
    actions, switches, every = {action.dest: action for action in parser._actions}, switches or {}, {*keys, *known}
    for key, value in _flat(content):
        if key not in every:
            near = difflib.get_close_matches(key, sorted(every), n=1, cutoff=0.0)[0]
            raise UsageError(f"--config {path}: unknown key {key}: did you mean {near}?")
        dest = keys.get(key)
        if dest in switches and isinstance(value, bool):  # a default of the flag that it stands for
            dest, value = switches[dest][0], switches[dest][1] if value else None
        if dest in actions and value is not None:
            parser.set_defaults(**{dest: _checked(actions[dest], value, f"--config {path}: {key}")})


def _flat(content):
    """("section.key", value) or ("key", value) of each."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif value is not None:
            yield str(name), value


def _checked(action, value, where):
    """The value as the flag itself would take it."""
    if action.nargs == 0 or isinstance(action.const, bool):  # a switch
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {value!r} is not true or false")
        return value
    if (action.nargs == "+") != isinstance(value, list):
        raise UsageError(f"{where}: {value!r} must be {'a list of values' if action.nargs == '+' else 'one value'}")
    try:
        made = [(action.type or str)(str(item)) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{where}: {error}") from None
    if wrong := [item for item in made if action.choices and item not in action.choices]:
        raise UsageError(f"{where}: {wrong[0]!r} is not one of {', '.join(map(str, action.choices))}")
    return made if action.nargs == "+" else made[0]
