"""What a user relies on in whynan.py: births are named exactly, a run that lives stays as it is, no trace remains."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import re
import threading
import warnings
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import births
from nan_cases import DEATHS, HEALTHY
from torch import nn, optim
from torch._dynamo import eval_frame
from torch.nn.modules import module as modules
from torch.nn.parallel import DistributedDataParallel
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
pytestmark = pytest.mark.filterwarnings("ignore:.*(degrees of freedom|torch.jit|nested tensors)")


def death_of(run, *args, net=None, **options):
    """The error that `run(*args)` dies of under a watch."""
    with pytest.raises(NonFiniteError) as caught, whynan.watch(net, **options):
        run(*args)
    return caught.value


def truth_of(error):
    return error.step, error.phase, error.module, error.operation


def bits(tensors):
    return [tensor.detach().reshape(-1).view(torch.uint8).tolist() for tensor in tensors]


def traces():
    """All that a watch could leave behind in torch."""
    hooks = [dict(value) for module in (modules, optimizers) for name, value in vars(module).items()
             if name.startswith("_global") and isinstance(value, dict)]
    patched = [getattr(owner, name) for owner in (torch.autograd, torch.Tensor, torch.amp.GradScaler, optim.Optimizer,
               nn.Module) for name in ("backward", "grad", "step", "__call__") if hasattr(owner, name)]
    return (hooks, patched, dispatch._get_current_dispatch_mode_stack(), torch.autograd.is_multithreading_enabled(),
            torch.is_grad_enabled(), eval_frame._stance)


@pytest.fixture(autouse=True)
def no_trace():
    """Whatever a test does, nothing is left of its watches, and the next one can watch."""
    before = traces()
    yield
    after = traces()
    while dispatch._len_torch_dispatch_stack() > len(before[2]):
        dispatch._pop_mode()
    whynan._active = None
    assert after == before


# --------------------------------------------------------------------------------- the cases that are kept
@pytest.mark.parametrize("name", DEATHS)
def test_of_each_case_the_birth_is_told_and_its_cure_is_silent(name):
    truth = DEATHS[name]
    assert not math.isfinite(truth.run(cured=False)[-1])
    error = death_of(lambda: truth.run(cured=False))
    assert (*truth_of(error), error.verdict) == (truth.step, truth.phase, truth.module, truth.operation, truth.verdict)
    assert truth.line in error.line.text and error.verdict in VERDICTS
    with whynan.watch():
        assert all(map(math.isfinite, truth.run(cured=True)))


@pytest.mark.parametrize("name", [name for name, truth in DEATHS.items() if truth.operation])
def test_the_truth_of_each_case_is_what_an_independent_instrument_sees(name):
    truth = DEATHS[name]
    seen = {(operation, node is not None) for operation, node, _ in births(lambda: truth.run(cured=False), True)}
    assert (truth.operation, truth.phase == "backward") in seen


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_not_finite_and_harms_nobody_passes(name):
    unwatched = HEALTHY[name]()
    with whynan.watch():
        assert HEALTHY[name]() == unwatched
    assert births(HEALTHY[name], nan_of_inf=True)


# ------------------------------------------------------------------------------------ a run that lives
class First(nn.Module):
    """Of a recurrent network or an attention: its output without its state."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]


LAYERS = [
    lambda: nn.Linear(8, 8), lambda: nn.Conv1d(3, 3, 3, padding=1), lambda: nn.LayerNorm(8), lambda: nn.BatchNorm1d(3),
    lambda: nn.GroupNorm(1, 3), lambda: nn.Dropout(0.3), nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus,
    lambda: First(nn.GRU(8, 8, batch_first=True)), lambda: First(nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1)),
    lambda: First(nn.MultiheadAttention(8, 2, batch_first=True)), lambda: nn.Softmax(-1), lambda: nn.MaxPool1d(1),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: nn.RReLU(), lambda: nn.Bilinear]
LAYERS.pop()
OPTIMIZERS = [
    lambda p, **o: optim.SGD(p, lr=0.1, **o), lambda p, **o: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, **o),
    lambda p, **o: optim.Adam(p, lr=0.01, **o), lambda p, **o: optim.AdamW(p, lr=0.01, amsgrad=True, **o),
    lambda p, **o: optim.RMSprop(p, lr=0.01, centered=True, **o), lambda p, **o: optim.Adagrad(p, lr=0.1, **o)]


class Plan(NamedTuple):
    """A small training run."""

    layers: list
    optimizer: object
    foreach: bool
    half: bool
    clip: bool
    accumulate: int
    seed: int

    def run(self, watch=lambda net: contextlib.nullcontext()):
        """All that is left after it: losses, weights, buffers, optimizer's state, random state; and what hangs on it."""
        torch.manual_seed(self.seed)
        net = nn.Sequential(*(layer() for layer in self.layers), nn.Linear(8, 2))
        optimizer, losses, loss = self.optimizer(net.parameters(), foreach=self.foreach), [], None
        with watch(net):
            for batch in range(4):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                    loss = F.mse_loss(net(torch.randn(4, 3, 8)), torch.randn(4, 3, 2))
                (loss / self.accumulate).backward()
                losses.append(loss.detach())
                if (batch + 1) % self.accumulate == 0:
                    if self.clip:
                        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
        hung = [{key: len(value) for key, value in vars(thing).items() if hasattr(value, "__len__")}
                for thing in (*net.modules(), *net.parameters(), optimizer)]
        hung += [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in (*net.parameters(), loss)]
        return bits([*losses, *net.state_dict().values(), *state, torch.get_rng_state()]), hung


plans = st.builds(Plan, st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4), st.sampled_from(OPTIMIZERS),
                  st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))


@settings(max_examples=60)
@given(plans, st.booleans())
def test_a_run_that_lives_is_the_same_bit_for_bit_and_nothing_hangs_on_it(plan, named):
    before = traces()
    assert plan.run(lambda net: whynan.watch(net if named else None)) == plan.run()
    assert traces() == before


class Interrupt(torch.autograd.Function):
    """Calls what it is given in its forward or in its backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        forward()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.backward()
        return gradient, None, None


@pytest.mark.parametrize("where", ["loop", "forward", "backward", "hook", "closure"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the owner's"), SystemExit(3), StopIteration()])
def test_an_error_of_the_owner_comes_out_as_the_same_object_and_leaves_no_trace(error, where):
    def stop(*_):
        raise error

    def at(place):
        return stop if where == place else lambda *_: None

    net = nn.Sequential(nn.Linear(3, 3))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    net[0].register_forward_hook(lambda *_: at("hook")())
    before = traces()
    with pytest.raises(type(error)) as caught, whynan.watch(net):
        Interrupt.apply(net(torch.randn(2, 3)), at("forward"), at("backward")).sum().backward()
        optimizer.step(at("closure"))
        at("loop")()
    assert caught.value is error and traces() == before


def test_a_watch_keeps_no_network_alive_after_its_block():
    net = nn.Linear(3, 1)
    optimizer, watch = optim.Adam(net.parameters()), whynan.watch()
    with watch:
        net(torch.ones(3)).backward()
        optimizer.step()
    gone = weakref.ref(net), weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None] and watch.trail and watch.step == 2


# ------------------------------------------------------------------------------- a birth planted at random
class Spoil(torch.autograd.Function):
    """Hands on what it gets, and a quotient of its gradient back."""

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

    def parts(self, phase, module="", step=0):
        """keep, top and below, such that x * keep + top / below is x, but at the birth the value at the place."""
        keep, top, below = torch.ones(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
        if (phase, module, step) == (self.phase, self.module * (phase in ("forward", "backward", "update")), self.step):
            keep[self.place] = below[self.place] = 0
            top[self.place] = {NAN: 0, INF: 1, -INF: -1}[self.value]
        return keep, top, below

    def run(self):
        torch.manual_seed(0)
        net = nn.Sequential(Cell(), Cell(Cell()))
        optimizer = None if self.by_hand else Descent(net, self)
        for step in range(1, 5):
            for name, cell in net.named_modules():
                cell.parts = {phase: self.parts(phase, name, step) for phase in ("forward", "backward")}
            x = torch.randn(4, 4)
            if (self.phase, self.step) == ("enters", step):
                x.numpy()[self.place] = self.value
            keep, top, below = self.parts("data", step=step)
            x = x * keep + top / below  # data
            keep, top, below = self.parts("loss", step=step)
            loss = net(x) * keep + top / below  # loss
            loss.square().mean().backward()
            if self.by_hand:
                descend(net, self, step)
            else:
                optimizer.step()
            net.zero_grad()


def planted(phase, module, step, value, place, by_hand):
    return Birth(phase, module if phase in ("forward", "backward", "update") else "", step, value, place, by_hand)


@torch.no_grad()
def descend(net, birth, step):
    for name, weight in net.named_parameters():
        keep, top, below = birth.parts("update", name.removesuffix(".linear.weight"), step)
        weight.sub_(0.01 * weight.grad)
        if weight.dim() == 2:
            weight.mul_(keep).add_(top).div_(below)  # update


class Descent(optim.Optimizer):
    def __init__(self, net, birth):
        super().__init__(net.parameters(), {})
        self.net, self.birth, self.steps = net, birth, 0

    def step(self):
        self.steps += 1
        descend(self.net, self.birth, self.steps)


@settings(max_examples=120)
@given(st.builds(planted, st.sampled_from(["enters", "data", "forward", "loss", "backward", "update"]),
                 st.sampled_from(["0", "1", "1.inner"]), st.integers(1, 4), st.sampled_from([NAN, INF, -INF]),
                 st.tuples(st.integers(0, 3), st.integers(0, 3)), st.booleans()), st.booleans())
def test_a_planted_birth_is_named_exactly(birth, named):
    dead = death_of(birth.run)
    phase = "data" if birth.phase == "enters" else birth.phase
    module = f"{birth.module}.linear" if phase == "update" else birth.module
    operation = {"enters": "mul", "update": "div_"}.get(birth.phase, "div")
    line = {"enters": "# data", "backward": "Spoil.apply("}.get(birth.phase, f"# {phase}")
    if birth.phase == "enters":
        operation = ""
    assert truth_of(dead) == (birth.step, phase, module, operation) and line in dead.line.text
    nans = math.isnan(birth.value)
    assert (dead.result.nan, dead.result.inf, dead.result.places) == (nans, not nans, [birth.place])
    assert all(evidence.nan == evidence.inf == 0 for evidence in dead.operands)


# --------------------------------------------------------------------------------- the moment of the death
def one_loss(scale=0.0):
    return (nn.Linear(4, 1)(torch.ones(4)) * scale).log().sum()  # birth


SEEN = {"item": lambda loss: loss.item(), "float": float, "backward": lambda loss: loss.backward(), "print": "{:f}".format,
        "detached": lambda loss: loss.detach().item(), "average": lambda loss: loss.mean().item(),
        "scaled": lambda loss: (loss / 4).backward(),
        "grad": lambda loss: torch.autograd.grad(loss, [loss])}


@pytest.mark.parametrize("seen", SEEN)
def test_the_run_ends_where_a_bad_loss_is_read_or_goes_backward(seen):
    reached = []

    def run():
        loss = one_loss()
        reached.append(1)
        SEEN[seen](loss)
        reached.append(2)

    error = death_of(run)
    assert reached == [1] and truth_of(error) == (1, "loss", "", "log") and "# birth" in error.line.text


@pytest.mark.parametrize("how", ["break", "return", "end"])
def test_a_bad_loss_with_which_the_block_is_left_is_told(how):
    net, reached = nn.Linear(4, 1), []

    def run():
        with whynan.watch(net):
            for step in range(1, 4):
                loss = (net(torch.ones(4)) * 0 + (step < 3)).log().sum()  # birth
                if torch.isnan(loss) or torch.isinf(loss):
                    if how == "return":
                        return
                    break
                loss.backward()
            reached.append("end")

    with pytest.raises(NonFiniteError) as caught:
        run()
    assert truth_of(caught.value) == (3, "loss", "", "log") and reached == ["end"] * (how != "return")


def test_a_block_left_without_a_death_raises_nothing():
    with whynan.watch():
        pass
    with whynan.watch() as watch:
        one_loss(scale=NAN if os.environ.get("NO SUCH") else 0.0).detach()
        one_loss_of_finite = nn.Linear(4, 1)(torch.ones(4)).sum()
        one_loss_of_finite.backward()
    assert watch.step == 1


GOING = {
    "SGD": lambda p, closure: optim.SGD(p, lr=0.1).step(), "Adam": lambda p, closure: optim.Adam(p).step(),
    "foreach": lambda p, closure: optim.AdamW(p, foreach=True).step(),
    "fused": lambda p, closure: optim.AdamW(p, fused=True).step(),
    "closure": lambda p, closure: optim.SGD(p, lr=0.1).step(closure),
    "keyword": lambda p, closure: optim.Adam(p).step(closure=closure)}


@pytest.mark.parametrize("how", GOING)
def test_weights_are_as_they_were_before_the_step_that_a_bad_gradient_would_have_taken(how):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    before = bits(net.parameters())

    def closure():
        loss = (net(torch.ones(4)) * 0).abs().sqrt().sum() + net[0](torch.ones(4)).sum()  # birth
        loss.backward()
        return loss

    def run():
        if how not in ("closure", "keyword"):
            closure()
        GOING[how](net.parameters(), closure)

    error = death_of(run, net=net)
    assert truth_of(error)[:3] == (1, "backward", "") and "# birth" in error.line.text
    assert bits(net.parameters()) == before


def test_a_weight_that_an_update_by_hand_spoils_is_told_as_it_is_written():
    net, reached = nn.Linear(3, 1), []

    def run():
        for step in range(1, 4):
            net(torch.ones(3)).sum().backward()
            with torch.no_grad():
                for weight in net.parameters():
                    weight -= weight.grad * 1e20 ** step  # birth
                    reached.append(step)
            net.zero_grad()

    error = death_of(run, net=net)
    assert (error.step, error.phase, reached) == (2, "update", [1, 1]) and "# birth" in error.line.text


def batches_of(accumulate, optimizers, scaler=None, by_hand=False, bad=NAN):
    """Trains on batches 1, 2, …, of which the bad one makes a NaN in the loss."""
    net = nn.Linear(2, 1)
    optimizers = [optim.SGD(net.parameters(), lr=1e-3) for _ in range(optimizers)]
    for batch in range(1, 20):
        with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
            out = net(torch.ones(2))
        loss = (out.float() * 0 + (batch != bad)).log().sum()  # birth
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler and batch in (2, 3):
            net.weight.grad.fill_(INF)
        for i, optimizer in enumerate(optimizers):
            if batch % (accumulate * (i + 1)) == 0:
                scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        net.zero_grad()


@pytest.mark.parametrize(("options", "bad", "step"), [
    ({"accumulate": 1, "optimizers": 0}, 1, 1), ({"accumulate": 1, "optimizers": 0}, 6, 6),
    ({"accumulate": 1, "optimizers": 1}, 6, 6), ({"accumulate": 3, "optimizers": 1}, 2, 1),
    ({"accumulate": 3, "optimizers": 1}, 4, 2), ({"accumulate": 3, "optimizers": 1}, 9, 3),
    ({"accumulate": 1, "optimizers": 2}, 7, 7), ({"accumulate": 2, "optimizers": 2}, 7, 4),
    ({"accumulate": 1, "optimizers": 1, "scaler": True}, 6, 6)])
def test_steps_are_those_of_the_busiest_optimizer_or_else_the_calls_of_backward(options, bad, step):
    scaler = torch.amp.GradScaler("cpu", 2.0**10) if options.get("scaler") else None
    error = death_of(lambda: batches_of(**options | {"scaler": scaler}, bad=bad))
    assert truth_of(error) == (step, "loss", "", "log")


def test_an_error_that_the_owner_swallows_comes_again_when_the_block_is_left():
    reached, first = [], []

    def run():
        for _ in range(3):
            try:
                one_loss().item()
            except Exception as error:
                first.append(error)
        one_loss().backward()
        reached.append("end")

    assert death_of(run) is first[0] and reached == ["end"] and len(first) == 1


# ------------------------------------------------------------------------------------- what people have
LOOPS = {}


def loop(phase, module="", operation="div"):
    """Registers a training run(factor); at one step factor(step) is 0, and the line marked as birth divides by it."""
    def register(run):
        LOOPS[run.__name__] = run, phase, module, operation
        return run
    return register


def trained(make, optimizer=lambda weights: optim.SGD(weights, lr=0.01)):
    """Makes of the loss below, a function of (network, data, factor), a training run of four steps."""
    def decorate(loss_of):
        @functools.wraps(loss_of)
        def run(factor):
            torch.manual_seed(0)
            net, losses, descent = make(), [], None
            for step in range(1, 5):
                loss = loss_of(net, torch.rand(6, 4), factor(step))
                loss.backward()
                descent = descent or optimizer(net.parameters())
                descent.step()
                descent.zero_grad()
                losses.append(loss.item())
            return losses
        return run
    return decorate


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    hidden: tuple


class Quotient(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, factor=1.0):
        return torch.tanh(self.linear(x)) / x.new_tensor(factor)  # birth


class Assistant(nn.Module):
    """Takes a dict by keyword and an integer, gives a dataclass; one module is used twice, and one weight."""

    def __init__(self):
        super().__init__()
        self.words, self.shared, self.head = nn.Embedding(9, 4), Quotient(), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, batch, *, factor, turns=2):
        hidden = (self.words(batch["ids"]),)
        for turn in range(turns):
            hidden += (self.shared(hidden[-1], factor if turn else 1.0),)
        return Output(F.cross_entropy(self.head(hidden[-1]), batch["ids"]), hidden)


@loop("forward", "shared")
@trained(Assistant, lambda weights: optim.AdamW(weights, lr=0.01))
def dicts_dataclasses_and_tied_weights(net, x, factor):
    return net({"ids": torch.arange(6) % 9}, factor=factor).loss


@loop("data")
@trained(lambda: nn.ModuleList([nn.Transformer(4, 2, 1, 1, 8), nn.LSTM(4, 4, 2, bidirectional=True), nn.GRU(8, 4)]))
def transformer_lstm_and_gru(net, x, factor):
    x = x / x.new_tensor(factor)  # birth
    return net[2](net[1](net[0](x[None], x[None]))[0])[0].square().mean()


@loop("loss")
@trained(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
def gradient_in_the_loss(net, x, factor):
    slope, = torch.autograd.grad(net(x.requires_grad_()).sum(), x, create_graph=True)
    return (slope / slope.new_tensor(factor)).square().mean()  # birth


@loop("loss")
@trained(lambda: nn.Linear(4, 4))
def loss_module(net, x, factor):
    return nn.MSELoss()(net(x) / x.new_tensor(factor), x)  # birth


@loop("loss", "", "mse_loss")
@trained(lambda: nn.Linear(4, 4))
def loss_module_that_overflows(net, x, factor):
    return nn.MSELoss()(net(x), x + (0.0 if factor else 1e25))  # birth


@loop("forward")
@trained(Quotient)
def checkpoints(net, x, factor):
    early = checkpoint(net, x.requires_grad_(), use_reentrant=False)
    return checkpoint(lambda y: net(y, factor), early, use_reentrant=True).square().mean()


@loop("backward", "", "pow")
@trained(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
def gradient_through_a_checkpointed_function(net, x, factor):
    def root(y):
        return (y + 1e-30).pow(2 if factor else -0.5)  # birth

    return (checkpoint(root, net(x) * 0 + (1.0 if factor else 0.0), use_reentrant=False) * (1e-20 + factor)).sum()


@loop("loss")
@trained(lambda: nn.ParameterList([torch.randn(4, dtype=torch.cfloat)]))
def complex_weights(net, x, factor):
    return (x * net[0].conj() / x.new_tensor(factor)).abs().mean()  # birth


@loop("backward")
@trained(lambda: nn.Embedding(5, 3, sparse=True))
def sparse_gradients(net, x, factor):
    return (net(torch.arange(4)) * factor).square().sum(1).sqrt().sum()  # birth


@loop("forward", "_orig_mod")
@trained(lambda: torch.compile(Quotient(), backend="eager"))
def compiled_network(net, x, factor):
    return net(x, factor).square().mean()


@loop("data", "", "div")
@trained(lambda: nn.Linear(4, 1))
def data_loader(net, x, factor):
    loader = DataLoader([row / row.new_tensor(factor) for row in x], batch_size=6)  # birth
    return net(next(iter(loader))).square().mean()


@loop("forward")
@trained(Quotient)
def functional_call(net, x, factor):
    weights = {name: weight * 2 for name, weight in net.named_parameters()}
    return torch.func.functional_call(net, weights, (x, factor)).square().mean()


@loop("loss")
@trained(lambda: nn.Linear(4, 2))
def functional_derivatives(net, x, factor):
    weights = dict(net.named_parameters())

    def loss_of(weights, row):
        return torch.func.functional_call(net, weights, row).square().sum()

    each = torch.func.vmap(torch.func.grad(loss_of), (None, 0))(weights, x)
    slope = torch.func.jacrev(net)(x[0]) + torch.func.jacfwd(net)(x[0])
    return (each["weight"].square().sum() + slope.square().sum()) / x.new_tensor(factor)  # birth


@loop("forward", "1")
@trained(lambda: nn.Sequential(nn.LazyLinear(4), Quotient()))
def lazy_modules(net, x, factor):
    return net[1](net[0](x), factor).square().mean() if hasattr(net[0], "in_features") else net(x).mean()


@loop("loss")
@trained(lambda: nn.Linear(4, 4))
def float8(net, x, factor):
    x = x.to(torch.float8_e4m3fn).float()
    return (net(x) / x.new_tensor(factor)).mean()  # birth


@loop("forward", "parametrizations.weight.0", "_weight_norm_interface")
@trained(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
def weight_normalised(net, x, factor):
    with torch.no_grad():
        net.parametrizations.weight.original1.mul_(factor)
    return net(x).square().mean()  # birth


@torch.library.custom_op("whynan_test::quotient", mutates_args=())
def quotient(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() / x.new_tensor(factor).numpy())


quotient.register_autograd(lambda ctx, gradient: (gradient, None))


@loop("loss", "", "quotient")
@trained(lambda: nn.Linear(4, 4))
def operation_of_its_own(net, x, factor):
    return quotient(net(x).abs() + 1, factor).mean()  # birth


@loop("loss", "", "mul")
@trained(lambda: nn.Linear(4, 4))
def infinite_constant(net, x, factor):
    return net(x).square().mean() * (1.0 if factor else INF)  # birth


@loop("forward", "module")
@trained(lambda: DistributedDataParallel(Quotient()))
def distributed(net, x, factor):
    return net(x, factor).square().mean()


@loop("forward", "", "div")
def several_networks_with_averages_and_schedules(factor):
    torch.manual_seed(0)
    networks, losses = [Quotient(), Quotient()], []
    optimizers = [optim.Adam(net.parameters(), lr=0.01) for net in networks]
    average = AveragedModel(networks[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    schedules = [optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9) for optimizer in optimizers]
    for step in range(1, 5):
        for net, other, optimizer, schedule in zip(networks, networks[::-1], optimizers, schedules, strict=True):
            loss = (net(torch.rand(3, 4), factor(step)) - other(torch.rand(3, 4)).detach()).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        average.update_parameters(networks[0])
        losses.append(average(torch.rand(3, 4)).mean().item())
    return losses


@loop("forward")
def lbfgs(factor):
    torch.manual_seed(0)
    net, losses, x = Quotient(), [], torch.rand(5, 4)
    optimizer = optim.LBFGS(net.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    for step in range(1, 5):
        def closure(step=step):
            optimizer.zero_grad()
            loss = (net(x, factor(step)) - x).square().mean()
            loss.backward()
            return loss
        losses.append(optimizer.step(closure).item())
    return losses


@loop("loss")
def no_network_and_no_optimizer(factor):
    w, losses = torch.zeros(4, requires_grad=True), []
    for step in range(1, 5):
        loss = ((w - torch.arange(4)) / w.new_tensor(factor(step))).square().sum()  # birth
        gradient, = torch.autograd.grad(loss, w)
        losses.append(loss.item())
        w = (w - 0.1 * gradient).detach().requires_grad_()
    return losses


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", LOOPS)
def test_loops_as_people_write_them_are_watched_and_their_deaths_named(name):
    run, *truth = LOOPS[name]
    unwatched = run(lambda step: 1.0)
    with whynan.watch() as watch:
        assert run(lambda step: 1.0) == unwatched
    assert watch.trail
    error = death_of(run, lambda step: float(step != 3))
    assert [*truth_of(error)] == [3, *truth] and "# birth" in error.line.text


def test_names_are_those_of_the_network_that_is_given():
    net = nn.ModuleDict({"actor": nn.ModuleList([Quotient()]), "critic": nn.Linear(4, 1)})
    assert death_of(lambda: net["actor"][0](torch.ones(4), 0.0).sum().item()).module == ""
    assert death_of(lambda: net["actor"][0](torch.ones(4), 0.0).sum().item(), net=net).module == "actor.0"


# -------------------------------------------------------------------------------------------- from_step
@pytest.mark.parametrize("options", [{"accumulate": 1, "optimizers": 0}, {"accumulate": 1, "optimizers": 1},
                                     {"accumulate": 4, "optimizers": 1}, {"accumulate": 2, "optimizers": 2}])
@pytest.mark.parametrize("from_step", [1, 2, 3])
def test_from_step_looks_at_nothing_before_and_counts_steps_all_the_same(options, from_step):
    def run():
        last = (from_step - 1) * options["accumulate"]  # the last batch before
        for _ in range(1 if last else 0):
            one_loss(0.0).item() if from_step > 1 else None
        batches_of(**options, bad=last + 2 * options["accumulate"])

    error = death_of(run, from_step=from_step)
    assert truth_of(error) == (from_step + 1, "loss", "", "log")
    assert {entry[0] for entry in error.trail} == {from_step, from_step + 1}


# ---------------------------------------------------------------------------------------------- bad use
@pytest.mark.parametrize(("arguments", "options", "name"), [
    (("net",), {}, "net"), ((nn.Linear,), {}, "net"), ((None,), {"from_step": 0}, "from_step"),
    ((), {"from_step": True}, "from_step"), ((), {"from_step": 1.5}, "from_step")])
def test_a_bad_argument_is_one_line_with_its_name_and_what_is_allowed(arguments, options, name):
    with pytest.raises(ValueError, match=rf"^{name} = .+ is not allowed; ") as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        whynan.watch(*arguments, **options)
    assert "\n" not in str(error.value)


def enter_another():
    with whynan.watch():
        pass


def test_a_watch_within_another_is_refused_in_any_thread_and_the_first_goes_on():
    refused = []

    def in_thread():
        try:
            enter_another()
        except RuntimeError as error:
            refused.append(str(error))

    def run():
        in_thread()
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        one_loss().backward()

    assert death_of(run).operation == "log"
    assert len(refused) == 2 and all("another watch" in message and "\n" not in message for message in refused)


def test_a_watch_without_with_is_one_line_of_warning():
    with pytest.warns(UserWarning) as warned:
        whynan.watch()
        gc.collect()
    assert len(warned) == 1 and re.fullmatch(r"[^\n]+with whynan\.watch[^\n]+", str(warned[0].message))


def test_a_watch_can_be_used_again_after_its_block():
    watch = whynan.watch(nn.Linear(4, 1))
    for _ in range(2):
        with pytest.raises(NonFiniteError), watch:
            one_loss().backward()


def test_a_network_that_cannot_be_watched_leaves_no_trace():
    net = nn.Linear(2, 2)
    net.named_modules = lambda **_: 1 / 0
    with contextlib.suppress(ZeroDivisionError), whynan.watch(net):
        pass
    with whynan.watch():
        pass


# ------------------------------------------------------------------------------------ verdict and report
W = torch.ones(4)
VERDICT_OF = {
    "unknown": [
        lambda w: torch.fmod(w, 0.0), lambda w: torch.fmod(w.half(), 0.0), lambda w: torch.remainder(w.half(), 0 * w),
        lambda w: torch.special.zeta(w.detach(), 1.0) + w, lambda w: torch.ldexp(w, torch.tensor(500)) if 0 else w.fmod(0)],
    "division by zero": [lambda w: w / 0, lambda w: w.sum() / w[:0].sum(), lambda w: (w - w) / (w - w).norm(),
                         lambda w: 1 / (w - 1), lambda w: w.half() / (w.half() - 1)],
    "float16 range": [lambda w: w.half() * 60000 * 2]}


@pytest.mark.parametrize(("verdict", "loss_of"), [(v, loss_of) for v, several in VERDICT_OF.items() for loss_of in several])
def test_a_verdict_is_given_where_the_evidence_is_sufficient_and_only_there(verdict, loss_of):
    assert death_of(lambda: loss_of(torch.ones(4, requires_grad=True)).sum().backward()).verdict == verdict


def test_an_update_by_hand_that_divides_by_zero_is_not_adams():
    def run():
        w = torch.zeros(3, requires_grad=True)
        (w * 0).sum().backward()
        with torch.no_grad():
            w -= w.grad / w.grad.norm()

    assert death_of(run).verdict == "division by zero"


def test_every_verdict_has_one_line_of_advice_and_most_have_a_case():
    used = {truth.verdict for truth in DEATHS.values()}
    assert used <= VERDICTS.keys() and all(advice and "\n" not in advice for advice in VERDICTS.values())


@pytest.mark.parametrize(("name", "parts"), [
    ("empty_sentence", ["NaN at step 3, forward phase, self_attn (MultiheadAttention)", "\n    attention.py, line "]),
    ("adam_in_half", ["NaN at step 1, update phase, items", "tensor1 = exp_avg of items.weight", "557 of 720 zero"]),
    ("nan_in_a_checkpoint", ["data phase, outside of all modules", "bad weight: 72 of 576 values", "first at (0, 5, 0, 0)"])])
def test_the_report_has_line_operands_and_verdict_and_no_path_of_the_machine(name, parts):
    error = death_of(lambda: DEATHS[name].run(cured=False))
    text = str(error)
    assert all(part in text for part in [*parts, error.line.text, str(error.line.number), f"{error.verdict}: ",
                                         VERDICTS[error.verdict], *(evidence.name for evidence in error.operands)])
    assert os.path.dirname(__file__) not in text and os.path.dirname(torch.__file__) not in text and os.sep + "home" not in text
    assert str(error.line).startswith(os.path.basename(error.line.file))
