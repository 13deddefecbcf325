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
    Raises UsageError for an unknown key (with the nearest known one), a key that is there twice, a value of the wrong
    kind, no yaml file.
    """
    content = _read(path)
    actions, switches, every = {action.dest: action for action in parser._actions}, switches or {}, {*keys, *known}
    for key, value in _flat(content, {name.split(".")[0] for name in every if "." in name}):
        if key not in every:
            near = difflib.get_close_matches(key, sorted(every), n=1, cutoff=0.0)[0]
            raise UsageError(f"--config {path}: unknown key {key}: did you mean {near}?")
        dest = keys.get(key)
        if dest in switches and isinstance(value, bool):  # a default of the flag that it stands for
            dest, value = switches[dest][0], switches[dest][1] if value else None
        if dest in actions and value is not None:
            value = _checked(actions[dest], value, f"--config {path}: {key}")
            if value != actions[dest].default:
                parser.defaulted[dest] = f"{key} of --config"
            parser.set_defaults(**{dest: value})


class _Loader(yaml.SafeLoader):
    """Of a key that is there twice yaml takes the last and says nothing."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise UsageError(f"line {key.start_mark.line + 1}: {key.value} is there twice: drop one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path):
    """The keys and values in the yaml file at `path`."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}: name a yaml file") from None
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None
    except RecursionError:
        raise UsageError(f"--config {path}: brackets in brackets in brackets: two levels are all it takes") from None
    except Exception as error:  # not only YAMLError: a date that is none, a tag without its value
        raise UsageError(f"--config {path} is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: the file must hold keys and values")
    return content


def _flat(content, sections):
    """("section.key", value) or ("key", value) of each; a section that is empty has none."""
    for name, value in content.items():
        if name not in sections:
            yield str(name), value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif value is not None:
            yield f"{name}.{value}", None


def _checked(action, value, where):
    """The value as the flag itself would take it."""
    if action.nargs == 0 or isinstance(action.const, bool):  # a switch
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {value!r} is not true or false")
        return value
    many = action.nargs == "+"
    if many != isinstance(value, list) or value == []:
        raise UsageError(f"{where}: {value!r} must be {'a list of values' if many else 'one value'}")
    made = []
    for item in value if many else [value]:
        if isinstance(item, (dict, list)) or item is None or item == "" and not getattr(action, "empty", False):
            raise UsageError(f"{where}: {item!r} must be one value")
        try:
            made.append(action.type(str(item)) if action.type else str(item))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{where}: {error}") from None
        if action.choices and made[-1] not in action.choices:
            raise UsageError(f"{where}: {item!r} is not one of {', '.join(map(str, action.choices))}")
    return made if many else made[0]
