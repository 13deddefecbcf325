"""Data sets and models of the Hugging Face hub, through their libraries' own caches and offline modes."""

import contextlib
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from common.cli import RunFailed, UsageError


def one_line(error):
    """The first line of an exception's message, for a UsageError."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# Everything that asks the hub's library for a model gives these: it takes a download with fewer files for incomplete.
MODEL_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]  # configuration, tokenizer, weights; no pickles
ANSWER_SECONDS = 5  # for a server's first answer


def hub_reachable():
    """Whether the Hugging Face hub answers within seconds; its own clients try for up to a minute."""
    return answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def answers(address):
    """Whether the server at `address` answers within seconds. False when HF_HUB_OFFLINE asks to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # if not in a friendly way: the client will say what is wrong
    except (OSError, ValueError):
        return False
    return True


def hub_dataset(name, columns, what, files):
    """{split: {column: list}} of a data set on the hub, or in the cache of its library.

    Args: name: ("owner/name", its configuration if it has some); columns: {split: names of columns}.
    Raises: UsageError where there is none: `what` is not there, and which `files` would do instead.
    """
    online = hub_reachable()
    import datasets  # only here: it takes a second to import

    if not online:  # else the libraries try for a minute; from now on they look into their caches only
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        splits = datasets.load_dataset(*name)
        return {split: {c: list(splits[split][c]) for c in columns[split]} for split in columns}
    except Exception as error:
        why = f"the hub did not give it ({one_line(error)})" if online else "the hub cannot be reached"
        raise UsageError(f"{what} and {why}: put {files}, or give --data-root, or take --dataset demo") from error


# ---- models


def download(model, cache_dir=None, online=True):
    """The folder of `model`, its missing files downloaded; offline: as an earlier download left it.

    Raises: UsageError for what is not there or has no safetensors; RunFailed when a download breaks off.
    """
    from huggingface_hub import errors, snapshot_download  # only here: it takes a second to import

    how = {"allow_patterns": MODEL_FILES, "cache_dir": cache_dir, "local_files_only": not online}
    try:
        folder = Path(snapshot_download(model, **how))
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise UsageError(f"the hub has no {model} ({one_line(error)}): choose another model") from error
    except errors.LocalEntryNotFoundError as error:
        raise UsageError(f"{model} is not downloaded yet, or not whole: run this where there is a network") from error
    except Exception as error:  # of whichever HTTP library the hub's has under it
        raise RunFailed(f"{model}: {one_line(error)}; run the same command again to go on") from error
    if not list(folder.glob("model*.safetensors")):
        raise UsageError(f"{model} has no model.safetensors, and pickled weights are not taken: choose another model")
    return folder


def find_model(name, spec=None, advice=""):
    """The folder of a model: `name` itself where it is a folder, else what an earlier download left, else from the hub.

    Args: spec: its name on the hub (default: name); advice: what else to do where neither is there.
    Raises: UsageError when it is not there, or a folder without config.json or model.safetensors.
    """
    folder, spec = Path(name).expanduser(), spec or name
    if os.path.isdir(folder):  # also of a name that is too long
        if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
            advice = "give a folder that transformers wrote (pickled weights are not read)"
            raise UsageError(f"--model {name}: {folder} has no config.json with model.safetensors: {advice}")
        return folder
    for cache in (remembered_cache(), None):
        with contextlib.suppress(UsageError):
            return download(spec, cache_dir=cache, online=False)
    if hub_reachable():
        return download(spec)
    raise UsageError(f"no model {name}: not a folder, not downloaded before, and the hub is out of reach: {advice}")


def load_pretrained(kind, source, what, advice, **options):
    """(model, transformers' loading info) of a folder or a name on the hub, in fp32, from safetensors.

    Args: kind: a class of transformers with `from_pretrained`, which gets the options; what, advice: as `reading`.
    """
    options = {"use_safetensors": True, "dtype": "float32", "output_loading_info": True, **options}
    with quiet(), reading(what, advice):
        return kind.from_pretrained(source, trust_remote_code=False, **options)


def weight_bytes(folder):
    """Bytes of a folder's weights, 0 where it is no folder: for a guess at memory."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else 0


@contextlib.contextmanager
def reading(what, advice):
    """Turns whatever a library raises over a file that it does not understand into a UsageError of one line."""
    try:
        yield
    except (UsageError, RunFailed):
        raise
    except Exception as error:
        raise UsageError(f"{what} ({one_line(error)[:300]}): {advice}") from error


@contextlib.contextmanager
def quiet():
    """Without transformers' own progress bars and warnings."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # for good: no script shows them
    try:
        yield
    finally:
        logging.set_verbosity(shown)


# ---- where `download_roberta_models.py --hf_home` put the models


def _record():
    return Path(os.environ.get("FEDQUARTET_CACHE") or "~/.cache/fedquartet").expanduser() / "hf_home.txt"


def remembered_cache():
    """The `cache_dir` for the hub's library that `remember` was last given, None where it is gone or there was none."""
    folder = Path(_record().read_text("utf-8")) if _record().is_file() else None
    return folder if folder and folder.is_dir() else None


def remember(cache):
    """Makes `find_model` look into the absolute folder `cache` first."""
    try:
        _record().parent.mkdir(parents=True, exist_ok=True)
        _record().write_text(str(cache), "utf-8")
    except OSError as error:
        warnings.warn(f"cannot write {_record()} ({error}): give the printed folders as --model", stacklevel=2)
