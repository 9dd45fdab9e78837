"""Find where a NaN or an infinity was born, in any PyTorch training loop.

    import whynan

    with whynan.watch(net):          # or watch(): whatever is trained in the block
        train_as_always()            # your loop, your optimizer, your loss, untouched

When the run dies, `NonFiniteError` is raised; its text says in which step, phase, module, operation and line the first
bad value was made, what it was made of, and, where the evidence is sufficient, why, and what to do. This file needs
torch (2.10 or later) and nothing else: copy it into any project. Read it from top to bottom:

    evidence    Line, Evidence            what is known of a line and of a tensor
    reasons     Origin, VERDICTS          where a bad value comes from; what it is, where the evidence is sufficient
    report      NonFiniteError
    memory      _Memory, _Operation       what is known of the memory that tensors lie in, and of operations
    watch       watch                     sees every operation of the block

It works beneath autograd: a `TorchDispatchMode` is called for every operation, those of the backward pass and of the
optimizer too. An operation is a *birth* if its result is not finite although its operands are. What becomes of a bad
value is followed through the memory that it lies in, so that of many infinities the one that did harm is told.
"""

import collections
import contextlib
import functools
import gc
import linecache
import math
import os
import sys
import sysconfig
import textwrap
import threading
import warnings
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as modules
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


# ------------------------------------------------------------------------------------------------- evidence
class Line(NamedTuple):
    """A line of a source file; of a notebook's cell `file` is the name that IPython gives it."""

    file: str
    number: int
    text: str

    def __str__(self):
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        names = getattr(getattr(shell, "compile", None), "format_code_name", lambda name: None)(self.file)
        place = " ".join(names) if names else os.path.basename(self.file)
        return f"{place}, line {self.number}: {self.text or '(the source is not at hand)'}"


class Evidence(NamedTuple):
    """One tensor at a birth. Magnitudes are of its finite values that are not zero; NaN if there are none."""

    name: str  # its role in the operation, as torch's schema has it, and its own name if it is a weight
    shape: tuple
    dtype: torch.dtype
    device: str
    smallest: float
    largest: float
    nan: int  # how many of the values are NaN, and so on
    inf: int
    zero: int
    subnormal: int
    places: list  # indices of the first three that are not finite

    def __str__(self):
        shape, total = "×".join(map(str, self.shape)) or "scalar", math.prod(self.shape)
        span = "" if math.isnan(self.largest) else f"|x| {self.smallest:.3g} to {self.largest:.3g}"
        counts = [(self.nan, "NaN"), (self.inf, "inf"), (self.zero, "zero"), (self.subnormal, "subnormal")]
        counts = [f"{count:,} of {total:,} {kind}" for count, kind in counts if count]
        if self.places and self.shape:  # behind the last bad count
            places = ", ".join(str(place).replace(" ", "") for place in self.places)
            counts[bool(self.nan) + bool(self.inf) - 1] += f", the first at {places}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name:<22s} {shape} {dtype} {self.device}  {span:<26s} {'; '.join(counts)}".rstrip()


def _first_places(bad):
    """The first three places where `bad` is true; nonzero would make a list of all of them, eight times the tensor."""
    left, places = bad.flatten().byte(), []
    while len(places) < 3 and left.any():
        left[first := int(left.argmax())] = 0  # the first of equals
        places.append(tuple(int(index) for index in torch.unravel_index(torch.tensor(first), bad.shape)))
    return places


def _weigh(name, tensor):
    """The `Evidence` of a tensor."""
    values = tensor.detach()
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    values = values.float() if values.element_size() == 1 else values
    sizes, finite = values.abs(), values.isfinite()
    tiny = torch.finfo(tensor.dtype).tiny if tensor.is_floating_point() else 0
    some = finite & (sizes > 0)  # a mask, and no selection by it: that takes eight times the tensor's memory
    smallest, largest = math.nan, math.nan
    if some.any():
        smallest, largest = sizes.where(some, math.inf).min().item(), sizes.where(some, 0).max().item()
    return Evidence(name, tuple(tensor.shape), tensor.dtype, str(tensor.device), smallest, largest,
                    int(values.isnan().sum()), int(values.isinf().sum()), int((values == 0).sum()),
                    int((some & (sizes < tiny)).sum()), _first_places(~finite))


def _largest(tensor):
    """The largest magnitude of a tensor in one pass over it: inf if one is infinite, NaN if one is NaN."""
    if tensor.numel() == 1:
        return abs(tensor.item())
    if not tensor.numel():
        return 0.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch knows no largest of an 8-bit float
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.as_strided((tensor.numel(),), (1,))  # in the order of memory: aminmax is ten times as fast
    low, high = tensor.aminmax()
    low, high = low.item(), high.item()
    return max(abs(low), abs(high)) if low == low else low


_OWN = os.path.dirname(torch.__file__), __file__, "<frozen", *(sysconfig.get_path(p) for p in ("stdlib", "platstdlib"))


@functools.cache
def _whose(code):
    """Whose a code object is: of a "user", of another "library", or "torch", which is Python's own too."""
    if "site-packages" in code.co_filename or "dist-packages" in code.co_filename:
        return "torch" if code.co_filename.startswith(_OWN[0] + os.sep) else "library"
    return "torch" if code.co_filename.startswith(_OWN) else "user"


def _caller(beyond_function=False):
    """(code, line number) of the innermost user's frame, and of the innermost one of another library, or None.

    beyond_function: of the frames outside of the `forward` of an autograd.Function, if one is under way.
    """
    frame, library, user = sys._getframe(1), None, None
    while frame and (beyond_function or not user):
        code, whose = frame.f_code, _whose(frame.f_code)
        if beyond_function and code.co_name == "forward" and not isinstance(
                frame.f_locals.get(code.co_varnames[0]), torch.nn.Module):
            user, library, beyond_function = None, None, False
        elif whose == "user":
            user = user or (code, frame.f_lineno)
        elif whose == "library":
            library = library or (code, frame.f_lineno)
        frame = frame.f_back
    return user or library, library


def _called_from(file):
    """Whether a function of a file with this name is under way."""
    frame = sys._getframe(1)
    while frame and os.path.basename(frame.f_code.co_filename) != file:
        frame = frame.f_back
    return frame is not None


def _has_ranks():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _line(place):
    """The `Line` of (code, line number)."""
    code, number = place
    return Line(code.co_filename, number, linecache.getline(code.co_filename, number).strip())


# -------------------------------------------------------------------------------------------------- reasons
class Origin(NamedTuple):
    """Where a bad value comes from."""

    how: str  # "operation" made it, a GradScaler "scaled" it, it "entered" from outside, or a "constant" or "mask" did
    value: str  # "NaN" or "inf"
    number: int  # origins are numbered as they are met
    step: int
    phase: str
    module: str
    kind: str  # the module's class; "" outside of all
    caller: tuple  # (code, line number) of the user's line, and of the innermost one of another library or None
    node: str  # autograd's node, in the backward phase
    operation: str = ""
    operands: tuple = ()  # of Evidence
    result: Evidence | None = None
    reason: tuple = ("unknown", "the evidence is not sufficient for a verdict")  # (verdict, its evidence)
    source: "Origin | None" = None  # of a NaN that was made of an infinity: where that came from

    @property
    def birth(self):
        return self.source or self

    def __str__(self):
        module = f"{self.module or 'the network itself'} ({self.kind})" if self.kind else "outside of all modules"
        return f"step {self.step}, {self.phase} phase, {module}"


VERDICTS = {
    "bad data": "Mend the row where the data is made; isfinite().all() checks a batch",
    "bad weight": "Load another checkpoint, or initialise this weight anew",
    "division by zero": "Make sure that the divisor cannot be 0: a clamp, or skip the case",
    "log of zero": "Use what takes logits (log_softmax, logsigmoid, …_with_logits), or clamp from below",
    "log of a negative": "Make the argument positive where it is made, by softplus or exp; a clamp hides it, and has "
                         "no gradient below",
    "root of a negative": "Clamp the argument at a small positive number",
    "infinite slope": "Keep the argument off that point: sqrt(x + 1e-12), clamp(1e-12, …)",
    "outside the domain": "Clamp the argument to the inside of the domain",
    "exp overflow": "First ask what made the exponent so large: input scale, one bad row, learning rate. Then bound "
                    "it, or subtract the largest first (logsumexp, softmax)",
    "empty softmax row": "Leave one entry of each row unmasked, or drop such rows",
    "mean of nothing": "Skip the empty case, or divide the sum by the count clamped at 1",
    "spread of one": "Drop the last batch of one, or use correction=0",
    "where trap": "Make the unselected input harmless before the function: f(torch.where(ok, x, 1))",
    "steps too long": "Divide the learning rate by 10 until the run lives, or clip the gradient's norm; if it only "
                      "dies later, the loss may have no lower bound",
    "wrong scale": "Standardise the inputs; initialise by fan-in, as Kaiming's does",
    "float16 range": "Use bfloat16 or float32 here; for gradients, a GradScaler",
    "vanished eps": "Use an eps above 6e-8, the least float16, or compute this in float32",
    "Adam's denominator": "Keep weights and Adam's state in float32, or give a larger eps (float16: 1e-4)",
    "infinite norm clipped": "Find what makes the gradient infinite: clipping can't mend it",
    "constant normalised": "Drop the constant feature or row, or add an eps to its variance",
    "exploding gradient": "Shrink the repeated weights, normalise between layers, or cut the sequence",
    "no alignment": "Give more time steps than labels and repeats, or zero_infinity=True",
    "mask overflow": "Use -1e4 in its place, or masked_fill with -inf that leaves one entry of each row",
    "zero times infinity": "Select with masked_fill or where; don't multiply by infinity",
    "unknown": "Look at the operands",
}
_DENOMINATORS = {"div": "other", "reciprocal": "self", "rsqrt": "self", "addcdiv": "tensor2", "pow": "self"}
_LOGS = ("log", "log2", "log10", "log1p", "xlogy")
_DOMAINS = ("acos", "asin", "acosh", "atanh", "logit", "erfinv", "lgamma", "digamma", "tan")
_EXPS = ("exp", "exp2", "expm1", "sinh", "cosh")
_SPREADS = ("std", "var", "std_mean", "var_mean")
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax", "_scaled_dot_product")
_SUMS = ("mm", "mv", "conv", "dot", "norm", "sum", "mean", "var", "std", "lstm", "gru", "rnn", "softmax", "_scaled")
_SLOPES = ("Sqrt", "Rsqrt", "Log", "Pow", "Acos", "Asin", "Acosh", "Atanh", "Xlogy", "Erfinv", "Norm", "Linalg",
           "Cdist")
_SELECTS = "Where", "MaskedFill", "NanToNum"


class _Growth(NamedTuple):
    text: str
    absurd: bool  # a thousandfold, to more than a thousand


def _plain(name):
    """An operation's name without what says that it works in place or on lists."""
    return name.removeprefix("_foreach_").removesuffix("_")


def _reason(birth, given, operands, result, notes, growth):
    """(verdict, its evidence) of a birth.

    given      the operation's arguments by name
    operands   [(role, tensor)]
    notes      notes(tensor) is what is remembered of it
    growth     how a weight has grown, or None
    """
    name, tensors = _plain(birth.operation), {role.partition("[")[0]: tensor for role, tensor in operands}
    has_nan, half = bool(result.isnan().any()), result.dtype is torch.float16
    largest = sorted((_largest(tensor) for _, tensor in operands if tensor.isfinite().all()), reverse=True)
    if growth and growth.absurd and birth.phase != "update":  # whatever it is then that gives way first
        return "steps too long", growth.text
    below = tensors.get(_DENOMINATORS.get(name), given.get(_DENOMINATORS.get(name)))
    below = torch.tensor(float(below)) if isinstance(below, (int, float)) else below
    exponent = torch.as_tensor(given.get("exponent", 1) if name == "pow" else 1)
    if below is not None and ((below == 0) & (exponent < 0 if name == "pow" else True)).any():
        zeros = f"{int((below == 0).sum()):,} of {below.numel():,}"
        note = next(iter(notes(below)), "")
        if birth.phase == "update" and name == "addcdiv":
            eps = ", as float16 has no eps below 6e-8" * half
            return "Adam's denominator", f"{zeros} denominators of the optimizer (Adam's, RMSprop's) are 0{eps}"
        function = birth.node.partition("Backward")[0]
        if function in ("Log", "Log2", "Log10", "Log1p", "Xlogy", "Rsqrt"):
            verdict = "division by zero" if function == "Rsqrt" else "log of zero"
            return verdict, f"{function} and its slope are infinite at {zeros} places; to clamp it comes too late"
        if birth.node.startswith(_SLOPES):
            return "infinite slope", f"the value of {function} is finite, its slope is infinite at {zeros} places"
        if note.endswith("norm") and birth.phase == "backward":  # torch mends the first derivative alone
            return "infinite slope", (f"{zeros} norms are 0, and there the second derivative of a norm (a gradient "
                                      "penalty, a PINN) is NaN in today's torch too; take its square, or keep 0 out")
        if note.startswith("eps"):
            return "vanished eps", f"{zeros} denominators are 0: {note} is 0 in float16"
        if note in _SPREADS:
            return "constant normalised", f"{zeros} deviations are 0"
        return "division by zero", f"{zeros} denominators" + f" (a {note})" * bool(note) + " are 0"
    if name in _LOGS:
        what = "1 + the argument" if name == "log1p" else "the argument"
        return ("log of a negative", f"{what} is negative") if has_nan else ("log of zero", f"{what} is 0")
    if name in ("sqrt", "rsqrt", "pow") and has_nan:
        return "root of a negative", "the argument is negative"
    if name in _DOMAINS:
        return "outside the domain", f"the argument of {name} is at the end of its domain or beyond"
    if name in _EXPS and not has_nan:
        limit = math.log(torch.finfo(result.dtype).max)
        return "exp overflow", f"exp of more than {limit:.1f} is infinite in {str(result.dtype)[6:]}"
    if (name in _SOFTMAX[:3] and (tensors["self"] == -math.inf).all(given["dim"]).any()) or (name.startswith(
            _SOFTMAX[3]) and any((t == -math.inf).all(-1).any() for role, t in operands if role.startswith("attn"))):
        return "empty softmax row", "all entries of a row are -inf"
    if has_nan and (name.startswith("nll_loss") or any(not tensor.numel() for _, tensor in operands)):
        return "mean of nothing", "no element is left to take the mean of, or their weights sum to 0: 0 / 0"
    if name in _SPREADS and has_nan:
        return "spread of one", "one element has no deviation: 0 / (1 - 1)"
    if name.endswith("ctc_loss") and not has_nan:
        return "no alignment", "a label is longer, with its repeats, than its input"
    infinite = [abs(value) == math.inf for value in given.values() if isinstance(value, float)]
    infinite += [tensor.isinf().any() for _, tensor in operands]
    if name == "mul" and has_nan and any(infinite) and any((t == 0).any() for _, t in operands):
        return "zero times infinity", "a factor is 0 where the other is infinite"
    if "_norm" in name and given.get("eps") == 0:
        return "constant normalised", "its eps is 0"
    if name == "_weight_norm_interface" and has_nan and (tensors["v"] == 0).any():
        return "division by zero", "a row of the weight has length 0, and it is divided by its length"

    if not has_nan and name in ("add", "sub", "_to_copy") and (result[result.isinf()] < 0).all() and any(
            (tensor == torch.finfo(tensor.dtype).min).any() for _, tensor in operands if tensor.is_floating_point()):
        what = "is rounded to" if name == "_to_copy" else "with another added, is"
        return "mask overflow", f"the least finite number, as masks have it, {what} -inf"

    # an overflow, if the operands are large enough for one; straight to NaN it goes only in what sums
    if largest and (not has_nan or any(word in name for word in _SUMS)):
        size = math.log10(max(tensor.numel() for _, tensor in operands) or 1)
        size += math.log10(max([1.0, *(abs(v) for v in given.values() if isinstance(v, float) and math.isfinite(v))]))
        squares = any(word in name for word in ("mse", "var", "std", "norm", "cdist", "huber", "smooth"))
        pair = largest[0], largest[0] if squares or len(largest) == 1 else largest[1]
        digits = [math.log10(max(value, 1e-300)) for value in pair]
        if max(sum(digits), exponent.max().item() * digits[0]) + size >= math.log10(torch.finfo(result.dtype).max):
            if half:
                return "float16 range", f"operands up to {largest[0]:.3g} give more than 65,504, the largest float16"
            if growth or birth.phase == "update":
                return "steps too long", growth.text if growth else (
                    f"rate times gradient ({largest[0]:.2g}) is beyond all numbers")
            if birth.phase == "backward" and birth.kind:  # not in a loss, where nothing repeats
                return "exploding gradient", f"values up to {largest[0]:.2g} are multiplied on the way back"
            if birth.step == 1:
                return "wrong scale", f"at the first step already values up to {largest[0]:.2g} are multiplied"
    return "unknown", "the evidence is not sufficient for a verdict"


# --------------------------------------------------------------------------------------------------- report
def _fold(line):
    """A line of the report in as many as a page of 100 columns needs; words, and the spaces within, stay whole."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, 100, subsequent_indent=indent, replace_whitespace=False, break_long_words=False,
                         break_on_hyphens=False)


class NonFiniteError(FloatingPointError):
    """The NaN or inf that a run died of, from its birth on. The text is the report; these are its parts:

    step       1, 2, …: one more than the steps that the busiest optimizer had taken, those that a GradScaler skips
               included; in a loop without an optimizer, the call of `backward` that the operation belongs to
    phase      "data" (bad before any operation, or made before the network is called), "forward" (in a module),
               "loss" (outside of all), "backward" or "update"
    module     its full name; "" for the network itself and outside of all
    operation  as torch names it, without namespace; "" for what was bad before any
    line       `Line` of the user's file; in the backward phase of the forward call; None if there is none
    verdict    a key of VERDICTS
    operands, result   `Evidence` of each tensor
    rank       of the process, where torch.distributed runs, else None
    trail      [(step, phase, module, tensor, largest magnitude)] of this step and up to 50 before; tensor is
               "output", "gradient", "gradient of weight", …, or the name of a weight after the update
    """

    def __init__(self, origin, reached, step, trail):
        birth = origin.birth
        self.step, self.phase, self.module, self.operation = birth.step, birth.phase, birth.module, birth.operation
        self.operands, self.result, self.trail = birth.operands, birth.result, trail
        lines = [_line(caller) for caller in dict.fromkeys(birth.caller) if caller]
        self.line = lines[0] if lines else None
        known = origin.reason[0] == "where trap" or (birth.reason[0] == "unknown" != origin.reason[0])
        self.verdict, why = origin.reason if known else birth.reason
        how = f"is born: {birth.operation}" if birth.operation else "enters"
        then = f"it becomes NaN at {origin}: {origin.operation}; " if origin.source else ""
        reached += f" in step {step}" * (step != birth.step)
        self.rank = torch.distributed.get_rank() if _has_ranks() else None
        rank = "" if self.rank is None else f"rank {self.rank}: "
        text = [f"{rank}{birth.value} at {birth}, {how}", *(f"    {line}" for line in lines),
                f"    {then}it reaches {reached}", "", f"{self.verdict}: {why}. {VERDICTS[self.verdict]}.", "",
                "made of (|x|: from the smallest to the largest finite magnitude that is not 0)",
                *(f"    {evidence}" for evidence in (*birth.operands, birth.result) if evidence), "",
                "the largest magnitude made in each phase"]
        for step in sorted({entry[0] for entry in trail})[-4:]:
            parts = []
            for phase, tensors in (("forward", "output"), ("loss", "output"), ("backward", "gradient"), ("update", "")):
                found = [entry[2:] for entry in trail if entry[:2] == (step, phase) and entry[3].endswith(tensors)]
                if found:
                    module, tensor, size = max(found, key=lambda entry: entry[2])
                    where = ".".join(filter(None, (module, tensor if phase == "update" else "")))
                    what = "weights" if phase == "update" else phase  # those that it has written
                    parts.append(f"{what} {size:.3g}" + f" in {where}" * bool(where))
            if parts:
                text.append(f"    step {step}: " + ", ".join(parts))
        super().__init__("\n".join(map(_fold, text)))

    def __reduce__(self):  # to be copied, or sent by another process
        return FloatingPointError.__new__, (NonFiniteError, str(self)), vars(self)


# --------------------------------------------------------------------------------------------------- memory
class _Memory:
    """Remembers things about the memory that tensors lie in, as long as that memory lives."""

    def __init__(self):
        self.kept, self.limit = {}, 1000

    def put(self, tensor, *things):
        """Remembers these things, or none, and forgets what it knew of all that the tensor has overwritten."""
        storage = tensor.untyped_storage()
        if not things and storage._cdata not in self.kept:
            return
        reference, items = self.kept.get(storage._cdata, (None, []))
        if reference is None or reference.expired():
            reference, items = StorageWeakRef(storage), []
        start, end = _span(tensor)
        if tensor.numel() * tensor.element_size() == end - start:
            items = [item for item in items if item[0] < start or item[1] > end]
        self.kept[storage._cdata] = reference, items + [(start, end, thing) for thing in things]
        if len(self.kept) > self.limit:
            self.kept = {key: pair for key, pair in self.kept.items() if not pair[0].expired()}
            self.limit = max(1000, 2 * len(self.kept))

    def get(self, tensor):
        """What is remembered of memory that the tensor has a part in, the newest first."""
        reference, items = self.kept.get(tensor.untyped_storage()._cdata, (None, []))
        if reference is None or reference.expired():
            return []
        start, end = _span(tensor)
        return [thing for a, b, thing in reversed(items) if a < end and b > start]


def _span(tensor):
    """(start, end) of a tensor in its storage, in bytes."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    start, size = tensor.storage_offset(), tensor.element_size()
    return start * size, (start + 1 + sum((length - 1) * stride for length, stride in steps)) * size


class _Operation(NamedTuple):
    """What an operation's schema says."""

    name: str
    roles: list  # names of its arguments
    written: list  # those that it writes to
    silent: bool  # its result is a view of an operand, or is not filled yet
    shared: bool  # other processes fill its result, some time before it is waited for


@functools.cache
def _operation(func):
    schema, name = func._schema, func._schema.name.rpartition("::")[2]
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns) and name != "lift_fresh"
    silent = view or "empty" in name or schema.name.startswith("profiler::") or (
        name in ("resize_", "set_", "_local_scalar_dense"))
    shared = schema.name.startswith(("c10d::", "_c10d_functional::", "fsdp::")) and (
        "gather" in name or "scatter" in name)
    return _Operation(name, [a.name for a in schema.arguments], written, silent, shared)


def _tensors(value):
    """The tensors with real or complex values in an argument or a result: one, a list of them, or none."""
    if isinstance(value, torch.Tensor):
        if not (value.is_floating_point() or value.is_complex()) or value.is_meta or value.is_nested or is_lazy(
                value) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return []
        if value.layout is not torch.strided:
            if value.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
                return [value.values()]
            return [value._values()] if value.layout is torch.sparse_coo else []
        if is_traceable_wrapper_subclass(value):  # such as DTensor: what it is made of
            return [t for name in value.__tensor_flatten__()[0] for t in _tensors(getattr(value, name))]
        return [] if value._is_zerotensor() else [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _at_its_place(operation, named, result, tensor):
    """The arguments of which this tensor was made: of lists (an optimizer's, on a GPU) what stands at its place."""
    written = [value for role, value in named if role in operation.written]
    for several in written or [result] * operation.name.startswith("_foreach_"):
        if isinstance(several, (list, tuple)):
            for place, other in enumerate(several):
                if other is tensor:
                    return [(role, value[place] if isinstance(value, (list, tuple)) and len(value) == len(several)
                             else value) for role, value in named]
    return named


# ---------------------------------------------------------------------------------------------------- watch
_active = None  # the watch whose block runs
_GUARDS = AssertionError, ArithmeticError, RuntimeError, ValueError  # what owners, and torch, raise at a bad value
_NOTED = {*_SPREADS, "sum", "linalg_vector_norm"}  # what a denominator may be
_HANDED_ON = {"sqrt", "add", "mul", "clone", "_to_copy", "mean"}  # what keeps a denominator's note
_COPIED = {*_DENOMINATORS, *_LOGS, *_DOMAINS, *_EXPS, "sqrt", "mul", "add", "sub"}  # in place, operand worth a copy


def _in_its_thread(method):
    """A callback of a watch, which hears of other threads too: these are let alone, and everything after a death."""
    @functools.wraps(method)
    def callback(self, *args):
        if threading.get_ident() == self.thread and not self.error:
            return method(self, *args)
    return callback


def _gradients():
    """{id of a weight: which gradient it has} of all optimizers there are.

    An optimizer that has not made a step yet is heard of nowhere else, and backward may be called often for a step.
    """
    found = [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]
    weights = [weight for optimizer in found for group in optimizer.param_groups for weight in group["params"]]
    return {id(weight): (id(weight.grad), getattr(weight.grad, "_version", 0)) for weight in weights}


class watch(TorchDispatchMode):
    """Watches a training loop, and says where the NaN or inf that it dies of was born.

        with whynan.watch(net):
            train_as_always()

    net        whose names modules and weights get; None: names within whichever module is called
    from_step  nothing is looked at, and next to no time spent, before this step: for a death after many good ones

    Raises `NonFiniteError`, whose text is the report, when the run dies: when `backward` (or `torch.autograd.grad`,
    called by this name) is given a loss that is not finite, or the block is left with one; when a gradient is not
    finite as an optimizer's step begins; when a weight is not after it, or after an update by hand. What is not finite
    and harms nobody passes: a mask's -inf, the branch that `where` drops, a step that a GradScaler skips, a loss or a
    metric that is read before the backward of a good one. Steps count from 1.

    An error of your own comes out as it is (from Python 3.11 on with the report as a note, where a bad value was made
    in its step). Otherwise the run is the same, bit for bit, and nothing remains of the watch when the block is left,
    however that happens.

    Every operation of the thread that entered the block is looked at; networks in other threads get a warning.
    Networks compiled by `torch.compile` run eagerly in it. Of a weight that processes share out (DTensor, as FSDP2's)
    each sees its part. `trail` has the magnitudes so far, as `NonFiniteError` has.

    Raises ValueError for a bad argument, RuntimeError within another watch.
    """

    _entered = True  # until one is made

    def __init__(self, net=None, *others, from_step=1):
        if others:
            raise ValueError("of several networks give watch one module: nn.ModuleDict({'G': G, 'D': D}); or none")
        if net is not None and not isinstance(net, torch.nn.Module):
            raise ValueError(f"net = {net!r} is not allowed; net is a torch.nn.Module, or None for any")
        if type(from_step) is not int or from_step < 1:
            raise ValueError(f"from_step = {from_step!r} is not allowed; from_step is a whole number from 1")
        super().__init__()
        self.net, self.from_step, self._entered = net, from_step, False

    def __del__(self):
        if not self._entered:
            warnings.warn("whynan.watch alone does nothing; write `with whynan.watch(net):`", stacklevel=2)

    # ---------------------------------------------------------------------------- the block begins and ends
    def __enter__(self):
        global _active
        self._entered = True
        if _active:
            raise RuntimeError("whynan.watch: another watch is active; leave its block first")
        _active, self.thread, self.started, self.looking, self.exits = self, threading.get_ident(), False, False, None
        self.steps = collections.deque(maxlen=51)  # (step, {(phase, module, tensor): magnitude})
        self._forget()
        self.exits = contextlib.ExitStack()
        for hook in (optimizers.register_optimizer_step_pre_hook(self._before_step),
                     optimizers.register_optimizer_step_post_hook(self._after_step)):
            self.exits.callback(hook.remove)
        for owner, name, wrap in ((torch.autograd, "backward", self._watch_backward),
                                  (torch.autograd, "grad", self._watch_backward),
                                  (torch.amp.GradScaler, "step", self._watch_scaler)):
            self.exits.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, wrap(getattr(owner, name)))
        try:
            if self.from_step == 1:
                self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _forget(self):
        self.error = None
        self.pending = self.latest = None  # where the loss has a bad value from; and whatever had one last in this step
        self.counts, self.backwards, self.optimizer = {}, 0, None  # steps of each optimizer; the one in its step
        self.frozen = None  # the step that a backward belongs to, though an optimizer may make its own within it
        self.called = self.after_backward = self.in_backward = False  # in this step
        self.calls, self.names, self.growth = [], {}, {}  # of modules; by id; of weights: [(step, magnitude)]
        self.parts = {}  # of a weight, by id: itself, or what a DTensor is made of
        self.bad, self.notes, self.origins = _Memory(), _Memory(), 0
        self.dropped, self.of_node, self.updates = _Memory(), (None, None), _Memory()  # see `_keep_notes`, `_look`
        self.made, self.sequence = {}, 0  # by autograd's sequence number: (module, class, caller) of the forward call
        self.derived = set()  # the sequence numbers of nodes that torch's formula of a derivative made, and no owner

    def _start(self):
        self.started, self.sequence = True, torch.autograd._get_sequence_nr()
        for hook in (modules.register_module_forward_pre_hook(self._enter_module),
                     modules.register_module_forward_hook(self._leave_module, always_call=True)):
            self.exits.callback(hook.remove)
        # a mode and autograd's sequence numbers belong to a thread: backward in this one, on a GPU too
        self.exits.enter_context(torch.autograd.set_multithreading_enabled(False))
        if "torch._dynamo" in sys.modules:
            self.exits.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        self.exits.callback(super().__exit__, None, None, None)
        if self.net is not None:
            self._learn(self.net)

    def __exit__(self, kind, error, traceback):
        global _active
        self.exits.close()
        _active, death = None, self.error
        if error is None and not death and self.pending:
            death = self._death(self.pending, "the loss with which the block is left")
        elif isinstance(error, _GUARDS) and not death and hasattr(error, "add_note"):  # from Python 3.11 on
            if cause := self.pending or self.latest:
                error.add_note(f"whynan: {self._death(cause, 'the place of this error, perhaps')}")
        last = self.step
        self._forget()  # else it would keep networks alive
        self.counts = {None: last - 1}
        if death and error is not death:
            raise death from error

    # --------------------------------------------------------------- what calls operations: modules, backward, steps
    def _enter_module(self, module, args):
        if threading.get_ident() != self.thread:
            warnings.warn("whynan.watch sees nothing of the modules that another thread calls", stacklevel=2)
            return
        if id(module) not in self.names:  # the first call, or built since
            for root in (self.net, self.calls[0][0] if self.calls else module):
                if root is not None and next(root.parameters(), None) is not None:
                    self._learn(root)
        # a loss that is a module, and has no weights, has no name: it counts as outside of all
        name, _ = self.names.get(id(module), (None, None))
        in_backward = torch._C._current_autograd_node() is not None  # the recomputation of a checkpoint
        self.calls.append((module, name, in_backward))
        if not in_backward and name is not None and torch.is_grad_enabled():
            self.called, self.after_backward = True, False

    @_in_its_thread
    def _leave_module(self, module, args, output):
        if self.calls and self.calls[-1][0] is module:
            self.calls.pop()

    def _learn(self, root):
        """Learns the names in `root`, and how large its weights are before they move."""
        for name, module in root.named_modules():
            self.names.setdefault(id(module), (name, module))
        for name, weight in root.named_parameters():
            self._learn_weight(name, weight)

    def _learn_weight(self, name, weight):
        if id(weight) not in self.names and weight.is_leaf:  # else it is put in a weight's place, by functional_call
            self.names[id(weight)] = name, weight
            self.parts |= {id(part): (id(weight), part) for part in _tensors(weight)}
            self.growth[id(weight)] = collections.deque([(self.step - 1, self._measure(weight))], maxlen=1000)

    def _measure(self, tensor):
        """`_largest`, outside of an operation."""
        before, self.looking = self.looking, True
        try:
            return max((_largest(part.detach()) for part in _tensors(tensor)), default=0.0)
        finally:
            self.looking = before

    def _watch_backward(self, original):
        @functools.wraps(original)
        def backward(outputs, *args, **kwargs):
            inner = original.__name__ == "grad" and kwargs.get("create_graph")  # a part of the loss
            # within another it belongs to that one; and torch calls itself anew under torch.set_default_device
            if threading.get_ident() != self.thread or self.error or inner or self.in_backward:
                return original(outputs, *args, **kwargs)
            for loss in _tensors(outputs) if self.started else ():
                if not math.isfinite(self._measure(loss)):
                    origin = self._find("loss", loss)
                    if origin.birth.how != "scaled":  # by a GradScaler, which will skip the step
                        self._die(origin, "the loss that backward is called on")
            self.pending, self.backwards = None, self.backwards + 1
            self.in_backward = self.after_backward = True
            self.frozen, (stepping, self.optimizer) = self.step, (self.optimizer, None)
            due = not self.started and not self.counts and self.backwards + 1 >= self.from_step
            before = _gradients() if due else {}
            try:
                result = original(outputs, *args, **kwargs)
                for gradient in _tensors(result):  # of autograd.grad
                    self.updates.put(gradient, True)
                return result
            finally:
                self.in_backward = self.called = False
                self.frozen, self.optimizer = None, stepping
                if due and _gradients() == before:  # in a loop without an optimizer a step ends here
                    self._start()
        return backward

    def _watch_scaler(self, original):
        @functools.wraps(original)
        def step(scaler, optimizer, *args, **kwargs):
            before = self.counts.get(optimizer, 0)
            result = original(scaler, optimizer, *args, **kwargs)
            if self.counts.get(optimizer, 0) == before:  # it skipped the step
                self._after_step(optimizer, args, kwargs)
            return result
        return step

    @_in_its_thread
    def _before_step(self, optimizer, args, kwargs):
        if not self.counts:  # all before was step 1, however often backward was called
            sizes = {key: size for _, sizes in self.steps for key, size in sizes.items()}
            self.steps = collections.deque([(1, sizes)], maxlen=51)
        new = optimizer not in self.counts
        self.counts.setdefault(optimizer, 0)
        self.optimizer = optimizer
        if not self.started:
            return None
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            self._learn_weight(f"weight {len(self.growth)}", weight)
            for state in optimizer.state.get(weight, {}).values() if new else ():  # a checkpoint's, perhaps
                for tensor in _tensors(state):
                    if not math.isfinite(self._measure(tensor)):
                        self._find("state", tensor, into=self._name(tensor))
        self._check_gradients(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None

        def checked():
            loss = closure()
            self._check_gradients(optimizer)
            return loss
        return ((optimizer, checked, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": checked})

    def _check_gradients(self, optimizer):
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer skips such a step by itself
        if found is not None and self._measure(found):
            return
        bad = []
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            if weight.grad is not None:
                name, size = self.names[id(weight)][0], self._measure(weight.grad)
                if math.isfinite(size):
                    self._note("backward", *self._part(name, "gradient of "), size)
                else:
                    bad.append((self._find("gradient", *_tensors(weight.grad)), name))
        if bad:
            origin, name = min(bad, key=lambda pair: pair[0].birth.number)
            self._die(origin, f"the gradient of {name} as a step of the optimizer begins")

    @_in_its_thread
    def _after_step(self, optimizer, args, kwargs):
        self.counts[optimizer] = self.counts.get(optimizer, 0) + 1
        self.optimizer, self.latest, self.called, self.after_backward = None, None, False, False
        if not self.started and self.step >= self.from_step:
            self._start()

    @property
    def step(self):
        """The number of the step under way."""
        if self.frozen:
            return self.frozen
        return max(self.counts.values()) + 1 if self.counts else max(1, self.backwards + (not self.after_backward))

    @property
    def trail(self):
        steps = [(step, sizes) for step, sizes in self.steps if step >= self.from_step]
        return [(step, *key, size) for step, sizes in steps for key, size in sizes.items()]

    @staticmethod
    def _part(name, prefix=""):
        module, _, local = name.rpartition(".")
        return module, prefix + local

    def _note(self, phase, module, tensor, size):
        if not self.steps or self.steps[-1][0] != self.step:
            self.steps.append((self.step, {}))
        sizes, key = self.steps[-1][1], (phase, module, tensor)
        sizes[key] = max(size, sizes.get(key, 0.0))

    # ------------------------------------------------------------------------------------- every operation
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.looking or self.error:
            return func(*args, **kwargs)
        operation = _operation(func)
        node = torch._C._current_autograd_node()
        call = self.calls[-1] if self.calls else None
        if call and (call[1] is None or (node is not None and not call[2])):
            call = None
        number = torch.autograd._get_sequence_nr()
        if number != self.sequence:  # it has made a node of the graph
            # without a graph being made: in the forward of an autograd.Function, whose call is wanted
            made = self._made(node, call, beyond_function=not torch.is_grad_enabled())
            for new in range(self.sequence, number):
                self.made[new] = made
            # the name of torch's own nodes ends in a digit, of an autograd.Function's not; a where's derivative is one
            if node is not None and not call and node.name()[-1].isdigit() and not node.name().startswith(_SELECTS):
                self.derived.update(range(self.sequence, number))
            if len(self.made) > 200_000:  # graphs that old are seldom alive
                self.made = dict(list(self.made.items())[100_000:])
                self.derived &= self.made.keys()
            self.sequence = number
        copy = None
        if operation.written == ["self"] and not self.optimizer and _plain(operation.name) in _COPIED:
            copy = args[0].clone() if isinstance(args[0], torch.Tensor) and args[0].numel() <= 1_000_000 else None
        result = func(*args, **kwargs)
        if operation.shared:
            self._pass_on(operation, args, kwargs, result)
        elif not operation.silent:
            self._look(operation, args, kwargs, result, node, call, copy)
        return result

    def _pass_on(self, operation, args, kwargs, result):
        """Of what other processes will fill one knows for now what this one's share has brought with it."""
        named = [*zip(operation.roles, args, strict=False), *kwargs.items()]
        shares = [tensor for role, value in named if "output" not in role for tensor in _tensors(value)]
        origins = [origin for share in shares if not math.isfinite(_largest(share))
                   for origin in self.bad.get(share)[:1]]
        for tensor in _tensors(result):
            self.bad.put(tensor, *origins[:1])

    def _made(self, node, call, beyond_function=False):
        """(module, class, caller) of what is called now; in a backward, of the forward call that it belongs to."""
        if node is not None and not call and not (torch.is_grad_enabled() and "Checkpoint" in node.name()):
            return self.made.get(node._sequence_nr()) or ("", "", _caller())
        caller = _caller(beyond_function)
        return (call[1], type(call[0]).__name__, caller) if call else ("", "", caller)

    def _phase(self, node, call, args):
        grad = torch.is_grad_enabled()
        if self.optimizer and not grad:
            return "update"
        if node is not None and not call:
            return "backward"
        if call:
            return "forward"
        if self.after_backward and not grad:
            return "update"
        if any(tensor.requires_grad for tensor in _tensors(args)):
            self.after_backward = self.in_backward  # else the next loss has begun
            return "loss"
        return "loss" if self.called else "data"

    def _look(self, operation, args, kwargs, result, node, call, copy):
        """Looks at all that an operation has made."""
        results = _tensors(result)
        phase = self._phase(node, call, args)
        if phase in ("data", "loss") and self.after_backward and not self.in_backward and any(
                self._name(tensor) or self.updates.get(tensor) for tensor in _tensors([*args, *kwargs.values()])):
            phase = "update"  # by hand, as in weight.data -= lr * weight.grad
            for tensor in results:
                self.updates.put(tensor, True)
        module = call[1] if call else self.made.get(node._sequence_nr(), ("",))[0] if phase == "backward" else ""
        named, written, main = (), (), results[0] if results else None
        if operation.written:
            named = [*zip(operation.roles, args, strict=False), *kwargs.items()]
            written = [t for role, value in named if role in operation.written for t in _tensors(value)]
            results = written + [t for t in results if not any(t is other for other in written)]
        elif operation.name.endswith("ctc_loss"):
            results = results[:1]  # the second may be memory that was never filled
        bad = []
        for tensor in results:
            size = _largest(tensor)
            if not math.isfinite(size):
                bad.append((tensor, size))
                continue
            if self.bad.kept:
                self.bad.put(tensor)
            if written and phase == "update" and tensor.requires_grad:
                self._learn_weight(f"weight {len(self.growth)}", tensor)  # of a loop without modules
            if written and id(tensor) in self.parts:
                weight, _ = self.parts[id(tensor)]
                self._note("update", *self._part(self.names[weight][0]), size)
                if size != self.growth[weight][-1][1]:
                    self.growth[weight].append((self.step, size))
            elif phase in ("data", "backward") or (
                    # beside its result a norm has 1 / spread; no loss: an accuracy, the 1 that backward begins with
                    phase == "forward" and (tensor is main or "norm" not in operation.name)) or (
                    phase == "loss" and tensor is main and not self.in_backward and (
                        any(operand.requires_grad for operand in _tensors(args)))):
                self._note(phase, module, "gradient" if phase == "backward" else "output", size)
        if results:
            self._keep_notes(operation, args, results, node, phase)
        if not bad:
            return
        named = named or [*zip(operation.roles, args, strict=False), *kwargs.items()]
        origin = None
        for tensor, _ in sorted(bad, key=lambda pair: not math.isnan(pair[1])):
            alone = _at_its_place(operation, named, result, tensor)
            if origin is None or alone is not named:
                origin = self._origin(operation, alone, tensor, node, call, copy, phase)
            self.bad.put(tensor, origin)
            if origin.how in ("operation", "entered"):
                self.latest = origin
            # exp of a loss is its perplexity, which may well overflow
            if node is None and tensor.numel() == 1 and origin.birth.how != "scaled" and operation.name != "exp" and (
                    torch.is_grad_enabled() and any(operand.requires_grad for operand in _tensors(args))):
                self.pending = origin
            if phase == "update" and any(tensor is other for other in written) and (weight := self._weight(tensor)):
                self._die(origin, f"{weight} as it is written")

    def _keep_notes(self, operation, args, results, node, phase):
        """Remembers of some tensors what they are, since a verdict may ask for it."""
        name = _plain(operation.name)
        if phase == "backward":
            # where a branch was not taken its gradient is 0: which elements these are goes with it
            # (the formula of a norm's slope has a masked_fill of its own)
            if node.name().startswith(_SELECTS) and node._sequence_nr() not in self.derived:
                self.dropped.put(results[0], results[0] == 0)
            elif self.dropped.kept:
                dropped = [self.dropped.get(tensor)[:1] for tensor in _tensors(args)]
                masks = [mask for masks in dropped for mask in masks if mask.shape == results[0].shape]
                if masks and (name != "add" or len(masks) == len(dropped)):
                    self.of_node = node._sequence_nr(), functools.reduce(torch.logical_and, masks)
                    self.dropped.put(results[0], self.of_node[1])
        elif name in _NOTED:
            self.notes.put(results[0], name.removeprefix("linalg_vector_"))
        elif results[0].dtype is torch.float16 and name in ("add", "clamp_min") and (
                isinstance(args[1], float) and 0 < args[1] < 2.9e-8):
            self.notes.put(results[0], f"eps {args[1]:g}")
        elif name in _HANDED_ON and self.notes.kept and _tensors(args[0]):
            for note in self.notes.get(_tensors(args[0])[0])[:1]:
                self.notes.put(results[0], note)

    # -------------------------------------------------------------------------------- where a bad value comes from
    def _name(self, tensor, states=True):
        """The name of the weight that lies where the tensor does, or of its gradient or an optimizer's state; or ''."""
        for name, weight in self.names.values():
            if isinstance(weight, torch.Tensor):
                lying = {name: weight}
                if states:
                    lying[f"gradient of {name}"] = weight.grad
                    kept = self.optimizer.state.get(weight, {}) if self.optimizer else {}
                    lying |= {f"{key} of {name}": state for key, state in kept.items()}
                for found, other in lying.items():
                    if any(one.untyped_storage()._cdata == tensor.untyped_storage()._cdata for one in _tensors(other)):
                        return found
        return ""

    def _weight(self, tensor):
        unnamed = tensor.requires_grad and tensor.is_leaf
        return self._name(tensor, states=False) or "a weight" * unnamed

    def _weigh(self, role, tensor):
        name = self._name(tensor)
        return _weigh(f"{role} = {name}" if name else role, tensor.detach())

    def _find(self, role, tensor, into=""):
        """The `Origin` of a tensor that is not finite; one that is new has entered from outside."""
        value = "NaN" if math.isnan(self._measure(tensor)) else "inf"
        found = self.bad.get(tensor)
        for origin in [origin for origin in found if origin.value == value] or found:
            return origin
        before, self.looking = self.looking, True
        evidence, weight, how = self._weigh(role, tensor), into or self._weight(tensor), "entered"
        place = tensor.untyped_storage()._cdata
        buffer = next((".".join(filter(None, (name, own))) for name, module in self.names.values()
                       if isinstance(module, torch.nn.Module) for own, buffer in module.named_buffers(recurse=False)
                       if _tensors(buffer) and buffer.untyped_storage()._cdata == place), "")
        if value == "NaN":
            weight = weight or buffer
        else:
            if tensor.numel() == 1 or buffer:
                how = "constant"
            elif not (tensor.detach() == math.inf).any():
                how = "mask"
        self.looking = before
        bad = f"{evidence.nan + evidence.inf:,} of {tensor.numel():,} values of {weight or f'what comes as {role}'}"
        reason, phase = ("bad weight" if weight else "bad data", f"{bad} are not finite before any operation"), "data"
        if self.in_backward and not weight:
            phase, reason = "backward", ("unknown", f"{bad} are not finite, and no operation of torch has made them")
        if _has_ranks() and (self.in_backward or role == "gradient"):  # no operation has made it, so what joins ranks
            phase, reason = "backward", ("unknown", "another rank's gradient, it seems: read that rank's report")
        call = self.calls[-1] if weight and self.calls and self.calls[-1][1] is not None else None
        origin = self._new(how, value, phase, None, call, result=evidence, reason=reason)
        self.bad.put(tensor, origin)
        return origin

    def _new(self, how, value, phase, node, call, **known):
        self.origins += 1
        step = self.step + (phase in ("data", "loss") and self.after_backward and not self.counts)
        name = node.name() if phase == "backward" and node else ""
        return Origin(how, value, self.origins, step, phase, *self._made(node, call), name, **known)

    def _origin(self, operation, named, result, node, call, copy, phase):
        """The `Origin` of what an operation has made: that of a bad operand, or a new one."""
        value = "NaN" if math.isnan(_largest(result)) else "inf"
        operands, sources, into = [], [], ""
        for role, argument in named:
            tensors = _tensors(argument)
            if role in operation.written:
                into = into or (self._weight(tensors[0]) if tensors else "")
                sources += [origin for tensor in tensors for origin in self.bad.get(tensor)[:1]]
                tensors = [] if copy is None else [copy]
            operands += [(role if len(tensors) == 1 else f"{role}[{i}]", t) for i, t in enumerate(tensors)]
        sources += [self._find(role, tensor, into) for role, tensor in operands
                    if tensor is not copy and not math.isfinite(_largest(tensor))]
        sources.sort(key=lambda source: source.birth.number)
        # an infinite constant, or a mask that softmax reads, is no cause of a NaN
        softmax = operation.name.startswith(_SOFTMAX)
        causes = [source for source in sources if source.value == "NaN"] or [
            s for s in sources if s.how != "constant" and not (s.how == "mask" and softmax)]
        trap = value == "NaN" and phase == "backward" and self._was_dropped(node, result)
        constant = functools.partial(self._new, "constant", value, phase, node, call, operation=operation.name,
                                     reason=("unknown", "a constant that is not finite is given"))
        given = [argument for _, argument in named if isinstance(argument, float) and not math.isfinite(argument)]
        if given and not sources and (value == "inf" or not operands):
            return constant()
        if sources and sources[0].how == "constant" and sources[0].value == value and len(operands) > 1 and (
                sources[0].operation in ("scalar_tensor", "full", "full_like", "fill_")):
            return constant()  # here it is mixed with what is computed
        told = causes and (value == "inf" or causes[0].value == "NaN")
        if told and (not trap or causes[0].reason[0] == "where trap"):
            return causes[0]
        if value == "inf" and sources:
            return sources[0]
        origin = self._new("operation", value, phase, node, call, operation=operation.name)
        if not origin.kind and phase in ("update", "backward"):  # then it is the weight's
            names = [into, *(self._name(tensor) for _, tensor in operands)]
            owner = self._part(next(filter(None, names), "").rpartition(" of ")[2])[0]
            kinds = [type(module).__name__ for name, module in self.names.values() if name == owner]
            if any(names):
                origin = origin._replace(module=owner, kind=kinds[0] if kinds else "")
        if trap:
            origin = origin._replace(reason=("where trap", "the gradient is 0 where the other branch was taken, and 0 "
                                             "times what is infinite or NaN in the branch that was dropped is NaN"))
        if causes:  # an infinity has become NaN
            if _called_from("clip_grad.py"):
                origin = origin._replace(reason=("infinite norm clipped", "its norm is infinite; inf times 0 is NaN"))
            return origin._replace(source=causes[0].birth)
        if operation.name == "mul" and _called_from("grad_scaler.py"):
            return origin._replace(how="scaled")
        reason = origin.reason if trap else _reason(origin, dict(named), operands, result, self.notes.get,
                                                    self._growth(operands))
        below = _DENOMINATORS.get(_plain(operation.name))  # a count, say, of what a mask leaves
        whole = [(role, value) for role, value in named if role == below and isinstance(value, torch.Tensor)
                 and not value.is_floating_point() and not value.is_complex()]
        evidence = tuple(self._weigh(role, tensor) for role, tensor in [*operands, *whole])
        return origin._replace(operands=evidence, result=_weigh("result", result), reason=reason)

    def _was_dropped(self, node, result):
        """Whether the gradient that came to this node was 0 wherever the result is bad, since `where` dropped it."""
        number, mask = self.of_node
        return number == node._sequence_nr() and mask.shape == result.shape and bool(mask[~result.isfinite()].all())

    def _growth(self, operands):
        """The `_Growth` of a weight among the operands, else of the one that grew most; None if it explains nothing.

        It explains a death if it is thirtyfold, or tenfold in the last step, and all such growth together is within six
        digits of the largest operand.
        """
        groups = [group for optimizer in self.counts for group in optimizer.param_groups]
        moved = {id(weight) for group in groups for weight in group["params"]}
        jumped = {key for key, sizes in self.growth.items() if len(sizes) > 1 and sizes[-1][1] > 10 * sizes[-2][1] > 0}
        ratios = {key: sizes[-1][1] / sizes[0][1] for key, sizes in self.growth.items() if sizes[0][1] > 0 and (
            key in moved or not moved) and (sizes[-1][1] > 30 * sizes[0][1] or key in jumped)}
        largest = max((_largest(tensor) for _, tensor in operands), default=0.0)
        strong = {key for key, ratio in ratios.items()
                  if (ratio > 100 or key in jumped) and self.names[key][1].dim() > 1}
        if not ratios or not math.isfinite(largest) or (
                sum(map(math.log10, ratios.values())) + 6 < math.log10(max(largest, 1.0))):
            return None
        names = {self._name(tensor, states=False) for _, tensor in operands}
        key = max(ratios, key=lambda key: (self.names[key][0] in names, key in strong, ratios[key]))
        sizes = self.growth[key]
        first, last = next(step for step, size in sizes if size > 2 * sizes[0][1]), sizes[-1][0]
        steps = f"in steps {first} to {last}" if last > first else f"in step {first}"
        text = f"{self.names[key][0]} grew from {sizes[0][1]:.2g} to {sizes[-1][1]:.2g} {steps}"
        start = max((size for step, phase, _, _, size in self.trail if (step, phase) == (1, "forward")), default=0.0)
        if start > 1e6:
            text += f" (and at step 1 the outputs were up to {start:.2g} already: first mend that scale)"
        return _Growth(text, ratios[key] > 1e3 and sizes[-1][1] > 1e3)

    def _death(self, origin, reached):
        trail = self.trail
        waits = self.counts or self.names.keys() & _gradients().keys()
        if self.backwards and not any(self.counts.values()) and waits:
            trail = [(1, *entry[1:]) for entry in trail]
            source = origin.source and origin.source._replace(step=1)
            origin = origin._replace(step=1, source=source)
            return NonFiniteError(origin, reached, 1, trail)
        return NonFiniteError(origin, reached, self.step, trail)

    def _die(self, origin, reached):
        self.error = self._death(origin, reached)
        raise self.error
