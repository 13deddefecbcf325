"""Flags without effect, unknown flags, --help, yaml files, and lines of information beside a refusal."""

import subprocess
import sys
import warnings

import harness
import pytest

from common import cli
from common.cli import Flags, Parser, RunFailed, UsageError, When, checked, only, run_main, say, say_waiting, unless
from common.config_file import apply_config
from llm_noniid import flags as noniid
from lora_glue_fl import fedavg_rounds, sharding
from mamba_fl import fed_avg, fed_momentum
from plots import glue, mamba, noniid_runs
from plots import vit as vit_runs
from vit_sparse_fl import flags as vit
from vit_sparse_fl import train_centralized, train_federated, train_federated_sparse

TRAIN = noniid.build_parser("train.py")
SHARDS, ROUNDS = "--task-name sst2 --k 3 --out-dir x", "--task-name sst2 --shard-dir x"


@pytest.mark.parametrize(
    "parser, words, line",
    [
        (train_federated.build_parser(), "--nc 5", "--nc has no effect with --sharding iid"),
        (train_federated.build_parser(), "--sharding iid --alpha 1", "--alpha has no effect with --sharding iid"),
        (train_federated.build_parser(), "--sharding non_iid --nc=5", None),
        (train_federated.build_parser(), "--j-values 1", "--j-values has no effect without --local-steps-experiment"),
        (train_federated.build_parser(), "--j-values 1 --local-steps-experiment", None),
        (train_centralized.build_parser(), "--hp_lrs 1", "--hp-lrs has no effect without --hp-search"),
        (train_federated_sparse.build_parser(), "--mask-scope layer --upload topk",
         "--mask-scope has no effect with --upload topk"),
        (train_federated_sparse.build_parser(), "--mask-strategy random --fisher-samples 9 --calibrate-on clients",
         "--fisher-samples and --calibrate-on have no effect with --mask-strategy random"),
        (train_federated_sparse.build_parser(), "--mask-strategy random --calibration seed --compare-strategies",
         "--mask-strategy has no effect with --compare-strategies"),
        (train_federated_sparse.build_parser(), "--sparsity-experiment --sparsity-ratio 0.5",
         "--sparsity-ratio has no effect with --sparsity-experiment"),
        (train_federated.build_parser(), "--local-steps-experiment --local-steps 8",
         "--local-steps has no effect with --local-steps-experiment"),
        (train_federated.build_parser(), "--heterogeneity-experiment --sharding non_iid --nc 7",
         "--sharding and --nc have no effect with --heterogeneity-experiment"),
        (train_centralized.build_parser(), "--hp-search --lr 1 --weight-decay 1 --epochs 3",
         "--epochs and --lr and --weight-decay have no effect with --hp-search"),
        (train_centralized.build_parser(), "--freeze-backbone --freeze-layers 1",
         "--freeze-layers has no effect with --freeze-backbone"),
        (sharding.build_parser(), f"{SHARDS} --overlap-ratio 0.3", "--overlap-ratio has no effect with --mode iid"),
        (sharding.build_parser(), f"{SHARDS} --mode overlap --overlap-ratio 0.3", None),
        (fedavg_rounds.build_parser(), f"{ROUNDS} --server-lr 1", None),  # its off-value
        (fedavg_rounds.build_parser(), f"{ROUNDS} --model tiny --model_size base",
         "--model-size has no effect with --model tiny: it only names the folder"),
        (fedavg_rounds.build_parser(), f"{ROUNDS} --svd-rank 4 --alpha 4 --skip-svd",
         "--svd-rank and --alpha have no effect with --skip-svd"),
        (fedavg_rounds.build_parser(), f"{ROUNDS} --svd-rank 4 --model-size base", None),
        (fed_momentum.build_parser(), "--server-tau 1", "--server-tau has no effect with --server-optimizer momentum"),
        (TRAIN, "--partition iid --alpha 1", "--alpha has no effect with --partition iid"),
        (TRAIN, "--partition iid --sizes equal", "--sizes has no effect with --partition iid"),
        (TRAIN, "--sizes equal --drift-samples 8", None),
        (TRAIN, "--algorithm local --drift-samples 8", "--drift-samples has no effect with --algorithm local"),
        (TRAIN, "--num-clusters 3", "--num-clusters has no effect with --cluster none"),
        (TRAIN, "--server_lr 1 --algorithm local", "--server-lr has no effect with --algorithm local"),
        (TRAIN, "--mu=1", "--mu has no effect with --algorithm fedavg"),
        (TRAIN, "--algorithm fedprox --mu 1", None),
        (TRAIN, "--algorithm central --participation 1",
         "--participation has no effect with --algorithm central with --local-steps 0"),
        (TRAIN, "--algorithm central --participation 1 --local-steps 3", None),
    ],
)  # fmt: skip
def test_a_flag_without_effect_says_so(parser, words, line):
    assert parser.parse_args(words.split()).notes == ([f"warning: {line}"] if line else [])


def test_a_key_without_effect_says_so_where_it_differs_from_the_flag_s_default(tmp_path):
    file = tmp_path / "mine.yaml"
    for content, notes in (
        ("data: {partition_strategy: iid, alpha: 0.1}", []),
        ("data: {partition_strategy: iid, alpha: 0.3}",
         ["warning: data.alpha of --config has no effect with --partition iid"]),
        ("data: {alpha: 0.3}", []),
    ):  # fmt: skip
        file.write_text(content)
        assert noniid.parse(noniid.build_parser("train.py"), ["--config", str(file)]).notes == notes


@pytest.mark.parametrize(
    "study, parser, words",
    [
        (mamba.STUDY, fed_momentum.build_parser(), ""),
        (mamba.STUDY, fed_avg.build_parser(), ""),
        (vit_runs.STUDY, train_centralized.build_parser(), ""),
        (vit_runs.STUDY, train_federated.build_parser(), ""),
        (vit_runs.STUDY, train_federated_sparse.build_parser(), ""),
        (glue.STUDY, fedavg_rounds.build_parser(), ROUNDS),
        (noniid_runs.STUDY, TRAIN, ""),
    ],
)
def test_a_flag_that_is_no_part_of_a_method_at_its_off_value_is_declared_to_the_plots(study, parser, words):
    args = parser.parse_args(words.split())
    args.server_lr = getattr(args, "server_lr", None) or 1.0
    newer = {flag for flag, when in args.reads.items() if isinstance(when, When) and flag in when.off(args)}
    assert newer <= {*study.off, *study.said}


def test_conditions_are_joined():
    flags = Flags(sharding="iid", nc=3, mode="b")
    assert only(sharding="iid", nc=(2, 3))(flags) and not only(nc=lambda n: n > 3)(flags)
    assert only(sharding="iid", mode="a", nc=2).off(flags) == ["mode"]
    assert unless(sharding="iid", nc=3).off(flags) == ["sharding", "nc"] and unless(sharding="iid", nc=2)(flags)
    no, yes = only(mode="a"), only(mode="b")
    assert (no | yes)(flags) and (yes | no)(flags) and not (no | no)(flags) and not (yes & no)(flags)


@pytest.mark.slow
def test_a_run_says_it_once_whatever_its_processes(tmp_path):
    line = "warning: --client-state has no effect with --client-optimizer sgd\n"
    words = harness.command("mamba_fl/fed_avg", tmp_path)
    words += "--client-optimizer sgd --client-state reset --rounds 1 --prompt= --client-val-sequences 0".split()
    first, second = harness.run_ranks(words, 2)
    assert (first.code, second.code, second.err) == (0, 0, "")
    assert first.err.startswith(line) and first.err.count("warning") == 1, first.err
    ended = harness.run([*words, "--resume"])
    assert ended.code == 0 and not ended.err  # finished already


def test_an_unknown_flag_names_the_nearest_if_one_is_near(capsys):
    for words, part in (
        (["--local-step", "3"], "unknown flag --local-step: did you mean --local-steps?"),
        (["--learning_rat=3"], "unknown flag --learning-rat: did you mean --learning-rate?"),
        (["--gpu", "3"], "error: unknown flag --gpu (see --help)\n"),  # not --mu
        (["--fp16"], "error: unknown flag --fp16 (see --help)\n"),
        (["3"], "'3' belongs to no flag: drop it"),
        (["--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
        (["--name", ""], "'' is not the name of a folder"),
        (["--name", "a\nb"], "'a\\nb' is not the name of a folder"),
        (["--output-dir="], "argument --output-dir/--results-dir: an empty text is no value of it"),
        (["--alpha=--"], "argument --alpha: '--' is no value of it"),  # argparse would make an empty list of it
        (["--seed\n2"], "unknown flag --seed 2: did you mean --seed?"),
    ):
        with pytest.raises(SystemExit) as stop:
            TRAIN.parse_args(words)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and part in said and said.count("\n") == 1, said
    with pytest.raises(SystemExit) as stop:  # before what is missing
        sharding.build_parser().parse_args(["--task-nam", "sst2"])
    assert stop.value.code == 2 and "did you mean --task-name?" in capsys.readouterr().err


def test_flags_are_checked_without_importing_what_computes():
    modules = ["common.cli", "common.config_file", "common.participation"]
    modules += [f"{study}.flags" for study in ("mamba_fl", "vit_sparse_fl", "lora_glue_fl", "llm_noniid")]
    heavy = {"torch", "numpy", "scipy", "transformers", "datasets", "peft", "pandas", "safetensors"}
    code = f"import sys, {', '.join(modules)}; print(*{heavy} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "\n"


# ------------------------------------------------------------------------------------------------ yaml files


@pytest.mark.parametrize(
    "content, line",
    [
        ("seed: 3\nseed: 4\n", "line 2: seed is there twice: drop one of the two"),
        ("federated:\n  alpha: 3\n  alpha: 3\n", "line 3: alpha is there twice"),
        ("federated: &a {x: *a}\n", "unknown key federated.x"),
        ("federated: &a [*a]\n", "unknown key federated.[[...]]"),
        ("seed: &a [*a]\n", "must be one value"),
        ("seed: {a: 3}\n", "must be one value"),
        ("values: [[3]]\n", "[3] must be one value"),
        ("values: []\n", "[] must be a list"),
        ("[" * 3000, "two levels are all it takes"),
        ("seed: " + "{a: " * 3000, "two levels are all it takes"),
        ('"a\\nb": 3\n', "unknown key a b"),
        ('seed: "inf\\n"\n', "is not"),
        ("seed: 2001-13-01\n", "is not yaml: month must be in 1..12"),
        ("seed: !!bool x\n", "is not yaml"),
        ("? [a]\n: 3\n", "is not yaml"),
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
    "ends, begins, err",
    [
        (UsageError("no data"), False, "error: no data\n"),
        (UsageError("no data"), True, "warning: no effect\nfirst\nwarning: slow\nlast\nerror: no data\n"),
        (RunFailed("no room"), False, "warning: no effect\nfirst\nwarning: slow\nlast\nfailed: no room\n"),
        (None, False, "warning: no effect\nfirst\nwarning: slow\nlast\n"),
        (None, True, "warning: no effect\nfirst\nwarning: slow\nlast\n"),
    ],
)
def test_information_waits_until_nothing_refuses(ends, begins, err, capsys):
    def main(args):
        say("first")
        warnings.warn("slow", stacklevel=1)
        if begins:
            say_waiting(args)
        say("last")
        if ends:
            raise ends

    args = Flags()
    args.notes = ["warning: no effect"]
    with pytest.raises(SystemExit):
        run_main(main, args)
    assert capsys.readouterr().err == err
    say("outside of a run nothing waits")
    assert capsys.readouterr().err == "outside of a run nothing waits\n"


def test_only_one_sweep_at_a_time():
    parser = train_federated.build_parser()
    with pytest.raises(UsageError, match="--heterogeneity-experiment and --local-steps-experiment are sweeps"):
        vit.parse(parser, ["--heterogeneity-experiment", "--local-steps-experiment"])


def test_a_message_is_one_line_that_can_be_printed():
    said = str(cli.UsageError("--only \udcff: not\nthere"))
    assert said == "--only \\udcff: not there" and said.encode()
