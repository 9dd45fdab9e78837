"""Deaths of networks that generate or embed: densities, distances and a gradient of a gradient."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from . import death


class VAE(nn.Module):
    def __init__(self, columns, latent=4):
        super().__init__()
        self.encode, self.mu, self.logvar = nn.Linear(columns, 32), nn.Linear(32, latent), nn.Linear(32, latent)
        self.decode = nn.Sequential(nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, columns))

    def forward(self, x):
        h = F.relu(self.encode(x))
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z), mu, logvar


def elbo(reconstruction, x, mu, logvar):
    kl = -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum()
    return F.mse_loss(reconstruction, x, reduction="sum") + kl


@death(step=5, phase="forward", module="", operation="exp", line="torch.exp(0.5 * logvar)", verdict="exp overflow",
       source="https://github.com/vanderschaarlab/synthcity/issues/331")
def vae_logvar(cured):
    """A VAE learns from a table of customers as it is, until a rich one comes, whose log-variance is enormous."""
    torch.manual_seed(0)
    table = torch.rand(160, 10) * torch.tensor([1.0, 1, 1, 1, 5, 5, 10, 10, 40, 60])
    table[70, 9] = 1e5
    if cured:
        table = (table - table.mean(0)) / table.std(0)
    vae = VAE(10)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    losses = []
    for (x,) in DataLoader(TensorDataset(table), batch_size=16):
        reconstruction, mu, logvar = vae(x)
        loss = elbo(reconstruction, x, mu, logvar)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class Critic(nn.Module):
    def __init__(self, columns, hidden=8):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(columns, hidden), nn.Linear(hidden, 1)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def gradient_penalty(critic, real, fake, eps):
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    slope, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norm = torch.sqrt((slope ** 2).sum(1) + eps)
    return ((norm - 1) ** 2).mean()


@death(step=13, phase="backward", module="", operation="div", line="torch.sqrt((slope ** 2).sum(1) + eps)",
       verdict="infinite slope", source="https://github.com/pytorch/pytorch/issues/2534")
def wgan_gp(cured):
    """A WGAN with a norm of its own in the gradient penalty meets a point at which all ReLUs of the critic are off."""
    torch.manual_seed(6)
    generator, critic = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)), Critic(4)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    d_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    losses = []
    for i in range(30):
        real, fake = torch.randn(8, 4) + 1, generator(torch.randn(8, 3))
        penalty = gradient_penalty(critic, real, fake.detach(), 1e-12 if cured else 0)
        d_loss = critic(fake.detach()).mean() - critic(real).mean() + 10 * penalty
        losses.append(d_loss.item())
        if math.isnan(losses[-1]):
            return losses
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        if i % 3 == 2:  # the generator learns at every third step of the critic
            g_loss = -critic(generator(torch.randn(8, 3))).mean()
            g_optimizer.zero_grad()
            g_loss.backward()
            g_optimizer.step()
    return losses


class DepthNet(nn.Module):
    def __init__(self, cured):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 8, 3, padding=1), nn.ELU())
        self.head, self.cured = nn.Conv2d(8, 2, 1), cured
        nn.init.constant_(self.head.bias, 0.5)

    def forward(self, image):
        depth, spread = self.head(self.body(image)).unbind(1)
        return depth, F.softplus(spread) if self.cured else spread


@death(step=5, phase="loss", module="", operation="log", line="torch.log(spread)", verdict="log of a negative",
       source="https://github.com/mattpoggi/mono-uncertainty/issues/13")
def gaussian_nll(cured):
    """A depth network has a second channel for its error, whose logarithm is taken; nothing keeps it positive."""
    torch.manual_seed(0)
    net = DepthNet(cured)
    average = copy.deepcopy(net).requires_grad_(False)  # of the weights, for the evaluation
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    while len(losses) < 25 and (not losses or math.isfinite(losses[-1])):
        image = torch.rand(4, 1, 12, 12)
        depth, spread = net(image)
        error = (depth - F.avg_pool2d(image, 3, 1, 1).squeeze(1)).abs()
        loss = (error / spread + torch.log(spread)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, weight in zip(average.parameters(), net.parameters(), strict=True):
            kept.lerp_(weight.detach(), 0.01)
        losses.append(loss.item())
    return losses


class MixtureDensity(nn.Module):
    def __init__(self, components, cured):
        super().__init__()
        self.hidden, self.cured = nn.Linear(1, 24), cured
        self.weights, self.mu, self.sigma = (nn.Linear(24, components) for _ in range(3))

    def forward(self, x):
        h = F.relu(self.hidden(x))
        if self.cured:
            pi = F.softmax(self.weights(h), dim=1)
        else:
            pi = torch.exp(self.weights(h))
            pi = pi / pi.sum(1, keepdim=True)
        return torch.distributions.Normal(self.mu(h), 1 + F.softplus(self.sigma(h))), pi


@death(step=4, phase="forward", module="", operation="exp", line="torch.exp(self.weights(h))", verdict="exp overflow",
       source="https://github.com/tonyduan/mixture-density-network/pull/4")
def mixture_density(cured):
    """A mixture of sales by the day, in the order of the days, has a softmax of its own that takes no maximum off."""
    torch.manual_seed(3)
    mixture = MixtureDensity(5, cured)
    optimizer = torch.optim.SGD(mixture.parameters(), lr=1e-6)
    losses = []
    for day in torch.arange(1.0, 1001).split(100):
        normal, pi = mixture(day[:, None])
        sales = 3 + day[:, None] / 100 + torch.randn(len(day), 1)
        loss = -torch.logsumexp(torch.log(pi + 1e-30) + normal.log_prob(sales), dim=1).mean()
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def contrastive(a, b, same, eps, margin=2.0):
    distance = (a - b).pow(2).sum(1).add(eps).sqrt()
    return torch.where(same, distance ** 2, F.relu(margin - distance) ** 2).mean()


@death(step=9, phase="backward", module="", operation="div", line=".add(eps).sqrt()", verdict="infinite slope",
       source="https://github.com/adambielski/siamese-triplet/issues/18")
def siamese_twins(cured):
    """A siamese network learns from pairs of which the ninth batch has one of an image and itself."""
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.PReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.RMSprop(embed.parameters(), lr=1e-3)
    losses = []
    for i in range(14):
        first, second, same = torch.rand(10, 6, 6), torch.rand(10, 6, 6), torch.rand(10) < 0.5
        second[same] = first[same] + 0.1 * torch.randn(int(same.sum()), 6, 6)
        if i == 8:
            second[4], same[4] = first[4], True
        loss = contrastive(embed(first), embed(second), same, eps=1e-9 if cured else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] != losses[-1]:
            break
    return losses
