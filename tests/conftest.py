"""`pytest -m quick`: the tests of the two modules and of the project's files but for the slow ones, under a minute.

`--precision float32` or `--precision bfloat16` makes that the one which "auto" finds, whatever the processor is.
`--device cuda` puts tensors and networks there that a test makes without saying where.
"""

import contextlib
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: their threads, and their kernels', would only collide
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes in

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import whynan


def pytest_addoption(parser):
    parser.addoption("--precision", choices=["float32", "bfloat16"], help="what precision 'auto' finds in this process")
    parser.addoption("--device", help="where tests make tensors that are told no place, as cuda")


@pytest.fixture(autouse=True)
def forced_precision(request, monkeypatch):
    if precision := request.config.getoption("--precision"):
        features = {"cpu_name": "AMD", "avx512_bf16": precision == "bfloat16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)


# Data that NumPy made, or writes; torch.multinomial of NaN, after which a GPU can do nothing more; a backward that sums
# in no fixed order there, so that no two runs are the same; an overflow that its matrix units put elsewhere; and
# thousands of small steps, for which one took two minutes.
ONLY_ON_THE_CPU = ("nan_in_a_row", "inf_in_a_label", "is_filled_again", "own_guard", "mask_in_the_module",
                   "loss_scale", "masked_mean_late")


class DrawnOnTheCpu(TorchFunctionMode):
    """New tensors go to a device, with the CPU's random numbers: a case then dies there as it dies everywhere."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None:
            if "empty" in func.__name__:  # to copy what it holds would be an operation, perhaps on NaN
                return func(*args, **kwargs | {"device": self.device})
            wants_gradient = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs).to(self.device)
            return made.requires_grad_() if wants_gradient else made
        if func.__name__ in ("normal_", "uniform_", "random_", "bernoulli_") or (
                getattr(func, "__module__", "") == "torch.nn.init"):
            tensor, *args = args if args else (kwargs.pop("tensor"),)
            with torch.no_grad():
                return tensor.copy_(func(tensor.detach().cpu(), *args, **kwargs))
        if func.__name__ in ("randn_like", "rand_like"):
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def on_device(request, monkeypatch):
    if device := request.config.getoption("--device"):
        monkeypatch.setattr(whynan, "_OWN", (*whynan._OWN, __file__))  # this file is no user's
    with DrawnOnTheCpu(device) if device else contextlib.nullcontext():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    for item in items:
        if device and any(name in item.name for name in ONLY_ON_THE_CPU):
            item.add_marker(pytest.mark.skip(reason="tells of the CPU"))
        if item.path.name in ("test_helpers.py", "test_project.py") and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    # The longest first, or at the end one process would wait for the other for minutes.
    items.sort(key=lambda item: item.path.name not in ("test_notebooks.py", "08_speedrun.ipynb"))
