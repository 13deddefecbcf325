"""vit_sparse_fl's scripts as a user runs them: the documented commands, runs killed, resumed, on several processes."""

import importlib
import re
import shlex
import sys
from types import ModuleType

import harness
import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.cli import checked, run_main
from common.curves import read_metrics
from vit_sparse_fl import masks, study, train_centralized, train_federated, train_federated_sparse
from vit_sparse_fl.experiments import federated_settings, repeated
from vit_sparse_fl.flags import parse
from vit_sparse_fl.vit import init_from, make_model, save_pretrained

CONFIG = "vit_sparse_fl/configs/default.yaml"
NAMES = [name for name in harness.GOLDEN if name.startswith("vit_sparse_fl/")]
SMALL = "--dataset demo --model tiny --classes 0:4 --batch-size 8 --threads 1 --seed 0"
FEDERATED = f"{SMALL} --num-clients 12 --participation-rate 0.25 --num-rounds 4 --eval-every 2 --save-every 2 --lr 0.05"
TINY = {
    "train_centralized": f"{SMALL} --epochs 3 --save-every 1 --warmup-epochs 1 --lr 0.05",
    "train_federated": f"{FEDERATED} --sharding non_iid --nc 3",
    "train_federated_sparse": f"{FEDERATED} --fisher-samples 16",
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Of runs in this process: half of a small run's time."""
    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)


def call(script, words):
    """A script in this process. Returns its exit code."""
    module, words = importlib.import_module(f"vit_sparse_fl.{script}"), [str(w) for w in words]
    with pytest.raises(SystemExit) as stop:
        run_main(module.main, checked(parse, module.build_parser(), words))
    return stop.value.code


def small(script, *more):
    return call(script, [*shlex.split(TINY[script]), *more])


def final(folder):
    """The trained weights of a run."""
    return load_file(folder / "final" / "model.safetensors")


def same(a, b):
    """Whether two {name: tensor} have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def masks_of(folder):
    """{name: bool tensor} of a run's mask."""
    return load_file(folder / "mask.safetensors")


def counts_of(masks):
    return {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_what_the_readme_says(name):
    folder, central = harness.whole(name), name.endswith("centralized")
    manifest, lines = read_json(folder / "run.json"), read_metrics(folder)
    assert {"test_accuracy_last", "test_accuracy_best", "val_accuracy_best", "bytes_up"} <= manifest["results"].keys()
    assert [line["round"] for line in lines] == ([0, 1, 2, 3] if central else [0, 2, 4, 6])
    wanted = {"val_loss", "val_accuracy", "images", "bytes_up", "bytes_down", "seconds"}
    assert wanted <= lines[0].keys() and not {"train_loss", "lr"} & lines[0].keys()
    wanted |= {"train_loss", "lr"}
    if not central:
        wanted |= {"drift", "clients"}
    assert wanted <= lines[-1].keys()
    assert (folder / "r_curves.png").stat().st_size > 1000
    log = (folder.parent / "logs" / "r.log").read_text()
    assert manifest["args"].get("sharding") != "non_iid" or "12 clients, 54 images or more, 3 to 3 classes each" in log
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (INFO|WARNING) \| \S", line) for line in log.splitlines())


def test_final_loads_in_transformers_and_gives_the_logged_accuracy():
    from transformers import AutoModelForImageClassification

    from vit_sparse_fl.data import load_images, prepare

    folder = harness.whole("vit_sparse_fl/federated")
    model = AutoModelForImageClassification.from_pretrained(folder / "final").eval()
    data = load_images("demo", 0, classes=range(10))
    with torch.no_grad():
        logits = model(prepare(data.test, 32)).logits
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    results = read_json(folder / "run.json")["results"]
    assert accuracy == pytest.approx(results["test_accuracy_last"], abs=1e-9)
    loss = torch.nn.functional.cross_entropy(logits.double(), data.test_labels).item()
    assert loss == pytest.approx(results["test_loss_last"], rel=1e-5)
    best = max(read_metrics(folder)[1:], key=lambda line: line["val_accuracy"])  # the first of equals
    assert (results["best_round"], results["val_accuracy_best"]) == (best["round"], best["val_accuracy"])


def test_a_masked_weight_keeps_its_bits_for_the_whole_run():
    folder = harness.whole("vit_sparse_fl/sparse")
    before = dict(make_model("tiny", image_size=32, n_classes=10, seed=0).named_parameters())
    model = make_model("tiny", image_size=32, n_classes=10, seed=1)
    init_from(model, folder)
    after = {name: p.detach() for name, p in model.named_parameters()}
    masks = masks_of(folder)
    kept, total = map(sum, zip(*counts_of(masks).values(), strict=True))
    assert kept == round(0.1 * total)
    assert read_json(folder / "run.json")["results"]["kept"] == counts_of(masks)
    moved = 0
    for name, old in before.items():
        trained = masks.get(name, torch.zeros(old.shape, dtype=torch.bool))
        assert torch.equal(old.detach().view(torch.int32)[~trained], after[name].view(torch.int32)[~trained]), name
        moved += int((old != after[name])[trained].sum())
    assert moved > 0.5 * kept


def test_sparse_uploads_cost_what_is_sent():
    folder = harness.whole("vit_sparse_fl/sparse")
    last, parameters = read_metrics(folder)[-1], read_json(folder / "run.json")["parameters"]
    kept, total = map(sum, zip(*counts_of(masks_of(folder)).values(), strict=True))
    assert last["bytes_up"] == 6 * 3 * 4 * kept  # rounds, clients a round, bytes
    # the model and the mask's places to those that join, the kept weights to the others
    model = 4 * parameters["total"] + -(-total // 8)
    joined, rest = divmod(last["bytes_down"] - 6 * 3 * 4 * kept, model - 4 * kept)
    assert rest == 0 and 6 <= joined <= 12

    topk = read_metrics(harness.whole("vit_sparse_fl/topk"))[-1]
    assert topk["bytes_up"] == 6 * 3 * 8 * (kept // 2)


@pytest.mark.slow
def test_a_run_of_a_frozen_fitted_head_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """The head is fitted once: it is in the checkpoint, though it is not trained. So are the best rounds, all three."""
    words = ("--head", "ridge", "--freeze-head", "--eval-every", 1, "--num-rounds", 3, "--run-name", "r", "--resume")
    words += ("--output-dir",)
    evaluate = study.Study.evaluate

    def interrupted(made, theta, t, row):
        if t == 3:
            raise KeyboardInterrupt
        return evaluate(made, theta, t, row)

    assert small("train_federated", *words, tmp_path / "a") == 0
    sums = 8 * (96 * 97 // 2 + 97 * (4 + 1))  # of a client's features and classes
    assert read_metrics(tmp_path / "a" / "r")[0]["bytes_up"] == 12 * sums
    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "evaluate", interrupted)
        assert small("train_federated", *words, tmp_path / "b") == 130
    assert "head fitted" in capsys.readouterr().err
    assert small("train_federated", *words, tmp_path / "b") == 0
    said = capsys.readouterr().err
    assert "resumed after round 2" in said and "head fitted" not in said
    harness.same_run(tmp_path / "a" / "r", tmp_path / "b" / "r")


def test_every_file_is_in_the_readme():
    folder = harness.ROOT / "vit_sparse_fl"
    words = (folder / "README.md").read_text()
    assert [file.name for file in folder.glob("*.py") if f"`{file.name}`" not in words] == ["__init__.py"]


@pytest.mark.slow
def test_the_readmes_strategy_of_ones_own_runs(tmp_path, monkeypatch):
    """The README's function and its line, put into masks.py where it says."""
    readme = (harness.ROOT / "vit_sparse_fl" / "README.md").read_text()
    function, line = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    source = (harness.ROOT / "vit_sparse_fl" / "masks.py").read_text()
    assert source.count("\nSTRATEGIES = {\n") == 1
    edited = ModuleType("vit_sparse_fl.edited_masks")
    monkeypatch.setitem(sys.modules, edited.__name__, edited)
    exec(source.replace("\nSTRATEGIES = {\n", f"\n{function}\n\nSTRATEGIES = {{\n{line}"), vars(edited))
    assert edited.STRATEGIES.keys() == {"connection", *masks.STRATEGIES}
    monkeypatch.setitem(masks.STRATEGIES, "connection", edited.STRATEGIES["connection"])
    words = ("--mask-strategy", "connection", "--num-rounds", 2, "--output-dir", tmp_path)
    assert small("train_federated_sparse", *words) == 0
    (folder,) = (file.parent for file in tmp_path.glob("*/run.json"))
    assert "sparse_connection_s0.9_talos4" in folder.name
    kept, total = map(sum, zip(*counts_of(masks_of(folder)).values(), strict=True))
    assert kept == round(0.1 * total)


def test_one_client_is_central_training_bitwise(tmp_path):
    words = f"{SMALL} --batch-size 72 --scheduler none --lr 0.05 --dropout 0.1".split() + ["--output-dir", tmp_path]
    federated = ["--num-clients", 1, "--participation-rate", 1, "--num-rounds", 1, "--local-steps", 4]
    assert call("train_federated", [*words, *federated, "--run-name", "fed"]) == 0
    assert call("train_centralized", [*words, "--epochs", 1, "--warmup-epochs", 0, "--run-name", "central"]) == 0
    assert same(final(tmp_path / "fed"), final(tmp_path / "central"))


@pytest.mark.parametrize("script", ["train_centralized", "train_federated"])
def test_early_stopping_the_best_checkpoints_and_the_weights_that_final_asks_for(script, tmp_path, monkeypatch):
    accuracies, validate = iter([0.1, 0.3, 0.9, 0.9, 0.5, 0.2]), study.validate

    def given(made, split, name):
        row = validate(made, split, name)
        return row | {"val_accuracy": next(accuracies)} if split == "validation" else row

    monkeypatch.setattr(study, "validate", given)
    words = ("--eval-every", 1, "--num-rounds", 9) if "fed" in script else ("--batch-size", 72, "--epochs", 9)
    words = (*words, "--early-stopping-patience", 3, "--final", "best", "--output-dir", tmp_path, "--run-name", "r")
    assert small(script, *words) == 0
    run = read_json(tmp_path / "r" / "run.json")
    assert (run["ended"]["how"], run["ended"]["by"], run["ended"]["round"]) == ("stopped", "early_stopping", 5)
    results = run["results"]
    assert (results["best_round"], results["final_round"], results["rounds"]) == (2, 2, 5)
    files = sorted(file.name for file in (tmp_path / "r" / "best").iterdir())
    assert files == [f"round_00000{t}.safetensors" for t in (2, 3, 4)]
    best = load_file(tmp_path / "r" / "best" / files[0])
    model = make_model("tiny", image_size=32, n_classes=4)
    init_from(model, tmp_path / "r")
    assert same(dict(model.named_parameters()), best)
    last = load_file(tmp_path / "r" / "checkpoint" / "theta.safetensors")
    assert not same({name: best[name] for name in last}, last)


SWEEPS = [
    (train_federated_sparse, "--compare-strategies", {"mask_strategy": 5}),
    (train_federated_sparse, "--sparsity-experiment", {"sparsity_ratio": 5}),
    (train_federated_sparse, "--heterogeneity-experiment --nc-values 1 2", {"sharding": 2, "nc": 3}),
    (train_centralized, "--hp-search --hp-epochs 3", {"lr": 4, "weight_decay": 2, "epochs": 1}),
]


@pytest.mark.parametrize("script, sweep, values", SWEEPS)
def test_sweeps_are_runs_of_their_own(script, sweep, values):
    args = parse(script.build_parser(), [*sweep.split(), "--num-runs", "2"])
    runs = repeated(args, script.settings(args) if hasattr(script, "settings") else federated_settings(args))
    assert len({flags.run_name for _, flags in runs}) == len(runs) and {flags.seed for _, flags in runs} == {42, 43}
    for flag, number in values.items():
        assert len({getattr(flags, flag) for _, flags in runs}) == number
    assert not any(vars(flags)[sweep.split()[0][2:].replace("-", "_")] for _, flags in runs)


@pytest.mark.slow
def test_a_sweep_goes_on_with_its_runs_and_scales_rounds(tmp_path, capsys):
    sweep = ["--local-steps-experiment", "--j-values", 4, 8, "--num-rounds", 2, "--output-dir", tmp_path]
    assert small("train_federated", "--num-rounds", 2, "--output-dir", tmp_path) == 0
    assert small("train_federated", *sweep) == 0
    said = capsys.readouterr().out
    assert "already finished" in said and "plots/tables.py vit_sparse_fl" in said
    found = {file.parent.name: read_json(file)["args"] for file in tmp_path.glob("*/run.json")}
    assert {name: args["num_rounds"] for name, args in found.items()} == {
        "fedavg_non_iid_nc3_classes_0_4_J4_seed_0_demo": 2,
        "fedavg_non_iid_nc3_classes_0_4_J8_seed_0_demo": 1,
    }


def test_a_run_has_the_image_size_of_the_one_that_it_starts_from(tmp_path):
    save_pretrained(make_model("tiny", image_size=64, n_classes=10), tmp_path / "run" / "final")
    for words, size in (
        (["--init-from", f"{tmp_path}/run"], 64),
        (["--init-from", f"{tmp_path}/run/final"], 64),
        (["--init-from", f"{tmp_path}/run", "--image-size", "32"], 32),
        (["--model", "tiny"], 32),
        ([], 224),
    ):
        assert parse(train_federated.build_parser(), words).image_size == size


def test_the_default_config_is_taken_and_the_command_line_wins():
    args = parse(train_federated.build_parser(), ["--config", CONFIG])
    assert (args.lr, args.num_rounds, args.amp, args.early_stopping_patience) == (1e-3, 500, "auto", 100)
    args = parse(train_federated.build_parser(), ["--config", CONFIG, "--lr", "0.5", "--num-rounds", "3"])
    assert (args.lr, args.num_rounds) == (0.5, 3)
    assert parse(train_federated.build_parser(), ["--config", CONFIG, "--amp", "off"]).amp == "off"
    args = parse(train_federated_sparse.build_parser(), ["--config", CONFIG])
    assert (args.calibration_rounds, args.sparsity_ratio, args.fisher_samples) == (5, 0.9, 512)
    args = parse(train_centralized.build_parser(), ["--config", CONFIG])
    assert (args.epochs, args.lr, args.early_stopping_patience, args.warmup_epochs) == (50, 1e-3, 10, 5)
