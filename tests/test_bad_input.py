"""Generated bad input: any value of any flag, and damage to every file that a script reads.

    python tests/test_bad_input.py --cases 1000        # the long form: prints counts, and each case that is not well

Each case is a script's command line at tiny size in a forked process, up to the point where its run would begin. It is
well if the input is taken (ACCEPTED: a generated value may be a good one), or refused: exit code 2, one line on stderr,
no traceback, nothing written. A case may take SECONDS and, beside what this process has, MEMORY.
"""

import argparse
import gc
import io
import json
import os
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from encoders import save_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

ACCEPTED, SECONDS, MEMORY = 77, 20, 4 * 2**30
LAYERS = [f"roberta.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
PLACES = {  # in the flags of tests/harness.py -> of this module's input
    "{lora_glue_fl/sharding}": "{in}/shards",
    "{lora_glue_fl/central_lora}/adapter": "{in}/adapters/1",
    **{f"{{lora_glue_fl/svd}}/round_1/client_{k}/adapter": f"{{in}}/adapters/{k}" for k in (1, 2, 3)},
}
FLAGS = {golden.script: golden.flags for golden in reversed(harness.GOLDEN.values())} | {
    "llm_noniid/run_experiments.py": "--output-dir {out} --plan",
    "llm_noniid/failure_map.py": "--output-dir {out} --plan",
    "lora_glue_fl/run_study.py": "--output-dir {out} --plan",
    "mamba_fl/run_study.py": "--output-dir {out} --plan",
    "vit_sparse_fl/run_all_experiments.py": "--output-dir {out} --plan",
}
READS = [  # (script, flags, what is read)
    ("mamba_fl/fed_avg.py", "--tokenizer {in}/gpt2", "gpt2/tokenizer*"),
    ("mamba_fl/central.py", "--dataset wikitext2 --data-root {in}", "wikitext-2/*"),
    ("vit_sparse_fl/train_federated.py", "--init-from {in}/vit", "vit/*"),
    ("vit_sparse_fl/train_centralized.py", "--model {in}/vit", "vit/*"),
    ("vit_sparse_fl/train_federated.py", "--weights {in}/dino.pth", "dino.pth"),
    ("vit_sparse_fl/train_federated.py", "--weights {in}/dino.safetensors", "dino.safetensors"),
    ("vit_sparse_fl/train_federated.py", "--dataset cifar100 --data-root {in}", "cifar100.npz"),
    ("vit_sparse_fl/train_federated.py", "--config {in}/vit.yaml", "vit.yaml"),
    ("vit_sparse_fl/train_federated_sparse.py", "--mask {in}/mask.safetensors", "mask.safetensors"),
    ("lora_glue_fl/fedavg_rounds.py", "", "shards/*"),
    ("lora_glue_fl/fedavg_rounds.py", "--init-adapter {in}/adapters/1", "adapters/1/*"),
    ("lora_glue_fl/fedavg_rounds.py", "--model {in}/bert --tokenizer {in}/bert", "bert/*"),
    ("lora_glue_fl/baseline_run.py", "--model {in}/bert", "bert/*"),
    ("lora_glue_fl/main_glue_lora.py", "--dataset glue --data-root {in} --tokenizer demo", "glue/SST-2/*"),
    ("lora_glue_fl/adapters_eval.py", "", "adapters/1/*"),
    ("lora_glue_fl/fedavg_merge.py", "", "adapters/*/*"),
    ("lora_glue_fl/fedavg_merge.py", "", "shards/client*"),
    ("llm_noniid/train.py", "--model {in}/gpt2 --tokenizer {in}/gpt2", "gpt2/*"),
    ("llm_noniid/train.py", "--dataset ag_news --data-root {in}", "ag_news/*"),
    ("llm_noniid/train.py", "--config {in}/llm.yaml", "llm.yaml"),
    ("llm_noniid/pretrain.py", "--tokenizer {in}/gpt2", "gpt2/tokenizer*"),
]


# ---------------------------------------------------------------------------------------------- the good input


def make_input(folder):
    """Small files of every kind that the scripts read."""
    from common.adapter_files import write_adapter
    from lora_glue_fl.shards import make_client_splits, save_shard_manifests
    from vit_sparse_fl.mask_files import save_mask
    from vit_sparse_fl.masks import maskable
    from vit_sparse_fl.vit import dino_name, make_model, save_pretrained

    save_shard_manifests(folder / "shards", make_client_splits("sst2", 3, max_examples=150, dataset="demo"))
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
    np.savez(folder / "cifar100.npz", train_images=np.zeros((9, 3, 32, 32), np.uint8))
    (folder / "vit.yaml").write_text("federated:\n  num_rounds: 3\nsharding:\n  strategy: iid\n")
    (folder / "llm.yaml").write_text("federated:\n  learning_rate: 0.01\ndata:\n  alpha: 0.5\n")
    for name, lines in {
        **{f"glue/SST-2/{n}.tsv": ["sentence\tlabel", *(f"a film {i}\t{i % 2}" for i in range(120))] for n in GLUE},
        **{f"ag_news/{n}.csv": [f'"{i % 4 + 1}","Title {i}","Text {i}."' for i in range(200)] for n in AG_NEWS},
        **{f"wikitext-2/wiki.{n}.raw": [line for i in range(9) for line in article(i)] for n in WIKITEXT},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n")


GLUE, AG_NEWS, WIKITEXT = ("train", "dev"), ("train", "test"), ("train", "valid", "test")


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


# ---------------------------------------------------------------------------------------------- what is generated

NUMBERS = "-1 0 1 0.5 1e30 1e400 nan -inf 99999999 999999999999999999999999999999 1e-400 0x10 1_000 \u0663".split()
WORDS = ["", " ", ".", "a/b", "x" * 300, "x" * 5000, "\xfc", "\udcff", "two\nlines", "--", "-", "{}", "*", "none"]
WORDS += ["tiny", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "demo", "auto", "cuda:9", "bpe:-1"]
ODD = [None, True, "x", "", "9" * 20, -1, 0, 0.5, 10**8, 10**18, -(10**30), float("nan"), [], {}, [[]], {"a": 1}]
BYTES = [b"", b"\0" * 100, b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\n"]
BYTES += [b"a: &a [*a]", b"a:\n", b"PK\x03\x04", b"\x80\x02N.", b"\x80\x04\x95" + b"\xff" * 8, b"\xff" * 7 + b"\0{}"]
LETTERS = st.characters(exclude_characters="/~\0", codec="utf-8")


@st.composite
def flag_cases(draw, parsers):
    """(script, words): one to three flags, each with values that its help does not ask for."""
    script = draw(st.sampled_from(sorted(parsers)))
    words = []
    for action in draw(st.lists(st.sampled_from(parsers[script]), min_size=1, max_size=3)):
        known = [str(choice) for choice in action.choices or ()]
        value = st.sampled_from([*NUMBERS, *WORDS, *known]) | st.text(LETTERS, max_size=8) | st.integers().map(str)
        most = {None: 1, 0: draw(st.sampled_from([0, 0, 0, 1]))}.get(action.nargs, 3)
        values = draw(st.lists(value, min_size=min(1, most), max_size=most))
        words += [draw(st.sampled_from(action.option_strings)), *values]
    return script, "", words, None


@st.composite
def file_cases(draw, files):
    """(script, flags, [], (file, damage, seed)): one file that it reads, damaged."""
    script, flags, names = draw(st.sampled_from(files))
    kinds = ["bytes", "cut", "flip", "folder", "gone", "loop"] + ["edit"] * 6
    return script, flags, [], (draw(st.sampled_from(names)), draw(st.sampled_from(kinds)), draw(st.integers(0, 10**9)))


def damage(path, kind, seed):
    """Damages the file at `path`, which others may share: a new one takes its place."""
    random, content = np.random.default_rng(seed), path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "bytes":
        path.write_bytes(BYTES[random.integers(len(BYTES))])
    elif kind == "cut":
        path.write_bytes(content[: random.integers(len(content) + 1)])
    elif kind == "flip" or kind == "edit" and path.suffix not in (".json", ".safetensors", ".npz"):
        changed = bytearray(content)
        for at in random.integers(min(len(content), random.choice([200, 10**9])), size=random.choice([1, 1, 20])):
            changed[at] = random.integers(256)
        path.write_bytes(changed)
    elif kind == "edit" and path.suffix == ".json":
        path.write_text(json.dumps(edited(json.loads(content), random)), "utf-8")
    elif kind == "edit" and path.suffix == ".npz":
        kind, shape = random.choice(["|u1", "<i8", "|O", "<U9"]), (int(random.choice([0, 5, 10**13])), 3)
        with open(path, "wb") as file:
            np.savez(file, train_images=np.zeros((1, 3), kind) if shape[0] < 9 else np.zeros(9, np.uint8))
        path.write_bytes(path.read_bytes().replace(b"(9,), ", b"(9" + b"0" * 12 + b",), ", 1))
    elif kind == "edit":
        path.write_bytes(edited_tensors(content, random))


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


def edited_tensors(content, random):
    """A safetensors file with a tensor renamed, gone, of another shape or type, or with another header."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        Path(file.name).write_bytes(content)
        tensors = load_file(file.name)
        length = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + length])
        how = random.integers(6)
        if how == 5:
            header = json.dumps(edited(about, random)).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + length :]
        name = list(tensors)[random.integers(len(tensors))]
        tensor = tensors.pop(name)
        if how == 0:
            tensors[name + "x" if random.random() < 0.5 else "ü"] = tensor
        elif how == 1:
            shapes = [(0,), (1,), (*tensor.shape, 1), tensor.shape[::-1], (2,) * tensor.ndim, ()]
            tensors[name] = torch.zeros(shapes[random.integers(len(shapes))], dtype=tensor.dtype)
        elif how == 2:
            kinds = [torch.int64, torch.bool, torch.complex64, torch.float16, torch.float8_e4m3fn, torch.float64]
            tensors[name] = tensor.to(kinds[random.integers(len(kinds))])
        elif how == 3:
            tensors[name] = torch.full(tensor.shape, float("nan")) if tensor.is_floating_point() else tensor[:0]
        save_file(tensors, file.name, metadata=about.get("__metadata__"))
        return Path(file.name).read_bytes()


# ---------------------------------------------------------------------------------------------- a case


def attempt(case, good, place):
    """How a case ends: (verdict, command line, stderr). place: an empty folder."""
    script, flags, words, harm = case
    text = f"{FLAGS[script]} {flags} {harness.EXTRA if '--processes' in PARSED[script] else ''}"
    for name, there in {**PLACES, "{in}": str(place / "in"), "{out}": str(place / "out")}.items():
        text = text.replace(name, there)
    line = [script, *shlex.split(text), *words]
    if said := parse_error(line):
        return "refused" if said.count("\n") == 1 else "lines", shlex.join(line), said
    shutil.copytree(good, place / "in", copy_function=os.link)
    if harm:
        damage(place / "in" / harm[0], *harm[1:])
    before = snapshot(place)
    code, out, err = forked(line, place)
    said = err.strip().splitlines()
    if code is None:
        verdict = "hang"
    elif "Traceback" in err or code not in (0, 2, ACCEPTED):
        verdict = "traceback"
    elif code != 2:
        verdict = "accepted"
    elif snapshot(place) != before and "--cache-dir" not in line:
        verdict = "left"
    else:
        verdict = "refused" if len(said) == 1 and not out else "lines"
    return verdict, f"{shlex.join(line)}  {harm or ''}".replace(str(place), "."), err


def parse_error(line):
    """What the script's parser says to flags that it does not take, None where it takes them."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            PARSERS[line[0]]().parse_args(line[1:])
        except SystemExit as stop:
            return said.getvalue() if stop.code == 2 else None


def snapshot(place):
    return {
        str(path.relative_to(place)): (path.lstat().st_size, path.lstat().st_mtime_ns, path.is_dir())
        for path in place.rglob("*")
    }


def forked(line, place):
    """(exit code, None: it took too long; stdout; stderr) of a script in a forked process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            try:
                gc.disable()
                run_script(line, place, out, err)
            finally:
                os._exit(99)
        end, code = time.monotonic() + SECONDS, None
        while code is None and time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.002)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return code, *(os.pread(file.fileno(), 2**20, 0).decode(errors="replace") for file in (out, err))


def run_script(line, place, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.chdir(place)
    # Large memory is refused as on a machine that has little; this process has address space that it does not use
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("default")
    sys.argv = [str(harness.ROOT / line[0]), *line[1:]]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def begins(*args, **options):
    """What stands in the place of a run's begin: the input was taken."""
    os._exit(ACCEPTED)


def alone(main, args, *_, **__):
    """`run_federated` in this process."""
    from common.cli import run_main

    run_main(main, args)


@contextmanager
def up_to_the_run():
    """Scripts in this block's forks end where they would begin to train, evaluate or start others."""
    from common import grid, local, processes, runlog
    from lora_glue_fl.task_model import TaskModel
    from vit_sparse_fl.demo_images import demo_images

    demo_images()  # made once, for all forks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.Run, "begin", begins)
        patch.setattr(TaskModel, "evaluate", begins)
        patch.setattr(local, "local_steps", begins)
        for name in ("start", "call"):
            patch.setattr(grid, name, begins)
        patch.setattr(processes, "run_federated", alone)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.delenv("WORLD_SIZE", raising=False)
        yield


PARSERS, PARSED = {}, {}  # {script: its build_parser}, {script: {flag: action}}, filled by `parsers`


def parsers():
    """{script: its flags but --help}."""
    import importlib

    found = {}
    for script in FLAGS:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        PARSERS[script] = module.build_parser
        actions = [a for a in module.build_parser()._actions if a.dest != "help" and a.option_strings]
        PARSED[script] = {name: a for a in actions for name in a.option_strings}
        found[script] = actions
    return found


def check(cases, good, folder, report=None):
    """Runs generated cases. Returns ({verdict: how many}, those not well: [(verdict, command line, stderr)]).

    Args: good: what `make_input` filled; folder: an empty one; report: function of a case that is not well.
    """
    counts, bad = Counter(), []
    files = [
        (script, flags, [str(path.relative_to(good)) for path in sorted(good.glob(names)) if path.is_file()])
        for script, flags, names in READS
    ]

    @settings(max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(st.one_of(flag_cases(parsers()), file_cases(files)))
    def each(case):
        place = folder / "case"
        place.mkdir()
        verdict, *about = attempt(case, good, place)
        shutil.rmtree(place)
        counts[verdict] += 1
        if verdict not in ("accepted", "refused"):
            bad.append((verdict, *about))
            if report:
                report(*bad[-1])

    with up_to_the_run():
        gc.collect()
        gc.freeze()  # a fork then shares what it does not write
        each()
        gc.unfreeze()
    return counts, bad


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(tmp_path):
    good, cases = tmp_path / "in", tmp_path / "cases"
    good.mkdir()
    cases.mkdir()
    make_input(good)
    counts, bad = check(200, good, cases)
    assert not bad, "\n\n".join(map("\n".join, bad))
    assert counts["refused"] > 100 and counts["accepted"] > 5


def main():
    parser = argparse.ArgumentParser(description="Generated bad input: prints how many cases ended how.")
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with harness.scratch(), tempfile.TemporaryDirectory() as folder:
        good, cases = Path(folder, "in"), Path(folder, "cases")
        good.mkdir()
        cases.mkdir()
        make_input(good)
        started = time.monotonic()
        counts, bad = check(args.cases, good, cases, lambda *about: print(*about, sep="\n", end="\n\n", flush=True))
        names = {"traceback": "tracebacks", "hang": "hangs", "left": "files left", "lines": "not one line"}
        print(f"cases {counts.total()}, refused {counts['refused']}, accepted {counts['accepted']}", end="")
        print("".join(f", {name} {counts[key]}" for key, name in names.items()), end="")
        print(f"; {time.monotonic() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
