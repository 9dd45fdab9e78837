"""Training runs that die of NaN as their owners wrote them, each with its truth and its cure, and healthy ones.

A case is a function `run(cured)` that trains on the CPU for a second or two and returns the losses of its steps. With
cured=False a loss becomes inf or NaN (or the run would, one step later); cured=True changes the one thing that cures.
Its truth was worked out by hand and by instruments other than `whynan`; `tests/test_whynan.py` holds them together.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple


class Death(NamedTuple):
    run: Callable | None  # None: it stands in a notebook
    step: int  # the optimizer's step in which the first bad value that did harm was made, from 1
    phase: str  # data, forward, loss, backward or update
    module: str  # full name of the module whose own computation it was; "" outside of all
    operation: str  # as torch names it, without namespace
    line: str  # a part of the owner's line; in the backward phase of that of the forward call
    verdict: str  # one of whynan.VERDICTS
    source: str  # the public report that it follows


DEATHS: dict[str, Death] = {}
HEALTHY: dict[str, Callable] = {}  # name: run(), in which infinities or NaN are made that harm nobody


def death(**truth):
    """Registers the function below as a case that dies."""
    def register(run):
        DEATHS[run.__name__] = Death(run, **truth)
        return run
    return register


def healthy(run):
    """Registers the function below as a run in which nothing is wrong."""
    HEALTHY[run.__name__] = run
    return run


for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
