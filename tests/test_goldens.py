"""Every script's command line once, at tiny size, against what it gave when it was recorded (goldens/scripts.json).

    python tests/test_goldens.py --record                 # all anew; prints what differs from the recorded
    python tests/test_goldens.py --record mamba_fl vit_sparse_fl/topk

Bits depend on the processor and on torch: digests of tensors, and text drawn from a model, are compared where these
are those of the recording. Numbers are compared everywhere, to 1e-4 of their size: a hundred times what rounding does
to these runs (with kernels for AVX2 instead of AVX-512 one number of 3,000 moves by 2e-6, the others by less than
1e-6), and far below what an error in a formula does. Rounds and keys that were not recorded are ignored. The demo's
text is Python's own documentation: where that is another one, the two studies of texts are skipped.
"""

import hashlib
import json
import math
import platform
import re
import sys
from pathlib import Path

import harness
import pytest

FILE = Path(__file__).parent / "goldens" / "scripts.json"
RTOL, ATOL = 1e-4, 1e-6
COUNTED = 0.01  # shares of images, texts, weights: one at the border may fall on the other side
OF_TEXTS = ("mamba_fl/", "llm_noniid/")


def machine():
    """What decides the bits of a run, and the demo's text."""
    import pydoc_data.topics

    import torch
    import transformers

    vendor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
        vendor = lines[0].split(":")[1].strip() if lines else vendor
    text = json.dumps(pydoc_data.topics.topics, sort_keys=True)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{vendor} {torch.backends.cpu.get_cpu_capability()}",
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def differences(then, now, path="", exact=False, rtol=RTOL):
    """{path: (then, now)} of what was recorded and is not so now. exact: texts too; path: a way to a JSON value."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = {}
        for key, value in then.items():
            found |= differences(value, now.get(key, "(gone)"), f"{path}.{key}" if path else key, exact, rtol)
        return found
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        found = {}
        for i, value in enumerate(then):
            found |= differences(value, now[i], f"{path}[{i}]", exact, rtol)
        return found
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (then, now)]
    if all(numbers):
        atol = (COUNTED if re.search("accuracy|sign_conflict", path) else ATOL) if rtol else 0.0
        return {} if math.isclose(then, now, rel_tol=rtol, abs_tol=atol) else {path: (then, now)}
    of_bits = re.search(r"\.(generated|message|sha256(\[\d+\])?)$|^tensors$", path)
    return {} if then == now or (of_bits and not exact) else {path: (then, now)}


def by_round(record):
    """The record with its metrics as {round: line}."""
    return {**record, "metrics": {f"round {line['round']}": line for line in record["metrics"]}}


def read():
    return json.loads(FILE.read_text()) if FILE.exists() else {"machine": {}, "runs": {}}


@pytest.mark.slow
@pytest.mark.parametrize("name", harness.GOLDEN)
def test_golden(name):
    recorded, here = read(), machine()
    if name.startswith(OF_TEXTS) and recorded["machine"]["text"] != here["text"]:
        pytest.skip("the demo's text is of another Python")
    now = harness.record(name, harness.whole(name))
    exact = recorded["machine"] == here
    assert differences(by_round(recorded["runs"][name]), by_round(now), exact=exact) == {}


def test_differences_are_seen_and_new_keys_are_not():
    then = {"a": 1.0, "b": [1, None], "t.generated": "x", "c": {"n": 3}}
    assert differences(then, {**then, "new": 1, "a": 1.00009}) == {}
    assert differences(then, {**then, "a": 1.0002}) == {"a": (1.0, 1.0002)}
    assert differences(then, {**then, "b": [1, 2]}) == {"b[1]": (None, 2)}
    assert differences(then, {**then, "b": [1]}) == {"b": ([1, None], [1])}
    assert differences(then, {"a": 1.0, "b": [1, None], "t.generated": "x"}) == {"c": ({"n": 3}, "(gone)")}
    other = {**then, "t.generated": "y"}
    assert differences(then, other) == {} and differences(then, other, exact=True) == {"t.generated": ("x", "y")}


# ------------------------------------------------------------------------------------------------- to record


def main(words):
    if words[:1] != ["--record"]:
        raise SystemExit(__doc__)
    recorded, here = read(), machine()
    if words[1:] and recorded["machine"] != here:
        raise SystemExit(f"recorded on {recorded['machine']}, this is {here}: record all of them")
    names = [name for name in harness.GOLDEN if not words[1:] or name.startswith(tuple(words[1:]))]
    with harness.scratch():
        for name in names:
            now = harness.record(name, harness.whole(name))
            show(name, recorded["runs"].get(name), now)
            recorded["runs"][name] = now
    runs = {name: recorded["runs"][name] for name in harness.GOLDEN}
    FILE.write_text(as_text({"machine": here, "runs": runs}))


def show(name, then, now):
    """Prints what has changed: numbers by key with their largest relative change, keys and rounds that are new."""
    if then is None:
        print(f"{name}: new")
        return
    then, now = by_round(then), by_round(now)
    changed = differences(then, now, exact=True, rtol=0.0)
    added = [path for path, value in differences(now, then, exact=True, rtol=0.0).items() if value[1] == "(gone)"]
    print(f"{name}: " + (f"{len(changed)} changed, {len(added)} new" if changed or added else "as recorded"))
    keys = {}
    for path, (a, b) in changed.items():
        keys.setdefault(path.split(".")[-1].split("[")[0], []).append((path, a, b))
    for key, values in keys.items():
        path, a, b = values[0]
        if all(isinstance(v, (int, float)) for _, *both in values for v in both):
            path, a, b = max(values, key=lambda v: abs(v[1] - v[2]) / max(abs(v[1]), 1e-12))
            print(f"  {key}: {len(values)} moved, at most {abs(a - b) / max(abs(a), 1e-12):.1e}: {path} {a} -> {b}")
        else:
            print(
                f"  {key}: {path} {str(a)[:60]!r} -> {str(b)[:60]!r}"
                + f" and {len(values) - 1} more" * (len(values) > 1)
            )
    for path in added:
        print(f"  new: {path}")


def as_text(value):
    """JSON with a line for a part of a run and for a round."""
    parts = []
    for name, run in value["runs"].items():
        lines = [f"  {json.dumps(key)}: {json.dumps(run[key])}" for key in ("tensors", "results", "facts", "files")]
        rounds = ",\n".join("   " + json.dumps(line) for line in run["metrics"])
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + f',\n  "metrics": [\n{rounds}\n  ]\n }}')
    return f'{{"machine": {json.dumps(value["machine"])},\n"runs": {{\n' + ",\n".join(parts) + "\n}}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
