"""Large tensors reuse freed memory once `reuse_large_memory` was called: counted in page faults, in a fresh process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from common.evaluation import reuse_large_memory
took_effect = reuse_large_memory()
import torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.full((12_000_000,), 1.0)  # 46 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(took_effect, [faults() for _ in range(5)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_further_large_tensor_causes_no_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    took_effect, faults = done.stdout.split()
    if took_effect != "True":
        pytest.skip("this C library has no mallopt")
    assert int(faults) <= 10  # 46 MiB are 23 pages of 2 MiB, and 11,719 of 4 KiB
