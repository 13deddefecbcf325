"""For all tests: a cache folder of their own, one thread a process."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["FEDQUARTET_TEST_RUNS"] = str(shared / "runs")  # tests/harness.py: made once for all workers
    os.environ["FEDQUARTET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["OMP_NUM_THREADS"] = "1"
