"""`pytest -m quick`: the tests of the two modules and of the project's files but for the slow ones, under a minute.

`--precision float32` or `--precision bfloat16` makes that the one which "auto" finds, whatever the processor is.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: their threads, and their kernels', would only collide
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes in

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--precision", choices=["float32", "bfloat16"], help="what precision 'auto' finds in this process")


@pytest.fixture(autouse=True)
def forced_precision(request, monkeypatch):
    if precision := request.config.getoption("--precision"):
        features = {"cpu_name": "AMD", "avx512_bf16": precision == "bfloat16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in ("test_helpers.py", "test_project.py") and not item.get_closest_marker("slow"):
            item.add_marker("quick")
