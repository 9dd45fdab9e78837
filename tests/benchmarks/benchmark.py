"""How fast is this series, against the article's own code and against what the machine can do at most?

    python tests/benchmarks/benchmark.py                          the whole table, a quarter of an hour on two CPU cores
    python tests/benchmarks/benchmark.py --parts training data    some of its parts
    python tests/benchmarks/benchmark.py --help                   sizes, repeats, the JSON file

Contenders are measured in turn, A B C A B C …, in one process, after one round that does not count; a figure is
the median of the repeats. Ratios are to be trusted more than rates: machines are shared and noisy.
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import pathlib
import re
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2
from tqdm import tqdm

import helpers
import whynan
from helpers import AlexNet, init_weights, load_data, load_dataset
from training import evaluate, train

PARTS = ("training", "precision", "choices", "data", "evaluation", "watch", "memory", "growth")
DEVICE = helpers.find_device()
PRECISION = helpers.find_precision(DEVICE)


def seconds(work):
    """Wall time of one call, with all that it started on the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(contenders, repeats, clock=seconds):
    """{name: [clock(contender) of each repeat]}, measured in turn after one round that does not count."""
    times = {name: [] for name in contenders}
    for repeat in tqdm(range(repeats + 1), leave=False, disable=None):
        for name, contender in contenders.items():
            taken = clock(contender)
            if repeat:
                times[name].append(taken)
    return times


def median_rates(times, images):
    """[{what, images a second: median, least, most}] from `in_turn`'s times; images: a number, or one for each name."""
    count = images if isinstance(images, dict) else dict.fromkeys(times, images)
    return [{"what": name, "rate": count[name] / statistics.median(taken), "least": count[name] / max(taken),
             "most": count[name] / min(taken)} for name, taken in times.items()]


# ------------------------------------------------------------------------------------------------- contenders
def fresh_net(image_size):
    torch.manual_seed(0)
    return init_weights(AlexNet(image_size), "kaiming").to(DEVICE)


warnings.filterwarnings("ignore", "This DataLoader will create")  # the article's four workers, on two cores


def article_loader(options, train):
    """The article's: each image resized by PIL when it is its turn, four workers, no normalisation."""
    transform = transforms.Compose([transforms.Resize((options.image_size,) * 2), transforms.ToTensor()])
    return DataLoader(load_dataset(train=train, transform=transform), options.batch_size, shuffle=True,
                      num_workers=options.workers)


def reference_loader(options):
    """In the manner of torchvision's own training reference: transforms v2, its PIL backend, normalised."""
    transform = v2.Compose([v2.Resize((options.image_size,) * 2, antialias=True), v2.PILToTensor(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1307], [0.3081]), v2.ToPureTensor()])
    return DataLoader(load_dataset(transform=transform), options.batch_size, shuffle=True,
                      num_workers=options.workers, drop_last=True)


def endless(loader):
    """Batch after batch, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def article_training(options):
    """The article's loop as it is: float32, plain SGD; returns a callable that makes options.steps steps."""
    net = fresh_net(options.image_size)
    optimizer, batches = torch.optim.SGD(net.parameters(), lr=0.001), endless(article_loader(options, train=True))

    def steps():
        for X, y in itertools.islice(batches, options.steps):
            X, y = X.to(DEVICE), y.to(DEVICE)
            optimizer.zero_grad()
            logits = net(X)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == y).float().mean().item()

    return steps


def reference_training(options):
    """One epoch's loop as in torchvision's references/classification: momentum, weight decay, top-1 and top-5."""
    net = fresh_net(options.image_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    batches = endless(reference_loader(options))

    def steps():
        for X, y in itertools.islice(batches, options.steps):
            X, y = X.to(DEVICE), y.to(DEVICE)
            logits = net(X)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = logits.topk(5, 1).indices == y[:, None]
            loss.item(), right[:, :1].float().mean().item(), right.any(1).float().mean().item()

    return steps


def series_training(options, precision="auto", change=lambda net: net, optimizer=torch.optim.SGD):
    """`training.train` on `helpers.load_data`."""
    net = change(fresh_net(options.image_size))
    train_iter, _ = load_data(batch_size=options.batch_size, image_size=options.image_size)

    def steps():
        train(net, train_iter, None, options.steps / len(train_iter), 0.001, optimizer=optimizer, log_every=None,
              progress=False, live=False, precision=precision)

    return steps


def layer_products(image_size, batch_size):
    """(rows, inner, columns) of each layer's matrix product in the forward pass, a convolution as one product."""
    net, sizes = AlexNet(image_size), []

    def note(layer, args, output):
        positions = output[0].numel() // layer.weight.shape[0]
        sizes.append((batch_size * positions, layer.weight[0].numel(), layer.weight.shape[0]))

    for layer in net:
        if hasattr(layer, "weight"):
            layer.register_forward_hook(note)
    with torch.inference_mode():
        net(torch.zeros(1, 1, image_size, image_size))
    return sizes


def roof(options):
    """A callable with nothing but the products of the training steps: forward, and two of the same size backward."""
    products = []
    for number, (rows, inner, columns) in enumerate(layer_products(options.image_size, options.batch_size)):
        A, B, C = (torch.randn(shape, device=DEVICE, dtype=PRECISION)
                   for shape in ((rows, inner), (inner, columns), (rows, columns)))
        products += [(A, B), (A.T, C)]
        if number:  # nobody needs the gradient of the pixels
            products.append((C, B.T))

    def multiply():
        for left, right in products * options.steps:
            left @ right

    return multiply


# ------------------------------------------------------------------------------------------------------ parts
def training(options):
    contenders = {"the article's loop": article_training(options), "torchvision's manner": reference_training(options),
                  "training.train": series_training(options)}
    images = options.steps * options.batch_size
    times = in_turn(contenders, options.repeats)
    # by itself: its operands take as much memory as all the contenders
    times["roof: matrix products"] = in_turn({"roof": roof(options)}, options.repeats)["roof"]
    return median_rates(times, images)


def precision(options):
    contenders = {f"training.train in {name}": series_training(options, name) for name in ("float32", "bfloat16")}
    return median_rates(in_turn(contenders, options.repeats), options.steps * options.batch_size)


class Unshuffled(nn.Conv2d):
    """conv1 with each 4 × 4 pixels as 16 channels: the same products, summed in another order, in a form that suits
    matrix units better than one channel. For pictures whose side is a multiple of 4.
    """

    def forward(self, X):
        weight = F.pad(self.weight, (0, 1, 0, 1))
        weight, X = (F.pixel_unshuffle(part, 4).contiguous(memory_format=torch.channels_last) for part in (weight, X))
        return F.conv2d(X, weight, self.bias)  # weight: (96, 1, 12, 12) to (96, 16, 3, 3)


def with_unshuffled_conv1(net):
    net.conv1.__class__ = Unshuffled
    return net


def choices(options):
    """What else torch offers to make a step faster: each by itself, against `training.train` as it is."""
    def with_change(*change, **how):
        steps = series_training(options, **how)

        def take():
            with mock.patch.object(*change) if change else contextlib.nullcontext():
                steps()

        return take

    contenders = {
        "training.train": with_change(), "again, to see the noise": with_change(),
        "without channels_last": with_change(torch, "channels_last", torch.contiguous_format),
        "fused SGD": with_change(optimizer=functools.partial(torch.optim.SGD, fused=True))}
    if options.image_size % 4 == 0:
        contenders["conv1 unshuffled"] = with_change(change=with_unshuffled_conv1)
    if DEVICE.type == "cuda":  # elsewhere it wants a compiler that few have
        compiled, graphs = (functools.partial(torch.compile, mode=mode) for mode in (None, "reduce-overhead"))
        contenders |= {"torch.compile": with_change(change=compiled),
                       "torch.compile, CUDA graphs": with_change(change=graphs),
                       "both, and conv1 unshuffled": with_change(
                           change=lambda net: graphs(with_unshuffled_conv1(net)))}
    return median_rates(in_turn(contenders, options.repeats), options.steps * options.batch_size)


def data(options):
    count = min(options.data_batches, 60_000 // options.batch_size - 1)
    contenders = {"the article's loader": article_loader(options, train=True),
                  "helpers.load_data": load_data(batch_size=options.batch_size, image_size=options.image_size)[0],
                  "roof: writing the tensor": Writer(options)}

    def under_way(loader):
        """Seconds of `count` batches after the first. The workers end with it: idle ones would cook ahead, unpaid."""
        batches = iter(loader)
        next(batches)

        def take():
            for X, y in itertools.islice(batches, count):
                X.to(DEVICE), y.to(DEVICE)

        return seconds(take)

    return median_rates(in_turn(contenders, options.repeats, under_way), count * options.batch_size)


class Writer:
    """Yields batches that cost nothing but the writing of their pixels to fresh memory."""

    def __init__(self, options):
        self.shape, self.y = (options.batch_size, 1, options.image_size, options.image_size), torch.zeros(1)

    def __iter__(self):
        while True:
            yield torch.ones(self.shape, device=DEVICE), self.y


def evaluation(options):
    net = fresh_net(options.image_size).eval()
    loader = article_loader(options, train=False)
    _, test_iter = load_data(batch_size=options.batch_size, image_size=options.image_size,
                             test_images=options.test_images)
    loader.dataset.data = loader.dataset.data[:options.test_images]
    loader.dataset.targets = loader.dataset.targets[:options.test_images]

    @torch.no_grad()
    def article():
        return sum((net(X.to(DEVICE)).argmax(1) == y.to(DEVICE)).sum().item() for X, y in loader) / options.test_images

    return median_rates(in_turn({"the article's way, on the test set": article,
                                 "training.evaluate": lambda: evaluate(net, test_iter)}, options.repeats),
                        options.test_images)


class SmallTransformer(nn.Module):
    """Four layers of width 64 with a causal mask, over 100 letters: (batch, length) to logits (batch · length, 100)."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
        self.letters, self.head = nn.Embedding(100, 64), nn.Linear(64, 100)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, letters):
        mask = nn.Transformer.generate_square_subsequent_mask(letters.shape[1], device=letters.device)
        return self.head(self.layers(self.letters(letters), mask=mask, is_causal=True)).flatten(0, 1)


def watch(options):
    """Images (or texts, or rows) a second of three networks, trained as they are and watched by whynan."""
    torch.manual_seed(0)
    letters = torch.randint(100, (8, 64))
    cases = {
        "AlexNet": (fresh_net(options.image_size), *next(iter(load_data(
            batch_size=options.batch_size, image_size=options.image_size)[0])), options.steps),
        "a small transformer": (SmallTransformer(), letters, letters.flatten(), 10),
        "a tiny MLP": (nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)),
                       torch.randn(16, 10), torch.randint(2, (16,)), 300)}
    rows = []
    for name, (net, X, y, steps) in cases.items():
        net, X, y = net.to(DEVICE), X.to(DEVICE), y.to(DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

        def train(watched, net=net, X=X, y=y, steps=steps, optimizer=optimizer):
            with whynan.watch(net) if watched else contextlib.nullcontext():
                for _ in range(steps):
                    with torch.autocast(DEVICE.type, dtype=PRECISION, enabled=PRECISION != torch.float32):
                        loss = F.cross_entropy(net(X).float(), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    loss.item()

        times = in_turn({name: lambda train=train: train(False), f"{name}, watched": lambda train=train: train(True)},
                        options.repeats)
        alone, watched = median_rates(times, steps * len(X))
        rows += [alone | {"price": 1.0}, watched | {"price": alone["rate"] / watched["rate"]}]
    return rows


def peak_memory(contender, options):
    """The peak of this process, without its loader's workers, once it has trained for two steps, in GB."""
    contender(options)()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would be that of the parent, if it is larger: a child inherits it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: bytes


def memory(options):
    if sys.platform == "win32" and DEVICE.type != "cuda":
        return []
    rows, two_steps = [], argparse.Namespace(**vars(options) | {"steps": 2})
    for name, contender in {"the article's loop": article_training, "training.train": series_training}.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rows.append({"what": name, "gigabytes": fresh.submit(peak_memory, contender, two_steps).result()})
    return rows


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_step(batch_size, image_size, threads_used):
    """A callable that makes one training step of this size, the batch already at hand."""
    net = fresh_net(image_size)
    batch = next(iter(load_data(batch_size=batch_size, image_size=image_size)[0]))

    def step():
        with threads(threads_used):
            train(net, [batch], None, 1, 0.001, log_every=None, progress=False, live=False)

    return step


def growth(options):
    """Rates over one size at a time; the other sizes are the defaults (image sizes and threads: with batches of 20)."""
    usual, few, size = torch.get_num_threads(), min(20, options.batch_size), options.image_size
    cases = {"batch size": {n: (n, size, usual) for n in options.batch_sizes},
             "image size": {n: (few, n, usual) for n in options.image_sizes},
             "threads": {n: (few, size, n) for n in sorted({1, usual})}}
    rows = []
    for over, sizes in cases.items():
        times = in_turn({n: one_step(*case) for n, case in sizes.items()}, options.repeats)
        for row in median_rates(times, {n: case[0] for n, case in sizes.items()}):
            image = 3 * sum(2 * a * b * c for a, b, c in layer_products(sizes[row["what"]][1], 1)) / 1e9
            rows.append({**row, "over": over, "gflops": row["rate"] * image})
    return rows


# ----------------------------------------------------------------------------------------------------- table
def print_part(part, rows):
    titles = {"training": "training, images a second", "precision": "training by precision, images a second",
              "choices": "training with one choice changed, images a second",
              "data": "data iterator, images a second",
              "evaluation": "evaluation, images a second",
              "watch": "training watched by whynan, examples a second, and times as long",
              "memory": "peak memory of training, GB",
              "growth": "training step, images a second (and GFLOP/s)"}
    print(f"\n{titles[part]}", flush=True)
    for row in rows:
        if part == "memory":
            print(f"  {row['what']:36s} {row['gigabytes']:9.2f}")
        elif part == "growth":
            print(f"  {row['over'] + ' ' + str(row['what']):36s} {row['rate']:9.1f}   {row['gflops']:7.0f}   "
                  f"({row['least']:.1f} … {row['most']:.1f})")
        else:
            number, of = (row["price"], "× as long  ") if part == "watch" else (
                row["rate"] / rows[0]["rate"], "× the first")
            print(f"  {row['what']:36s} {row['rate']:9.1f}   {number:6.2f} {of}   "
                  f"({row['least']:.1f} … {row['most']:.1f})")


def above_0(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a whole number above 0 is")
    return int(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    on_gpu = DEVICE.type == "cuda"
    for name, default in {"repeats": 5, "steps": 100 if on_gpu else 1, "batch_size": 100, "image_size": 244,
                          "workers": 4, "data_batches": 50, "test_images": 10_000 if on_gpu else 1000}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=above_0, default=default, help=f"default {default}")
    for name, default in {"batch_sizes": (10, 20, 50, 100, 200, 500),
                          "image_sizes": (124, 164, 204, 244, 324, 404, 484)}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=above_0, nargs="+", default=default,
                            help=f"of the part growth; default {default}")
    parser.add_argument("--json", default="", help="file for the results")
    options = parser.parse_args()
    try:
        helpers.check_parameters(batch_size=options.batch_size, image_size=options.image_size,
                                 test_images=options.test_images, results_path=options.json)
        for n in options.batch_sizes:
            helpers.check_parameters(batch_size=n)
        for n in options.image_sizes:
            helpers.check_parameters(image_size=n)
    except ValueError as error:
        parser.error(str(error))
    return options


def main():
    options = arguments()
    environment = helpers.environment()
    for name, value in environment.items():
        print(f"{name:12s} {value}")
    if PRECISION == torch.float32:
        print("bfloat16 is not the faster arithmetic here: but for the part precision, all multiply in float32")
    results = {}
    for part in options.parts:
        results[part] = globals()[part](options)
        print_part(part, results[part])
        helpers.save_results(options.json, {"benchmark": results, "parameters": vars(options)})


if __name__ == "__main__":
    main()
