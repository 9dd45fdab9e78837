"""Losses that die: roots, logarithms, powers, norms and means at the edge of their domain."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from . import death

mse = nn.MSELoss()


def rmse(prediction, target):
    return torch.sqrt(mse(prediction, target))


@death(step=7, phase="backward", module="", operation="div", line="torch.sqrt(mse(prediction, target))",
       verdict="infinite slope",
       source="https://discuss.pytorch.org/t/function-mselossbackward-returned-nan-values-in-its-0th-output/94875")
def rmse_of_an_exact_batch(cured):
    """Rain gauges: in a dry week a net without biases is exactly right, and a root has no slope at 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False))
    criterion = mse if cured else rmse
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for week in range(1, 21):
        gauges = torch.zeros(8, 6) if week == 7 else torch.rand(8, 6)
        loss = criterion(net(gauges), gauges.sum(1, keepdim=True))
        losses.append(loss.item())
        if not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def distillation(logits, labels, teacher):
    x = torch.sum(F.softmax(teacher, dim=-1) * F.log_softmax(logits, dim=-1), dim=-1)
    mask = (labels != -100).float()
    return -torch.sum(x * mask) / torch.sum(mask)


@death(step=250, phase="loss", module="", operation="div", line="/ torch.sum(mask)", verdict="division by zero",
       source="https://github.com/microsoft/LMOps/issues/38")
def masked_mean_late(cured):
    """Distillation, well for 249 steps; then the texts of a batch are cut before their answers, and no token counts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 6))
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3), []
    while len(losses) < 280 and (not losses or math.isfinite(losses[-1])):
        X, labels, teacher = torch.randn(4, 5, 12), torch.randint(6, (4, 5)), torch.randn(4, 5, 6)
        prompt = 5 if len(losses) == 249 else 2
        if cured and prompt == 5:
            prompt = 4
        labels[:, :prompt] = -100
        loss = distillation(net(X), labels, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@death(step=1, phase="loss", module="", operation="log", line="torch.log(F.softmax(logits, dim=-1))",
       verdict="log of zero", source="https://github.com/allenai/allennlp/issues/2797")
def log_of_a_softmax(cured):
    """Word vectors that nobody scaled give scores in the hundreds, and a softmax of them that is exactly 0."""
    torch.manual_seed(0)
    vectors, labels = 200 * torch.randn(64, 50), F.one_hot(torch.randint(4, (64,)), 4).float()
    net = nn.Linear(50, 4)
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.01)
    history = []
    for _epoch in range(5):
        for i in range(0, 64, 16):
            logits = net(vectors[i:i + 16])
            log_probs = F.log_softmax(logits, dim=-1) if cured else torch.log(F.softmax(logits, dim=-1))
            loss = -(labels[i:i + 16] * log_probs).sum(-1).mean()
            history.append(loss.item())
            if math.isnan(history[-1]) or math.isinf(history[-1]):
                return history
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return history


@death(step=9, phase="loss", module="", operation="log", line="torch.log(1 - p)", verdict="log of zero",
       source="https://forums.fast.ai/t/cross-entropy-error-log-1-1-inf/1441")
def log_of_a_sure_sigmoid(cured):
    """Cross entropy by hand: as soon as the net is so sure that its sigmoid is 1, there is a 0 * log(0)."""
    torch.manual_seed(1)
    X = torch.randn(200, 10)
    y = (X[:, :1] > 0).float()
    net = nn.Sequential(nn.Linear(10, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
    losses = []
    for _ in range(30):
        p = net(X).clamp(1e-6, 1 - 1e-6) if cured else net(X)
        loss = -torch.mean(y * torch.log(p) + (1 - y) * torch.log(1 - p))
        losses += [loss.item()]
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class LogBands(nn.Module):
    def __init__(self, bands, clamped):
        super().__init__()
        self.gain, self.clamped = nn.Parameter(torch.full((bands,), 2.0)), clamped

    def forward(self, energy):
        x = self.gain * energy
        loud = x.clamp(min=1) if self.clamped else x
        return torch.where(x > 1, torch.log(loud), x - 1)


@death(step=4, phase="backward", module="compress", operation="div", line="torch.where(x > 1, torch.log(loud), x - 1)",
       verdict="where trap", source="https://github.com/pytorch/pytorch/issues/108618")
def where_trap(cured):
    """Loud bands as logarithms, soft ones as they are: the branch not taken is log(0), and has a gradient too."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(compress=LogBands(12, clamped=cured), hidden=nn.Linear(12, 16), act=nn.Tanh(),
                                    classes=nn.Linear(16, 3)))
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3)

    def clips():
        for i in range(12):
            energy = torch.rand(8, 12) + 0.1
            if i == 3:
                energy[5, 9:] = 0
            yield energy, torch.randint(3, (8,))

    losses = []
    for energy, word in clips():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(energy), word)
        losses.append(loss.item())
        if losses[-1] != losses[-1]:
            return losses
        loss.backward()
        optimizer.step()
    return losses


class FocalLoss(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, target):
        log_pt = F.log_softmax(logits, dim=1).gather(1, target[:, None])
        pt = log_pt.exp()
        return (-(1 - pt) ** self.gamma * log_pt).mean()


@death(step=11, phase="backward", module="", operation="pow", line="(1 - pt) ** self.gamma", verdict="infinite slope",
       source="https://github.com/clcarwin/focal_loss_pytorch/issues/13")
def focal_gamma_below_one(cured):
    """Focal loss with gamma 0.5: an example of which the net is quite sure has an infinite slope."""
    torch.manual_seed(0)
    net, criterion = nn.Linear(5, 2), FocalLoss(gamma=2.0 if cured else 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for i in range(25):
        target = torch.randint(2, (16,))
        images = torch.randn(16, 5) + 3 * target[:, None] - 1.5
        if i == 10:
            images[3] *= 40  # overexposed
        loss = criterion(net(images), target)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class SpeakerEncoder(nn.Module):
    def __init__(self, safe):
        super().__init__()
        self.frames, self.linear, self.safe = nn.Linear(20, 32, bias=False), nn.Linear(32, 8, bias=False), safe

    def forward(self, mels):
        x = F.relu(self.linear(torch.tanh(self.frames(mels)).mean(1)))
        return F.normalize(x) if self.safe else x / torch.norm(x, dim=1, keepdim=True)


@death(step=5, phase="forward", module="", operation="div", line="x / torch.norm(x, dim=1, keepdim=True)",
       verdict="division by zero", source="https://github.com/CorentinJ/Real-Time-Voice-Cloning/pull/678")
def normalised_silence(cured):
    """Voices as points of a sphere: an utterance without a sound is the vector 0, which has no direction."""
    torch.manual_seed(0)
    encoder, speakers = SpeakerEncoder(safe=cured), nn.Parameter(F.normalize(torch.randn(6, 8)))
    optimizer = torch.optim.Adam([*encoder.parameters(), speakers], lr=1e-3)
    losses = []
    for i in range(10):
        mels, who = torch.randn(12, 15, 20), torch.randint(6, (12,))
        if i == 4:
            mels[7] = 0
        loss = F.cross_entropy(10 * encoder(mels) @ F.normalize(speakers).T, who)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 3.0)
        optimizer.step()
    return losses


def info_nce(a, b, temperature=0.07):
    similarity = torch.exp(a @ b.T / temperature)
    return -torch.log(similarity.diagonal() / similarity.sum(dim=1)).mean()


@death(step=6, phase="loss", module="", operation="exp", line="torch.exp(a @ b.T / temperature)",
       verdict="exp overflow", source="https://github.com/Lightning-Universe/lightning-bolts/issues/320")
def contrastive_not_normalised(cured):
    """Two noisy views, pulled together by their dot product: the vectors grow until its exponential is inf."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    losses = []
    for _step in range(40):
        sounds = torch.randn(32, 24)
        views = [encoder(sounds + 0.5 * torch.randn_like(sounds)) for _ in range(2)]
        if cured:
            views = [F.normalize(view, dim=1) for view in views]
        loss = info_nce(*views)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
