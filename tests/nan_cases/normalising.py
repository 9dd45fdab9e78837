"""Deaths of means, spreads, norms and angles of what is too little or too equal."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from . import death


class MinibatchStd(nn.Module):
    """Adds a channel with the spread over the batch, for a discriminator."""

    def forward(self, x):
        spread = torch.std(x, dim=0).mean()
        return torch.cat((x, spread.expand(len(x), 1, *x.shape[2:])), 1)


@death(step=9, phase="forward", module="2", operation="std", line="torch.std(x, dim=0).mean()", verdict="spread of one",
       source="https://github.com/ziwei-jiang/PGGAN-PyTorch/issues/1")
def minibatch_std(cured):
    """A discriminator looks at the spread over the batch, and of 65 images in batches of 8 one is left alone."""
    torch.manual_seed(0)
    images = torch.rand(65, 3, 8, 8)
    loader = DataLoader(TensorDataset(images), batch_size=8, drop_last=cured, shuffle=True)
    D = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), MinibatchStd(), nn.Flatten(), nn.Linear(9 * 16, 1))
    optimizer = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(2):
        for (real,) in loader:
            fake = torch.rand_like(real) ** 2
            loss = F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if losses[-1] != losses[-1]:
                return losses
    return losses


def edges(masks):
    """Where a class meets another one."""
    return F.max_pool2d(masks, 3, 1, 1) != -F.max_pool2d(-masks, 3, 1, 1)


class Trainer:
    def __init__(self, model, cured, accumulate=2):
        self.model, self.cured, self.accumulate = model, cured, accumulate
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, nesterov=True, momentum=0.9)
        self.losses = []

    def loss(self, images, masks):
        each = F.binary_cross_entropy_with_logits(self.model(images), masks, reduction="none")
        at_edges = each[edges(masks)]
        if self.cured and at_edges.numel() == 0:
            return each.mean()
        return each.mean() + 2 * at_edges.mean()

    def fit(self, batches):
        for i, (images, masks) in enumerate(batches):
            loss = self.loss(images, masks)
            (loss / self.accumulate).backward()
            self.losses.append(loss.item())
            if not math.isfinite(self.losses[-1]):
                break
            if (i + 1) % self.accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self.losses


@death(step=3, phase="loss", module="", operation="mean", line="2 * at_edges.mean()", verdict="mean of nothing",
       source="https://github.com/Deci-AI/super-gradients/issues/912")
def no_edges(cured):
    """A segmentation weighs the edges of its masks, with gradients of two batches each; the sixth batch has no edge."""
    torch.manual_seed(0)
    batches = [(torch.rand(2, 1, 10, 10), (torch.rand(2, 1, 10, 10) > 0.7).float()) for _ in range(8)]
    batches[5][1].zero_()
    return Trainer(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1)), cured).fit(batches)


class Standardise(nn.Module):
    """A batch normalisation without weights, and with the running means for later."""

    def __init__(self, features, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x):
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        if self.training:
            self.mean.lerp_(mean.detach(), 0.1)
        return (x - mean) / (variance + self.eps).sqrt()


class Forecast(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.norm = Standardise(5, eps)
        self.mlp = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, weather):
        return self.mlp(self.norm(weather))


@death(step=6, phase="forward", module="norm", operation="div", line="(x - mean) / (variance + self.eps).sqrt()",
       verdict="constant normalised", source="https://github.com/mllam/neural-lam/issues/136")
def dry_month(cured):
    """A forecast standardises every batch of its weather by itself, and there is one in which it never rains."""
    torch.manual_seed(0)
    model = Forecast(eps=1e-5 if cured else 0.0).train()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    criterion, losses = nn.HuberLoss(), []
    for month in range(12):
        weather = torch.randn(30, 5)
        weather[:, 3] = 0 if month == 5 else weather[:, 3].relu()  # rain
        loss = criterion(model(weather), weather[:, :2].sum(1, keepdim=True))
        losses.append(loss.detach())
        if loss.isnan():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(losses).tolist()


class VectorNorm(nn.Module):
    """Normalises the lengths of vectors over the batch and leaves their directions."""

    def __init__(self, channels, eps):
        super().__init__()
        self.bn, self.eps = nn.BatchNorm1d(channels), eps

    def forward(self, x):
        length = torch.linalg.vector_norm(x, dim=-1)
        return x / (length + self.eps)[..., None] * self.bn(length)[..., None]


class PointNet(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.lift, self.norm, self.head = nn.Linear(1, 6, bias=False), VectorNorm(6, eps), nn.Linear(6, 3)

    def forward(self, clouds):
        vectors = self.lift(clouds[..., None]).transpose(2, 3)  # clouds × points × channels × 3
        vectors = self.norm(vectors.flatten(0, 1)).unflatten(0, clouds.shape[:2])
        return self.head(vectors.mean(1).norm(dim=-1))


@death(step=5, phase="forward", module="norm", operation="div", line="x / (length + self.eps)[..., None]",
       verdict="division by zero", source="https://github.com/FlyingGiraffe/vnn/pull/4")
def padded_cloud(cured):
    """Points are normalised to directions; a small cloud is filled up with points at the origin, which have none."""
    torch.manual_seed(0)
    model = PointNet(eps=1e-6 if cured else 0)
    optimizer, losses = torch.optim.RAdam(model.parameters(), lr=1e-3), []
    for step in range(1, 9):
        clouds, kind = torch.randn(6, 20, 3), torch.randint(3, (6,))
        if step == 5:
            clouds[2, 15:] = 0
        optimizer.zero_grad()
        loss = F.cross_entropy(model(clouds), kind)
        loss.backward()
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            break
        optimizer.step()
    return losses


def rotation(vector):
    """The rotation about a vector, of twice the angle whose tangent is its length."""
    w, x, y, z = F.normalize(F.pad(vector, (1, 0), value=1.0), dim=-1).unbind(-1)
    return torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), -1).unflatten(-1, (3, 3))


def angle_between(a, b, limit):
    cosine = ((a * b).sum((1, 2)) - 1) / 2
    return torch.acos(cosine.clamp(-limit, limit) if limit else cosine)


@death(step=6, phase="loss", module="", operation="acos", line="torch.acos(cosine", verdict="outside the domain",
       source="https://github.com/papagina/RotationContinuity/issues/1")
def angle_of_equals(cured):
    """A network turns the last pose by what it sees: nothing, once, and rounding makes the trace of equals exceed 3."""
    torch.manual_seed(0)
    spin = nn.Sequential(nn.Linear(6, 24, bias=False), nn.Tanh(), nn.Linear(24, 3, bias=False))
    optimizer = torch.optim.Adam(spin.parameters(), lr=1e-3, amsgrad=True)
    losses = []
    for i in range(10):
        pose, seen = rotation(torch.randn(64, 3)), torch.randn(64, 6) * (i != 5)
        target = pose @ rotation(seen[:, :3] / 5)
        loss = angle_between(pose @ rotation(spin(seen) / 10), target, 1 - 1e-6 if cured else None).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(losses[-1]):
            break
    return losses


class Angle(nn.Module):
    """Of a quaternion."""

    def forward(self, q):
        return 2 * torch.acos(q[0])


class SafeAngle(nn.Module):
    def forward(self, q):
        return 2 * torch.atan2(torch.linalg.vector_norm(q[1:]), q[0])


class Camera(nn.Module):
    def __init__(self, angle):
        super().__init__()
        self.pose, self.shift, self.angle = nn.Parameter(torch.eye(4)[0]), nn.Parameter(torch.zeros(3)), angle

    def forward(self, points):
        q = self.pose / torch.linalg.vector_norm(self.pose)
        return points @ rotation(q[1:] / q[0]).T + self.shift, self.angle(q)


@death(step=1, phase="backward", module="angle", operation="rsqrt", line="2 * torch.acos(q[0])",
       verdict="infinite slope", source="https://github.com/kornia/kornia/pull/4228")
def pose_from_identity(cured):
    """The pose of a camera is refined from the identity, whose angle is acos(1), and large angles cost something."""
    torch.manual_seed(0)
    camera = Camera(SafeAngle() if cured else Angle())
    optimizer = torch.optim.ASGD(camera.parameters(), lr=0.02)
    points = torch.randn(30, 3)
    seen = points @ rotation(torch.tensor([0.1, 0.05, -0.2])).T + 0.3
    losses = []
    for _ in range(10):
        moved, angle = camera(points)
        loss = (moved - seen).square().mean() + 0.01 * angle ** 2
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses
