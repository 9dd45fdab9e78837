"""What whynan says of loops that mislead a finder: each of these was once told wrongly, or not at all."""

import ast
import math
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_whynan import death_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import whynan


def descend(net, loss_of, steps=6, optimizer=torch.optim.SGD, lr=1e-3, before_step=lambda: None):
    """Trains net with the loss loss_of(step), from step 1 on."""
    optimizer = optimizer(net.parameters(), lr=lr)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(step).backward()
        before_step()
        optimizer.step()


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 1), torch.randn(8, 4)


# ----------------------------------------------------------------------------------------------- is it told?
@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before")
@pytest.mark.parametrize("guard", [
    lambda net, loss: math.isfinite(float(loss.detach().cpu().numpy())) or 1 / 0,
    lambda net, loss: torch.distributions.Categorical(logits=loss.detach().expand(3), validate_args=True),
    lambda net, loss: torch.multinomial(loss.detach().expand(3), 1)])
def test_an_error_of_the_owners_own_guard_comes_out_as_it_is_with_the_report_as_a_note(guard):
    net, X = linear()

    def loss_of(step):
        loss = (net(X).mean() * (step != 3)).abs().log()  # birth
        if step == 3:
            guard(net, loss)
        return loss

    with pytest.raises(Exception) as caught, whynan.watch(net):
        descend(net, loss_of)
    assert not isinstance(caught.value, whynan.NonFiniteError)
    note, = caught.value.__notes__
    assert "log of zero" in note and "step 3, loss phase" in note and "# birth" in note


def test_a_report_can_be_pickled():
    net, X = linear()
    error = death_of(lambda: (net(X) / 0).mean().backward())
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert repr(vars(copy)) == repr(vars(error)), "NaN is not equal to itself"


def test_a_bad_loss_of_shape_1_is_a_loss():
    net, X = linear()

    def run():
        for step in range(1, 5):
            loss = (net(X).mean(0) * (step != 3)).abs().log()
            if torch.isnan(loss).any() or torch.isinf(loss).any():
                return
            loss.sum().backward()

    assert death_of(run).step == 3


def test_a_perplexity_that_overflows_is_no_death():
    net, X = linear()

    def loss_of(step):
        loss = 100 + net(X).square().mean()
        assert loss.exp().item() == math.inf
        return loss

    with whynan.watch(net):
        descend(net, loss_of)


# ------------------------------------------------------------------------------------------ step, phase, place
def test_a_birth_in_the_backward_of_an_accumulated_batch_belongs_to_step_1():
    net, X = linear()

    def run():
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for batch in range(4):
            (net(X).mean() * (batch != 2)).abs().sqrt().backward()  # birth
        optimizer.step()

    error = death_of(run)
    assert (error.step, error.phase) == (1, "backward") and "# birth" in error.line.text


def test_a_gradient_clipped_by_hand_is_an_update():
    net, X = linear()

    def clip():
        total = sum(weight.grad.pow(2).sum() for weight in net.parameters()).sqrt()
        scale = 1 / total  # birth
        for weight in net.parameters():
            weight.grad.mul_(scale)

    error = death_of(lambda: descend(net, lambda step: net(X).mean() * (step != 3), before_step=clip))
    assert (error.step, error.phase, error.verdict) == (3, "update", "division by zero")
    assert "# birth" in error.line.text


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_an_optimizer_was_given_bad_is_data(key):
    net, X = linear()
    before = torch.optim.Adam(net.parameters())
    net(X).mean().backward()
    before.step()
    before.state[net.weight][key][0, 1] = math.nan

    def run():
        optimizer = torch.optim.Adam(net.parameters())
        optimizer.load_state_dict(before.state_dict())
        net(X).mean().backward()
        optimizer.step()

    error = death_of(run, net=net)
    assert (error.phase, error.operation, error.verdict) == ("data", "", "bad weight")
    assert f"{key} of weight" in str(error)


def test_a_buffer_that_was_loaded_bad_is_a_bad_weight():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    net[1].running_var[2] = math.nan
    error = death_of(lambda: net(torch.ones(2, 4)).sum().backward())
    assert (error.phase, error.module, error.verdict) == ("data", "1", "bad weight") and "1.running_var" in str(error)


def test_data_made_after_a_validation_is_data():
    net, X = linear()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def run():
        for step in range(1, 5):
            batch = X * (step != 3)
            batch = (batch - batch.mean(0)) / batch.std(0)  # birth
            net(batch).mean().backward()
            optimizer.step()
            with torch.no_grad():
                net(X).mean().item()

    error = death_of(run)
    assert (error.step, error.phase, error.verdict) == (3, "data", "constant normalised")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_birth_in_the_recomputed_part_of_a_checkpoint_has_its_own_line(use_reentrant):
    net, X = linear()

    def part(x):
        y = net(x) * 0
        return y.abs().sqrt()  # birth

    error = death_of(lambda: descend(net, lambda step: checkpoint(
        part, X.clone().requires_grad_(), use_reentrant=use_reentrant).mean()))
    assert (error.step, error.phase, error.verdict) == (1, "backward", "infinite slope")
    assert "# birth" in error.line.text


def test_an_optimizer_that_steps_within_backward_is_an_update():
    net, X = linear()
    net.half()
    optimizers = {weight: torch.optim.Adam([weight], lr=1e-3) for weight in net.parameters()}

    def step(weight):
        optimizers[weight].step()  # birth
        weight.grad = None

    for weight in net.parameters():
        weight.register_post_accumulate_grad_hook(step)
    error = death_of(lambda: (net(1e-3 * X.half()).mean() * 1e-3).backward())
    assert (error.step, error.phase, error.verdict) == (1, "update", "Adam's denominator")
    assert "# birth" in error.line.text


@pytest.mark.parametrize("foreach", [False, True])  # True is what an optimizer does by itself on a GPU
@pytest.mark.parametrize("sick", [0, 1, 2])
def test_of_an_optimizer_that_steps_on_lists_the_one_sick_weight_is_told(sick, foreach):
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3)).half()
    optimizer = torch.optim.Adam(net.parameters(), foreach=foreach)
    for number, layer in enumerate(net):
        layer.weight.grad = torch.full((4, 4), float(number != sick)).half()
    error = death_of(lambda: optimizer.step(), net=net)  # birth
    assert (error.step, error.phase, error.module, error.verdict) == (1, "update", str(sick), "Adam's denominator")
    assert [operand.name for operand in error.operands] == [f"tensor1 = exp_avg of {sick}.weight", "tensor2"]
    assert "16 of 16 denominators" in str(error) and "# birth" in error.line.text


@pytest.mark.parametrize("foreach", [False, True])
def test_of_two_births_the_first_is_told_though_the_gradients_are_clipped_as_a_list(foreach):
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)  # in backward the last is the first

    def run():
        X = torch.ones(2, 4)
        a = (first(X) * 0).abs().sqrt().sum()
        b = (last(X) * 0).abs().sqrt().sum()  # birth
        (a + b).backward()
        nn.utils.clip_grad_norm_([*first.parameters(), *last.parameters()], 1.0, foreach=foreach)
        torch.optim.SGD([*first.parameters(), *last.parameters()], 0.1).step()

    error = death_of(run, net=nn.ModuleList([first, last]))
    assert (error.phase, error.verdict) == ("backward", "infinite slope") and "# birth" in error.line.text


# ------------------------------------------------------------------------------------------------- verdicts
TRAPS = {
    "sqrt": lambda x: torch.where(x > 0, x.sqrt(), 0 * x), "log": lambda x: torch.where(x > 0, x.log(), 0 * x),
    "exp": lambda x: torch.where(x < 2, x, (100 * x).exp()), "sinc": lambda x: torch.where(x == 0, 1.0, x.sin() / x),
    "power": lambda x: torch.where(x > 0.2, (x - 0.2) ** 0.4, x), "fill": lambda x: (1 / x).masked_fill(x == 0, 0)}


@pytest.mark.parametrize("name", TRAPS)
def test_the_trap_of_where_is_told_wherever_the_dropped_branch_is_bad(name):
    x = nn.Parameter(torch.tensor([0.0, 1.0, 1.5, 0.5]))
    error = death_of(lambda: descend(nn.ParameterList([x]), lambda step: TRAPS[name](x).sum()))
    assert error.verdict == "where trap", str(error)


def test_a_gradient_of_zero_that_no_where_made_is_no_trap():
    x = nn.Parameter(torch.tensor([0.0, 1.0]))
    error = death_of(lambda: descend(nn.ParameterList([x]), lambda step: (x.sqrt() ** 2).sum()))
    assert error.verdict == "infinite slope"


NORMS = {"linalg": lambda x: torch.linalg.norm(x, dim=1), "norm": lambda x: x.norm(dim=1),
         "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1)}


@pytest.mark.parametrize("name", NORMS)
def test_the_second_derivative_of_a_norm_at_zero_is_no_trap_of_where(name):
    net, X = linear()
    X[3] = 0

    def loss_of(step):
        x = X.clone().requires_grad_()
        lengths = NORMS[name](x).view(8, 1).expand(8, 4)
        slope, = torch.autograd.grad(net(lengths).tanh().sum(), x, create_graph=True)
        curve, = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return curve.square().mean()

    error = death_of(lambda: descend(net, loss_of))
    assert error.verdict == "infinite slope", str(error)
    assert "1 of 8 norms" in str(error) and "second derivative" in str(error) and "where" not in str(error)


def test_the_trap_of_where_is_told_in_a_second_derivative_too():
    x = nn.Parameter(torch.tensor([0.0, 1.0, 1.5, 0.5]))

    def loss_of(step):
        slope, = torch.autograd.grad(torch.where(x > 0, x.log(), 0 * x).sum(), x, create_graph=True)
        return torch.where(x > 0, slope, 0 * x).sum()

    assert death_of(lambda: descend(nn.ParameterList([x]), loss_of)).verdict == "where trap"


def test_weights_of_classes_that_sum_to_zero_are_told_of():
    net = nn.Linear(4, 3)
    error = death_of(lambda: F.cross_entropy(net(torch.ones(2, 4)), torch.tensor([1, 1]),
                                             weight=torch.tensor([1.0, 0.0, 1.0])).backward())
    assert error.verdict == "mean of nothing" and "or their weights sum to 0" in " ".join(str(error).split())


def test_no_advice_invites_to_add_a_small_number_to_a_divisor():
    x = torch.tensor([-1e-8, 0.5], requires_grad=True)
    error = death_of(lambda: (1 / (x + 1e-8)).sum().backward())
    assert error.verdict == "division by zero"
    assert "add a small number" not in " ".join(str(error).split()) and "cannot be 0" in str(error)


@pytest.mark.parametrize("mixed", [lambda x, mask: x.exp() * (mask + mask).softmax(1),
                                   lambda x, mask: x.exp() * mask.bfloat16().softmax(1)])
def test_a_mask_of_the_least_number_that_overflows_is_told_of(mixed):
    net, X = linear()
    mask = torch.full((8, 8), torch.finfo(torch.float32).min)
    error = death_of(lambda: descend(net, lambda step: mixed(net(X), mask).sum()))
    assert error.verdict == "mask overflow", str(error)


def test_a_fill_value_is_not_blamed_on_a_weight_that_grew():
    net, X = linear()
    nn.init.constant_(net.bias, 1e-3)

    def loss_of(step):
        return F.mse_loss(net(X), torch.full((8, 1), 9.97e36 if step == 40 else 3.0))

    error = death_of(lambda: descend(net, loss_of, steps=50, lr=0.1), net=net)
    assert (error.step, error.verdict) == (40, "unknown")


def test_of_two_networks_with_the_same_names_each_has_its_own_growth():
    first, second = nn.Linear(4, 1), nn.Linear(4, 1)
    nn.init.constant_(first.weight, 1e-4)
    nn.init.constant_(second.weight, 5.0)
    X = torch.ones(2, 4)

    def loss_of(step):
        return first(X).mean() + (second(X) + (1e30 if step == 4 else 0)).pow(2).mean()

    error = death_of(lambda: descend(nn.ModuleList([first, second]), loss_of, lr=1e-9))
    assert error.verdict == "unknown"


@pytest.mark.parametrize(("function", "verdict", "evidence"), [
    (lambda x: torch.log1p(x - 2), "log of zero", "1 + the argument is 0"),
    (lambda x: torch.logit(x + 0.5), "outside the domain", "logit"),
    (lambda x: torch.remainder(x.half(), 0 * x.half()), "unknown", "not sufficient"),
    (lambda x: x * math.inf, "unknown", "a constant that is not finite")])
def test_the_evidence_is_true_of_the_function(function, verdict, evidence):
    x = torch.ones(3, requires_grad=True)
    error = death_of(lambda: function(x).sum().backward())
    assert error.verdict == verdict and evidence in str(error)


def test_a_count_that_divides_is_shown_and_magnitudes_are_those_of_results_not_of_a_norms_by_products():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.zeros_(net[0].bias)
    X, padded = torch.rand(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool)
    X[2], padded[1] = 0, True  # of zeros a LayerNorm computes 1 / sqrt(eps), which is no output
    with pytest.raises(whynan.NonFiniteError) as caught, whynan.watch(net):
        (net(X) * ~padded[..., None]).sum(1).div((~padded).sum(1)[:, None]).sum().backward()
    birth, report = caught.value, str(caught.value)
    assert birth.verdict == "division by zero" and birth.operation == "div"
    whole = next(evidence for evidence in birth.operands if evidence.name == "other")
    assert (whole.shape, whole.dtype, whole.largest, whole.zero) == ((3, 1), torch.int64, 5, 1)
    assert "4 of 12 NaN, the first at (1,0)" in " ".join(report.split())
    size = float(re.search(r"step 1: forward (\S+) in", report)[1])
    assert size < 3 < 1e-5**-0.5, "the largest of four numbers of mean 0 and spread 1 is below the root of 3"


def test_the_magnitude_of_the_loss_is_not_that_of_an_accuracy_beside_it():
    net, X = nn.Linear(4, 2), torch.randn(8, 4)
    labels = net(X).argmax(1)

    def loss_of(step):
        scores = net(X)
        assert (scores.argmax(1) == labels).float().mean() > 0.9
        return (1e-3 * scores).square().mean() + (math.inf if step == 2 else 0)

    report = str(death_of(lambda: descend(net, loss_of, lr=1e-9)))
    first, = re.findall(r"step 1: .*loss ([^,]+),", report)
    assert float(first) < 0.1 and not re.search(r"step 2: .*loss 1\b", report)


@pytest.mark.parametrize("when", ["before the backward", "after it"])
def test_a_metric_that_is_not_finite_harms_nobody_though_it_is_read(when):
    net, X = linear()
    y, metrics, read = X[:, :1] * 2, [], []

    def loss_of(step):
        few = slice(1 if step in (3, 6) else 8)  # the variance of one is 0
        loss = F.mse_loss(net(X[few]), y[few])
        metrics.append(1 - loss / (y[few] - y[few].mean()).square().mean())
        if when == "before the backward":
            read.append(metrics[-1].item())
        return loss

    with whynan.watch(net):
        descend(net, loss_of, before_step=lambda: when == "after it" and read.append(metrics[-1].item()))
    assert [math.isfinite(r2) for r2 in read] == [step not in (3, 6) for step in range(1, 7)]


def test_a_bad_row_is_not_blamed_on_weights_that_began_small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.normal_(net[2].weight, std=1e-3)
    X = torch.randn(64, 4)
    y = X[:, :1] * 2

    def loss_of(step):
        bad = torch.zeros_like(y)
        bad[3] = 1e25 if step == 120 else 0
        return F.mse_loss(net(X), y + bad)

    error = death_of(lambda: descend(net, loss_of, 150, torch.optim.Adam, 1e-2))
    assert error.step == 120 and error.verdict == "unknown"


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_nan_is_followed_into_a_sparse_matrix(layout):
    net, X = linear()
    A = torch.eye(8)
    A[2, 2] = 0  # a node without neighbours

    def loss_of(step):
        degree = A.sum(1).pow(-0.5)
        return (degree[:, None] * A * degree).to_sparse(layout=layout).matmul(net(X)).square().mean()

    error = death_of(lambda: descend(net, loss_of))
    assert (error.phase, error.operation, error.verdict) == ("data", "pow", "division by zero")


def test_what_a_backward_makes_outside_of_torch_is_no_data():
    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            array = gradient.numpy().copy()
            array[0] = math.nan
            return torch.from_numpy(array)

    net, X = linear()
    error = death_of(lambda: descend(net, lambda step: Outside.apply(net(X)).mean()))
    assert (error.step, error.phase, error.verdict) == (1, "backward", "unknown")


@pytest.mark.parametrize(("value_of", "verdict"), [
    (lambda p: p.log().clamp(min=-100), "log of zero"), (lambda p: p.rsqrt().clamp(max=1e4), "division by zero"),
    (lambda p: p.sqrt(), "infinite slope")])
def test_a_slope_is_infinite_at_a_finite_value_only(value_of, verdict):
    net, X = linear()
    error = death_of(lambda: descend(net, lambda step: value_of((net(X) * 1e4).sigmoid()).mean()))
    assert error.verdict == verdict and ("is finite" in str(error)) == (verdict == "infinite slope")


def test_of_two_networks_watch_wants_one_module():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^of several networks give watch one module: nn\.ModuleDict"):
        whynan.watch(net, net)


def test_a_learning_rate_beyond_all_measure_is_told_by_the_update():
    net, X = linear()
    error = death_of(lambda: descend(net, lambda step: 1e4 * net(X).mean(), lr=1e38))
    assert (error.step, error.phase, error.verdict) == (1, "update", "steps too long")


# ------------------------------------------------------------------------------------------------ file alone
SCRIPT = """
import torch, whynan
net = torch.nn.Linear(2, 1)
with whynan.watch(net):
    for step in range(3):
        (net(torch.ones(2)).abs() * (step < 2)).log().sum().backward()
"""


def test_the_file_alone_is_enough(tmp_path):
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.walk(ast.parse(pathlib.Path(whynan.__file__).read_text(encoding="utf-8")))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {module.split(".")[0] for module in modules} <= {"torch", *sys.stdlib_module_names}
    shutil.copy(whynan.__file__, tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "step 3, loss phase" in done.stderr and "train.py, line 6" in done.stderr
