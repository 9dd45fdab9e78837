"""What a user relies on in whynan.py: births are named exactly, a run that lives stays as it is, no trace remains."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from instrument import births
from nan_cases import DEATHS, HEALTHY
from torch import nn, optim
from torch._dynamo import eval_frame
from torch.nn.modules import module as modules
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import optimizer as optimizers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _python_dispatch as dispatch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import whynan
from whynan import VERDICTS, NonFiniteError

INF, NAN = math.inf, math.nan
settings.register_profile("shared machine", deadline=None)  # a slow machine is no failure
settings.load_profile("shared machine")
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings(
    "ignore:.*(degrees of freedom|jit.script|nested.tensor|Lazy modules|global hooks|lr_scheduler|to a scalar may)")]


def death_of(run, *args, net=None, **options):
    """The error that `run(*args)` dies of under a watch."""
    with pytest.raises(NonFiniteError) as caught, whynan.watch(net, **options):
        run(*args)
    return caught.value


def truth_of(error):
    return error.step, error.phase, error.module, error.operation


def one_by_one(operation):
    """On a GPU optimizers step on lists of weights."""
    return operation.removeprefix("_foreach_")


def bits(tensors):
    return [tensor.detach().reshape(-1).view(torch.uint8).tolist() for tensor in tensors]


def traces():
    """All that a watch could leave behind in torch."""
    hooks = [dict(value) for module in (modules, optimizers) for name, value in vars(module).items()
             if name.startswith("_global") and isinstance(value, dict)]
    owners = torch.autograd, torch.Tensor, torch.amp.GradScaler, optim.Optimizer, nn.Module
    functions = [vars(owner).get(name) for owner in owners for name in ("backward", "grad", "step", "__call__")]
    return (hooks, functions, dispatch._get_current_dispatch_mode_stack(), torch.autograd.is_multithreading_enabled(),
            torch.is_grad_enabled(), eval_frame._stance)


@pytest.fixture(autouse=True)
def no_trace():
    """Whatever a test does, nothing is left of its watches."""
    before = traces()
    yield
    assert traces() == before


# --------------------------------------------------------------------------------- the cases that are kept
@pytest.mark.parametrize("name", DEATHS)
def test_of_each_case_the_birth_is_told_as_an_independent_instrument_sees_it_and_the_cure_is_silent(name):
    truth, losses = DEATHS[name], []
    seen = {(one_by_one(operation), node is not None) for operation, node, _ in births(
        lambda: losses.extend(truth.run(cured=False)), nan_of_inf=True)}
    assert not math.isfinite(losses[-1])
    assert (truth.operation, truth.phase == "backward") in seen or not truth.operation
    error = death_of(lambda: truth.run(cured=False))
    assert (error.step, error.phase, error.module, one_by_one(error.operation), error.verdict) == (
        truth.step, truth.phase, truth.module, truth.operation, truth.verdict)
    assert truth.line in error.line.text and error.verdict in VERDICTS
    with whynan.watch():
        assert all(map(math.isfinite, truth.run(cured=True)))


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_not_finite_and_harms_nobody_passes(name):
    with whynan.watch():
        watched = HEALTHY[name]()
    unwatched = []
    assert births(lambda: unwatched.extend(HEALTHY[name]()), nan_of_inf=True) and watched == unwatched


# ------------------------------------------------------------------------------------ a run that lives
class First(nn.Module):
    """Of a recurrent network or an attention: its output without its state."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(*[x] * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1))[0]


LAYERS = [
    lambda: nn.Linear(8, 8), lambda: nn.Conv1d(3, 3, 3, padding=1), lambda: nn.LayerNorm(8), lambda: nn.BatchNorm1d(3),
    lambda: nn.GroupNorm(1, 3), lambda: nn.Dropout(0.3), nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus,
    lambda: First(nn.GRU(8, 8, batch_first=True)), lambda: First(nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1)),
    lambda: First(nn.MultiheadAttention(8, 2, batch_first=True)), lambda: nn.Softmax(-1), lambda: nn.MaxPool1d(1),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.RReLU, lambda: weight_norm(nn.Linear(8, 8))]
OPTIMIZERS = [(optim.SGD, {"lr": 0.1}), (optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
              (optim.Adam, {"lr": 0.01}), (optim.AdamW, {"lr": 0.01, "amsgrad": True}), (optim.Adagrad, {"lr": 0.1}),
              (optim.RMSprop, {"lr": 0.01, "centered": True})]


class Plan(NamedTuple):
    """A small training run."""

    layers: list
    optimizer: tuple
    foreach: bool
    half: bool
    clip: bool
    accumulate: int
    seed: int

    def run(self, watch=lambda net: contextlib.nullcontext()):
        """What is left after it: losses, weights, buffers, states, and random state; and all that hangs on them."""
        torch.manual_seed(self.seed)
        net, losses = nn.Sequential(*(layer() for layer in self.layers), nn.Linear(8, 2)), []
        optimizer = self.optimizer[0](net.parameters(), foreach=self.foreach, **self.optimizer[1])
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        with watch(net):
            for batch in range(4):
                with torch.autocast(net[-1].weight.device.type, torch.bfloat16, enabled=self.half):
                    loss = F.mse_loss(net(torch.randn(4, 3, 8)), torch.randn(4, 3, 2))
                (loss / self.accumulate).backward()
                losses.append(loss.detach())
                if (batch + 1) % self.accumulate == 0:
                    if self.clip:
                        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                    optimizer.step()
                    schedule.step()
                    average.update_parameters(net)
                    optimizer.zero_grad()
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        states += [torch.get_rng_state(), *net.state_dict().values(), *average.state_dict().values()]
        hung = [{key: len(value) for key, value in vars(thing).items() if hasattr(value, "__len__")}
                for thing in (*net.modules(), *net.parameters(), optimizer)]
        hung += [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in (*net.parameters(), loss)]
        return bits(losses + states), hung


@settings(max_examples=40)
@given(st.builds(Plan, st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4), st.sampled_from(OPTIMIZERS),
                 st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2**32 - 1)),
       st.booleans())
def test_a_run_that_lives_is_the_same_bit_for_bit_and_nothing_hangs_on_it(plan, named):
    before = traces()
    assert plan.run(lambda net: whynan.watch(net if named else None)) == plan.run()
    assert traces() == before


@pytest.mark.parametrize("where", ["loop", "forward", "backward", "closure"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the owner's"), SystemExit(3), StopIteration()])
def test_an_error_of_the_owner_comes_out_as_the_same_object_and_leaves_no_trace(error, where):
    def at(place):
        def call(*_):
            if place == where:
                raise error
        return call

    net = nn.Sequential(nn.Linear(3, 3))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    net[0].register_forward_hook(at("forward"))
    with pytest.raises(type(error)) as caught, whynan.watch(net):
        loss = net(torch.randn(2, 3)).sum()
        loss.register_hook(at("backward"))
        loss.backward()
        optimizer.step(at("closure"))
        at("loop")()
    assert caught.value is error


def test_a_watch_keeps_no_network_alive_after_its_block_and_still_tells_step_and_trail():
    net = nn.Linear(3, 1)
    optimizer = optim.Adam(net.parameters())
    with whynan.watch() as watch:
        net(torch.ones(3)).backward()
        optimizer.step()
    gone = weakref.ref(net), weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None] and watch.trail and watch.step == 2


# ------------------------------------------------------------------------------- a birth planted at random
class Spoil(torch.autograd.Function):
    """Hands on what it gets, and a gradient with a quotient in it back."""

    @staticmethod
    def forward(ctx, x, keep, top, below):
        ctx.save_for_backward(keep, top, below)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        keep, top, below = ctx.saved_tensors
        return gradient * keep + top / below, None, None, None


class Cell(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), inner

    def forward(self, x):
        x = self.linear(x).tanh()
        x = self.inner(x) if self.inner else x
        x = Spoil.apply(x, *self.parts["backward"])
        keep, top, below = self.parts["forward"]
        return x * keep + top / below  # forward


class Birth(NamedTuple):
    """A value that isn't finite, planted in a training loop."""

    phase: str
    module: str
    step: int
    value: float
    place: tuple
    by_hand: bool

    def parts(self, *when):
        """keep, top and below, such that x * keep + top / below is x, but at the birth the value at the place."""
        keep, top, below = torch.ones(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
        if when in ((self.phase, self.step), (self.phase, self.step, self.module)):
            keep[self.place], top[self.place], below[self.place] = 0, {NAN: 0, INF: 1, -INF: -1}[self.value], 0
        return keep, top, below

    def run(self):
        torch.manual_seed(0)
        net = nn.Sequential(Cell(), Cell(Cell()))
        optimizer = None if self.by_hand else Descent(net.parameters(), {})
        for step in range(1, 5):
            for name, cell in net.named_modules():
                cell.parts = {phase: self.parts(phase, step, name) for phase in ("forward", "backward")}
            x = torch.randn(4, 4)
            if (self.phase, self.step) == ("enters", step):
                assume(not x.is_cuda)  # or NumPy could not write there
                x.numpy()[self.place] = self.value
            keep, top, below = self.parts("data", step)
            x = x * keep + top / below  # data
            keep, top, below = self.parts("loss", step)
            loss = net(x) * keep + top / below  # loss
            loss.square().mean().backward()
            if self.by_hand:
                self.descend(net, step)
            else:
                optimizer.descend = functools.partial(self.descend, net, step)
                optimizer.step()
            net.zero_grad()


    @torch.no_grad()
    def descend(self, net, step):
        for name, weight in net.named_parameters():
            weight.sub_(0.01 * weight.grad)
            if weight.dim() == 2:
                keep, top, below = self.parts("update", step, name.removesuffix(".linear.weight"))
                weight.mul_(keep).add_(top).div_(below)  # update


class Descent(optim.Optimizer):
    def step(self):
        self.descend()


@settings(max_examples=80)
@given(st.builds(Birth, st.sampled_from(["enters", "data", "forward", "loss", "backward", "update"]),
                 st.sampled_from(["0", "1", "1.inner"]), st.integers(1, 4), st.sampled_from([NAN, INF, -INF]),
                 st.tuples(st.integers(0, 3), st.integers(0, 3)), st.booleans()))
def test_a_planted_birth_is_named_exactly(birth):
    error = death_of(birth.run)
    phase = "data" if birth.phase == "enters" else birth.phase
    module = {"forward": birth.module, "backward": birth.module, "update": f"{birth.module}.linear"}.get(phase, "")
    operation = {"enters": "", "update": "div_"}.get(birth.phase, "div")
    assert truth_of(error) == (birth.step, phase, module, operation)
    assert {"backward": "Spoil.apply("}.get(phase, f"# {phase}") in error.line.text
    nan = math.isnan(birth.value)
    assert (error.result.nan, error.result.inf, error.result.places) == (nan, not nan, [birth.place])
    assert not any(evidence.nan or evidence.inf for evidence in error.operands)


# --------------------------------------------------------------------------------- the moment of the death
def bad_loss():
    return (nn.Linear(4, 1)(torch.ones(4)) * 0).log().sum()  # birth


@pytest.mark.parametrize(("see", "goes_on"), [
    *((read, True) for read in (lambda loss: loss.item(), float, math.isnan, "{:f}".format,
                                lambda loss: loss.detach().item(), lambda loss: loss.mean().item())),
    *((backward, False) for backward in (lambda loss: loss.backward(), lambda loss: (loss / 4).backward(),
                                         lambda loss: torch.autograd.grad(loss, [loss])))])
def test_the_run_ends_where_a_bad_loss_goes_backward_or_with_the_block_in_which_it_was_read(see, goes_on):
    reached = []

    def run():
        loss = bad_loss()
        reached.append(1)
        see(loss)
        reached.append(2)

    error = death_of(run)
    assert reached == [1] + [2] * goes_on and truth_of(error) == (1, "loss", "", "log")
    assert "# birth" in error.line.text


@pytest.mark.parametrize("how", ["break", "return", "swallowed"])
def test_what_nobody_was_told_is_told_when_the_block_is_left(how):
    net, reached, swallowed = nn.Linear(4, 1), [], []

    def run():
        with whynan.watch(net):
            for step in range(1, 5):
                loss = (net(torch.ones(4)) * 0 + float(step < 3)).log().sum()  # birth
                if how != "swallowed" and torch.isinf(loss):
                    if how == "return":
                        return
                    break
                try:
                    loss.backward()
                except Exception as error:
                    swallowed.append(error)
            reached.append("end")

    with pytest.raises(NonFiniteError) as caught:
        run()
    assert truth_of(caught.value) == (3, "loss", "", "log") and reached == ["end"] * (how != "return")
    assert swallowed == [caught.value] * (how == "swallowed")


@pytest.mark.parametrize(("step", "inside"), [
    (lambda p, closure: optim.SGD(p, lr=0.1).step(), False), (lambda p, closure: optim.Adam(p).step(), False),
    (lambda p, closure: optim.AdamW(p, foreach=True).step(), False),
    (lambda p, closure: optim.AdamW(p, fused=True).step(), False),
    (lambda p, closure: optim.SGD(p, lr=0.1).step(closure), True),
    (lambda p, closure: optim.Adam(p).step(closure=closure), True)])
def test_weights_are_as_they_were_before_the_step_that_a_bad_gradient_would_have_taken(step, inside):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    before = bits(net.parameters())

    def closure():
        loss = (net(torch.ones(4)) * 0).abs().sqrt().sum() + net[0](torch.ones(4)).sum()  # birth
        loss.backward()
        return loss

    error = death_of(lambda: (inside or closure(), step(net.parameters(), closure)), net=net)
    assert truth_of(error)[:3] == (1, "backward", "") and "# birth" in error.line.text
    assert bits(net.parameters()) == before


@pytest.mark.parametrize("bad_step", [1, 3])
@pytest.mark.parametrize(("spoil", "network"), [
    (torch.no_grad()(lambda weight, slope: weight.sub_(0.1 * slope / 0)), True),  # birth
    (torch.no_grad()(lambda weight, slope: weight.sub_(0.1 * slope / 0)), False),  # birth
    (torch.no_grad()(lambda weight, slope: weight.copy_(weight - slope / 0)), False),  # birth
    (lambda weight, slope: weight.data.sub_(0.1 * slope / 0), True),  # birth
    (lambda weight, slope: weight.data.div_(0 * slope), True),  # birth
    (lambda weight, slope: setattr(weight, "data", weight.data - 0.1 * slope / 0), True)])  # birth
def test_a_weight_that_an_update_by_hand_spoils_is_told(spoil, network, bad_step):
    net, alone = nn.Linear(4, 1), torch.ones(4, requires_grad=True)

    def run():
        for step in range(1, 5):
            (net if network else alone.mul)(torch.ones(4)).sum().backward()
            for weight in net.parameters() if network else [alone]:
                if step == bad_step:
                    spoil(weight, weight.grad)
                weight.grad = None

    error = death_of(run)
    assert (error.step, error.phase, error.verdict) == (bad_step, "update", "division by zero")
    assert "# birth" in error.line.text


def batches(accumulate, optimizers, scaled=False, spoilt=NAN, data=False, harmless=0):
    """Trains on batches 1, 2, …; the spoilt one's loss, or data, are bad; a bad value is read in the harmless ones."""
    net = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler(net.weight.device.type, 2.0**10, enabled=scaled)
    descents = [optim.SGD(net.parameters(), lr=1e-3) for _ in range(optimizers)]
    for batch in range(1, 20):
        x = torch.ones(2) / torch.tensor(float(not data or batch != spoilt))  # birth
        with torch.autocast(x.device.type, torch.float16, enabled=scaled):
            out = net(x)
        if batch <= harmless:
            (out * NAN).sum().item()
        loss = (out.float() * 0 + float(data or batch != spoilt)).log().sum()  # birth
        scaler.scale(loss).backward()
        if scaled and batch in (2, 3):
            net.weight.grad.fill_(INF)
        for i, descent in enumerate(descents):
            if batch % (accumulate * (i + 1)) == 0:
                scaler.step(descent)
        if scaled:
            scaler.update()
        net.zero_grad()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("options", "spoilt", "step"), [
    ((1, 0), 1, 1), ((1, 0), 6, 6), ((1, 1), 6, 6), ((3, 1), 2, 1), ((3, 1), 3, 1), ((3, 1), 4, 2), ((3, 1), 9, 3),
    ((1, 2), 7, 7), ((2, 2), 7, 4), ((1, 1, True), 6, 6)])
def test_steps_are_those_of_the_busiest_optimizer_skipped_ones_too_or_else_the_calls_of_backward(
        options, spoilt, step, data):
    error = death_of(lambda: batches(*options, spoilt=spoilt, data=data))
    assert truth_of(error) == (step, *(("data", "", "div") if data else ("loss", "", "log")))


@pytest.mark.parametrize("options", [(1, 0), (1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("from_step", [1, 2, 3])
def test_from_step_looks_at_nothing_before_and_counts_steps_all_the_same(options, from_step):
    before = (from_step - 1) * options[0]
    error = death_of(lambda: batches(*options, spoilt=before + 2 * options[0], harmless=before), from_step=from_step)
    assert truth_of(error) == (from_step + 1, "loss", "", "log")
    assert {entry[0] for entry in error.trail} == {from_step, from_step + 1}


# ------------------------------------------------------------------------------------- what people have
class Quotient(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, divisor=1.0):
        return torch.tanh(self.linear(x)) / divisor  # birth


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    hidden: tuple


class Assistant(nn.Module):
    """Takes a dict and an integer, by keyword, and gives a dataclass; uses one module twice, and one weight."""

    def __init__(self):
        super().__init__()
        self.words, self.shared, self.head = nn.Embedding(9, 4), Quotient(), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, batch, *, divisor, turns=2):
        x = self.words(batch["ids"])
        hidden = (x, *(x := self.shared(x, divisor if turn else 1.0) for turn in range(turns)))
        return Output(F.cross_entropy(self.head(x), batch["ids"]), hidden)


def derivatives(net, x, divisor):
    weights = dict(net.named_parameters())
    each = torch.func.vmap(torch.func.grad(
        lambda weights, row: torch.func.functional_call(net, weights, row).square().sum()), (None, 0))(weights, x)
    slope, = torch.autograd.grad(net(x.requires_grad_()).sum(), x, create_graph=True)
    slope = slope.mean() + torch.func.jacrev(net)(x[0]).sum() + torch.func.jacfwd(net)(x[0]).sum()
    return (each["weight"].square().sum() + slope.square()) / divisor  # birth


def sequences(net, x, divisor):
    x = x / divisor  # birth
    return net[2](net[1](net[0](x[None], x[None]))[0])[0].square().mean()


def loader(net, x, divisor):
    rows = [row / divisor for row in x]  # birth
    return sum(net(batch).square().mean() for batch in DataLoader(rows, batch_size=3))


def carried(net, x, divisor):
    past, net.past = getattr(net, "past", x), net(x).detach() / divisor  # birth
    return (net(x) - past).square().mean()  # of the step after the birth


def without_length(net, x, divisor):
    with torch.no_grad():
        net.parametrizations.weight.original1.mul_(divisor)
    return net(x).square().mean()  # birth


@torch.library.custom_op("whynan_test::quotient", mutates_args=())
def quotient(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(x.cpu().numpy() / divisor.cpu().numpy()).to(x.device)


quotient.register_autograd(lambda ctx, gradient: (gradient, None))
TRAINED = {  # name: network, (phase, module, operation) of the birth, loss
    "dicts, dataclasses": (Assistant, ("forward", "shared", "div"), lambda net, x, divisor: net(
        {"ids": torch.arange(6)}, divisor=divisor).loss),
    "Transformer, LSTM, GRU": (lambda: nn.ModuleList([nn.Transformer(4, 2, 1, 1, 8), nn.LSTM(
        4, 4, 2, bidirectional=True), nn.GRU(8, 4)]), ("data", "", "div"), sequences),
    "loss module": (lambda: nn.Linear(4, 4), ("loss", "", "mse_loss"), lambda net, x, divisor:
                    nn.MSELoss()(net(x), x + 1e25 * (1 - divisor))),  # birth
    "double backward": (lambda: nn.Linear(4, 4), ("backward", "", "div"), lambda net, x, divisor:
                        torch.autograd.grad((net(x) * divisor).square().sum().sqrt() + net(x).square().sum(),  # birth
                                            list(net.parameters()), create_graph=True)[0].square().sum()),
    "checkpoint": (Quotient, ("forward", "", "div"), lambda net, x, divisor: checkpoint(
        lambda y: net(y, divisor), checkpoint(net, x.requires_grad_(), use_reentrant=False), use_reentrant=True).sum()),
    "complex": (lambda: nn.ParameterList([torch.randn(4, dtype=torch.cfloat)]), ("loss", "", "div"),
                lambda net, x, divisor: (x * net[0].conj() / divisor).abs().mean()),  # birth
    "sparse": (lambda: nn.Embedding(5, 3, sparse=True), ("backward", "", "div"), lambda net, x, divisor:
               (net(torch.arange(4)) * divisor).square().sum(1).sqrt().sum()),  # birth
    "compiled": (lambda: torch.compile(Quotient(), backend="eager"), ("forward", "_orig_mod", "div"),
                 lambda net, x, divisor: net(x, divisor).square().mean()),
    "distributed": (lambda: DistributedDataParallel(Quotient()), ("forward", "module", "div"),
                    lambda net, x, divisor: net(x, divisor).square().mean()),
    "DataLoader": (lambda: nn.Linear(4, 1), ("data", "", "div"), loader),
    "derivatives": (lambda: nn.Linear(4, 2), ("loss", "", "div"), derivatives),
    "functional_call": (Quotient, ("forward", "", "div"), lambda net, x, divisor: torch.func.functional_call(
        net, {name: 2 * weight for name, weight in net.named_parameters()}, (x, divisor)).mean()),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), ("loss", "", "div"), lambda net, x, divisor:
             (net(x) / divisor).mean()),  # birth
    "float8": (lambda: nn.Linear(4, 4), ("loss", "", "div"), lambda net, x, divisor:
               (net(x.to(torch.float8_e4m3fn).float()) / divisor).mean()),  # birth
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 4)), (
        "forward", "parametrizations.weight.0", "_weight_norm_interface"), without_length),
    "custom operation": (lambda: nn.Linear(4, 4), ("loss", "", "quotient"), lambda net, x, divisor:
                         quotient(net(x), divisor).mean()),  # birth
    "constant": (lambda: nn.Linear(4, 4), ("loss", "", "mul"), lambda net, x, divisor:
                 net(x).square().mean() * (1.0 if divisor else INF)),  # birth
    "carried": (lambda: nn.Linear(4, 4), ("loss", "", "div"), carried)}


def trained(name, divisor):
    """Trains a network of TRAINED for five steps; in one of them divisor(step) may be 0."""
    torch.manual_seed(0)
    make, _, loss_of = TRAINED[name]
    net, losses, optimizer = make(), [], None
    for step in range(1, 6):
        loss = loss_of(net, torch.rand(6, 4), torch.tensor(divisor(step)))
        loss.backward()
        optimizer = optimizer or optim.SGD(net.parameters(), lr=0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors_alone(_, divisor):
    w, losses = torch.zeros(4, requires_grad=True), []
    for step in range(1, 6):
        loss = ((w - torch.arange(4)) / torch.tensor(divisor(step))).square().sum()  # birth
        losses.append(loss.item())
        w = (w - 0.1 * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    return losses


LOOPS = {name: (trained, truth) for name, (_, truth, _) in TRAINED.items()}
LOOPS["tensors alone"] = tensors_alone, ("loss", "", "div")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("device", [None, "cpu"])  # as torch.set_default_device has it
def test_loops_as_people_write_them_are_watched_and_their_deaths_named(name, device):
    with torch.device(device) if device else contextlib.nullcontext():
        its_death_is_named(*LOOPS[name], name)


def its_death_is_named(loop, truth, name):
    with whynan.watch() as watch:
        watched = loop(name, lambda step: 1.0)
    assert watched == loop(name, lambda step: 1.0) and all(map(math.isfinite, watched)) and watch.trail
    error = death_of(loop, name, lambda step: float(step != 3))
    assert truth_of(error) == (3, *truth) and "# birth" in error.line.text


def test_names_are_those_of_the_network_that_is_given():
    net = nn.ModuleDict({"actor": nn.ModuleList([Quotient()]), "critic": nn.Linear(4, 1)})
    for given_net, name in ((None, ""), (net, "actor.0")):
        assert death_of(lambda: net["actor"][0](torch.ones(4), 0.0).sum().item(), net=given_net).module == name


def test_memory_that_is_filled_again_is_known_by_what_it_holds_now():
    net, batch = nn.Linear(4, 1), torch.ones(1, 4)

    def run():
        for step in range(1, 4):
            batch.copy_(torch.ones(1, 4) / float(step != 1))  # of step 1 nothing is used
            if step == 3:
                batch.numpy()[0, 2] = NAN
            if step > 1:
                net(batch).sum().backward()  # birth

    error = death_of(run)
    assert truth_of(error) == (2, "data", "", "") and "# birth" in error.line.text and error.result.places == [(0, 2)]


# ---------------------------------------------------------------------------------------------- bad use
@pytest.mark.parametrize(("arguments", "options", "name"), [
    (("net",), {}, "net"), ((nn.Linear,), {}, "net"), ((None,), {"from_step": 0}, "from_step"),
    ((), {"from_step": True}, "from_step"), ((), {"from_step": 1.5}, "from_step")])
def test_a_bad_argument_is_one_line_with_its_name_and_what_is_allowed(arguments, options, name):
    with pytest.raises(ValueError, match=rf"^{name} = .+ is not allowed; [^\n]+$"):
        whynan.watch(*arguments, **options)


def test_a_watch_within_another_is_refused_in_any_thread_and_the_first_goes_on():
    refused = []

    def enter_another():
        with pytest.raises(RuntimeError) as error, whynan.watch():
            pass
        refused.append(str(error.value))

    def run():
        enter_another()
        thread = threading.Thread(target=enter_another)
        thread.start()
        thread.join()
        bad_loss().backward()

    assert death_of(run).operation == "log"
    assert len(refused) == 2 and all("another watch" in message and "\n" not in message for message in refused)


def test_of_networks_in_another_thread_a_warning_tells_and_they_train_on():
    def train():
        nn.Linear(4, 1)(torch.full((4,), NAN)).backward()
        reached.append(1)

    reached, thread = [], threading.Thread(target=train)
    with pytest.warns(UserWarning, match="thread"), whynan.watch():
        thread.start()
        thread.join()
    assert reached == [1]


def test_a_watch_without_with_is_one_line_of_warning():
    with pytest.warns(UserWarning, match=r"^[^\n]+with whynan\.watch[^\n]+$") as warned:
        whynan.watch()
        gc.collect()
    assert len(warned) == 1


def test_a_watch_can_be_used_again_after_its_block():
    watch = whynan.watch(nn.Linear(4, 1))
    for _ in range(2):
        with pytest.raises(NonFiniteError), watch:
            bad_loss().backward()


def test_a_network_that_cannot_be_watched_leaves_no_trace(monkeypatch):
    net = nn.Linear(2, 2)
    monkeypatch.setattr(net, "named_modules", lambda **_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError), whynan.watch(net):
        pass
    assert death_of(lambda: bad_loss().item())


# ------------------------------------------------------------------------------------ verdict and report
@pytest.mark.parametrize(("verdict", "loss_of"), [
    ("unknown", lambda w: torch.fmod(w, 0.0)), ("unknown", lambda w: torch.fmod(w.half(), 0.0)),
    ("unknown", lambda w: torch.special.zeta(w.detach(), 1.0) + w), ("unknown", lambda w: quotient(w, 0 * w)),
    ("division by zero", lambda w: w / 0), ("division by zero", lambda w: w.sum() / w[:0].sum()),
    ("division by zero", lambda w: 1 / (w - 1)), ("division by zero", lambda w: w.half() / (w.half() - 1)),
    ("float16 range", lambda w: w.half() * 60000 * 2)])
def test_a_verdict_is_given_where_the_evidence_is_sufficient_and_only_there(verdict, loss_of):
    error = death_of(lambda: loss_of(torch.ones(4, requires_grad=True)).sum().backward())
    assert error.verdict == verdict and f"\n\n{verdict}: " in str(error)


def test_every_verdict_of_a_case_has_a_line_of_advice():
    assert {truth.verdict for truth in DEATHS.values()} <= VERDICTS.keys()
    assert all(advice and "\n" not in advice for advice in VERDICTS.values())


@pytest.mark.parametrize(("name", "parts"), [
    ("empty_sentence", ["NaN at step 3, forward phase, self_attn (MultiheadAttention)", "attention.py, line "]),
    ("adam_in_half", ["NaN at step 1, update phase, items", "tensor1 = exp_avg of items.weight", "557 of 720 zero"]),
    ("nan_in_a_checkpoint", ["data phase, outside of all modules", "bad weight: 72 of 576 values", "at (0,5,0,0)"])])
def test_the_report_has_line_operands_and_verdict_and_no_path_of_the_machine(name, parts):
    error = death_of(lambda: DEATHS[name].run(cured=False))
    report, base = str(error), os.path.basename(error.line.file)
    unfolded = " ".join(report.split())
    assert str(error.line) == f"{base}, line {error.line.number}: {error.line.text}"
    for part in (*parts, str(error.line), f"{error.verdict}: ", VERDICTS[error.verdict], *map(str, error.operands)):
        assert " ".join(part.split()) in unfolded
    assert not any(os.path.dirname(file) in report for file in (__file__, torch.__file__, os.path.expanduser("~/x")))
    assert all(line == line.rstrip() for line in report.splitlines())


@pytest.mark.parametrize("name", DEATHS)
def test_a_report_fits_on_a_page_and_breaks_no_word(name):
    error = death_of(lambda: DEATHS[name].run(cured=False))
    assert all(len(line) <= 100 for line in str(error).splitlines())
    words = " ".join(str(error).split())
    assert all(" ".join(str(part).split()) in words for part in (error.line, *error.operands, error.result or ""))
