"""The rows of tests/test_refusals.py: bad input of every script, and the line that refuses it.

A row is (run of tests/harness.py, or a script; flags after that run's own; parts of the line; what fills {tmp}
before, or nothing). In the flags, {tmp} is the test's empty folder, {made} has the adapters and shards of
test_refusals.py, {NAME} is the folder of the run NAME.
"""

import csv
import json
import shutil
import zipfile

import harness
import numpy as np
import torch
from bad_files import damage, save_gpt2
from encoders import save_encoder
from safetensors.torch import load_file, save_file

from vit_sparse_fl.mask_files import save_mask

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DEMO = "--model tiny --dataset demo --task-name sst2 --threads 1"


# --------------------------------------------------------------------------------------------- what rows begin with


def mask_of_another_model(tmp):
    save_mask(tmp / "mask.safetensors", {"vit.layers.0.x": torch.ones(3, dtype=torch.bool)}, {})


def half_an_npz(tmp):
    np.savez(tmp / "cifar100.npz", train_images=np.zeros((100, 3, 32, 32), np.uint8))
    cut(tmp / "cifar100.npz", 100_000)


def strange_run(tmp):
    """A ViT run one of whose weights has another name."""
    shutil.copytree(harness.whole("vit_sparse_fl/centralized"), tmp / "run")
    file = tmp / "run" / "final" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "key" in name and name.endswith("weight"))
    save_file({("strange" if n == gone else n): t for n, t in tensors.items()}, file)


def huge_npz(tmp):
    """cifar100.npz whose first header asks for 10 TB."""
    with zipfile.ZipFile(tmp / "cifar100.npz", "w") as archive, archive.open("train_images.npy", "w") as member:
        about = {"descr": "|u1", "fortran_order": False, "shape": (10**13,)}
        np.lib.format.write_array_header_1_0(member, about)


def odd_tokens(save, kind):
    """A model in {tmp}/odd whose tokenizer.json is damaged: a `kind` of tests/bad_files.py."""

    def write(tmp):
        save(tmp / "odd")
        assert damage(tmp / "odd" / "tokenizer.json", kind, 0)

    return write


def no_mask(tmp):
    save_file({"x": torch.ones(3)}, tmp / "mask.safetensors", metadata={"mask": '["shapes", "kept", "sha256"]'})


def model_with(make, **about):
    """A model in {tmp}/model with an odd configuration: its sizes are read before it is built."""

    def write(tmp):
        make(tmp)
        edited(tmp / "model" / "config.json", lambda config: config.update(about))

    return write


def a_vit(tmp):
    shutil.copytree(harness.whole("vit_sparse_fl/centralized") / "final", tmp / "model")


def a_bert(tmp):
    save_encoder(tmp / "model", "bert")


def a_gpt2(tmp):
    shutil.copytree(harness.whole("llm_noniid/pretrain"), tmp / "model")


def pickled(tmp):
    a_vit(tmp)
    (tmp / "model" / "model.safetensors").rename(tmp / "model" / "pytorch_model.bin")


def cut(path, by=9):
    path.write_bytes(path.read_bytes()[:-by])


def text(name, content):
    def write(tmp):
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def half_an_encoder(tmp):
    cut(save_encoder(tmp / "cut", "bert") / "model.safetensors")


def label(bad):
    """SST-2 as GLUE has it, with a label that is none in line 3."""

    def write(tmp):
        for name in ("train", "dev"):
            lines = f"sentence\tlabel\na good film\t1\na dull film\t{bad}\na scene\t0\n"
            text(f"glue/SST-2/{name}.tsv", lines)(tmp)

    return write


def ag_news(file, broken):
    """AG News of 80 rows, with line 4 of `file` broken."""

    def write(tmp):
        (tmp / "ag_news").mkdir()
        for name in ("train", "test"):
            path = tmp / "ag_news" / f"{name}.csv"
            with open(path, "w", encoding="utf-8", newline="") as to:
                rows = [(i % 4 + 1, f"Title {i}", f"Text {i}.") for i in range(80)]
                csv.writer(to, quoting=csv.QUOTE_ALL).writerows(rows)
            if name == file:
                lines = path.read_text().splitlines(keepends=True)
                path.write_text("".join([*lines[:3], broken, *lines[3:]]))

    return write


def an_opt(tmp):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 200, "vocab_size": 800}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).save_pretrained(tmp / "opt")
    AutoTokenizer.from_pretrained(harness.whole("llm_noniid/pretrain")).save_pretrained(tmp / "opt")


def folders(tmp):
    text("full/x", "x")(tmp)
    text("file", "x")(tmp)


def a_run(damage, status="failed"):
    """The finished run of fed_avg in {tmp}/out, as one that has ended so, and damaged."""

    def make(tmp):
        shutil.copytree(harness.whole("mamba_fl/fed_avg"), tmp / "out" / "r")
        edited(tmp / "out" / "r" / "run.json", lambda manifest: manifest.update(status=status))
        damage(tmp / "out" / "r")

    return make


def edited(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def manifest(change):
    return lambda folder: edited(folder / "run.json", change)


def damaged_and_of_another_python(folder):
    manifest(lambda run: run["versions"].update(python="3"))(folder)
    cut(folder / "checkpoint" / "theta.safetensors", 5000)


# What is done to a good adapter
def changed(**about):
    return lambda folder: edited(folder / CONFIG, lambda config: config.update(about))


def names_code(folder):
    (folder.parent / "glue_evil.py").write_text("raise SystemExit(77)\n")
    changed(auto_mapping={"base_model_class": "Evil", "parent_library": "glue_evil"})(folder)


def not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


BROKEN = [
    (lambda folder: cut(folder / WEIGHTS), [WEIGHTS, "damaged"]),
    (names_code, [CONFIG, "auto_mapping", "code", "null"]),
    (not_finite, [WEIGHTS, "not finite"]),
    (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "cannot be read"]),
    (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), ["pickle", "not read"]),
    (changed(use_dora=True), ["use_dora"]),
]


def broken_adapter(break_it):
    def make(tmp):
        shutil.copytree(harness.whole("lora_glue_fl/svd") / "round_1/client_1/adapter", tmp / "mine")
        break_it(tmp / "mine")

    return make


# --------------------------------------------------------------------------------------------------------- the rows

MAMBA = [
    ("fed_avg", "--dataset wikitext9", ["wikitext9", "demo"]),
    ("fed_avg", "--dataset wikitext2 --data-root {tmp}", ["--dataset demo", "{tmp}"]),
    ("fed_avg", "--num-clients 60", ["60", "45"]),
    ("fed_avg", "--sequence-length 100000", ["100000", "tokens"]),
    ("fed_avg", "--batch-size 100000", ["100000", "--batch-size"]),
    ("fed_avg", "--config pure_ssm_4_layer --layers 2", ["pure_ssm_4_layer", "2"]),
    ("fed_avg", "--sync epoch", ["--participation"]),
    ("fed_avg", "--tokenizer /no/such/tokenizer", ["/no/such/tokenizer"]),
    ("fed_avg", "--headdim 24", ["24"]),
    ("fed_avg", "--track wandb", ["wandb", "pip install"]),
    ("fed_avg", "--run-name ../escape", ["../escape", "--output-dir"]),
    ("central", "--kernel mamba_ssm", ["mamba_ssm"]),
    ("fed_avg", "--rounds 0", ["--rounds"]),
    ("fed_avg", "--lr -1", ["--lr"]),
    ("fed_avg", "--lr nan", ["--lr"]),
    ("fed_avg", "--seed 99999999999999999999", ["--seed"]),
    ("fed_avg", "--threads 100000", ["--threads"]),
    ("fed_avg", "--participation 1.5", ["--participation"]),
    ("fed_avg", "--participation 0.1", ["0.1 of 4 clients samples nobody", "raise it to 0.25"]),
    ("fed_avg", "--no-such-flag", ["--no-such-flag"]),
    ("fed_avg", "--local-update 3", ["--local-update:", "did you mean --local-updates?"]),
    ("fed_avg", "--resume --overwrite", ["--overwrite: not allowed with argument --resume"]),
    ("fed_avg", "--client-optimizer sgd --client-state keep --num-clients 60", ["60", "45"]),  # and no warning
    ("fed_entropy", "--temperature 0", ["--temperature"]),
    ("fed_momentum", "--server-momentum 1", ["--server-momentum"]),
    ("fed_fisher", "--fisher-samples 0", ["--fisher-samples"]),
    ("fed_avg", "", ["r exists (finished)", "--resume", "--overwrite"], a_run(lambda _: None, "finished")),
    ("fed_avg", "--resume --lr 0.1 --tokenizer bpe:300", ["--lr 0.01 -> 0.1", "bpe:400 -> bpe:300"],
     a_run(lambda _: None, "finished")),
    ("fed_entropy", "--resume", ["is a run of fed_avg"], a_run(lambda _: None)),
    ("fed_avg", "--resume", ["other data"], a_run(manifest(lambda run: run["data"].update(variant="another")))),
    ("fed_avg", "--resume", ["amp bf16 -> "], a_run(manifest(lambda run: run["resolved"].update(amp="bf16")))),
    ("fed_avg", "--tokenizer {tmp}/odd", ["this tokenizer cannot split"], odd_tokens(save_gpt2, "fact 1")),
    ("fed_avg", "--resume", ["theta.safetensors is damaged", "checkpoint.1, after round 4"],
     a_run(lambda folder: cut(folder / "checkpoint" / "theta.safetensors", 5000))),
    ("fed_avg", "--resume", ["theta.safetensors is damaged"], a_run(damaged_and_of_another_python)),
    ("fed_avg", "--layers 244601270678559", ["--layers", "from 1 to 1000"]),
    ("fed_avg", "--tokenizer {tmp}/t", ["no tokenizer in", "/t", "tokenizer.json"], text("t/tokenizer.json", "null")),
    ("fed_avg", "--tokenizer {tmp}/t", ["no tokenizer in", "/t"], text("t/tokenizer.json", "[" * 3000)),
    ("fed_avg", "--tokenizer /dev/zero", ["/dev/zero", "no file"]),
    ("fed_avg", "--run-name thesis --overwrite", ["thesis"], text("out/thesis/thesis.txt", "years of work")),
]  # fmt: skip
VIT = [
    ("federated", "--sharding non_iid --nc 11", ["11", "10"]),
    ("federated", "--num-clients 4 --participation 0.1", ["0.1 of 4 clients samples nobody", "raise it to 0.25"]),
    ("federated", "--heterogeneity-experiment --local-steps-experiment", ["one at a time"]),
    ("sparse", "--compare-strategies --sparsity-experiment", ["--compare-strategies and --sparsity-experiment"]),
    ("federated", "--sharding non_iid --nc 1 --num-clients 4", ["1, 2, 3, 4, 5, 9", "--num-clients"]),
    ("federated", "--sharding non_iid --nc 3 --num-clients 120", ["--batch-size 8", "--num-clients"]),
    ("federated", "--image-size 36", ["36", "32 or 40"]),
    *(
        ("federated", f"--init-from {{tmp}}/model{flag}", words, model_with(a_vit, image_size=size))
        for flag, size, words in [
            ("", 8 * 10**6, ["8000000", "4096"]),
            ("", 1e400, ["{tmp}/model"]),
            (" --image-size 4104", 32, ["4104", "4096"]),
        ]
    ),
    ("federated", f"--init-from {'x/' * 3000}", ["x/x", "too long", "shorter"]),
    ("federated", "--classes 0:101", ["101"]),
    ("federated", "--classes 5", ["FROM:TO"]),
    ("train_federated.py", "--dataset demo --model tiny --num-classes 99 --processes 1 --output-dir {tmp}/out", ["99"]),
    ("federated", "--freeze-layers 9", ["9", "4"]),
    ("federated", "--head keep", ["--init-from"]),
    ("federated", "--init-from /no/such/run", ["/no/such/run"]),
    ("federated", "--init-from {tmp}/run", ["lacks", "strange"], strange_run),
    ("federated", "--head keep --classes 10:30 --init-from {vit_sparse_fl/centralized}",
     ["10 classes", "20", "--head ridge"]),
    ("federated", "--weights /no/such/file.pth --model dino_vits16", ["/no/such/file.pth"]),
    ("federated", "--dataset cifar100 --data-root {tmp}", ["cifar100.npz"], half_an_npz),
    ("federated", "--dataset cifar100 --data-root {tmp}", ["cifar100.npz", "10000000000000"], huge_npz),
    *(
        ("federated", "--weights {tmp}/any --model dino_vits16", ["{tmp}/any", "--model tiny"], text("any", content))
        for content in (b"", b"hello", "ü".encode(), b"\x80\x02]q\x00.", b"\x80\x02N.", b"PK\x03\x04")
    ),
    ("federated", "--weights {tmp} --model dino_vits16", ["{tmp}", "no such file"]),
    ("federated", "--init-from {tmp}/model", ["no model.safetensors", "pickled"], pickled),
    *(
        ("federated", f"--{flag} {{tmp}}/model", ["{tmp}/model", word], model_with(a_vit, **about))
        for flag in ("init-from", "model")
        for word, about in [
            ("hidden_size", {"hidden_size": "96"}),
            ("zero", {"num_attention_heads": 0}),
            ("num_hidden_layers 100000000", {"num_hidden_layers": 10**8}),
            ("1 channels", {"num_channels": 1}),
            ("num_labels 1000000000", {"num_labels": 10**9}),
            ("numbers", {"hidden_size": 3 * 10**6}),
            ("type bert", {"model_type": "bert"}),
        ]
    ),
    ("sparse", "--mask {tmp}/mask.safetensors", ["no mask"], no_mask),
    ("federated", "--use-wandb", ["wandb", "pip install"]),
    ("federated", "--log-dir /proc/no/logs", ["--log-dir"]),
    ("federated", "--heterogeneity-experiment --nc-values 3 11", ["11", "10"]),
    ("federated", "--heterogeneity-experiment --nc-values 3 5 3", ["two runs", "nc3", "drop one"]),
    ("federated", "--warmup-rounds 6", ["--warmup-rounds 6", "--num-rounds 6", "lower"]),
    ("federated", "--min-lr 0.2", ["--min-lr 0.2", "--lr (0.01)", "lower"]),
    ("federated", "--init-from {tmp}/run", ["{tmp}/run", "finished", "final/"], text("run/run.json", "{}")),
    ("centralized", "--batch-size 1000", ["1000", "720"]),
    ("sparse", "--calibration-rounds 99999999", ["--calibration-rounds 99999999", "weights of a mask", "lower"]),
    ("sparse", "--sparsity-ratio 0", ["train_federated.py"]),
    ("sparse", "--sparsity-ratio 1", ["0.99"]),
    ("sparse", "--sparsity-ratio 1.5", ["1.5"]),
    ("sparse", "--sparsity-ratio 0.9999999", ["keeps 0"]),
    ("sparse", "--sparsity-experiment --sparsity-values 0.5 1", ["0.99"]),
    ("sparse", "--sparsity-ratio 0 --sparsity-experiment", ["train_federated.py"]),
    ("sparse", "--mask /no/such/mask", ["/no/such/mask"]),
    ("sparse", "--mask {tmp}/mask.safetensors", ["another model"], mask_of_another_model),
    ("sparse", "--mask-merge union --calibrate-on server", ["--calibrate-on clients"]),
    ("sparse", "--freeze-backbone", ["--freeze-backbone"]),
    ("sparse", "--mask-scope layer --sparsity-ratio 0.99999", ["keeps 0"]),
    ("sparse", "--calibration seed --calibrate-on server --calibration-rounds 100", ["100", "lower the rounds"]),
    ("sparse", "--mask x --compare-strategies", ["--mask x", "drop"]),
    ("sparse", "--upload topk --compare-strategies", ["topk", "drop"]),
    ("sparse", "--mask-merge union --mask-strategy random", ["random", "drop"]),
    ("federated", "--config /no/such.yaml", ["/no/such.yaml"]),
    *(
        ("federated", "--config {tmp}/bad.yaml", words, text("bad.yaml", content))
        for content, words in [
            ("federated:\n  num_round: 3\n", ["federated.num_round", "federated.num_rounds"]),
            ("sed: 3\n", ["sed", "seed"]),
            ("federated:\n  num_rounds: many\n", ["federated.num_rounds", "many"]),
            ("sharding:\n  strategy: odd\n", ["sharding.strategy", "non_iid"]),
            ("model:\n  freeze_backbone: 3\n", ["true or false"]),
            ("heterogeneity_experiment:\n  nc_values: 5\n", ["a list"]),
            ("a: [\n", ["not yaml"]),
            ("- 3\n", ["keys and values"]),
            (b"\xff\xfe\x00", ["not yaml"]),
        ]
    ),
]  # fmt: skip
SHARDING = "--dataset demo --task-name sst2 --k 3 --out-dir {tmp}/out"
CENTRAL = f"{DEMO} --output-dir {{tmp}}/out --lora-r 4"
BASE = "--dataset demo --task_name sst2 --output-dir {tmp}/out"  # without a model it is roberta-base
OUT = "--output-dir {tmp}/out"
MERGE = "--task-name sst2 --svd-rank 4 --save-adapter {tmp}/out --adapters {made}/a"
FILES = "--task-name sst2 --dataset glue --data-root {tmp} --model tiny --tokenizer demo --threads 1"
GLUE = [
    ("svd", "--task-name sst3", ["'sst3'", "cola, sst2"]),
    ("svd", "--shard-dir {tmp}/none", ["/none is missing", "sharding.py"]),
    ("svd", "--shard-dir {tmp}", ["has no client_1.json", "sharding.py"]),
    ("svd", "--shard-dir {made}/rte", ["of task rte", "not sst2", "--task-name rte"]),
    ("svd", "--shard-dir {made}/other", ["other data", "0123456789ab", "make the shards again"]),
    ("svd", "--svd-rank 13", ["--svd-rank 13", "above 12", "lower it"]),
    ("svd", "--svd-rank 8 --client-ranks 1 2 4", ["--svd-rank 8", "above 7", "lower it"]),
    ("svd", "--aggregate naive --client-ranks 2 4", ["--client-ranks 2 4", "naive", "--aggregate svd or stack"]),
    ("svd", "--client-ranks 1 2 3 4", ["4 --client-ranks for 3 clients"]),
    ("svd", "--participation 0.1", ["0.1 of 3 clients samples nobody", "raise it to 0.333"]),
    ("svd", "--lora-r 65", ["rank 65", "above 64", "--lora-r"]),
    ("central_lora", "--lora-r 22241959740", ["rank 22241959740", "above 64", "--lora-r"]),
    (
        "svd",
        "--model {tmp}/odd --tokenizer {tmp}/odd",
        ["the tokenizer has 1000"],
        odd_tokens(lambda folder: save_encoder(folder, "bert"), "fact 0"),
    ),
    ("merge", "--device no-such", ["--device no-such"]),
    ("svd", "--skip-svd --aggregate svd", ["--skip-svd", "not svd"]),
    ("svd", "--server-optimizer adam", ["adam", "svd", "naive, ffa, rolora or rotate"]),
    ("svd", "--server-optimizer momentum --aggregate stack", ["momentum", "stack", "naive, ffa, rolora or rotate"]),
    ("svd", "--replay --aggregate ffa", ["--replay", "ffa", "take svd"]),
    ("svd", "--replay --client-ranks 2 4", ["--client-ranks 2 4", "rank 4"]),
    ("svd", "--init-adapter {tmp}/none", ["/none does not exist", "give a folder"]),
    ("svd", "--init-adapter {made}/keys", ["its layers are not those of tiny", "self.key", "--model"]),
    ("svd", "--init-adapter {made}/mnli", ["out_proj.weight 3x64", "2x64", "--task-name"]),
    ("svd", "--init-adapter {made}/r8", ["has rank 8, above --lora-r 4", "--lora-r", "fedavg_merge.py"]),
    ("svd", "--init-adapter {made}/a --model {tmp}/little", ["its layers are not those of", "bert", "--model"],
     lambda tmp: save_encoder(tmp / "little", "bert")),
    ("svd", "--target-modules nope", ["no linear layer nope", "key", "query"]),
    ("svd", "--init-adapter {lora_glue_fl/stack}/round_2/client_1/adapter", ["a base that its run has", "final/"]),
    *(
        ("svd", "--model {tmp}/model", ["{tmp}/model", word], model_with(a_bert, **about))
        for word, about in [
            ("hidden_size", {"hidden_size": "16"}),
            ("zero", {"num_attention_heads": 0}),
            ("num_hidden_layers 100000000", {"num_hidden_layers": 10**8}),
            ("numbers", {"vocab_size": 10**8}),
        ]
    ),
    ("svd", "--tokenizer {tmp}/t", ["no tokenizer in", "/t"], text("t/tokenizer.json", "null")),
    ("svd", "--amp fp16", ["fp16", "--amp off"]),
    ("svd", "--max-length 4", ["4", "8 to"]),
    ("svd", "--run-name a/b", ["a/b", "--output-dir"]),
    ("svd", "--output-dir /proc/no", ["/proc/no", "--output-dir"]),
    ("svd", "--model {tmp}/none", ["none", "--model"]),
    *(
        (script, more, words, *make)
        for script in ("central_lora", "baseline")
        for more, words, *make in [
            ("--task-name sst3", ["'sst3'", "cola, sst2"]),
            ("--shard {tmp}/none.json", ["--shard", "--max-examples", "choose"]),
            ("--max-examples 0", ["--max-examples 0", "at least 1"]),
            ("--amp fp16", ["fp16", "--amp off"]),
            ("--model {tmp}/cut", ["/cut", "cannot be read", "give a folder"], half_an_encoder),
            ("--tokenizer {tmp}/none", ["/none", "tokenizer"]),
        ]
    ),
    ("main_glue_lora.py", f"{CENTRAL} --do-train --final best", ["--final best", "--do-eval"]),
    ("main_glue_lora.py", CENTRAL, ["nothing to do", "--do-train, --do-eval or both"]),
    ("main_glue_lora.py", f"{CENTRAL} --do-train --shard {{tmp}}/none.json", ["none.json", "sharding.py"]),
    ("main_glue_lora.py", f"{CENTRAL} --do-train --shard {{made}}/rte/client_1.json", ["client_1.json", "rte", "sst2"]),
    ("main_glue_lora.py", f"{CENTRAL} --do-train --shard {{made}}/other/client_1.json", ["other data", "again"]),
    ("main_glue_lora.py", f"{BASE} --do_train", ["roberta-base", "download_roberta_models.py", "--model tiny"]),
    ("adapters_eval.py", f"{BASE} --adapter-path {{made}}/r8", ["no model roberta-base", "--model tiny"]),
    ("sharding.py", f"{SHARDING} --task-name sst3", ["'sst3'", "cola, sst2"]),
    ("sharding.py", f"{SHARDING} --task-name wnli --k 401", ["401", "400"]),
    ("sharding.py", f"{SHARDING} --k 2000", ["1200 examples cannot be dealt to 2000 clients"]),
    ("sharding.py", f"{SHARDING} --dataset glue --data-root {{tmp}}", ["cannot be reached"]),
    ("sharding.py", f"{SHARDING} --k 90 --max-examples 80", ["90", "80"]),
    ("sharding.py", f"{SHARDING} --mode overlap --overlap-ratio 1.5", ["1.5"]),
    ("sharding.py", f"{SHARDING} --mode category --category-key genre", ["genre", "label, sentence"]),
    ("sharding.py", f"{SHARDING} --mode dirichlet --k 20 --min-samples 70", ["70", "20"]),
    *(
        (script, f"{flags} --task-name sst2 --dataset glue --data-root {{tmp}}",
         [f"{file}.tsv line 3", f"'{bad}'", "negative, positive", "corr"], label(bad))
        for script, flags, file, bad in [
            ("fedavg_rounds.py", f"{FILES} --processes 1 --shard-dir {{made}}/rte {OUT}", "train", "2"),
            ("main_glue_lora.py", f"{FILES} --do-train --output-dir {{tmp}}/out", "train", "-1"),
            ("sharding.py", "--k 1 --out-dir {tmp}/out", "train", "maybe"),
            ("adapters_eval.py", f"{FILES} --adapter-path {{made}}/a --output-dir {{tmp}}/out", "dev", "2"),
        ]
    ),
    *(
        (script, flags, ["{tmp}/mine", *words], broken_adapter(break_it))
        for script, flags in [
            ("svd", "--init-adapter {tmp}/mine"),
            ("eval", "--adapter-path {tmp}/mine"),
            ("fedavg_merge.py", f"{MERGE} {{tmp}}/mine"),
        ]
        for break_it, words in BROKEN
    ),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --weights 3 -1", ["--weights 3 -1", "at least 0"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --weights 1", ["1 --weights for 2", "give one for each"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --weights 1 2 3", ["3 --weights for 2", "give one for each"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --weights 0 0", ["--weights 0 0", "sum above 0"]),
    ("fedavg_merge.py",
     f"{MERGE} {{made}}/b --shard-manifests {{made}}/other/client_1.json {{made}}/rte/client_1.json", ["rte", "sst2"]),
    ("fedavg_merge.py",
     f"{MERGE} {{made}}/b --shard-manifests {{lora_glue_fl/sharding}}/client_1.json {{made}}/other/client_2.json",
     ["0123456789ab"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --task-name sst3", ["'sst3'"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --svd-rank 65", ["--svd-rank 65", "64", "lower it"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --svd-rank 9", ["--svd-rank 9", "above 8", "lower it"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --skip-svd --svd-rank 2", ["--svd-rank 2", "--aggregate svd"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/keys", ["different targets", "key, query", "query, value"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/mnli", ["different heads", "merge adapters of one task"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/none", ["none does not exist"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --save-adapter {{made}}/b", ["/b exists", "--overwrite"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --save-adapter {{made}}/b --overwrite", ["is one of --adapters"]),
    ("fedavg_merge.py", f"{MERGE} {{made}}/b --eval {DEMO} --task-name mnli", ["its head", "not the task's"]),
    ("eval", "--task-name sst3", ["'sst3'"]),
    ("eval", "--task-name mnli", ["its head", "out_proj.bias 2", "out_proj.bias 3", "--task-name"]),
    ("eval", "--adapter-path {tmp}/none", ["/none does not exist"]),
    ("eval", f"--adapter-path {{made}}/a/{WEIGHTS}", ["is a file"]),
    ("eval", "--amp fp16", ["fp16", "--amp off"]),
    ("eval", "--device cuda:99", ["cuda:99"]),
]  # fmt: skip
NONIID = [
    ("fedavg", "--alpha 0", ["--alpha", "0 is not a number above 0", "--help"]),
    ("fedavg", "--alpha -1", ["--alpha", "-1 is not a number above 0"]),
    ("fedavg", "--alpha nan", ["--alpha", "nan"]),
    ("fedavg", "--participation-rate 0", ["--participation-rate", "above 0"]),
    ("fedavg", "--participation-rate 1.5", ["--participation-rate", "at most 1"]),
    ("fedavg", "--algorithm fedsgd", ["fedsgd", "fedavg"]),
    ("fedavg", "--partition dirichlet", ["dirichlet", "topic_skew"]),
    ("fedavg", "--max-samples -1", ["--max-samples", "-1"]),
    ("fedavg", "--num-rounds 0", ["--num-rounds", "0"]),
    ("fedavg", "--mu -0.1", ["--mu", "-0.1"]),
    ("fedavg", "--learning-rate 0", ["--learning-rate"]),
    ("fedavg", "--lora-dropout 1", ["--lora-dropout", "below 1"]),
    ("fedavg", "--stop-on always", ["always", "divergence"]),
    ("fedavg", "--nonsense 1", ["--nonsense"]),
    ("fedavg", "--participation-rate 0.1", ["0.1 of 4 clients samples nobody", "raise it to 0.25"]),
    ("fedavg", "--num-clients 161 --min-samples 1", ["160 texts", "161 clients", "--num-clients"]),
    ("fedavg", "--num-clients 17 --min-samples 10", ["160 texts", "17 clients 10 each", "to at most 16"]),
    ("fedavg", "--max-samples 3", ["3 texts", "4 clients 6 each", "--num-clients to at most 3"]),
    ("fedavg", "--max-samples 5", ["5 texts", "4 clients 6 each", "--min-samples to at most 1"]),
    ("fedavg", "--algorithm fednova", ["fednova", "adamw", "sgd or sgdm"]),
    ("fedavg", "--algorithm scaffold --scaffold-option II", ["option II", "adamw", "mean_gradient"]),
    ("fedavg", "--algorithm fedprox --cluster updates", ["--cluster updates", "--algorithm fedprox"]),
    ("fedavg", "--cluster labels --num-clusters 5", ["--num-clusters 5", "--num-clients 4"]),
    ("fedavg", "--cluster updates --cluster-round 9 --num-rounds 8", ["--cluster-round 9", "--num-rounds 8"]),
    ("fedavg", "--target-modules c_attn nope", ["no linear layer nope", "c_attn", "c_proj"]),
    ("fedavg", "--model {tmp}/opt --tokenizer {tmp}/opt", ["opt", "--target-modules", "q_proj"], an_opt),
    ("fedavg", "--model {llm_noniid/pretrain} --max-length 97", ["--max-length 97", "96 positions", "lower it"]),
    ("fedavg", "--model {llm_noniid/pretrain} --tokenizer bpe:900", ["800 tokens", "900", "--tokenizer"]),
    ("fedavg", "--model {tmp}", ["config.json", "safetensors", "give a folder"]),
    ("fedavg", "--model {tmp}/none", ["no model", "none", "pretrain.py", "--model tiny"]),
    ("fedavg", "--model distilgpt2", ["no model distilgpt2", "pretrain.py", "--model tiny"]),
    ("fedavg", "--max-length 1", ["--max-length 1", "2 to"]),
    ("fedavg", "--max-length 99999999", ["--max-length 99999999", "lower it"]),
    *(
        ("fedavg", "--model {tmp}/model", ["{tmp}/model", word], model_with(a_gpt2, **about))
        for word, about in [
            ("n_embd", {"n_embd": "32"}),
            ("zero", {"n_head": 0}),
            ("n_layer 100000000", {"n_layer": 10**8}),
            ("numbers", {"n_positions": 10**8}),
        ]
    ),
    ("fedavg", "--tokenizer bpe:9", ["bpe:9"]),
    ("fedavg", "--dataset ag_news --data-root {tmp}", ["no AG News", "train.csv", "--dataset demo"]),
    ("fedavg", "--dataset wikitext --data-root {tmp}", ["--data-root"]),
    ("fedavg", "--amp fp16", ["fp16", "--amp off"]),
    ("fedavg", "--device cuda:99", ["cuda:99"]),
    ("fedavg", "--name a/b", ["a/b", "--output-dir"]),
    ("fedavg", "--output-dir /proc/no", ["/proc/no", "--output-dir"]),
    ("fedavg", "--config {tmp}/none.yaml", ["none.yaml", "name a yaml file"]),
    *(
        ("fedavg", "--dataset ag_news --data-root {tmp}", [f"{file}.csv", *words], ag_news(file, row))
        for file, row, words in [
            ("train", '"2","Only a title"\n', ["line 4", "2 columns", "mend it"]),
            ("train", '"2","A title,"and more"\n', ["line 4 is broken", "quotes"]),
            ("test", '"0","A title","A text."\n', ["line 4", "class '0' is outside 1 to 4", "World"]),
            ("train", '"5","A title","A text."\n', ["line 4", "class '5' is outside 1 to 4"]),
            ("test", '"Sports","A title","A text."\n', ["line 4", "class 'Sports'"]),
            ("test", '"3",""," "\n', ["line 4", "empty text"]),
        ]
    ),
    *(
        ("fedavg", "--config {tmp}/mine.yaml", ["--config", "mine.yaml", *words], text("mine.yaml", content))
        for content, words in [
            ("federated: {learning_rat: 1}", ["unknown key federated.learning_rat:", "mean federated.learning_rate?"]),
            ("learning_rate: 1", ["unknown key learning_rate", "federated.learning_rate?"]),
            ("data: {style_criterion: length}", ["unknown key data.style_criterion", "data.style_criteria?"]),
            ("federated: {participation_rate: 2}", ["federated.participation_rate", "2", "at most 1"]),
            ("federated: {algorithm: fedsgd}", ["federated.algorithm", "'fedsgd'", "fedavg"]),
            ("data: {alpha: [1, 2]}", ["data.alpha", "one value"]),
            ("data: {num_clients: few}", ["data.num_clients", "few"]),
            ("- a list", ["keys and values"]),
            ("a: [1", ["is not yaml"]),
        ]
    ),
    ("pretrain", "--heads 3", ["--d-model 32", "--heads 3"]),
    ("pretrain", "--out {tmp}/full", ["/full exists", "--overwrite"], folders),
    ("pretrain", "--out {tmp}/file", ["/file", "is a file"], folders),
    ("pretrain", "--max-samples -1", ["--max-samples", "-1"]),
    ("pretrain", "--max-length 1", ["--max-length 1"]),
    ("pretrain", "--max-length 99999999", ["--max-length 99999999", "lower it"]),
    ("pretrain", "--layers 100000000", ["--layers", "from 1 to 1000"]),
    ("pretrain", "--dataset ag_news --data-root {tmp}", ["no AG News"]),
    ("pretrain", "--tokenizer nope", ["nope", "bpe:N"]),
    ("pretrain", "--amp fp16", ["fp16", "--amp off"]),
    ("pretrain", "--device tpu", ["tpu"]),
    ("pretrain", "--epochs 0", ["--epochs", "0"]),
    ("pretrain", "--warmup-ratio 1.5", ["--warmup-ratio", "at most 1"]),
    ("pretrain", "--compile", ["--compile"]),
]  # fmt: skip
STUDIES = {"mamba_fl": MAMBA, "vit_sparse_fl": VIT, "lora_glue_fl": GLUE, "llm_noniid": NONIID}
ROWS = [(f"{study}/{first}", *row) for study, rows in STUDIES.items() for first, *row in rows]

# Runs that start and cannot go on: exit code 1, the reason in the last line and in run.json
FAILED = [
    *((f"mamba_fl/{script}", "--lr 1e30", ["lower --lr (1e+30)"]) for script in ("central", "fed_avg", "fed_momentum")),
    *((f"mamba_fl/{script}", "--lr 1e30", ["lower --lr (1e+30)"]) for script in ("fed_entropy", "fed_fisher")),
    ("vit_sparse_fl/federated", "--lr 1e30", ["--lr (1e+30)"]),
    ("vit_sparse_fl/centralized", "--lr 1e30", ["--lr (1e+30)"]),
    ("lora_glue_fl/svd", "--learning-rate 1e38", ["round 1", "3 of 3 clients", "--learning-rate (1e+38)"]),
    ("lora_glue_fl/central_lora", "--learning-rate 1e38", ["--learning-rate (1e+38)"]),
    ("lora_glue_fl/baseline", "--learning-rate 1e38", ["--learning-rate (1e+38)"]),
    ("llm_noniid/fedavg", "--learning-rate 1e38", ["round 1: ", "4 of 4 clients", "--learning-rate (1e+38)"]),
    ("llm_noniid/pretrain", "--learning-rate 1e38", ["epoch 1: the loss is nan", "--learning-rate"]),
]
