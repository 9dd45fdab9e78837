"""An instrument of its own: which operations of a run make infinities and NaN, whether or not they do harm.

It knows nothing of `whynan` and shares no code with it. Every operation that reaches the dispatcher is looked at before
and after: forward, backward (on the CPU this runs on the caller's thread), optimizer and metrics alike.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their outputs hold whatever the memory held.
UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}
# torch.tensor(float("inf")) fills memory out of the dispatcher's sight and passes it through these: a birth by itself.
CONSTANTS = {"lift_fresh", "lift_fresh_copy"}


def badness(leaves):
    """The set of "nan" and "inf" that the tensors among `leaves` hold."""
    found = set()
    for tensor in leaves:
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.is_nested or tensor.layout is not torch.strided:  # as plain memory
            tensor = tensor.values() if tensor.is_nested else tensor.to_dense()
        if not tensor.is_meta:
            found |= {"nan"} if tensor.isnan().any() else set()
            found |= {"inf"} if tensor.isinf().any() else set()
    return found


class Births(TorchDispatchMode):
    """Notes each operation whose output is bad while none of its tensor inputs is."""

    def __init__(self, nan_of_inf):
        super().__init__()
        self.nan_of_inf, self.found = nan_of_inf, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        inputs = set() if name in CONSTANTS else badness(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        if name in UNINITIALISED:
            return result
        written = [  # in-place, out= and _foreach_ forms need not return what they wrote
            kwargs.get(argument.name, args[place] if place < len(args) else None)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write]
        outputs = badness(tree_leaves((result, written)))
        node = torch._C._current_autograd_node()
        node = node.name() if node is not None else None
        if not inputs:
            self.found += [(name, node, kind) for kind in ("nan", "inf") if kind in outputs]
        elif self.nan_of_inf and "nan" in outputs - inputs:
            self.found.append((name, node, "nan"))
        return result


def births(run, nan_of_inf=False):
    """Runs `run()`; returns (operation, autograd node's name or None, "nan" or "inf") of each birth, in time's order.

    A birth has no bad tensor among its inputs; with `nan_of_inf` also one that makes NaN of infinities.
    """
    with Births(nan_of_inf) as mode:
        run()
    return mode.found
