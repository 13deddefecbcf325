"""Unknown flags, yaml files, and lines of information beside a refusal."""

import subprocess
import sys
import warnings

import harness
import pytest

from common import cli
from common.cli import Parser, RunFailed, UsageError, apply_config, checked, run_main, say, say_waiting
from llm_noniid import flags as noniid

TRAIN = noniid.build_parser("train.py")


def test_an_unknown_flag_names_the_nearest_if_one_is_near(capsys):
    for words, part in (
        (["--local-step", "3"], "unknown flag --local-step: did you mean --local-steps?"),
        (["--learning_rat=3"], "unknown flag --learning-rat: did you mean --learning-rate?"),
        (["--gpu", "3"], "error: unknown flag --gpu (see --help)\n"),  # not --mu
        (["--fp16"], "error: unknown flag --fp16 (see --help)\n"),
        (["--num-cli", "7"], "unknown flag --num-cli: did you mean --num-clients?"),
        (["--mu", "-1"], "argument --mu: -1 is not a number of at least 0"),
        (["--learning-rate", "inf"], "--lr: inf is not a number above 0"),
        (["--num-clients", "1.5"], "argument --num-clients: '1.5' is not an integer"),
        (["3"], "'3' belongs to no flag: drop it"),
        (["--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
        (["--name", ""], "'' is not the name of a folder"),
        (["--name", "a\nb"], "'a\\nb' is not the name of a folder"),
        (["--seed\n2"], "unknown flag --seed 2: did you mean --seed?"),
    ):
        with pytest.raises(SystemExit) as stop:
            TRAIN.parse_args(words)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and part in said and said.count("\n") == 1, said


def test_hyphens_and_underscores_are_one_flag():
    for spelling in (["--num_clients", "7"], ["--num_clients=7"], ["--num-clients", "7"]):
        assert TRAIN.parse_args(spelling).num_clients == 7


def test_flags_are_checked_without_importing_what_computes():
    modules = ["common.cli", "common.participation"]
    modules += [f"{study}.flags" for study in ("mamba_fl", "vit_sparse_fl", "lora_glue_fl", "llm_noniid")]
    heavy = {"torch", "numpy", "scipy", "transformers", "datasets", "peft", "pandas", "safetensors"}
    code = f"import sys, {', '.join(modules)}; print(*{heavy} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "\n"


# ------------------------------------------------------------------------------------------------ yaml files


@pytest.mark.parametrize(
    "content, line",
    [
        ("seed: [3]\n", "seed: [3]: not what this flag takes"),
        ("values: 3\n", "not what this flag takes"),
        ("values: [x]\n", "invalid int value: 'x'"),
        ("federated:\n  alpha: -1\n", "-1 is not a number of at least 0"),
        ("federated:\n  aplha: 1\n", "unknown key federated.aplha: did you mean federated.alpha?"),
        ("seed: 2001-13-01\n", "cannot be read as yaml: month must be in 1..12"),
        ("a: [\n", "cannot be read as yaml"),
        ("- 3\n", "must hold keys and values"),
        ("1: 3\n", "unknown key 1"),
        ("federated:\n", None),
        ("federated: {}\nseed:\n", None),
    ],
)
def test_yaml_that_is_not_two_levels_of_known_keys_is_one_line(content, line, tmp_path, capsys):
    parser = Parser("test")
    parser.add_argument("--seed", type=cli.non_negative_float, default=1)
    parser.add_argument("--values", nargs="+", type=int)
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    keys = {"seed": "seed", "values": "values", "federated.alpha": "seed"}
    if line is None:
        apply_config(parser, file, keys)
        assert parser.parse_args([]).seed == 1
        return
    with pytest.raises(SystemExit) as stop:
        checked(apply_config, parser, file, keys)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: --config {file}") and line in said, said
    assert said.count("\n") == 1


# ------------------------------------------------------------------------------------------------ lines and refusals


@pytest.mark.parametrize(
    "ends, begins, code, err",
    [
        (UsageError("no data"), False, 2, "error: no data\n"),
        (UsageError("no data"), True, 2, "first\nwarning: slow\nlast\nerror: no data\n"),
        (RunFailed("no room"), False, 1, "first\nwarning: slow\nlast\nfailed: no room\n"),
        (None, True, 0, "first\nwarning: slow\nlast\n"),
    ],
)
def test_information_waits_until_nothing_refuses(ends, begins, code, err, capsys):
    def main(args):
        say("first")
        warnings.warn("slow", stacklevel=1)
        if begins:
            say_waiting()
        say("last")
        if ends:
            raise ends

    with pytest.raises(SystemExit) as stop:
        run_main(main, None)
    assert stop.value.code == code and capsys.readouterr().err == err
    say("outside of a run nothing waits")
    assert capsys.readouterr().err == "outside of a run nothing waits\n"


def test_a_message_is_one_line_that_can_be_printed():
    said = str(cli.UsageError("--only \udcff: not\nthere"))
    assert said == "--only \\udcff: not there" and said.encode()
