"""Small files of every kind that the scripts read, and damage to them of which it is known whether a reader can see it.

`READS` says which script reads which; `make_input` makes them; `damages(path)` names what may happen to one, and
`damage` does it. What only shows in what comes of it (a run that goes on, a table) is in `COMPARED`: there a reader may
take a damaged file if what comes of it is the same, or if it says so.
"""

import io
import json
import os
import shutil
import zipfile
from fnmatch import fnmatch
from functools import partial

import harness
import numpy as np
import torch
from encoders import save_encoder
from safetensors.torch import load, save, save_file

LAYERS = [f"roberta.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
HALF = {  # what --resume goes on with, and what more its command line says than its script's first of tests/harness.py
    "mamba_fl/fed_avg": "",
    "mamba_fl/central": "",
    "vit_sparse_fl/sparse": "",
    "lora_glue_fl/svd": "",
    "llm_noniid/scaffold": "--participation-rate 0.5 --algorithm scaffold --drift-samples 6",
}
TABLES = {"mamba_fl": "mamba", "vit_sparse_fl": "vit", "lora_glue_fl": "glue", "llm_noniid": "noniid"}
READS = [  # (script, flags, what is read)
    ("mamba_fl/fed_avg.py", "--tokenizer {in}/gpt2", "gpt2/tokenizer*"),
    ("mamba_fl/central.py", "--dataset wikitext2 --data-root {in}/data", "data/wikitext-2/*"),
    ("mamba_fl/fed_avg.py", "--init-from {in}/mamba", "mamba/final/*"),
    ("vit_sparse_fl/train_federated.py", "--init-from {in}/vit", "vit/*"),
    ("vit_sparse_fl/train_centralized.py", "--model {in}/vit", "vit/*"),
    ("vit_sparse_fl/train_federated.py", "--weights {in}/dino.pth", "dino.pth"),
    ("vit_sparse_fl/train_federated.py", "--weights {in}/dino.safetensors", "dino.safetensors"),
    ("vit_sparse_fl/train_federated.py", "--dataset cifar100 --data-root {in}/data --val-split 0.3", "data/*.npz"),
    ("vit_sparse_fl/train_federated.py", "--config {in}/vit.yaml", "vit.yaml"),
    ("vit_sparse_fl/train_federated_sparse.py", "--mask {in}/mask.safetensors", "mask.safetensors"),
    ("lora_glue_fl/fedavg_rounds.py", "", "shards/*"),
    ("lora_glue_fl/fedavg_rounds.py", "--init-adapter {in}/adapters/1", "adapters/1/*"),
    ("lora_glue_fl/fedavg_rounds.py", "--model {in}/bert --tokenizer {in}/bert", "bert/*"),
    ("lora_glue_fl/baseline_run.py", "--model {in}/bert", "bert/*"),
    ("lora_glue_fl/baseline_run.py", "--shard {in}/shards/client_1.json", "shards/client_1.json"),
    ("lora_glue_fl/main_glue_lora.py", "--dataset glue --data-root {in}/data --tokenizer demo", "data/glue/SST-2/*"),
    ("lora_glue_fl/adapters_eval.py", "", "adapters/1/*"),
    ("lora_glue_fl/adapters_eval.py", "--adapter-path {in}/svd", "svd/final/*"),
    ("lora_glue_fl/adapters_eval.py", "--adapter-path {in}/stack", "stack/adapter/*"),
    ("lora_glue_fl/fedavg_merge.py", "", "adapters/*/*"),
    ("lora_glue_fl/fedavg_merge.py", "", "shards/client*"),
    ("llm_noniid/train.py", "--model {in}/gpt2 --tokenizer {in}/gpt2", "gpt2/*"),
    ("llm_noniid/train.py", "--init-from {in}/noniid", "noniid/run.json noniid/final/adapter/*"),
    ("llm_noniid/train.py", "--dataset ag_news --data-root {in}/data", "data/ag_news/*"),
    ("llm_noniid/train.py", "--config {in}/llm.yaml", "llm.yaml"),
    ("llm_noniid/pretrain.py", "--tokenizer {in}/gpt2", "gpt2/tokenizer*"),
    *(
        (
            harness.GOLDEN[name].script,
            f"{more} --output-dir {{in}}/{kind}_{study} --run-name {part} --resume",
            f"{kind}_{study}/{part}/*.json*" + f" half_{study}/{part}/checkpoint/*" * (kind == "half"),
        )
        for name, more in HALF.items()
        for study, _, part in [name.partition("/")]
        for kind in ("half", "done")
    ),
    *((f"plots/{TABLES[study]}.py", f"--data-dir {{in}}/runs/{study}", f"runs/{study}/*/*.json*") for study in TABLES),
    *(("plots/tables.py", f"{study} --data-dir {{in}}/runs/{study}", f"runs/{study}/*/*.json*") for study in TABLES),
    *(("plots/tables.py", f"{study} --data-dir {{in}}/log/{study}/a.jsonl", f"log/{study}/*") for study in TABLES),
    ("plots/report.py", "{in}/runs --no-figures --out {out}/page.html", "runs/*/*/*.json*"),
    (
        "plots/visualize_federated_deltas.py",
        "--data-dir {in}/runs/mamba_fl --entity client",
        "runs/mamba_fl/*/*/deltas/*",
    ),
]
# Files that may be absent: others say the same, or it is not known what they should say
OPTIONAL = ["tokenizer_config.json", "generation_config.json", "summary.json", "training_history.json", "step_*.npz"]


def compared(script, flags):
    """Whether damage counts by what comes of it."""
    return "--resume" in flags or script.startswith("plots/")


# ---------------------------------------------------------------------------------------------- the good input


def make_input(folder):
    """Small files of every kind that the scripts read."""
    from common.adapter_files import write_adapter
    from vit_sparse_fl.mask_files import save_mask
    from vit_sparse_fl.masks import maskable
    from vit_sparse_fl.vit import dino_name, make_model, save_pretrained

    shutil.copytree(harness.whole("lora_glue_fl/sharding"), folder / "shards")
    sizes = {"dense.weight": (64, 64), "dense.bias": (64,), "out_proj.weight": (2, 64), "out_proj.bias": (2,)}
    about = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "base_model": "tiny"}
    for k in (1, 2, 3):
        factors = {layer: (torch.randn(4, 64), torch.randn(64, 4)) for layer in LAYERS}
        head = {f"classifier.{name}": torch.randn(shape) for name, shape in sizes.items()}
        write_adapter(folder / "adapters" / str(k), factors, head, alpha=4, **about)
    save_encoder(folder / "bert", "bert")
    save_gpt2(folder / "gpt2")
    vit = make_model("tiny", image_size=32, n_classes=10)
    save_pretrained(vit, folder / "vit")
    dino = {}
    for name, p in vit.vit.named_parameters():
        dino.setdefault(dino_name(name), []).append(p.detach())
    dino = {name: torch.cat(parts) for name, parts in dino.items()}
    save_file(dino, folder / "dino.safetensors")
    torch.save({"teacher": {f"backbone.{name}": t for name, t in dino.items()}}, folder / "dino.pth")
    save_mask(
        folder / "mask.safetensors", {name: vit.get_parameter(name) > 0 for name in maskable(vit)}, {"strategy": "x"}
    )
    (folder / "vit.yaml").write_text("federated:\n  num_rounds: 3\nsharding:\n  strategy: iid\n")
    (folder / "llm.yaml").write_text("federated:\n  learning_rate: 0.01\ndata:\n  alpha: 0.5\n")
    for name, lines in {
        **{f"glue/SST-2/{n}.tsv": ["sentence\tlabel", *(f"a film {i}\t{i % 2}" for i in range(120))] for n in GLUE},
        **{f"ag_news/{n}.csv": [f'"{i % 4 + 1}","Title {i}","Text {i}."' for i in range(200)] for n in AG_NEWS},
        **{f"wikitext-2/wiki.{n}.raw": [line for i in range(9) for line in article(i)] for n in WIKITEXT},
    }.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text("\n".join(lines) + "\n")
    arrays = {}
    for split, count in CIFAR.items():
        arrays[f"{split}_images"] = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(32, 2)
        arrays[f"{split}_images"] = arrays[f"{split}_images"].repeat(32, 3)
        arrays[f"{split}_labels"] = np.arange(count) % 100
    np.savez(folder / "data" / "cifar100.npz", **arrays)
    for name in HALF:
        make_runs(folder, name)
    copy = partial(shutil.copytree, dirs_exist_ok=True)
    copy(harness.whole("mamba_fl/fed_avg") / "final", folder / "mamba" / "final")
    copy(harness.whole("lora_glue_fl/svd") / "final", folder / "svd" / "final")
    copy(harness.whole("llm_noniid/scaffold") / "final", folder / "noniid" / "final")
    shutil.copy2(harness.whole("llm_noniid/scaffold") / "run.json", folder / "noniid")
    copy(harness.whole("lora_glue_fl/stack") / "round_3" / "client_1", folder / "stack")


GLUE, AG_NEWS, WIKITEXT, CIFAR = (
    ("train", "dev"),
    ("train", "test"),
    ("train", "valid", "test"),
    {"train": 400, "test": 100},
)


def article(i):
    """Lines of WikiText-2."""
    return [
        " ",
        f" = Title {i} = ",
        " ",
        *(" ".join(f"w{(i + j) * j * k % 9973}" for j in range(40)) for k in range(9)),
    ]


def save_gpt2(folder):
    from transformers import GPT2LMHeadModel

    from common.corpora import load_corpus
    from common.text import load_tokenizer
    from llm_noniid.models import tiny_config

    tokenizer = load_tokenizer("bpe:400", load_corpus("demo"))
    GPT2LMHeadModel(tiny_config(tokenizer, 96, 16, 1, 2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_runs(folder, name):
    """The run `name` finished, as it was when it had but the checkpoint before the last, twice for tables, in a log."""
    source, study = harness.whole(name), name.partition("/")[0]
    for kind in ("done", "half"):
        half = folder / f"{kind}_{study}" / name.partition("/")[2]
        shutil.copytree(source, half, ignore=shutil.ignore_patterns("round_*", "clients", "params", "deltas", "*.png"))
        (half.parent / "logs").mkdir(exist_ok=True)
    facts = json.loads((half / "run.json").read_text())
    stopped = {"how": "interrupted", "by": None, "round": 4, "clients": None, "reason": ""}
    (half / "run.json").write_text(json.dumps({**facts, "status": "interrupted", "results": None, "ended": stopped}))
    shutil.rmtree(half / "checkpoint")
    shutil.rmtree(half / "final", ignore_errors=True)
    os.rename(half / "checkpoint.1", half / "checkpoint")
    rows = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    log = folder / "log" / study / "a.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    for seed in (facts["args"]["seed"], 8):
        run = folder / "runs" / study / f"{name.partition('/')[2]}_{seed}"
        shutil.copytree(
            source, run, ignore=shutil.ignore_patterns("checkpoint*", "round_*", "clients", "final", "params", "server")
        )
        about = {part: {**facts.get(part, {}), "seed": seed} for part in ("args", "method")}
        (run / "run.json").write_text(json.dumps(facts | about))
        with open(log, "a") as file:
            file.write(json.dumps({"name": run.name, "curve": rows, **facts, **about}) + "\n")


# ---------------------------------------------------------------------------------------------- damage

ODD = [None, True, "x", "", "9" * 20, -1, 0, 0.5, 10**8, 10**18, -(10**30), float("nan"), [], {}, [[]], {"a": 1}]
BYTES = [b"", b"\0" * 100, b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\n"]
BYTES += [b"a: &a [*a]", b"a:\n", b"PK\x03\x04", b"\x80\x02N.", b"\x80\x04\x95" + b"\xff" * 8, b"\xff" * 7 + b"\0{}"]

SIZES = ("hidden_size", "intermediate_size", "vocab_size", "n_embd", "num_channels", "num_hidden_layers", "n_layer")


def _with(key, *values):
    """Edits of a JSON object: other values of a key; one that is a function makes it of the value that is there."""
    return [(key, value) for value in values]


# {files: edits that a reader can see to be wrong}; a key that is not there is left alone
FACTS = {
    "*/client_*.json": [
        *_with("indices", lambda v: v + v[:1], lambda v: [-1, *v], lambda v: [*v, 10**6], lambda v: [*v, 2**70]),
        *_with("indices", lambda v: [v[0] + 0.5, *v[1:]], lambda v: list(map(str, v)), lambda v: [], None, 7, "DROP"),
        *_with("indices", "OTHER"),
        *_with("task", "rte", 3),
        *_with("fingerprint", "0" * 64),
    ],
    "*/adapter_config.json": [
        *_with("r", 3, 5, 0, -4, "4", 4.5, None, "DROP"),
        *_with("lora_alpha", 0, -1, "4", None, float("inf"), float("nan"), "DROP"),
        *_with("target_modules", ["query"], ["query", "value", "key"], [], "x(", 3),
        *_with("peft_type", "IA3", None, "DROP"),
        *_with("modules_to_save", [], ["other"], None),
        *_with("base_model_name_or_path", "another/model", 3),
        *_with("bias", "all"),
        *_with("use_dora", True),
        *_with("fan_in_fan_out", "no"),
    ],
    "*/config.json": [
        *(edit for key in SIZES for edit in _with(key, lambda v: v + 1, lambda v: v - 1, 0, -1, "8", None)),
        *_with("model_type", "t5", "no-such-type", None),
    ],
    "*/tokenizer.json": [
        *_with("model", lambda v: {**v, "vocab": {word: i + 10**5 for word, i in v["vocab"].items()}}),
        *_with("model", lambda v: {**v, "vocab": {word: i // 2 for word, i in v["vocab"].items()}}),
        *_with("model", lambda v: {**v, "vocab": {}}, None, "DROP"),
    ],
    "*/run.json": [
        *_with("command", "other", None, "DROP"),
        *_with("status", None, 3, "DROP"),
        *_with("args", None, [], "x", "DROP"),
        *_with("results", 3, "x", []),
        *_with("method", 3, []),
    ],
}


def damages(path):
    """[(name, whether a reader can see it: True, False, or None where that depends)] of damage to the file `path`."""
    absent = not any(fnmatch(path.name, name) for name in OPTIONAL)
    several = [("gone", absent), ("folder", absent), ("loop", absent)]
    whole = path.suffix in (".json", ".safetensors", ".npz", ".pth")  # its readers see where it ends
    whole = whole and absent
    several += [(f"bytes {i}", True if whole or i < 2 and path.suffix != ".yaml" else None) for i in range(len(BYTES))]
    several += [("cut", True if whole else None)] * 3 + [("flip", None)] * 2
    if path.suffix == ".json":
        several += [("edit", None)] * 8 + [("space", False), ("more", False)]
        here = next((FACTS[pattern] for pattern in FACTS if fnmatch(f"x/{path.name}", pattern)), [])
        # the run of another command is not a table's, which passes over it
        several += [(f"fact {n}", None if fact == ("command", "other") else True) for n, fact in enumerate(here)]
    elif path.suffix == ".safetensors":
        several += [(f"tensor {how}", how not in ("half", "bit", "header") or None) for how in TENSORS]
    elif path.name == "cifar100.npz":
        several += [(f"array {how}", True) for how in ARRAYS]
    elif path.suffix in (".tsv", ".csv"):
        several += [(f"row {how}", True) for how in ROWS]
    elif path.suffix == ".jsonl":
        several += [(f"line {how}", None) for how in LINES]
        several += [("line edit", None)] * 6
    return several


def damage(path, kind, seed):
    """Does `kind`, a name of `damages`, to the file at `path`. Returns whether it changed the file."""
    random, content = np.random.default_rng(seed), path.read_bytes()
    kind, _, how = kind.partition(" ")
    if kind in ("gone", "folder", "loop"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        return True
    changed = globals()[f"_{kind}"](path, content, how, random)
    if changed is None or changed == content:
        return False
    path.write_bytes(changed)
    return True


def _bytes(path, content, how, random):
    return BYTES[int(how)]


def _cut(path, content, how, random):
    return content[: random.integers(len(content.rstrip()) or 1)]


def _flip(path, content, how, random):
    changed = bytearray(content)
    for at in random.integers(min(len(content), random.choice([200, 10**9])) or 1, size=random.choice([1, 1, 20])):
        changed[at : at + 1] = [random.integers(256)]
    return bytes(changed)


def _space(path, content, how, random):
    return b" " + content.replace(b": ", b":  ") + b"\n"


def _more(path, content, how, random):
    value = json.loads(content)
    return json.dumps({**value, "x_more": 1}).encode() if isinstance(value, dict) else None


def _edit(path, content, how, random):
    return json.dumps(edited(json.loads(content), random)).encode("utf-8", "surrogatepass")


def _fact(path, content, how, random):
    key, new = next(FACTS[pattern] for pattern in FACTS if fnmatch(f"x/{path.name}", pattern))[int(how)]
    value = json.loads(content)
    if key not in value:
        return None
    if new == "DROP":
        del value[key]
    elif new == "OTHER":  # another client's in the place of one of its own
        others = sorted(set(range(2, 2 * len(value[key]) + 9)) - {*value[key]})
        other = json.loads(next(p for p in sorted(path.parent.glob("client_*.json")) if p != path).read_text())
        value[key] = sorted([*value[key][1:], next(i for i in others if i in other[key])])
    else:
        value[key] = new(value[key]) if callable(new) else new
    return json.dumps(value).encode()


def edited(value, random):
    """A JSON value with another one somewhere in it, or without one of its parts."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.9:
        key = list(value)[random.integers(len(value))] if isinstance(value, dict) else int(random.integers(len(value)))
        part = value.pop(key)
        if random.random() < 0.1:
            return value
        if isinstance(value, dict):
            return {**value, "renamed" if random.random() < 0.1 else key: edited(part, random)}
        return [*value[:key], edited(part, random), *value[key:]]
    return ODD[random.integers(len(ODD))]


TENSORS = {
    "renamed": lambda t: t,
    "absent": lambda t: None,
    "empty": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
    "deeper": lambda t: t[..., None],
    "integer": lambda t: t.to(torch.int64),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: _one(t, float("nan")),
    "inf": lambda t: _one(t, float("-inf")),
    "half": lambda t: t.half(),
    "bit": None,
    "header": None,
}


def _one(t, value):
    t = t.float().clone()
    t.view(-1)[-1:] = value
    return t


def _tensor(path, content, how, random):
    length = int.from_bytes(content[:8], "little")
    if how == "bit":
        at = random.integers(8 + length, len(content)) // 4 * 4  # low bits of numbers of four bytes, as good as before
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    about = json.loads(content[8 : 8 + length])
    if how == "header":
        header = json.dumps(edited(about, random)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    tensors = load(content)
    used = [name for name in tensors if not name.startswith("cls.")]  # not what BERT guessed masked words with
    name = used[random.integers(len(used))]
    if not tensors[name].ndim:
        return None
    changed = TENSORS[how](tensors.pop(name))
    if changed is not None:
        tensors[name + "x" if how == "renamed" else name] = changed.contiguous()
    return save(tensors, metadata=about.get("__metadata__"))


ARRAYS = {
    "absent": lambda a: None,
    "fewer": lambda a: a[:-1],
    "float": lambda a: a.astype(np.float32),
    "object": lambda a: a.astype(object),
    "flat": lambda a: a.reshape(1, -1),
    "labels": lambda a: a + np.array(100, a.dtype) if a.ndim == 1 else a.transpose(0, 2, 3, 1),
    "huge": None,
}


def _array(path, content, how, random):
    with np.load(io.BytesIO(content)) as stored:
        arrays = dict(stored)
    name, target = list(arrays)[random.integers(len(arrays))], io.BytesIO()
    if how == "huge":
        member = io.BytesIO()
        np.save(member, arrays.pop(name))
        np.savez(target, **arrays)
        with zipfile.ZipFile(target, "a") as archive:  # a header that asks for 10 TB
            archive.writestr(f"{name}.npy", member.getvalue().replace(b"00,", b"0" * 12 + b",", 1))
        return target.getvalue()
    changed = ARRAYS[how](arrays.pop(name))
    np.savez(target, **arrays, **({} if changed is None else {name: changed}))
    return target.getvalue()


ROWS = {
    "columns": lambda fields: fields[:1],
    "label": lambda fields: ["7" if len(field.strip('"')) == 1 else field for field in fields],
    "word": lambda fields: ["x" if len(field.strip('"')) == 1 else field for field in fields],
    "utf": None,
}


def _row(path, content, how, random):
    lines, comma = content.split(b"\n"), "," if path.suffix == ".csv" else "\t"
    some = range(5, 15) if how == "columns" else [random.integers(1, len(lines) - 1)]  # a few short rows are left out
    for i in some:
        if how == "utf":
            lines[i] = b"\xff" + lines[i]
        else:
            lines[i] = comma.join(ROWS[how](lines[i].decode().split(comma))).encode()
    return b"\n".join(lines)


LINES = {
    "absent": lambda lines, i: lines[:i] + lines[i + 1 :],
    "twice": lambda lines, i: lines[: i + 1] + lines[i:],
    "turned": lambda lines, i: lines[::-1],
    "zeros": lambda lines, i: [*lines[:i], b"\0" * 40, *lines[i + 1 :]],
    "list": lambda lines, i: [*lines[:i], b"[1]", *lines[i + 1 :]],
    "cut": lambda lines, i: [*lines[:i], lines[i][: len(lines[i]) // 2], *lines[i + 1 :]],
    "empty": lambda lines, i: [*lines[:i], b"{}", *lines[i + 1 :]],
    "edit": None,
}


def _line(path, content, how, random):
    lines = content.splitlines()
    i = random.integers(len(lines))
    if how == "edit":
        lines[i] = json.dumps(edited(json.loads(lines[i]), random)).encode("utf-8", "surrogatepass")
    else:
        lines = LINES[how](lines, i)
    return b"\n".join(lines) + b"\n"


def files(good, names):
    """The files that an entry of `READS` names, relative to the good input."""
    found = {path for name in names.split() for path in good.glob(name) if path.is_file()}
    return sorted(str(path.relative_to(good)) for path in found)
