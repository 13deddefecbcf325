"""For all tests: a cache folder of their own, one thread a process, no network."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["FEDQUARTET_TEST_RUNS"] = str(shared / "runs")  # tests/harness.py: made once for all workers
    os.environ["FEDQUARTET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("WORLD_SIZE", "1")  # a federated script in a test is one process but where the test says so
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No data and no cache but the test's own: tmp_path's data/ and cache/."""
    monkeypatch.setenv("FEDQUARTET_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FEDQUARTET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one_thread():
    """torch on one thread, whatever ran before; seed 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
