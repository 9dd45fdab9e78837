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

import atexit
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
import operator
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from IPython import display, get_ipython
from matplotlib.figure import Figure
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
    # Freed tensors of 16 MiB go back to the system at once; by itself glibc lets up to half a GB of them pile up.
    with contextlib.suppress(AttributeError):  # another C library, such as musl, has no mallopt
        ctypes.CDLL(None).mallopt(-3, 2**24)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**27)  # M_TRIM_THRESHOLD, or small ones would come and go with each step

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


_SCHEDULER = "'' or the address of a Dask scheduler that answers, as tcp://host:8786"


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
    scheduler: str = Field("", pattern=r"^$|^\w+://.+", description=_SCHEDULER)
    patient: str = Field("all", description="'all' or a name in PATIENTS of notebook 7")
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
def _ranks():
    """(rank, ranks) of this process; the first call joins it with the others that torchrun has started."""
    if not distributed.is_available():
        return 0, 1
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        store, rank, ranks = next(distributed.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else a group started again may find the dead one's addresses
            store = distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # NCCL for what lies on CUDA, gloo for what lies on the CPU
        distributed.init_process_group(store=store, rank=rank, world_size=ranks)
        atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def find_device():
    """The fastest device here: CUDA (each rank's own), then MPS (not with ranks: gloo can't reach it), then the CPU."""
    _, ranks = _ranks()
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() and ranks == 1 else "cpu")


def find_precision(device, precision="auto"):
    """The dtype to multiply in: for "auto" bfloat16 where the hardware is faster with it, else float32.

    Having bfloat16 instructions is not enough: AMD's AVX-512 multiplies twice as fast with them, Intel's is slower than
    with float32 (results/benchmark_xeon.json) unless AMX stands beside it.
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
    Where ranks exist, each gets its own share of every batch (the last of an epoch may leave some ranks none).
    """

    def __init__(self, images, labels, batch_size, image_size, shuffle, seed, normalize, device, dataset="unnamed"):
        self.images, self.labels = images.to(device), labels.to(device)  # (n, 28, 28) uint8, (n,) int64
        self.batch_size, self.image_size, self.normalize, self.seed = batch_size, image_size, normalize, seed
        self.dataset = dataset
        self.rank, self.ranks = _ranks()
        # It draws epoch e of seed s like epoch e - 1 of seed s + 1; far apart, no two seeds meet. And it is told of no
        # ranks: it would make other batches of them, and repeat images to fill up the last.
        self.sampler = DistributedSampler(labels, 1, 0, seed=seed << 20) if shuffle else range(len(labels))
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
        for indices in order.split(self.batch_size)[skip:]:
            yield self.take(indices.tensor_split(self.ranks)[self.rank])

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
    image_size    pixels per side, at least the original 28
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
        super().__init__(OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2), sigmoid1=nn.Sigmoid(), pool1=nn.AvgPool2d(2, 2),
            conv2=nn.Conv2d(6, 16, 5), sigmoid2=nn.Sigmoid(), pool2=nn.AvgPool2d(2, 2), flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120), sigmoid3=nn.Sigmoid(), fc2=nn.Linear(120, 84), sigmoid4=nn.Sigmoid(),
            fc3=nn.Linear(84, 10)))


class AlexNet(nn.Sequential):
    """AlexNet for one-channel images: (batch, 1, image_size, image_size) to logits (batch, num_classes).

    all_relus=False is the article's form, with nothing between conv3, conv4 and conv5; all_relus=True puts a
    ReLU after every convolution, as Krizhevsky et al. 2012, section 3.5. dropout > 0 drops that share of the
    inputs of fc1 and fc2 while training (section 4.2: 0.5). Raises ValueError for an image_size too small.
    """

    def __init__(self, image_size=244, num_classes=10, all_relus=False, dropout=0.0):
        p = check_parameters(image_size=image_size, all_relus=all_relus)
        side = p.image_size
        for kernel, stride in ((11, 4), (3, 2), (3, 2), (3, 2)):  # conv1 and the pools; the rest keeps the size
            side = (side - kernel) // stride + 1
        layers = OrderedDict(
            conv1=nn.Conv2d(1, 96, 11, stride=4), relu1=nn.ReLU(), pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(96, 256, 5, padding=2), relu2=nn.ReLU(), pool2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(256, 384, 3, padding=1), relu3=nn.ReLU() if p.all_relus else None,
            conv4=nn.Conv2d(384, 384, 3, padding=1), relu4=nn.ReLU() if p.all_relus else None,
            conv5=nn.Conv2d(384, 256, 3, padding=1), relu5=nn.ReLU(), pool3=nn.MaxPool2d(3, 2), flatten=nn.Flatten(),
            dropout1=nn.Dropout(dropout) if dropout else None, fc1=nn.Linear(256 * side * side, 4096), relu6=nn.ReLU(),
            dropout2=nn.Dropout(dropout) if dropout else None, fc2=nn.Linear(4096, 4096), relu7=nn.ReLU(),
            fc3=nn.Linear(4096, num_classes))
        super().__init__(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


def init_weights(net, scheme):
    """Initialise every convolution and linear layer of `net` in place, and return it.

    "normal"      weights N(0, 1); biases untouched (the article's run A)
    "kaiming"     weights N(0, 2 / fan_in), He et al. 2015, section 2.2; biases untouched (runs B and C)
    "default"     what torch does by itself: uniform in ±1/√fan_in, weights and biases
    "krizhevsky"  weights N(0, 0.01²); biases 1 in conv2, conv4, conv5, fc1 and fc2, else 0 (2012, section 5)

    Draws from torch's global generator: call torch.manual_seed before. Raises ValueError.
    """
    scheme = check_parameters(init=scheme).init
    fill = {"normal": nn.init.normal_, "kaiming": nn.init.kaiming_normal_,
            "krizhevsky": functools.partial(nn.init.normal_, std=0.01)}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fill[scheme](layer.weight) if scheme in fill else layer.reset_parameters()
            if scheme == "krizhevsky":
                nn.init.constant_(layer.bias, float(name in ("conv2", "conv4", "conv5", "fc1", "fc2")))
    return net


def add_norms(net, kind="batch"):
    """Put a normalisation behind each layer of `net` that has weights, but not behind its last layer; return net.

    "batch"  BatchNorm, Ioffe and Szegedy 2015; "layer"  LayerNorm, Ba et al. 2016, of a convolution's output over
    channels and pixels. A layer keeps its place and its name, and becomes the pair (layer, normalisation).
    Raises ValueError for another kind.
    """
    if kind not in ("batch", "layer"):
        raise _refuse("kind", kind, "'batch' or 'layer'")
    for name, layer in list(net.named_children())[:-1]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            batch_norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
            width = len(layer.weight)
            # torch's LayerNorm wants the size of the map; one group is the same without
            setattr(net, name, nn.Sequential(layer, batch_norm(width) if kind == "batch" else nn.GroupNorm(1, width)))
    return net


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
    """`Evaluation` of net over all of data_iter, on the device of net; the same on all ranks, where these share it.

    A row of logits that is all NaN counts as class 0, the arg max that torch gives it.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # seconds to import

    device, was_training, batches = next(net.parameters()).device, net.training, []
    net.eval()
    with _autocast(device, precision):
        for X, y in data_iter:
            logits = net(X.to(device, memory_format=torch.channels_last)).float()
            losses = F.cross_entropy(logits, y.to(device), reduction="none")
            batches.append((losses, logits.argmax(1), y.to(device)))
    net.train(was_training)
    if not batches:
        raise _refuse("data_iter", data_iter, "an iterator of at least one batch")
    if getattr(data_iter, "ranks", 1) > 1:
        batches = [[part.cpu() for part in batch] for batch in batches]
        batches = [share for shares in zip(*_of_all_ranks(batches), strict=True) for share in shares]
    losses, predictions, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    counts = multiclass_confusion_matrix(predictions, labels, logits.shape[1]).cpu()
    accuracy = (counts.trace() / counts.sum()).item()
    return Evaluation(losses.mean().item(), accuracy, counts, losses.cpu(), predictions.cpu())


def _of_all_ranks(thing):
    """[what each rank gives], on all of them."""
    things = [thing] * _ranks()[1]
    if len(things) > 1:
        distributed.all_gather_object(things, thing)
    return things


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
    """Shows a History while it grows, in one place of the notebook; nothing where there is none."""

    def __init__(self, wanted, run):
        self.wanted, self.run, self.drawn, self.pause = wanted and hasattr(get_ipython(), "kernel"), run, 0.0, 3.0

    def update(self, history, seconds_between=None):
        """Draws, if the last drawing is so many seconds ago; None: so many that drawing takes 1/20 of the time."""
        start = time.monotonic()
        if not self.wanted or start - self.drawn < (self.pause if seconds_between is None else seconds_between):
            return
        figure = Figure(figsize=(9, 3))  # not pyplot's: Jupyter would keep each, 3 MB, until the cell ends
        history.plot(figure.subplots(1, 2), run=self.run)
        drawn = _picture(figure, "Live curves of the run: the loss, and the accuracy, of each step's batch.")
        if self.drawn:
            self.handle.update(drawn, raw=True)
        else:
            self.handle = display.display(drawn, raw=True, display_id=True)
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
    loss_fn                 what is made small: loss_fn(logits, y), a mean over the images
    log_every               steps a logged line; a run that comes to its end has one for its last step; None: no lines
    stop_at_nonfinite       end at the first loss that is inf or NaN (else go on, as the article did); the weights
                            are then those that gave this loss
    precision               "auto" (`find_precision`), "float32" or "bfloat16" (autocast)
    checkpoint              file to resume from if it exists, written anew every `checkpoint_every` steps and after
                            the last; a resumed run equals an uninterrupted one bit for bit on the same machine,
                            if train_iter has `set_epoch` as `load_data`'s has
    progress, live, run     progress bar; live figure in a notebook; its entry in STYLE

    Started by torchrun, the processes (ranks) train one network: each takes its share of every batch that `load_data`
    makes, and the gradient, loss and accuracy are those of the whole batch. Rank 0 alone prints, draws and saves.
    BatchNorm normalises a whole batch on CUDA; elsewhere each rank its share, and rank 0's statistics are kept.

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
    model = _on_all_ranks(net, optimizer)
    history = saved.load()
    if history.diverged_at and stop_at_nonfinite:
        return history

    test = functools.partial(evaluate, net, test_iter, p.precision) if test_iter is not None else None
    figure = _LiveFigure(live, run)
    with _beside(history, total, progress, figure, saved, checkpoint_every, log_every, test) as after_step:
        for X, y in _batches(train_iter, len(history.loss), total):
            # forward: the scores, and how wrong they are
            X, y = X.to(device, memory_format=torch.channels_last), y.to(device)
            with _autocast(device, p.precision):
                logits = model(X).float()
                loss = loss_fn(logits, y)
            loss, *of_the_batch = _of_the_batch(loss, logits, y)
            history.add(*of_the_batch)
            if history.diverged_at and stop_at_nonfinite:
                break

            # backward: the gradient of each weight; then a step against it
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()

            # beside it: the bar, a line, a test, a checkpoint, the figure, each when it is due
            after_step()
    optimizer.zero_grad()  # the gradients take as much memory as the weights
    return history


def _on_all_ranks(net, optimizer):
    """What is called in the place of net: net itself, or, where ranks exist, what averages their gradients."""
    rank, ranks = _ranks()
    if ranks == 1:
        return net
    torch.manual_seed(torch.initial_seed() + rank)  # or dropout would drop the same units of each share
    on_cuda = next(net.parameters()).is_cuda
    if on_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer.register_step_post_hook(lambda *_: [distributed.broadcast(buffer, 0) for buffer in net.buffers()])
    model = nn.parallel.DistributedDataParallel(net)
    if not on_cuda:
        model.register_comm_hook(None, _mean_of_each)
    return model


def _mean_of_each(_, bucket):
    """Averages the gradient of each weight by itself. DDP joins several, and sorts them anew after the first step: in
    another place the ranks are added in another order, and a resumed run would have other last digits."""
    futures = [distributed.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(futures).then(lambda _: bucket.buffer().div_(distributed.get_world_size()))


def _of_the_batch(loss, logits, y):
    """(what to go back from, loss and accuracy of the batch); where ranks exist, of the batch that they share."""
    right, (_, ranks) = logits.argmax(1) == y, _ranks()
    if ranks == 1:
        return loss, loss.item(), right.float().mean().item()
    loss = loss * len(y) if len(y) else logits.sum()  # of no images: 0, and so are its gradients
    sums = torch.stack([loss.detach().double(), right.sum().double(), torch.ones_like(right).sum().double()])
    distributed.all_reduce(sums)
    total, right, images = sums.tolist()
    return loss * (ranks / images), total / images, right / images


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


@contextlib.contextmanager
def _beside(history, total, progress, figure, saved, checkpoint_every, log_every, test):
    """A function that does after each step what is due of: progress bar, logged line, test, checkpoint, figure."""
    def after_step():
        step = len(history.loss)
        bar.set_postfix_str(f"loss {history.loss[-1]:.3g}", refresh=False)
        bar.update()
        if log_every and (step % log_every == 0 or step == total):
            window = slice((step - 1) // log_every * log_every, step)
            history.rows.append(Row(step=step, train_loss=statistics.fmean(history.loss[window]),
                                    train_accuracy=statistics.fmean(history.accuracy[window]),
                                    test_accuracy=test().accuracy if test else None))
            if first:
                bar.write(str(history.rows[-1]), file=sys.stdout)
        if step % checkpoint_every == 0 or step == total:
            saved.save(history)
        figure.update(history)

    first = not _ranks()[0]
    figure.wanted &= first
    figure.update(history)  # above the bar
    try:
        with tqdm(total=total, initial=len(history.loss), unit="step", file=sys.stdout,
                  disable=not (progress and first), mininterval=2, ncols=100) as bar:
            yield after_step
    finally:
        figure.update(history, seconds_between=0)


class _Checkpoint:
    """The state of one training run in one file; with no path it does nothing."""

    def __init__(self, path, run, parts):
        self.path, self.run = path, run  # `run` describes what must be the same when the run is taken up again
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def save(self, history):
        """Rank 0 writes, and with it the random numbers of each rank."""
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
        randoms = _of_all_ranks(random) if self.path else []
        if self.path and not _ranks()[0]:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            with _replacing(self.path) as file:
                torch.save({**state, "randoms": randoms, "run": self.run, "history": history.model_dump_json()}, file)

    def load(self):
        """The history so far, and net, optimizer, schedule and random numbers set to where it ended."""
        rank, ranks = _ranks()
        state = [self._read() if self.path and not rank else None]
        if self.path and ranks > 1:  # the file may lie on another machine
            distributed.broadcast_object_list(state)
        state, = state
        if not state:
            return History()
        if state["run"] != self.run:
            pieces = (re.split(r"[(),\n]+ *", about) for about in (state["run"], self.run))
            theirs, ours = next((a, b) for a, b in itertools.zip_longest(*pieces, fillvalue="nothing") if a != b)
            raise _refuse("checkpoint", str(self.path), f"of another run: it has {theirs}, this one has {ours}; give "
                                                        "another path, or delete it")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        cpu, *gpus = state["randoms"][rank % len(state["randoms"])]
        torch.set_rng_state(cpu)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(gpus)
        return state["history"]

    def _read(self):
        _unfinished(self.path).unlink(missing_ok=True)  # of a run that was killed while it wrote
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            return state | {"history": History.model_validate_json(state["history"]), "run": state["run"],
                            "randoms": state["randoms"]}
        except FileNotFoundError:
            return None
        except Exception:
            allowed = "a file that `train` wrote whole; delete it to start anew"
            raise _refuse("checkpoint", str(self.path), allowed) from None


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
    "learned"    it ended below 0.9 times the smaller of its first loss and ln(classes)
    "stalled"    none of these: not clearly better than ignorance and its own start, and not worse
    """
    end, ignorance = final_loss(losses), math.log(classes)
    if math.isnan(end):
        return "nan"
    first = float(losses[0])
    if end > 1.1 * max(first, ignorance):
        return "blew up"
    return "learned" if end < 0.9 * min(first, ignorance) else "stalled"


# ------------------------------------------------------------------------------------------------- results
def save_results(path, results):
    """Write a dict of results, with `environment()`, as one JSON file, whole or not at all; path "" does nothing.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity". Raises ValueError for a bad path.
    """
    path = check_parameters(results_path=str(path)).results_path
    if path and not _ranks()[0]:
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
        self.lock, self.workers = threading.RLock(), None
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
            found = self.workers(run, unit) if self.workers else run(**unit)
            # Through JSON and back, so that a fresh and a kept result are the same.
            fresh = json.loads(to_json({**unit, **found}, inf_nan_mode="strings"))
            with self.lock, FileLock(path.with_name(f".{path.name}.lock")) if self.path else contextlib.nullcontext():
                self._read()
                if self.find(**unit) is None:
                    self.units.append(fresh)
                    save_results(self.path, {"settings": self.settings, "units": self.units})
        return self.find(**unit)

    def each(self, do, items, scheduler="", name="runs"):
        """Call do(*item) for each item, with a progress bar: in turn; or, with the address of a Dask scheduler, all at
        once, while its workers run what they ask of this sweep. Units are kept in the order in which they are finished.

        The workers must be able to import helpers. Raises ValueError for an address where no scheduler answers.
        """
        bar = functools.partial(tqdm, total=len(items), desc=name, file=sys.stdout, ncols=80, mininterval=5)
        if not check_parameters(scheduler=scheduler).scheduler:
            for item in bar(items):
                do(*item)
            return
        try:
            with ThreadPoolExecutor(len(items) or 1) as threads, _dask(scheduler) as self.workers:
                for done in bar(as_completed([threads.submit(do, *item) for item in items])):
                    done.result()
        finally:
            self.workers = None


@contextlib.contextmanager
def _dask(scheduler):
    """A function (run, unit) that has a worker of this Dask scheduler call run(**unit), and returns what it returns."""
    from distributed import Client  # a second to import
    from distributed.protocol import pickle

    def call(run, unit):
        with lock:
            if run not in sent:  # once, as it may hold a network; and pickled: the scheduler has no torch
                sent[run] = client.submit(pickle.loads, pickle.dumps(functools.partial(_alone, run)))
        return client.submit(operator.methodcaller("__call__", unit), sent[run]).result()

    try:
        client = Client(scheduler, timeout=5, set_as_default=False)
    except (OSError, ValueError):
        raise _refuse("scheduler", scheduler, _SCHEDULER) from None
    lock, sent = threading.Lock(), {}
    warnings.filterwarnings("ignore", "Sending large graph")
    with client:
        yield call


_one_at_a_time = threading.Lock()


def _alone(run, unit):
    with _one_at_a_time:  # a worker of several threads has only one stream of random numbers
        return run(**unit)


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
