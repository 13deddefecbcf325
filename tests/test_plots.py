"""Which runs figures and tables compare, which they leave out and say so, and what they refuse."""

import json
import os
import subprocess
import sys

import fixed_runs
import pytest
from fixed_runs import CENTRAL, FULL, LORA, SPARSE, write_glue, write_mamba, write_vit
from noniid_folders import write_run as write_noniid
from plotting import (
    COMMANDS,
    ROOT,
    STUDIES,
    call,
    command_line,
    figures,
    lines_of,
    printed,
    refused,
    table,
    tables,
    ticks,
)

from common.lowrank import RULES
from common.records import collect
from llm_noniid import flags
from llm_noniid.detectors import DETECTORS
from lora_glue_fl.glue_tasks import TASKS
from plots.noniid_maps import NEEDED

WRITE = {"mamba": write_mamba, "vit": write_vit, "glue": write_glue, "noniid": write_noniid}
# study -> flags and facts of a run that set it apart from a run without them
OTHERS = {
    "mamba": [{"dataset": "demo"}, {"tokenizer": "bpe:4096"}, {"layers": 2}, {"d_model": 128}, {"sequence_length": 128}]
    + [{"val_sequences": 8}, {"variant": "tokens"}, {"sync": "epoch"}, {"local_updates": 8}],
    "vit": [{"dataset": "demo"}, {"model": "dino_vits16"}, {"image_size": 64}, {"num_clients": 10}, {"local_steps": 8}]
    + [{"sharding": "non_iid"}, {"num_rounds": 60}, {"init_from": None}, {"val_split": 0.2}],
    "glue": [{"task_name": "mrpc"}, {"model": "elsewhere/bert"}, {"model_size": "large"}, {"lora_r": 8}]
    + [{"lora_alpha": 4.0}, {"rounds": 5}, {"local_epochs": 2.0}, {"data": {"clients": 9}}, {"svd_rank": 2}]
    + [{"data": {"mode": "dirichlet"}}, {"data": {"sha256": {"train": "other"}}}, {"data": {"examples": [20] * 3}}]
    + [{"data": {"dataset": "demo"}}, {"client_ranks": [2, 4], "data": {"ranks": [2, 4, 2]}}, {"mu": 0.01}]
    + [
        {"svd_split": "balanced"},
        {"aggregate": "naive"},
        {"pooling": "mean"},
        {"data": {"mode": "dirichlet", "sizes": "equal"}},
    ],
    "noniid": [{"partition": "iid"}, {"alpha": 1.0}, {"style_criterion": "formality", "partition": "style_skew"}]
    + [{"num_clients": 5}, {"participation_rate": 0.5}, {"local_steps": 7}, {"learning_rate": 1e-4}]
    + [{"num_rounds": 8}, {"max_samples": 500}, {"eval_samples": 100}, {"model": "models/big"}, {"lora_r": 4}]
    + [{"dataset": "wikitext"}, {"local_steps": 0}, {"algorithm": "fedprox"}, {"cluster": "labels"}],
}
# study -> (of both runs, what is different and does not matter)
SAME = {
    "mamba": [
        ({}, {"threads": 2}),
        ({}, {"output_dir": "x"}),
        ({"layers": 2}, {"layers": None, "config": "pure_ssm_2_layer"}),
    ],
    "vit": [({}, {"nc": 5, "alpha": 1.0, "nc_values": [1]}), ({}, {"init_from": "elsewhere/pretrain_seed_1/final"})]
    + [({}, {"num_classes": 50, "mask_scope": "layer"}), ({"command": SPARSE}, {"calibration_rounds": 9})]
    + [({"command": SPARSE, "mask_strategy": "least_sensitive"}, {"calibration_clients": 3})],
    "glue": [({}, {"shard_dir": "elsewhere"}), ({}, {"eval_batch_size": 7}), ({}, {"server_lr": 0.1})]
    + [({}, {"replay": True}), ({}, {"rotate_lambda": 0.5}), ({}, {"save_clients": False})]
    + [({}, {"data": {"source": "hub", "shard_seed": 9}}), ({}, {"lora_alpha": 8})]
    + [({"aggregate": "naive"}, {"skip_svd": True, "svd_rank": 2, "svd_split": "balanced"})],
    "noniid": [({}, {"output_dir": "x"}), ({}, {"mu": 0.5}), ({}, {"num_clusters": 9}), ({}, {"server_lr": 3.0})]
    + [({}, {"style_criterion": "formality"}), ({}, {"stop_on": "divergence"}), ({}, {"local_epochs": 3.0})]
    + [({"partition": "iid"}, {"alpha": 9.0, "min_samples": 3})],
}


def rows_of(study, root):
    """[(heading, first cell, number of seeds)] of a study's tables."""
    found = tables(f"table {study}", root)
    return [(about, label, int(row["seeds"])) for about, rows in found for label, row in rows.items()]


@pytest.mark.parametrize("study", STUDIES)
def test_only_runs_that_differ_in_nothing_but_their_seed_are_averaged(study, tmp_path):
    cases = [({}, other, [1, 1]) for other in OTHERS[study]] + [(both, other, [2]) for both, other in SAME[study]]
    for i, (both, other, expected) in enumerate(cases):
        for seed, more in enumerate((both, both | other)):
            if study == "vit" and "val_split" in other:
                more = {"val_split": 0.1} | more
            WRITE[study](tmp_path / str(i), seed=seed, **more)
        assert [seeds for *_, seeds in rows_of(study, tmp_path / str(i))] == expected, other


def test_every_flag_of_llm_noniid_sets_runs_apart_or_does_not_by_decision(tmp_path):
    parsed = vars(flags.build_parser("x").parse_args([]))
    apart = set()
    for name, value in parsed.items():
        if name not in ("seed", "algorithm", "partition", "cluster"):
            kinds = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 or 0.5}
            write_noniid(tmp_path / name, **{name: value})
            write_noniid(tmp_path / name, **{name: kinds.get(type(value), lambda v: "other")(value)}, seed=1)
            if len(rows_of("noniid", tmp_path / name)) == 2:
                apart.add(name)
    setting = "alpha amp dataset eval_samples learning_rate local_steps lora_alpha lora_r max_samples model".split()
    setting += "num_clients num_rounds participation_rate sizes target train".split()
    method = "batch_size client_optimizer client_weights lora_dropout max_grad_norm max_length min_samples".split()
    method += "target_modules tokenizer weight_decay init_from personal dropout".split()
    assert apart == {*setting, *method}, "decide for a new flag: does it make another method, or none?"


def test_labels_say_what_differs_and_nothing_else(tmp_path):
    def labels(study):
        return [label for _, label, _ in rows_of(study, tmp_path / study)]

    write = {study: lambda *args, s=study, **more: WRITE[s](tmp_path / s, *args, **more) for study in STUDIES}
    write["mamba"]("central", seed=5)
    write["mamba"]()
    write["mamba"]("fed_fisher", seed=1, threads=2)
    write["mamba"]("fed_momentum", server_optimizer="nesterov")
    write["mamba"]("fed_momentum", server_optimizer="adam", client_optimizer="sgd")
    expected = ["Central", "FedAvg", "FedMomentum, nesterov", "FedMomentum, client sgd, adam", "FedFisher"]
    assert labels("mamba") == expected
    write["mamba"](local_updates=8)
    assert labels("mamba")[:3] == ["Central", "FedAvg, LU 1", "FedAvg, LU 8"]

    for steps, more in ((4, {"seed": 0}), (4, {"seed": 1}), (8, {"sharding": "non_iid"})):
        write["vit"](local_steps=steps, num_rounds=120 // steps, freeze_head=steps == 4, **more)
    write["vit"](SPARSE, upload="topk", freeze_head=True, lr=0.1)
    write["vit"](SPARSE, mask_strategy="most_sensitive", freeze_head=True, mask_merge="union")
    write["vit"](lora_r=7, freeze_head=True)
    write["vit"](CENTRAL, lr=0.5)
    dense = ["Dense FedAvg", "Dense FedAvg, Nc 10, J 8, 15 rounds, head trained"]
    assert labels("vit") == ["Central", *dense, "Most sensitive", "Top-k updates, lr 0.1", "Federated LoRA, rank 7"]
    assert "Unless said otherwise: IID, J 4, 30 rounds, head frozen, lr 0.01." in printed("table vit", tmp_path / "vit")

    for rule in ("svd", "naive", "ffa"):
        write["glue"](aggregate=rule)
    write["glue"](mu=0.01)
    write["glue"](aggregate="naive", server_optimizer="momentum", server_beta=0.9)
    names = ["SVD (FlexLoRA)", "SVD (FlexLoRA), FedProx 0.01"]
    assert labels("glue") == [*names, "Naive (FedIT)", "Naive (FedIT), server momentum", "FFA-LoRA"]

    write["noniid"]()
    for seed, mu in enumerate((0.01, 0.01, 0.1)):
        write["noniid"](algorithm="fedprox", mu=mu, seed=seed)
    assert labels("noniid") == ["FedAvg", "FedProx, mu 0.01", "FedProx, mu 0.1"]


def test_central_runs_stand_beside_every_federation_on_their_data(tmp_path):
    def tables_of(study):
        return {about: list(rows) for about, rows in tables(f"table {study}", tmp_path / study)}

    for seed in range(3):
        write_mamba(tmp_path / "mamba", seed=seed, sync="epoch", expand=2)
    write_mamba(tmp_path / "mamba", sync="round", expand=2)
    write_mamba(tmp_path / "mamba", "central", sync="round", budget="equal", local_updates=1, expand=2)
    found = tables_of("mamba")
    order = ["sync every round", "sync every epoch"]
    assert [about.rpartition(", ")[2] for about in found] == order, "the default first, then most runs"
    assert list(found.values()) == [["Central", "FedAvg"]] * 2

    for more in ({"num_clients": 7}, {"dataset": "demo"}):
        write_vit(tmp_path / "vit", CENTRAL, **more)
    write_vit(tmp_path / "vit")
    write_vit(tmp_path / "vit", SPARSE)
    assert list(tables_of("vit").values()) == [["Central", "Dense FedAvg", "Random"], ["Central"]]

    write_glue(tmp_path / "glue", LORA)
    write_glue(tmp_path / "glue", LORA, data={"examples": 40})
    write_glue(tmp_path / "glue", FULL)
    for more in ({}, {"data": {"mode": "dirichlet", "dirichlet_alpha": 0.5}}, {"lora_r": 8, "lora_alpha": 16.0}):
        write_glue(tmp_path / "glue", **more)
    both, svd = ["Central LoRA", "Central, all weights"], "SVD (FlexLoRA)"
    assert list(tables_of("glue").values()) == [[*both, svd], [*both, svd], [both[1], svd], [both[0]]]

    write_noniid(tmp_path / "noniid", algorithm="central")
    for partition in ("iid", "topic_skew"):
        write_noniid(tmp_path / "noniid", partition=partition)
    drawn = figures("noniid curves", tmp_path / "noniid")
    there = {name: ["Central, last round" in lines_of(axes) for axes in drawn[name].axes] for name in drawn}
    only_its_own = {"noniid_curves.png": [True, True], "noniid_curves_worst.png": [False, True]}
    assert there == only_its_own, "clients are compared with central training on their own partition"


@pytest.mark.parametrize("study", STUDIES)
def test_what_is_left_out_is_named(study, tmp_path):
    write = WRITE[study]
    for name, written_at in (("a", 2_000), ("b", 1_000)):
        os.utime(write(tmp_path / "deep" / "er", name=name) / "metrics.jsonl", (written_at, written_at))
    for name in ("damaged", "no_line", "no_file"):
        write(tmp_path, name=name, seed=7)
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "no_line" / "metrics.jsonl").write_text("")
    (tmp_path / "no_file" / "metrics.jsonl").unlink()
    write(tmp_path, name="half", seed=4, status="interrupted")
    fixed_runs.save(tmp_path / "another_study", [{"round": 1}], command="pretrain", status="finished")
    text = printed(f"table {study}", tmp_path)
    notes = {line.split(":")[0].removeprefix(f"left out {tmp_path}/") for line in text.splitlines() if "left" in line}
    assert notes == {"deep/er/b", "damaged", "no_line", "no_file", "half"}
    assert [seeds for *_, seeds in rows_of(study, tmp_path)] == [1]
    assert "deep/er/a, which is later" in text and "--unfinished" in text
    ((_, rows),) = tables(f"table {study}", tmp_path, "--unfinished")
    assert [row["seeds"] for row in rows.values()] == ["2"]


def test_a_run_whose_updates_were_all_not_finite_counts_as_diverged(tmp_path):
    reason = "round 13: the updates of all 6 clients are not finite: lower --learning-rate (5) or --amp off"
    folder = write_noniid(tmp_path, status="failed", reason=reason, losses=[5.0, 6.0, 9.0])
    write_noniid(tmp_path, status="failed", reason="out of memory", seed=1)
    row = table("table noniid", tmp_path)["FedAvg"]
    assert (row["val loss"], row["alarms"], row["seeds"]) == ("-", "diverged", "1")
    (folder / "metrics.jsonl").unlink()
    write_noniid(tmp_path, partition="iid")
    found = {label: row["alarms"] for label, row in table("table noniid", tmp_path).items()}
    assert found == {"FedAvg, topic skew": "diverged", "FedAvg, IID": "-"}


def test_methods_of_mamba_fl_are_compared_at_the_fewest_local_updates_and_missing_figures_are_named(tmp_path):
    write_mamba(tmp_path)
    write_mamba(tmp_path, "fed_fisher")
    write_mamba(tmp_path, "fed_entropy", local_updates=8)
    (figure,) = figures("mamba", tmp_path).values()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["FedAvg", "FedFisher"]
    text = printed("mamba", tmp_path)
    assert "not drawn: 2_lu_comparison_pure_ssm_1_layer.png needs runs of fed_avg.py" in text
    assert "not drawn: 4_multi_config_comparison.png needs" in text


def test_files_say_what_sets_a_further_group_apart(tmp_path):
    for optimizer in ("momentum", "adam"):
        for sync in ("round", "epoch"):
            folder = write_mamba(tmp_path, "fed_momentum", server_optimizer=optimizer, sync=sync)
            fixed_runs.write_deltas(folder / "server" / "deltas", steps=(1,), layers=1)
    drawn = [name for name in figures("mamba federated updates", tmp_path) if name.startswith("svd_spectrum")]
    stem = "svd_spectrum_fed_momentum_pure_ssm_1_layer_lu_1"
    assert drawn == [f"{stem}{end}.png" for end in ("", "_momentum", "_sync_epoch", "_sync_epoch_momentum")]
    (folder / "server" / "deltas" / "step_000009.npz").write_bytes(b"PK damaged")
    text = printed("mamba federated updates", tmp_path)
    assert "step_000009.npz" in text and "damaged" in text
    path = folder / "server" / "deltas" / "step_000001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # in an array; the names of all are at the end
    path.write_bytes(content)
    assert f"left out {path}: damaged" in printed("mamba federated updates", tmp_path)


KEPT = {"weight": 0.2, "bias": 1.0}


def test_masks_are_drawn_from_the_log_weights_and_biases_apart(tmp_path):
    kept = {f"vit.layers.{i}.attention.k_proj.{kind}": share for i in (0, 1) for kind, share in KEPT.items()}
    write_vit(tmp_path, SPARSE, kept=kept | {"vit.layernorm.bias": 0.5})
    collect(tmp_path)
    drawn = figures("vit layers", tmp_path / "results.jsonl", out=tmp_path / "out")["mask_layers.png"]
    found = {axes.get_title(): list(lines_of(axes)["Random"].get_ydata()) for axes in drawn.axes[:2]}
    assert found == {"Key": [20, 20], "Key, bias": [100, 100]}
    assert ticks(drawn.axes[2].xaxis) == ["last norm, bias"]


@pytest.mark.parametrize("study", STUDIES[1:])
def test_a_method_looks_the_same_in_every_figure_and_unlike_the_others_in_grey(study, tmp_path):
    if study == "vit":
        for sparsity in (0.9, 0.99):
            for strategy in ("least_sensitive", "random", "most_sensitive")[:: 1 if sparsity == 0.9 else 2]:
                kept = {"vit.layers.0.attention.q_proj.weight": 0.2}
                write_vit(tmp_path, SPARSE, mask_strategy=strategy, sparsity_ratio=sparsity, kept=kept)
        write_vit(tmp_path)
    elif study == "glue":
        for rule in RULES:
            write_glue(tmp_path, aggregate=rule)
        for rule in ("naive", "ffa"):
            write_glue(tmp_path, aggregate=rule, lora_r=8)
    else:
        for algorithm in flags.ALGORITHMS:
            write_noniid(tmp_path, algorithm=algorithm)
        for cluster in ("updates", "labels"):
            write_noniid(tmp_path, cluster=cluster)
    names = {
        "vit": ["vit curves", "vit layers"],
        "glue": ["glue metric", "glue bytes"],
        "noniid": ["noniid curves", "noniid drift"],
    }
    looks = {}
    for name in names[study]:
        for file, figure in figures(name, tmp_path, out=tmp_path / name).items():
            for label, line in lines_of(figure.axes[0]).items():
                if "interference" not in file and not label.startswith(("Central", "orthogonal", "all weights")):
                    look = line.get_linestyle(), line.get_marker(), line.get_color()
                    assert looks.setdefault(label, look) == look, (file, label)
    assert len(looks) == {"vit": 4, "glue": len(RULES), "noniid": 10}[study], looks
    assert len({look[:2] for look in looks.values()}) == len(looks)
    assert not {*RULES, *flags.ALGORITHMS} & set(looks), "names in words"


def test_every_task_metric_and_detector_has_its_words(tmp_path):
    for task in TASKS:
        write_glue(tmp_path / "glue", task_name=task)
    found = tables("table glue", tmp_path / "glue")
    assert len(found) == len(TASKS) and not {about.split(",")[0] for about, _ in found} & set(TASKS)
    metrics = {list(row)[1] for _, rows in found for row in rows.values()}
    assert all(name.endswith(("(%)", "(x 100)")) for name in metrics)
    names = [*DETECTORS, "slow"]  # of an older log
    write_noniid(tmp_path / "noniid", alarms=[(name, 12) for name in names])
    about = " ".join(figures("noniid curves", tmp_path / "noniid")["noniid_curves.png"].get_suptitle().split())
    assert "first alarms: Di diverged, Le left out, Sl slow (n/m" in about
    alarms = table("table noniid", tmp_path / "noniid")["FedAvg"]["alarms"].split(", ")
    assert {name.replace(" ", "_") for name in alarms} == set(names)


# ---- what is refused


def test_a_wrong_folder_and_one_without_runs_are_refused_by_every_command(tmp_path):
    for name in COMMANDS:
        assert "is not a folder" in refused(name, tmp_path / "nowhere"), name
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert any(words in refused(name, tmp_path / "empty") for words in ("no finished run", "is not there")), name


NO_CLIENTS = ["client_val_loss", "val_topic_loss", "relative_drift", "gradient_diversity", "mean_cosine", "mean_cka"]
REFUSED = [
    ("mamba", write_mamba, {}, "", "central.py"),
    ("mamba", write_mamba, {}, "--config pure_ssm_9_layer", "pure_ssm_9_layer"),
    ("table mamba", write_mamba, {}, "--config pure_ssm_9_layer", "pure_ssm_9_layer"),
    ("mamba central updates", write_mamba, {"command": "central"}, "", "--save-deltas"),
    ("mamba federated updates", write_mamba, {}, "", "--save-deltas"),
    ("vit", write_vit, {}, "", "no figure could be drawn"),
    ("vit heterogeneity", write_vit, {}, "", "--nc 1 and --nc 5"),
    ("vit interference", write_vit, {}, "", "needs"),
    ("vit shards", write_vit, {}, "", "needs"),
    ("vit layers", write_vit, {"command": SPARSE}, "", "needs"),
    ("vit layers", write_vit, {"command": SPARSE, "kept": {"a.weight": "x"}}, "", "kept is damaged"),
    ("glue", write_glue, {}, "--tasks qqp", "there are rte"),
    ("table glue", write_glue, {}, "--tasks qqp", "there are rte"),
    ("glue metric", write_glue, {"drop": ["val_accuracy"]}, "", "--eval-each-round"),
    ("glue bytes", write_glue, {"drop": ["bytes_up", "bytes_down"]}, "", "bytes_up"),
    ("glue clients", write_glue, {"drop": ["client_val_accuracy"]}, "", "--eval-clients"),
    ("glue error", write_glue, {"drop": ["aggregation_error"]}, "", "aggregation_error"),
    ("noniid curves", write_noniid, {"drop": ["val_loss", "worst_client_val_loss"]}, "", "val_loss"),
    ("noniid clients", write_noniid, {"drop": NO_CLIENTS}, "", "client_val_loss"),
    ("noniid drift", write_noniid, {"drop": NO_CLIENTS}, "", "relative_drift"),
    ("noniid similarity", write_noniid, {"drop": ["update_cosines"]}, "", "update_cosines"),
]


def test_a_figure_without_its_runs_or_fields_names_what_it_needs(tmp_path):
    for i, (name, write, more, words, expected) in enumerate(REFUSED):
        write(tmp_path / str(i), **more)
        assert expected in refused(name, tmp_path / str(i), words), name


PARTITION = '{"label_histograms": [[1], [2]], "counts": [1]}'
SHORT = json.dumps({name: [] for name in NEEDED} | {"label_histograms": [[1]], "counts": [1], "label_names": ["x"]})
DEEP = "[" * 3000
DAMAGED = [
    ("vit shards", write_vit, "shards.json", ["{", '{"counts": [1, 2]}', '{"counts": [["a"]]}', "{}", DEEP]),
    (
        "noniid partition",
        write_noniid,
        "partition.json",
        ["{", "[]", '{"label_histograms": [[1, 2]]}', PARTITION, SHORT, DEEP],
    ),
]


def test_damaged_files_beside_a_run_are_named(tmp_path):
    for name, write, file, texts in DAMAGED:
        for i, text in enumerate(texts):
            folder = write(tmp_path / f"{name}_{i}")
            (folder / file).write_text(text)
            error = refused(name, folder.parent)
            assert str(folder) in error and "damaged" in error, (name, text, error)


def test_a_line_cut_off_by_a_crash_is_left_out_and_damage_elsewhere_is_named(tmp_path):
    path = write_mamba(tmp_path) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"round": 4, "val_p')
    assert table("table mamba", tmp_path)["FedAvg"]["tokens"] == "3,000"
    path.write_text("{damaged\n" + whole)
    assert "line 1" in refused("table mamba", tmp_path)


def test_a_script_of_its_own_ends_with_one_line_and_2_and_its_files_are_pictures(tmp_path):
    for sync in ("round", "epoch"):
        write_mamba(tmp_path, sync=sync)
    words = command_line("mamba", tmp_path, tmp_path / "plots")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "central.py" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "plots").exists()
    write_mamba(tmp_path, "central")
    assert call(words)[0] == call([*words, "--format", "pdf"])[0] == 0
    drawn = {path.name: path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()}
    name = "1_central_vs_fed_pure_ssm_1_layer"
    kinds = {"png": b"\x89PNG", "pdf": b"%PDF"}
    assert drawn == {f"{name}{end}.{kind}": start for end in ("", "_sync_epoch") for kind, start in kinds.items()}
