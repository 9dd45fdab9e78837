"""What two notebooks or more of this series share; read it from top to bottom.

    parameters   check_parameters                      what a notebook accepts
    machine      find_rank, find_device, find_precision, environment
    data         load_dataset, load_data               MNIST and Fashion-MNIST, enlarged
    networks     LeNet, AlexNet, init_weights, add_norms
    files        save_results                          one JSON file of results, whole or not at all
    figures      STYLE, show                           one look

How these networks are trained and judged stands in training.py. Shapes are (batch, channel, height, width).
"""

import atexit
import base64
import contextlib
import ctypes
import functools
import gzip
import html
import io
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import zlib
from collections import OrderedDict
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from IPython import display, get_ipython
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from torch import distributed, nn
from torch.utils.data import DistributedSampler
from torchvision.datasets.utils import check_integrity

HERE = pathlib.Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------- parameters
def not_allowed(name, value, allowed):
    """The ValueError that says in one line what was wrong, and what is right."""
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
    scheduler: str = Field("", pattern=r"^$|^\w+://.+",
                           description="'' or the address of a Dask scheduler that answers, as tcp://host:8786")
    patient: str = Field("all", description="'all' or a name in PATIENTS of notebook 7")
    sweep: _NewFile = ""
    results_path: _NewFile = ""
    checkpoint: _NewFile = ""


def check_parameters(**given):
    """The given parameters, validated and coerced ("1e-3" becomes 0.001, "false" becomes False).

    Returns a `Parameters`. Raises ValueError, one line with the name, the value and what is allowed.
    """
    shell = getattr(get_ipython(), "user_ns", {})  # papermill's values are in a cell of their own, under any name
    injected, own = ("\n".join(cell for cell in shell.get("In", ()) if cell.startswith("# Parameters\n") == is_injected)
                     for is_injected in (True, False))
    for name in re.findall(r"^(?!PAPERMILL_)(\w+) = ", injected, re.MULTILINE):
        if not re.search(rf"^{name}\b.*=", own, re.MULTILINE):
            raise not_allowed(name, shell[name], "no parameter of this notebook")
    try:
        return Parameters(**given)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        field = Parameters.model_fields.get(name)
        raise not_allowed(name, given[name], field.description if field else "no parameter of this series") from None


# -------------------------------------------------------------------------------------------------- machine
# Read by torch at its first large allocation, Linux only: without huge pages a step of AlexNet on a few images
# spends a seventh of its time on page faults, for 233 MB of fresh gradients.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    # Freed tensors of 16 MiB go back to the system at once; by itself glibc lets up to half a GB of them pile up.
    with contextlib.suppress(AttributeError):  # another C library, such as musl, has no mallopt
        ctypes.CDLL(None).mallopt(-3, 2**24)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**27)  # M_TRIM_THRESHOLD, or small ones would come and go with each step


def find_rank():
    """(rank, number of ranks) of this process; the first call joins it with the others that torchrun has started."""
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
    _, ranks = find_rank()
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


# ----------------------------------------------------------------------------------------------------- data
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
        tensors.append(torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8))
    data = source.__new__(source)  # its __init__ would want extracted files
    torchvision.datasets.VisionDataset.__init__(data, data_dir, transform=transform)
    images, labels = tensors  # in LeCun's IDX format: a head of 16 and of 8 bytes, and then nothing but the values
    data.train, data.data, data.targets = train, images[16:].view(-1, 28, 28), labels[8:].long()
    return data


class ImageIterator:
    """Yields (X, y): X float32 (batch, 1, image_size, image_size), y int64 (batch,), both on `device`.

    Holds the images as bytes, 28×28, and enlarges a whole batch at once; pixels lie in [0, 1] unless normalised.
    Each pass is one epoch: every image once, in an order that depends on the seed and the epoch's number alone.
    Where ranks exist, each gets its own share of every batch (the last of an epoch may leave some ranks none).
    """

    def __init__(self, images, labels, batch_size, image_size, shuffle, seed, normalize, device, dataset):
        self.images, self.labels = images.to(device), labels.to(device)  # (n, 28, 28) uint8, (n,) int64
        self.batch_size, self.image_size, self.normalize, self.seed = batch_size, image_size, normalize, seed
        self.dataset = dataset
        self.rank, self.ranks = find_rank()
        # It draws epoch e of seed s like epoch e - 1 of seed s + 1; far apart, no two seeds meet. And it is told of no
        # ranks: it would make other batches of them, and repeat images to fill up the last.
        self.sampler = DistributedSampler(labels, 1, 0, shuffle=shuffle, seed=seed << 20)
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
        skip = self.skip
        self.sampler.set_epoch(self.epoch)
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
        raise not_allowed("image_size", image_size, "a whole number of pixels from 28 to 512")
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


# ------------------------------------------------------------------------------------------------- networks
class LeNet(nn.Sequential):
    """LeNet-5's layout with sigmoids: (batch, 1, 28, 28) to logits (batch, 10). LeCun et al. 1998, figure 2."""

    def __init__(self):
        super().__init__(OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2), sigmoid1=nn.Sigmoid(), pool1=nn.AvgPool2d(2, 2),
            conv2=nn.Conv2d(6, 16, 5), sigmoid2=nn.Sigmoid(), pool2=nn.AvgPool2d(2, 2), flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120), sigmoid3=nn.Sigmoid(), fc2=nn.Linear(120, 84), sigmoid4=nn.Sigmoid(),
            fc3=nn.Linear(84, 10)))


class AlexNet(nn.Sequential):
    """AlexNet for one-channel images: (batch, 1, image_size, image_size) to logits (batch, 10).

    all_relus=False is the article's form, with nothing between conv3, conv4 and conv5; all_relus=True puts a
    ReLU after every convolution, as Krizhevsky et al. 2012, section 3.5. dropout > 0 drops that share of the
    inputs of fc1 and fc2 while training (section 4.2: 0.5). Raises ValueError for an image_size too small.
    """

    def __init__(self, image_size=244, all_relus=False, dropout=0.0):
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
            fc3=nn.Linear(4096, 10))
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
        raise not_allowed("kind", kind, "'batch' or 'layer'")
    for name, layer in list(net.named_children())[:-1]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            batch_norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
            width = len(layer.weight)
            # torch's LayerNorm wants the size of the map; one group is the same without
            setattr(net, name, nn.Sequential(layer, batch_norm(width) if kind == "batch" else nn.GroupNorm(1, width)))
    return net


# ---------------------------------------------------------------------------------------------------- files
def unfinished(path):
    """Where `replacing` writes what is to become the file `path`."""
    return pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.unfinished")


@contextlib.contextmanager
def replacing(path):
    """A temporary file beside `path` that takes its place when all went well, and leaves no trace otherwise."""
    temporary = unfinished(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_results(path, results):
    """Write a dict of results, with `environment()`, as one JSON file, whole or not at all; path "" does nothing.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity". Raises ValueError for a bad path.
    """
    path = check_parameters(results_path=str(path)).results_path
    if path and not find_rank()[0]:
        text = to_json({**results, "environment": environment()}, indent=1, inf_nan_mode="strings")
        with replacing(path) as file:
            file.write_bytes(text + b"\n")


# -------------------------------------------------------------------------------------------------- figures
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


def show(figure, alt, **place):
    """Display a figure with a text for those who can't see it, and close it; `place` as IPython's `display` has it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight")
    plt.close(figure)
    # at most 256 colours, which no eye misses in a plot and halves the file
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    png = base64.b64encode(small.getvalue()).decode()
    # JupyterLab, nbconvert and GitHub read an alternative text in HTML only, and LaTeX reads no HTML
    img = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'
    display.display({"text/html": img, "image/png": png, "text/plain": alt}, raw=True, **place)
