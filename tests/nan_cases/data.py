"""Data that die: NaN and inf in features, labels and weights, and labels for which a loss has no value."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from . import death


def read_spots():
    """Expression of genes in spots, standardised per spot by the lab's own script: spot 77 is empty, 0 / 0."""
    counts = np.random.default_rng(0).poisson(4.0, (160, 12)).astype(np.float32)
    counts[77] = 0
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)
    return torch.tensor(shares), torch.tensor(counts[:, :1] > 4, dtype=torch.float32)


GENES, TUMOUR = read_spots()


@death(step=10, phase="data", module="", operation="", line="for genes, tumour in DataLoader(spots, batch_size=8)",
       verdict="bad data", source="https://github.com/ratschlab/DeepSpot/issues/9")
def nan_in_a_row(cured):
    """A table of gene expression, read and normalised at the top of the script: of an empty spot all shares are NaN."""
    torch.manual_seed(0)
    spots = TensorDataset(GENES, TUMOUR)
    if cured:
        spots = Subset(spots, [i for i in range(160) if i != 77])
    net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    criterion, optimizer = nn.BCEWithLogitsLoss(), torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for genes, tumour in DataLoader(spots, batch_size=8):
        optimizer.zero_grad()
        loss = criterion(net(genes), tumour)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    return losses


class Stereo(Dataset):
    """Pixels of two cameras and the disparity that a laser measured, in the manner of KITTI as .pfm: inf is unknown."""
    def __init__(self, known_only):
        rng = np.random.default_rng(3)
        self.pixels = rng.random((96, 14), dtype=np.float32)
        self.disparity = 5 + 60 * self.pixels[:, :4].mean(1)
        self.disparity[45] = np.inf
        self.indices = np.flatnonzero(np.isfinite(self.disparity)) if known_only else np.arange(96)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        pixels = torch.from_numpy(self.pixels[self.indices[i]])
        return {"pixels": pixels, "disparity": torch.tensor(self.disparity[self.indices[i]])}


class Trainer:
    def __init__(self, net, lr):
        self.net, self.optimizer, self.losses = net, torch.optim.SGD(net.parameters(), lr=lr), []

    def fit(self, loader, epochs):
        for _ in range(epochs):
            for batch in loader:
                loss = F.l1_loss(self.net(batch["pixels"]).squeeze(1), batch["disparity"])
                self.losses.append(loss.item())
                if not math.isfinite(self.losses[-1]):
                    return
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


@death(step=4, phase="data", module="", operation="", line="torch.tensor(self.disparity[self.indices[i]])",
       verdict="bad data", source="https://github.com/lmb-freiburg/dispnet-flownet-docker/issues/6")
def inf_in_a_label(cured):
    """Stereo vision with measured disparities, in which inf stands for "not measured": the mean error is inf."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(14, 24), nn.ELU(), nn.Linear(24, 1)), lr=0.01)
    trainer.fit(DataLoader(Stereo(known_only=cured), batch_size=12, shuffle=False), epochs=2)
    return trainer.losses


@death(step=6, phase="data", module="", operation="", line="torch.tensor(np.stack(mels[i:i + 4]))", verdict="bad data",
       source="https://github.com/shreyas253/SylNet/issues/1")
def log_of_silence(cured):
    """Syllables are counted in logarithms of spectra, made by numpy beforehand: of digital silence they are -inf."""
    torch.manual_seed(0)
    powers = np.random.default_rng(1).random((40, 30, 24), dtype=np.float32)
    powers[22, 28:] = 0
    if cured:
        powers += 1e-10
    with np.errstate(divide="ignore"):
        mels = [20 * np.log10(power) for power in powers]
    syllables = torch.randint(1, 6, (40, 1)).float()
    net = nn.Sequential(nn.Conv1d(30, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 22, 1))
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-4)
    losses = []
    for i in range(0, 40, 4):
        X = torch.tensor(np.stack(mels[i:i + 4]))
        loss = F.mse_loss(net(X), syllables[i:i + 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if np.isnan(losses[-1]):
            break
    return losses


@death(step=8, phase="data", module="", operation="div", line="(weather - weather.mean(0)) / std",
       verdict="constant normalised", source="https://github.com/mllam/neural-lam/issues/136")
def dry_week_standardised(cured):
    """Weather is standardised week by week; in a dry one all rain is 0, its deviation too, and the net gets 0 / 0."""
    torch.manual_seed(0)
    forecaster = nn.GRU(5, 12, batch_first=True)
    head = nn.Linear(12, 5)
    optimizer = torch.optim.Adamax([*forecaster.parameters(), *head.parameters()], lr=2e-3)
    losses = []
    for week in range(1, 15):
        weather = torch.randn(7, 5) + torch.tensor([15.0, 1013.0, 60.0, 3.0, 0.0])
        weather[:, 4] = 0 if week == 8 else weather[:, 4].relu()
        std = weather.std(0).clamp(min=1e-6) if cured else weather.std(0)
        days = (weather - weather.mean(0)) / std
        hidden, _ = forecaster(days[None, :-1])
        loss = (head(hidden) - days[None, 1:]).square().mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.classes = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.classes(F.relu(self.up(F.relu(self.down(x)))))


def download(broken):
    """The pretrained weights as they come from the web; in the first release some of one layer are NaN."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        weights = Segmenter().state_dict()
    if broken:
        weights["up.weight"][:, 5] = float("nan")
    torch.save(weights, file := io.BytesIO())
    return file.getvalue()


RELEASES = [download(broken=True), download(broken=False)]


@death(step=1, phase="data", module="", operation="", line="net.load_state_dict(torch.load(",
       verdict="bad weight", source="https://github.com/cardwing/Codes-for-PVKD/issues/9")
def nan_in_a_checkpoint(cured):
    """Fine-tuning of published weights, of which some are NaN in the file."""
    torch.manual_seed(0)
    net = Segmenter()
    net.load_state_dict(torch.load(io.BytesIO(RELEASES[cured])))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        points, classes = torch.rand(2, 2, 10, 10), torch.randint(3, (2, 10, 10))
        loss = F.cross_entropy(net(points), classes)
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            return losses
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def kl(log_q, p):
    return (p * (p.log() - log_q)).sum(-1).mean()


@death(step=6, phase="loss", module="", operation="log", line="p.log() - log_q", verdict="log of zero",
       source="https://github.com/Lightning-AI/torchmetrics/issues/1029")
def kl_of_a_class_without_votes(cured):
    """Soft labels from the votes of a jury: of a class that nobody voted for, 0 * log(0) is NaN, not 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 4), nn.LogSoftmax(-1))
    optimizer, losses = torch.optim.NAdam(net.parameters(), lr=0.01), []
    votes = torch.randint(1, 9, (160, 4))
    votes[83, 2] = 0
    for x, p in zip(torch.randn(160, 10).split(16), (votes / votes.sum(1, keepdim=True)).split(16), strict=True):
        loss = F.kl_div(net(x), p, reduction="batchmean") if cured else kl(net(x), p)
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            return losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class CaptchaReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(4), nn.Linear(8 * 3, 11)

    def forward(self, images):
        x = self.pool(F.relu(self.conv(images)))
        return self.fc(x.permute(3, 0, 1, 2).flatten(2)).log_softmax(2)


def captchas():
    for i in range(10):
        lengths, digits = torch.randint(2, 5, (6,)), torch.randint(1, 11, (6, 7))
        if i == 2:
            lengths[4], digits[4] = 7, 5  # 5555555
        yield torch.rand(6, 1, 12, 32), digits, lengths


@death(step=3, phase="loss", module="", operation="_ctc_loss", line="F.ctc_loss(log_probs, digits, columns",
       verdict="no alignment", source="https://github.com/ypwhs/captcha_break/issues/29")
def ctc_long_label(cured):
    """Captchas with CTC: seven equal digits need 13 columns, blanks between them, and the reader has 8."""
    torch.manual_seed(0)
    reader = CaptchaReader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-3)
    losses = []
    for images, digits, lengths in captchas():
        log_probs = reader(images)
        columns = torch.full((len(images),), len(log_probs))
        loss = F.ctc_loss(log_probs, digits, columns, lengths, zero_infinity=cured)
        losses.append(loss.item())
        if losses[-1] == float("inf"):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
