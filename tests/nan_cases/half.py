"""Deaths in float16, whose numbers end at 65504 and begin at 6e-8."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import death


@death(step=4, phase="loss", module="", operation="mse_loss", line="reduction=\"sum\"", verdict="float16 range",
       source="https://github.com/qubvel-org/segmentation_models.pytorch/issues/463")
def summed_in_half(cured):
    """A depth network in float16 sums its squared errors over growing images, until the sum does not fit."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1)).half()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    losses = []
    for size in (8, 10, 12, 20, 20):
        image = torch.rand(6, 1, size, size).half()
        metres, output = 6 + 2 * image, net(image)
        if cured:
            metres, output = metres.float(), output.float()
        loss = F.mse_loss(output, metres, reduction="sum")
        losses.append(loss.item())
        if math.isinf(losses[-1]):
            return losses
        net.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class RMSNorm(nn.Module):
    def __init__(self, features, eps):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(features)), eps

    def forward(self, x):
        return self.gain * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Tagger(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.words = nn.Embedding(30, 16, padding_idx=0)
        self.norm, self.out = RMSNorm(16, eps), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.out(self.norm(self.words(tokens)))


@death(step=3, phase="forward", module="norm", operation="div", line="/ torch.sqrt(x.pow(2).mean(-1, keepdim=True)",
       verdict="vanished eps", source="https://github.com/huggingface/diffusers/pull/13316")
def vanished_eps(cured):
    """A tagger has its eps of 1e-8 from float32; in float16 that is 0, and so is the vector of a padding."""
    torch.manual_seed(0)
    tagger = Tagger(eps=1e-4 if cured else 1e-8).half()
    optimizer = torch.optim.SGD(tagger.parameters(), lr=0.1, momentum=0.5)
    losses = []
    for i in range(6):
        tokens, labels = torch.randint(1, 30, (8, 7)), torch.randint(4, (8, 7))
        if i == 2:
            tokens[5, 4:], labels[5, 4:] = 0, -100
        loss = nn.CrossEntropyLoss()(tagger(tokens).float().flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.items, self.score = nn.EmbeddingBag(60, 12, mode="sum"), nn.Linear(12, 1)

    def forward(self, baskets):
        return self.score(self.items(baskets).relu()).squeeze(1)


@death(step=1, phase="update", module="items", operation="addcdiv_", line="optimizer.step()",
       verdict="Adam's denominator", source="https://github.com/pytorch/pytorch/issues/8860")
def adam_in_half(cured):
    """A whole network in float16 with Adam as it comes: an item in no basket has a step of 0 / (sqrt(0) + eps)."""
    torch.manual_seed(0)
    model = Bags().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4 if cured else 1e-8)
    losses = []
    for _ in range(8):
        baskets = torch.randint(60, (6, 5))
        target = (baskets < 20).sum(1).half()
        optimizer.zero_grad()
        loss = (model(baskets) - target).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses
    return losses


def scaled_steps(net, optimizer, batches, scale, growth):
    """The loss is scaled against underflow, and the scale grows; nobody looks whether a gradient is inf."""
    for X, y in batches:
        with torch.autocast(X.device.type, dtype=torch.float16):
            loss = F.cross_entropy(net(X), y)
        yield loss.item()
        (scale * loss).backward()
        for p in net.parameters():
            p.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        scale *= growth


@death(step=7, phase="backward", module="2", operation="mm", line="F.cross_entropy(net(X), y)",
       verdict="float16 range", source="https://github.com/locuslab/ect/pull/13")
def loss_scale(cured):
    """Mixed precision with a loss scale by hand that grows fourfold at every step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.NAdam(net.parameters(), lr=1e-3)
    batches = [(torch.randn(16, 10), torch.randint(3, (16,))) for _ in range(14)]
    losses = []
    for loss in scaled_steps(net, optimizer, batches, scale=2.0 ** 8, growth=1 if cured else 4):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    return losses
