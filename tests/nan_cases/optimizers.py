"""Deaths of weights that went too far, by torch's optimizers and by hand."""

import math

import torch
import torch.nn.functional as F
from torch import nn, optim

from . import death


@death(step=67, phase="loss", module="", operation="pow", line="(net(A) - b).pow(2).sum()", verdict="steps too long",
       source="https://discuss.pytorch.org/t/why-is-this-simple-linear-regression-with-only-two-variables-so-hard-to-"
              "converge-during-gradient-descent/208572")
def regression_lr(cured):
    """Least squares in two unknowns by gradient descent, with a learning rate somewhat above 2 / largest curvature."""
    torch.manual_seed(0)
    A, b = torch.tensor([[-249.69, -4.1511], [-4.1511, -0.20755]]), torch.tensor([[0.0], [10.0]])
    net = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(net.parameters(), lr=1.6e-5 if cured else 2.4e-5)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(A) - b).pow(2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] == math.inf:
            break
    return losses


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 3 * 3, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x))
        x = F.max_pool2d(F.leaky_relu(self.conv2(x)), 2).flatten(1)
        return F.log_softmax(self.fc2(F.leaky_relu(self.fc1(x))), dim=1)


def train_epoch(model, batches, optimizer, history):
    model.train()
    for data, target in batches:
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if not math.isfinite(history[-1]):
            raise FloatingPointError(f"loss {history[-1]}")


@death(step=7, phase="forward", module="conv2", operation="convolution", line="self.conv2(x)", verdict="steps too long",
       source="https://github.com/pytorch/examples/issues/736")
def adadelta_lr_for_sgd(cured):
    """The example for digits with SGD put in place of Adadelta, whose learning rate of 1 stayed."""
    torch.manual_seed(0)
    prototypes = torch.rand(10, 1, 10, 10)
    batches = []
    for _ in range(5):
        target = torch.randint(10, (16,))
        batches.append((8 * prototypes[target] + 0.3 * torch.randn(16, 1, 10, 10), target))
    model, history = ConvNet(), []
    optimizer = optim.SGD(model.parameters(), lr=0.01 if cured else 1.0, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    try:
        for _ in range(4):
            train_epoch(model, batches, optimizer, history)
            scheduler.step()
    except FloatingPointError:
        pass
    return history


@death(step=14, phase="loss", module="", operation="pow", line="((prediction - y) ** 2).sum()",
       verdict="steps too long",
       source="https://discuss.pytorch.org/t/finding-coefficients-of-a-polynomial-through-linear-regression/71751")
def polynomial_by_hand(cured):
    """The coefficients of a polynomial by gradient descent in plain tensors, with no module and no optimizer."""
    torch.manual_seed(0)
    x = torch.linspace(2, 5, 7)
    y, powers = torch.sin(x), torch.stack([x ** 2, x, torch.ones(7)], 1)
    w = torch.zeros(3, requires_grad=True)
    lr, losses = 1e-4 if cured else 1e-2, []
    for _ in range(100):
        prediction = powers @ w
        loss = ((prediction - y) ** 2).sum()
        losses.append(loss.item())
        if math.isinf(losses[-1]):
            return losses
        loss.backward()
        with torch.no_grad():
            w -= lr * w.grad
            w.grad.zero_()
    return losses


@death(step=7, phase="loss", module="", operation="mse_loss", line="F.mse_loss(rent(homes).squeeze(1), euros)",
       verdict="steps too long", source="https://github.com/pytorch/pytorch/issues/5953")
def lbfgs_closure(cured):
    """A linear model is fitted with LBFGS, whose steps are right as they are, five times as far."""
    torch.manual_seed(0)
    homes = torch.rand(80, 3)
    euros = homes @ torch.tensor([24.0, -16.0, 8.0]) + 4 + 0.8 * torch.randn(80)
    rent = nn.Linear(3, 1)
    optimizer = optim.LBFGS(rent.parameters(), lr=1 if cured else 5, max_iter=5)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(rent(homes).squeeze(1), euros)
        loss.backward()
        return loss

    for _ in range(12):
        losses.append(optimizer.step(closure).item())
        if not math.isfinite(losses[-1]):
            break
    return losses


class Cubes(nn.Module):
    """Every column, its square and its cube."""

    def __init__(self, columns):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3 * columns, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.mlp(torch.cat((x, x ** 2, x ** 3), 1)).squeeze(1)


@death(step=1, phase="loss", module="", operation="mse_loss", line="F.mse_loss(model(X), y)", verdict="wrong scale",
       source="https://github.com/pytorch/pytorch/issues/6610")
def cubes_of_prices(cured):
    """Prices in the millions are cubed for a small network, and the first squared error is beyond 3e38."""
    torch.manual_seed(0)
    X = 4e6 * (1 + torch.rand(64, 4))
    y = X.mean(1) / 1e6
    if cured:
        X = X / 1e6
    model = Cubes(4)
    optimizer = optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    losses = [0.0]
    while math.isfinite(losses[-1]) and len(losses) <= 10:
        loss = F.mse_loss(model(X), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[1:]
