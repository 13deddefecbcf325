"""download_roberta_models.py and hub.py, with a stand-in for the hub's library."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from common import hub
from common.cli import UsageError, run_main
from lora_glue_fl import download_roberta_models, models


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What snapshot_download was asked for; the stand-in writes a model, or raises `asked.error` at call `asked.at`."""
    monkeypatch.setenv("FEDQUARTET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download_roberta_models, "hub_reachable", lambda: calls.online)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", calls := Calls(tmp_path))
    return calls


class Calls(list):
    online, error, at, file = True, None, 0, "model.safetensors"

    def __init__(self, tmp_path):
        self.default = tmp_path / "default"

    def __call__(self, name, **how):
        self.append((name, how))
        folder = Path(how["cache_dir"] or self.default) / name
        if self.error is not None and len(self) > self.at:
            raise self.error
        if how["local_files_only"] and not folder.is_dir():
            raise errors.LocalEntryNotFoundError("Cannot find\nan appropriate folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / self.file).write_bytes(b"")
        return str(folder)


def call(*words):
    args = download_roberta_models.build_parser().parse_args([str(word) for word in words])
    with pytest.raises(SystemExit) as stop:
        run_main(download_roberta_models.main, args)
    return stop.value.code


def test_both_models_into_a_folder_that_later_scripts_find(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("--hf_home", "./hf_cache") == 0
    cache = tmp_path / "hf_cache" / "hub"
    assert [name for name, _ in asked] == ["roberta-base", "roberta-large"]
    assert all(how["cache_dir"] == cache for _, how in asked)
    assert capsys.readouterr().out.splitlines() == [f"{n}: {cache / n}" for n in ("roberta-base", "roberta-large")]
    monkeypatch.chdir("/")
    assert call("--models", "x") == 0  # into the library's own cache
    assert models.find_model("roberta-large") == cache / "roberta-large"
    assert models.find_model("x") == tmp_path / "default" / "x"
    cache.rename(tmp_path / "gone")
    with pytest.raises(UsageError, match="no model roberta-large"):
        models.find_model("roberta-large")


def test_no_pickles_and_the_same_files_as_the_scripts_ask_for(asked, tmp_path):
    """Another list than the download's, and the library would take the download for incomplete."""
    from huggingface_hub.utils import filter_repo_objects

    assert call("--models", "x") == 0
    patterns = asked[0][1]["allow_patterns"]
    names = "README.md config.json tokenizer.json vocab.json merges.txt pytorch_model.bin model.safetensors tf_model.h5"
    kept = set(filter_repo_objects(names.split(), allow_patterns=patterns))
    assert kept == {"config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"}
    assert models.find_model("x") == tmp_path / "default" / "x"
    assert asked[-1][1]["allow_patterns"] == patterns


def test_no_network(asked, tmp_path, capsys):
    asked.online = False
    assert call("--hf_home", tmp_path / "home") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "roberta-base" in said and "network" in said
    assert not list(tmp_path.iterdir())
    asked.online = True
    assert call("--hf_home", tmp_path / "home") == 0
    asked.online = False
    capsys.readouterr()
    assert call("--hf_home", tmp_path / "home") == 0 and len(capsys.readouterr().out.splitlines()) == 2


def test_a_download_that_breaks_off_goes_on(asked, tmp_path, capsys):
    asked.at = 1
    for error, code in ((OSError(28, "No space left"), 1), (KeyboardInterrupt(), 130)):
        asked.clear()
        asked.error = error
        assert call("--hf_home", tmp_path / "home") == code
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and "the same command again" in said.err and "--resume" not in said.err
        assert said.out.startswith("roberta-base: ") and hub.remembered_cache() is not None
    asked.error = None
    assert call("--hf_home", tmp_path / "home") == 0
