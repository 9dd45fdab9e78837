"""What two notebooks or more of this series share; read it from top to bottom.

    parameters   Parameters, check_parameters          what a notebook accepts
    machine      find_device, find_precision, environment
    data         load_dataset, load_data               MNIST and Fashion-MNIST, enlarged
    networks     LeNet, AlexNet, init_weights, add_norms
    training     train, evaluate, History
    diagnosis    final_loss, outcome                   what became of a run; where a NaN was born says whynan.py
    results      save_results, Sweep, open_sweep       one JSON file a run, or a sweep of many
    figures      STYLE, show                           one look

Shapes are written (batch, channel, height, width). A *step* is one mini-batch; steps count from 1.
"""

import base64
import contextlib
import ctypes
import functools
import gzip
import html
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import zlib
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from IPython import display, get_ipython
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json, to_jsonable_python
from torch import distributed, nn
from torch.utils.data import DistributedSampler
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
# Read by torch at its first large allocation, Linux only: without huge pages a step of AlexNet on a few images
# spends a seventh of its time on page faults, for 233 MB of fresh gradients.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    # Freed tensors of 4 MiB go back to the system at once; by itself glibc lets up to half a GB of them pile up.
    with contextlib.suppress(AttributeError):  # another C library, such as musl, has no mallopt
        ctypes.CDLL(None).mallopt(-3, 2**22)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**25)  # M_TRIM_THRESHOLD, or small ones would come and go with each step

# One colour a run through the whole series (Okabe and Ito's colour-blind safe set), each with its own
# line style, so that a figure printed in grey still tells the runs apart.
STYLE = {
    "A": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "B": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "C": {"color": "#0072B2", "linestyle": "-", "marker": "^"},
    "LeNet": {"color": "#009E73", "linestyle": "-.", "marker": "D"},
    "other": {"color": "#CC79A7", "linestyle": ":", "marker": "v"},
}
plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True})


def _picture(figure, alt):
    """{MIME type: data} of a figure: JupyterLab, nbconvert and GitHub read an alternative text in HTML only, and LaTeX
    no HTML. The colours are at most 256, which no eye misses in a plot and halves the file."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    png = base64.b64encode(small.getvalue()).decode()
    return {"text/html": f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png}">', "image/png": png,
            "text/plain": alt}


def show(figure, alt):
    """Display a figure with a text for those who can't see it, and close it."""
    display.display(_picture(figure, alt), raw=True)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- parameters
def _refuse(name, value, allowed):
    return ValueError(f"{name} = {value!r} is not allowed; {name} is {allowed}")


def _writable(path):
    """'' or a path whose folder takes a new file."""
    folder = os.path.dirname(path) or "."
    if path and (os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK)):
        raise ValueError
    return path


_NewFile = Annotated[str, AfterValidator(_writable),
                     Field(description="'' or a file in a folder that exists and can be written")]


class Parameters(BaseModel):
    """Every parameter of the notebooks, with what is allowed; strings are coerced."""

    model_config = ConfigDict(extra="forbid")

    dataset: Literal["MNIST", "FashionMNIST"] = Field("MNIST", description="'MNIST' or 'FashionMNIST'")
    image_size: int = Field(244, ge=67, le=512, description="a whole number of pixels from 67 to 512")
    batch_size: int = Field(100, ge=1, le=10_000, description="a whole number from 1 to 10000")
    lr: float = Field(0.1, gt=0, allow_inf_nan=False, description="a finite number above 0")
    init: Literal["normal", "kaiming", "default", "krizhevsky"] = Field(
        "kaiming", description="'normal', 'kaiming', 'default' or 'krizhevsky'")
    all_relus: bool = Field(False, description="true or false")
    num_epochs: float = Field(1, gt=0, le=1000, description="a number above 0, at most 1000")
    max_steps: int = Field(1, ge=1, le=1_000_000, description="a whole number from 1 to 1000000")
    log_every: int = Field(0, ge=0, description="a whole number from 0")
    train_images: int = Field(0, ge=0, le=60_000, description="a whole number from 0 (all) to 60000")
    test_images: int = Field(0, ge=0, le=10_000, description="a whole number from 0 (all) to 10000")
    seed: int = Field(0, ge=0, lt=2**32, description="a whole number from 0 to 2**32 - 1")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="'auto', 'float32' or 'bfloat16'")
    relus: bool = Field(False, description="true or false")
    images: int = Field(4, ge=2, le=1000, description="a whole number from 2 to 1000")
    steps: int = Field(10, ge=3, le=100_000, description="a whole number from 3 to 100000")
    grid_size: int = Field(7, ge=2, le=100, description="a whole number from 2 to 100")
    seeds: int = Field(3, ge=1, le=100, description="a whole number from 1 to 100")
    sweep: _NewFile = ""
    results_path: _NewFile = ""
    checkpoint: _NewFile = ""


def _refuse_unknown_names():
    """papermill puts its values into a cell of their own, and only warns if no other cell has such a name."""
    known = getattr(get_ipython(), "user_ns", {})
    theirs, ours = ("\n".join(cell for cell in known.get("In", ()) if cell.startswith("# Parameters\n") == injected)
                    for injected in (True, False))
    for name in re.findall(r"^(?!PAPERMILL_)(\w+) = ", theirs, re.MULTILINE):
        if not re.search(rf"^{name}\b.*=", ours, re.MULTILINE):
            raise _refuse(name, known[name], "no parameter of this notebook")


def check_parameters(**given):
    """The given parameters, validated and coerced ("1e-3" becomes 0.001, "false" becomes False).

    Returns a `Parameters`. Raises ValueError, one line with the name, the value and what is allowed.
    """
    _refuse_unknown_names()
    try:
        return Parameters(**given)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        field = Parameters.model_fields.get(name)
        raise _refuse(name, given[name], field.description if field else "no parameter of this series") from None


# ------------------------------------------------------------------------------------------------- machine
def find_device():
    """The fastest device here: CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_precision(device, precision="auto"):
    """The dtype to multiply in: for "auto" bfloat16 where the hardware is faster with it, else float32.

    A processor without bfloat16 instructions emulates them, and is much slower than with float32. Having them is not
    enough: AMD's AVX-512 multiplies twice as fast with them; Intel's needs AMX beside it, and is slower than with
    float32 without (results/benchmark_xeon.json).
    """
    if precision != "auto":
        return getattr(torch, check_parameters(precision=precision).precision)
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch 2.10 does not tell yet: then float32, which is always right
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        avx_pays = features.get("avx512_bf16") and "AMD" in features.get("cpu_name", "")
        pays = features.get("amx_bf16") or avx_pays
    return torch.bfloat16 if pays else torch.float32


def environment():
    """What a figure depends on, as a dict: device, precision, threads, system, versions, commit of this project."""
    device = find_device()
    try:
        command = ["git", "--git-dir=.git", "rev-parse", "--short", "HEAD"]  # not that of a repository around this one
        commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        commit = "unknown"
    processor = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.processor()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({processor})",
        "precision": str(find_precision(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "commit": commit,
    }


# ---------------------------------------------------------------------------------------------------- data
def _read_idx(path):
    """The uint8 tensor in a .gz of LeCun's IDX format: its lengths are big-endian, after a head of four bytes."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    lengths = [int.from_bytes(data[i:i + 4], "big") for i in range(4, 4 + 4 * data[3], 4)]
    return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * len(lengths)).view(*lengths)


def load_dataset(dataset="MNIST", train=True, transform=None, data_dir=HERE / "data"):
    """torchvision's MNIST or FashionMNIST, read from the original .gz files in data/ into memory; never downloads.

    Each .gz is verified by torchvision's own MD5 list. Nothing is written. Raises ValueError for an unknown data set,
    RuntimeError that names a damaged or missing file.
    """
    source = getattr(torchvision.datasets, check_parameters(dataset=dataset).dataset)
    tensors = []
    for name, md5 in source.resources[:2] if train else source.resources[2:]:  # images, labels
        path = pathlib.Path(data_dir, dataset, "raw", name)
        if not check_integrity(str(path), md5):
            state = "damaged" if path.is_file() else "missing"
            raise RuntimeError(f"data file {path} is {state}; bring it back with "
                               f"`git checkout -- data/{dataset}`, or see data/README.md")
        tensors.append(_read_idx(path))
    data = source.__new__(source)  # its __init__ would want extracted files
    torchvision.datasets.VisionDataset.__init__(data, data_dir, transform=transform)
    data.train, data.data, data.targets = train, tensors[0], tensors[1].long()
    return data


class ImageIterator:
    """Yields (X, y): X float32 (batch, 1, image_size, image_size), y int64 (batch,), both on `device`.

    Holds the images as bytes, 28×28, and enlarges a whole batch at once; pixels lie in [0, 1] unless normalised.
    Each pass is one epoch: every image once, in an order that depends on the seed and the epoch's number alone.
    With torch.distributed running, each rank gets its own share (of training images equally many: a few come
    twice where the ranks don't divide their number).
    """

    def __init__(self, images, labels, batch_size, image_size, shuffle, seed, normalize, device, dataset="unnamed"):
        self.images, self.labels = images.to(device), labels.to(device)  # (n, 28, 28) uint8, (n,) int64
        self.batch_size, self.image_size, self.normalize, self.seed = batch_size, image_size, normalize, seed
        self.dataset = dataset
        ranks = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if ranks else (0, 1)
        if shuffle:
            # It draws epoch e of seed s like epoch e - 1 of seed s + 1; far apart, no two seeds meet.
            self.sampler = DistributedSampler(labels, self.ranks, self.rank, shuffle=True, seed=seed << 20)
        else:  # a DistributedSampler repeats images to fill up the last share: wrong where one counts
            self.sampler = range(self.rank, len(labels), self.ranks)
        self.set_epoch(0)

    def __repr__(self):
        return (f"ImageIterator(dataset {self.dataset}, {len(self.labels)} images, CRC of labels "
                f"{zlib.crc32(self.labels.cpu().numpy()):08x}, {self.image_size} pixels, batches of {self.batch_size}, "
                f"seed {self.seed})")

    def __len__(self):
        return math.ceil(len(self.sampler) / self.batch_size)

    def set_epoch(self, epoch, skip=0):
        """The next pass is epoch number `epoch`, without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self):
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(self.epoch)
        skip = self.skip
        self.set_epoch(self.epoch + 1)
        order = torch.tensor(list(self.sampler), device=self.images.device)  # at once: a GPU waits for each copy
        for indices in order.split(self.batch_size)[skip:len(self)]:
            yield self.take(indices)

    def take(self, indices):
        """The batch (X, y) of these images; indices int64 (batch,)."""
        indices = indices.to(self.images.device)
        X = self.images[indices].unsqueeze(1).float() / 255
        X = F.interpolate(X, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        if self.normalize:
            mean, std = self.normalize
            X = (X - mean) / std
        return X, self.labels[indices]


def load_data(dataset="MNIST", batch_size=100, image_size=244, *, train_images=0, test_images=0, normalize=False,
              seed=0, device=None, data_dir=HERE / "data"):
    """(train_iter, test_iter) over MNIST or Fashion-MNIST, two `ImageIterator`s; the training set is shuffled.

    batch_size    images a batch; the last batch of an epoch may be smaller
    image_size    pixels a side, at least the original 28
    train_images, test_images    how many images to use, spread evenly over the set; 0 for all
    normalize     subtract the training pixels' mean, divide by their standard deviation
    device        where the images lie; None finds the fastest

    Raises ValueError (a parameter), RuntimeError (a damaged or missing data file).
    """
    p = check_parameters(dataset=dataset, batch_size=batch_size, train_images=train_images, test_images=test_images,
                         seed=seed)
    if not (isinstance(image_size, int) and 28 <= image_size <= 512):
        raise _refuse("image_size", image_size, "a whole number of pixels from 28 to 512")
    mean_and_std, iterators = None, []
    for train, wanted in ((True, p.train_images), (False, p.test_images)):
        data = load_dataset(p.dataset, train, data_dir=data_dir)
        if normalize and train:
            pixels = data.data.double() / 255
            mean_and_std = pixels.mean().item(), pixels.std().item()
        count = wanted or len(data)
        # Spread evenly: two groups of people wrote MNIST's digits. In the test set one has the first half, the other
        # the second; in the training set they seem to take turns (notebook 8), and an even step would meet only one.
        chosen = torch.linspace(0, len(data) - 1, count).round().long() if train else (
            torch.arange(count) * len(data) // count)
        iterators.append(ImageIterator(data.data[chosen], data.targets[chosen], p.batch_size, image_size, train,
                                       p.seed, mean_and_std, device or find_device(), p.dataset))
    return tuple(iterators)


# ------------------------------------------------------------------------------------------------ networks
class LeNet(nn.Sequential):
    """LeNet-5's layout with sigmoids: (batch, 1, 28, 28) to logits (batch, 10). LeCun et al. 1998, figure 2."""

    def __init__(self):
        super().__init__()
        for name, layer in {
            "conv1": nn.Conv2d(1, 6, 5, padding=2), "sigmoid1": nn.Sigmoid(), "pool1": nn.AvgPool2d(2, 2),
            "conv2": nn.Conv2d(6, 16, 5), "sigmoid2": nn.Sigmoid(), "pool2": nn.AvgPool2d(2, 2),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(400, 120), "sigmoid3": nn.Sigmoid(),
            "fc2": nn.Linear(120, 84), "sigmoid4": nn.Sigmoid(),
            "fc3": nn.Linear(84, 10),
        }.items():
            self.add_module(name, layer)


class AlexNet(nn.Sequential):
    """AlexNet for one-channel images: (batch, 1, image_size, image_size) to logits (batch, num_classes).

    all_relus=False is the article's form, with nothing between conv3, conv4 and conv5; all_relus=True puts a
    ReLU after every convolution, as Krizhevsky et al. 2012, section 3.5. dropout > 0 drops that share of the
    inputs of fc1 and fc2 while training (section 4.2: 0.5). Raises ValueError for an image_size too small.
    """

    def __init__(self, image_size=244, num_classes=10, all_relus=False, dropout=0.0):
        p = check_parameters(image_size=image_size, all_relus=all_relus)
        super().__init__()
        side = p.image_size
        for kernel, stride in ((11, 4), (3, 2), (3, 2), (3, 2)):  # conv1 and the pools; the rest keeps the size
            side = (side - kernel) // stride + 1
        dropouts = [nn.Dropout(dropout) if dropout else None for _ in range(2)]
        for name, layer in {
            "conv1": nn.Conv2d(1, 96, 11, stride=4), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(3, 2),
            "conv2": nn.Conv2d(96, 256, 5, padding=2), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(3, 2),
            "conv3": nn.Conv2d(256, 384, 3, padding=1), "relu3": nn.ReLU() if p.all_relus else None,
            "conv4": nn.Conv2d(384, 384, 3, padding=1), "relu4": nn.ReLU() if p.all_relus else None,
            "conv5": nn.Conv2d(384, 256, 3, padding=1), "relu5": nn.ReLU(), "pool3": nn.MaxPool2d(3, 2),
            "flatten": nn.Flatten(),
            "dropout1": dropouts[0], "fc1": nn.Linear(256 * side * side, 4096), "relu6": nn.ReLU(),
            "dropout2": dropouts[1], "fc2": nn.Linear(4096, 4096), "relu7": nn.ReLU(),
            "fc3": nn.Linear(4096, num_classes),
        }.items():
            if layer is not None:
                self.add_module(name, layer)


def init_weights(net, scheme):
    """Initialise every convolution and linear layer of `net` in place, and return it.

    "normal"      weights N(0, 1); biases untouched (the article's run A)
    "kaiming"     weights N(0, 2 / fan_in), He et al. 2015, section 2.2; biases untouched (runs B and C)
    "default"     what torch does by itself: uniform in ±1/√fan_in, weights and biases
    "krizhevsky"  weights N(0, 0.01²); biases 1 in conv2, conv4, conv5, fc1 and fc2, else 0 (2012, section 5)

    Draws from torch's global generator: call torch.manual_seed before. Raises ValueError.
    """
    scheme = check_parameters(init=scheme).init
    for name, layer in net.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        if scheme == "normal":
            nn.init.normal_(layer.weight)
        elif scheme == "kaiming":
            nn.init.kaiming_normal_(layer.weight)
        elif scheme == "default":
            layer.reset_parameters()
        else:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, float(name in ("conv2", "conv4", "conv5", "fc1", "fc2")))
    return net


def add_norms(net, kind="batch"):
    """Put a normalisation behind each layer of `net` that has weights, but not behind its last layer; return net.

    "batch"  BatchNorm, Ioffe and Szegedy 2015; "layer"  LayerNorm, Ba et al. 2016, of a convolution's output over
    channels and pixels. A layer keeps its place and its name, and becomes the pair (layer, normalisation).
    Raises ValueError for another kind.
    """
    kinds = {"batch": (nn.BatchNorm2d, nn.BatchNorm1d), "layer": (_layer_norm, _layer_norm)}
    if kind not in kinds:
        raise _refuse("kind", kind, "'batch' or 'layer'")
    of_maps, of_rows = kinds[kind]
    for name, layer in list(net.named_children())[:-1]:
        if isinstance(layer, nn.Conv2d):
            setattr(net, name, nn.Sequential(layer, of_maps(layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            setattr(net, name, nn.Sequential(layer, of_rows(layer.out_features)))
    return net


def _layer_norm(channels):
    return nn.GroupNorm(1, channels)  # torch's LayerNorm wants the size of the map


# ------------------------------------------------------------------------------------------------ training
class Row(BaseModel):
    """One logged line: means over up to `log_every` steps before it; accuracies are shares from 0 to 1."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # not handed down from History

    step: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float | None

    def __str__(self):
        test = "" if self.test_accuracy is None else f"   test acc {self.test_accuracy:.3f}"
        return f"step {self.step:5d}   loss {self.train_loss:9.3g}   train acc {self.train_accuracy:.3f}{test}"


class History(BaseModel):
    """What a training run went through; `model_dump_json` and `model_validate_json` write and read it."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    loss: list[float] = []  # of each step's batch
    accuracy: list[float] = []  # of each step's batch
    rows: list[Row] = []
    diverged_at: int | None = None  # the first step with a loss that is not finite

    def add(self, loss, accuracy):
        """Note those of one more step."""
        self.loss.append(loss)
        self.accuracy.append(accuracy)
        if self.diverged_at is None and not math.isfinite(loss):
            self.diverged_at = len(self.loss)

    def plot(self, axes=None, run="C", label=None):
        """Loss (log scale, up to the last finite one) and accuracy over steps; returns the two axes."""
        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3))
        style = {**STYLE[run], "marker": ""}
        steps = range(1, len(self.loss) + 1)
        finite = [loss if math.isfinite(loss) else math.nan for loss in self.loss]
        axes[0].plot(steps, finite, label=label, **style)
        if self.diverged_at and self.diverged_at > 1:
            axes[0].plot(self.diverged_at - 1, finite[self.diverged_at - 2], "kx", ms=9, mew=2)
        axes[0].set(xlabel="step", ylabel="loss of the batch (nats)", yscale="log")
        for axis in axes:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[1].plot(steps, self.accuracy, label=None if label is None else f"{label}, training batch", **style)
        tested = [row for row in self.rows if row.test_accuracy is not None]
        if tested:
            axes[1].plot([row.step for row in tested], [row.test_accuracy for row in tested], linestyle="none",
                         color="black", marker=STYLE[run]["marker"], label="test set")
        axes[1].set(xlabel="step", ylabel="accuracy (share)", ylim=(-0.02, 1.02))
        return axes


class Evaluation(NamedTuple):
    loss: float  # mean cross-entropy, nats
    accuracy: float  # share, from 0 to 1
    confusion: torch.Tensor  # int64 (classes, classes): row the true class, column the predicted one
    losses: torch.Tensor  # float32 (images,), of each image in the order of data_iter, on the CPU
    predictions: torch.Tensor  # int64 (images,), likewise


def _autocast(device, precision):
    dtype = find_precision(device, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.inference_mode()
def evaluate(net, data_iter, precision="auto"):
    """`Evaluation` of net over all of data_iter, on the device of net.

    Where ranks exist, loss, accuracy and confusion are joined over them; losses and predictions are the rank's
    own. A row of logits that is all NaN counts as class 0, the arg max that torch gives it.
    """
    from torchmetrics import MeanMetric  # seconds to import: only for those who evaluate
    from torchmetrics.classification import MulticlassConfusionMatrix

    device, was_training = next(net.parameters()).device, net.training
    net.eval()
    losses, predictions, labels = [], [], []
    with _autocast(device, precision):
        for X, y in data_iter:
            logits = net(X.to(device, memory_format=torch.channels_last)).float()
            losses.append(F.cross_entropy(logits, y.to(device), reduction="none"))
            predictions.append(logits.argmax(1))
            labels.append(y.to(device))
    net.train(was_training)
    if not labels:
        raise _refuse("data_iter", data_iter, "an iterator of at least one batch")
    losses, predictions, labels = (torch.cat(parts) for parts in (losses, predictions, labels))
    loss, confusion = MeanMetric(nan_strategy="disable"), MulticlassConfusionMatrix(logits.shape[1])
    loss.to(device).update(losses)  # update and compute: these join the ranks, a plain call does not
    confusion.to(device).update(predictions, labels)
    counts = confusion.compute().cpu()
    accuracy = (counts.trace() / counts.sum()).item()
    return Evaluation(loss.compute().item(), accuracy, counts, losses.cpu(), predictions.cpu())


def _unfinished(path):
    return pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.unfinished")


@contextlib.contextmanager
def _replacing(path):
    """A temporary file beside `path` that takes its place when all went well, and leaves no trace otherwise."""
    unfinished = _unfinished(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class _LiveFigure:
    """Redraws a History in place while it grows, where there is a notebook to show it.

    One figure for the whole run: until a cell ends, Jupyter's backend keeps each figure that the cell made, 3 MB.
    """

    def __init__(self, wanted, run):
        self.run, self.axes, self.drawn, self.pause = run, None, 0.0, 3.0
        self.wanted = wanted and hasattr(get_ipython(), "kernel")

    def update(self, history, seconds_between=None):
        """Draws, if the last drawing is so many seconds ago; None: so many that drawing takes 1/20 of the time."""
        start = time.monotonic()
        if not self.wanted or start - self.drawn < (self.pause if seconds_between is None else seconds_between):
            return
        if first := self.axes is None:
            figure, self.axes = plt.subplots(1, 2, figsize=(9, 3))
            plt.close(figure)  # or the end of the cell would show it once more
        for axis in self.axes:
            axis.clear()
        figure = history.plot(self.axes, run=self.run)[0].figure
        drawn = _picture(figure, "Live curves of the run: the loss, and the accuracy, of each step's batch.")
        if first:
            self.handle = display.display(drawn, raw=True, display_id=True)
        else:
            self.handle.update(drawn, raw=True)
        self.drawn = time.monotonic()
        self.pause = max(3.0, 20 * (self.drawn - start))


def train(net, train_iter, test_iter=None, num_epochs=1, lr=0.1, *, optimizer=torch.optim.SGD, scheduler=None,
          loss_fn=F.cross_entropy, log_every=200, stop_at_nonfinite=True, precision="auto", checkpoint=None,
          checkpoint_every=100, progress=True, live=True, run="C"):
    """Train net in place, on the device of its parameters; returns its `History`.

    train_iter, test_iter   yield (X, y); with test_iter each logged line has the accuracy on all of it
    num_epochs              may be a fraction: 0.5 is half of the batches
    optimizer, scheduler    called as optimizer(net.parameters(), lr=lr) and scheduler(optimizer); the schedule
                            moves at each step
    loss_fn                 what is made small: loss_fn(logits, y)
    log_every               steps a logged line; a run that comes to its end has one for its last step; None: no lines
    stop_at_nonfinite       end at the first loss that is inf or NaN (else go on, as the article did); the weights
                            are then those that gave this loss
    precision               "auto" (`find_precision`), "float32" or "bfloat16" (autocast)
    checkpoint              file to resume from if it exists, written anew every `checkpoint_every` steps and after
                            the last; a resumed run equals an uninterrupted one bit for bit on the same machine,
                            if train_iter has `set_epoch` as `load_data`'s has
    progress, live, run     progress bar; live figure in a notebook; its entry in STYLE

    Raises ValueError (a parameter; a checkpoint that is damaged, or of a run that differs in network, optimizer,
    schedule, lr, or the images, batches and seed of train_iter).
    """
    p = check_parameters(lr=lr, num_epochs=num_epochs, precision=precision, checkpoint=str(checkpoint or ""))
    if log_every is not None and log_every < 1:
        raise _refuse("log_every", log_every, "a whole number from 1, or None")
    if not len(train_iter):
        raise _refuse("train_iter", train_iter, "an iterator of at least one batch")
    device = next(net.parameters()).device
    net.to(memory_format=torch.channels_last).train()
    optimizer = optimizer(net.parameters(), lr=p.lr)
    scheduler = scheduler(optimizer) if scheduler else None
    total = max(1, round(p.num_epochs * len(train_iter)))
    data = train_iter if hasattr(train_iter, "set_epoch") else f"{len(train_iter)} batches"
    about = f"{net}\noptimizer {type(optimizer).__name__}, schedule {type(scheduler).__name__}, lr {p.lr}, {data}"
    saved = _Checkpoint(checkpoint, about, {"net": net, "optimizer": optimizer, "scheduler": scheduler})
    history = saved.load()
    if history.diverged_at and stop_at_nonfinite:
        return history

    test = functools.partial(evaluate, net, test_iter, p.precision) if test_iter is not None else None
    with _Beside(history, total, progress, _LiveFigure(live, run), saved, checkpoint_every, log_every, test) as beside:
        for X, y in _batches(train_iter, len(history.loss), total):
            # forward: the scores, and how wrong they are
            X, y = X.to(device, memory_format=torch.channels_last), y.to(device)
            with _autocast(device, p.precision):
                logits = net(X).float()
                loss = loss_fn(logits, y)
            history.add(loss.item(), (logits.argmax(1) == y).float().mean().item())
            if history.diverged_at and stop_at_nonfinite:
                break

            # backward: the gradient of each weight; then a step against it
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()

            # beside it: the bar, a line, a test, a checkpoint, the figure, each when it is due
            beside.after_step()
    optimizer.zero_grad()  # the gradients take as much memory as the weights
    return history


def _batches(train_iter, step, total):
    """The batches from step `step` on, `total` less those that were before, over as many epochs as it takes."""
    while step < total:
        epoch, skip = divmod(step, len(train_iter))
        if hasattr(train_iter, "set_epoch"):
            train_iter.set_epoch(epoch, skip)
            skip = 0
        for batch in itertools.islice(train_iter, skip, skip + total - step):
            step += 1
            yield batch


class _Beside:
    """What goes on beside the training: progress bar, logged lines, checkpoint, live figure."""

    def __init__(self, history, total, progress, figure, saved, checkpoint_every, log_every, test):
        self.history, self.total, self.figure, self.saved, self.test = history, total, figure, saved, test
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        figure.update(history)  # above the bar
        self.bar = tqdm(total=total, initial=len(history.loss), unit="step", file=sys.stdout, disable=not progress,
                        mininterval=2, ncols=100)

    def __enter__(self):
        return self

    def after_step(self):
        history, step = self.history, len(self.history.loss)
        self.bar.set_postfix_str(f"loss {history.loss[-1]:.3g}", refresh=False)
        self.bar.update()
        if self.log_every and (step % self.log_every == 0 or step == self.total):
            window = slice((step - 1) // self.log_every * self.log_every, step)
            history.rows.append(Row(step=step, train_loss=statistics.fmean(history.loss[window]),
                                    train_accuracy=statistics.fmean(history.accuracy[window]),
                                    test_accuracy=self.test().accuracy if self.test else None))
            self.bar.write(str(history.rows[-1]), file=sys.stdout)
        if step % self.checkpoint_every == 0 or step == self.total:
            self.saved.save(history)
        self.figure.update(history)

    def __exit__(self, *exception):
        self.bar.close()
        self.figure.update(self.history, seconds_between=0)


class _Checkpoint:
    """The state of one training run in one file; with no path it does nothing."""

    def __init__(self, path, run, parts):
        self.path, self.run = path, run  # `run` describes what must be the same when the run is taken up again
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def save(self, history):
        if self.path:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
            with _replacing(self.path) as file:
                torch.save({**state, "random": random, "run": self.run, "history": history.model_dump_json()}, file)

    def load(self):
        """The history so far, and net, optimizer, schedule and random numbers set to where it ended."""
        if self.path:
            _unfinished(self.path).unlink(missing_ok=True)  # of a run that was killed while it wrote
        if not self.path or not os.path.exists(self.path):
            return History()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            run, history = state["run"], History.model_validate_json(state["history"])
        except Exception:
            allowed = "a file that `train` wrote whole; delete it to start anew"
            raise _refuse("checkpoint", str(self.path), allowed) from None
        if run != self.run:
            pieces = (re.split(r"[(),\n]+ *", about) for about in (run, self.run))
            theirs, ours = next((a, b) for a, b in itertools.zip_longest(*pieces, fillvalue="nothing") if a != b)
            raise _refuse("checkpoint", str(self.path), f"of another run: it has {theirs}, this one has {ours}; give "
                                                        "another path, or delete it")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"][0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"][1:])
        return history


# ----------------------------------------------------------------------------------------------- diagnosis
def final_loss(losses):
    """The loss at which a run ended: the median of its last third; NaN if any loss is not finite.

    Takes the loss of each step, at least one, as floats or text ("NaN", as JSON has them). Raises ValueError.
    """
    losses = [float(loss) for loss in losses]
    if not losses:
        raise _refuse("losses", losses, "at least one loss")
    return statistics.median(losses[-math.ceil(len(losses) / 3):]) if all(map(math.isfinite, losses)) else math.nan


def outcome(losses, classes=10):
    """What became of a training run, from the loss of each step, taken as `final_loss` takes it.

    "nan"        a loss is not finite
    "blew up"    it ended above 1.1 times the larger of its first loss and ln(classes), the loss of ignorance
    "learned"    it ended below 0.9 ln(classes)
    "stalled"    none of these: not better than ignorance, and not worse than at the start
    """
    end, ignorance = final_loss(losses), math.log(classes)
    if math.isnan(end):
        return "nan"
    if end > 1.1 * max(float(losses[0]), ignorance):
        return "blew up"
    return "learned" if end < 0.9 * ignorance else "stalled"


# ------------------------------------------------------------------------------------------------- results
def save_results(path, results):
    """Write a dict of results, with `environment()`, as one JSON file, whole or not at all; path "" does nothing.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity". Raises ValueError for a bad path.
    """
    path = check_parameters(results_path=str(path)).results_path
    if path:
        text = to_json({**results, "environment": environment()}, indent=1, inf_nan_mode="strings")
        with _replacing(path) as file:
            file.write_bytes(text + b"\n")


class Sweep:
    """The finished units of a sweep, kept in a JSON file, so that an interrupted sweep goes on where it stopped.

    path        the file, written anew after each unit; read first if it exists; "" keeps them in memory only
    settings    a dict of what all units share, kept in the file too

    Several processes may work at one file: none loses what another has finished. Raises ValueError for a file that is
    damaged, or whose settings are others.
    """

    def __init__(self, path="", settings=None):
        self.path, self.settings, self.units = str(path), to_jsonable_python(settings or {}), []
        self._read()

    def _read(self):
        if not os.path.isfile(self.path):
            return
        try:
            saved = json.loads(pathlib.Path(self.path).read_text(encoding="utf-8"))
            found, self.units = saved["settings"], saved["units"]
        except (ValueError, KeyError, TypeError):
            raise _refuse("sweep file", self.path, "what a sweep wrote whole; delete it to start anew") from None
        if found != self.settings:
            raise _refuse("sweep file", self.path, f"of another sweep ({found}); give another path, or delete it")

    def find(self, **unit):
        """The kept result of this unit, or None."""
        return next((kept for kept in self.units if unit.items() <= kept.items()), None)

    def __call__(self, run, **unit):
        """The dict that run(**unit) returns, with the unit's own entries; from the file if it is finished there."""
        if self.find(**unit) is None:
            path = pathlib.Path(check_parameters(sweep=self.path).sweep)
            # Through JSON and back, so that a fresh and a kept result are the same.
            fresh = json.loads(to_json({**unit, **run(**unit)}, inf_nan_mode="strings"))
            with FileLock(path.with_name(f".{path.name}.lock")) if self.path else contextlib.nullcontext():
                self._read()
                if self.find(**unit) is None:
                    self.units.append(fresh)
                    save_results(self.path, {"settings": self.settings, "units": self.units})
        return self.find(**unit)


def open_sweep(path, name, settings):
    """The sweep kept in the file `path`; with path "" the one that is recorded as results/<name>.json, in memory.

    Says on which machine that record was made; or that there is none with these settings, and then it is empty.
    """
    sweep, recorded = Sweep(path, settings), HERE / "results" / f"{name}.json"
    if not path:
        found = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
        if found.get("settings") == sweep.settings:
            sweep.units, machine = found["units"], found["environment"]
            print(f"{recorded.name}: {machine['device']}, {machine['threads']} threads, {machine['precision']}")
        else:
            print(f"{recorded.name}: no record for these parameters; make one with -p sweep FILE")
    return sweep
