"""How a network of this series is trained and judged, and how many runs are kept; read it from top to bottom.

    history      Row, History                 what a run went through; a *step* is one mini-batch, counted from 1
    evaluation   Evaluation, evaluate         how good a network is
    training     train                        the loop that every run goes through
    beside it    the progress bar, logged lines, tests, checkpoints and the live figure, each when it is due
    ranks        one network trained by several processes
    outcome      final_loss, outcome          what became of a run; where a NaN was born says whynan.py
    sweeps       Sweep, open_sweep            many runs in one file, on one machine or on several
"""

import contextlib
import functools
import itertools
import json
import math
import operator
import os
import pathlib
import re
import statistics
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from IPython import display, get_ipython
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json, to_jsonable_python
from torch import distributed, nn
from tqdm import tqdm

import helpers
from helpers import HERE, STYLE, Parameters, check_parameters, find_precision, find_rank, not_allowed


# -------------------------------------------------------------------------------------------------- history
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
        """Note those of one more step; True if a loss, now or before, is not finite."""
        self.loss.append(loss)
        self.accuracy.append(accuracy)
        if self.diverged_at is None and not math.isfinite(loss):
            self.diverged_at = len(self.loss)
        return self.diverged_at is not None

    def plot(self, axes, run="C"):
        """Loss (log scale, up to the last finite one) and accuracy over steps, on two axes."""
        style, steps = {**STYLE[run], "marker": ""}, range(1, len(self.loss) + 1)
        finite = [loss if math.isfinite(loss) else math.nan for loss in self.loss]
        axes[0].plot(steps, finite, **style)
        if self.diverged_at and self.diverged_at > 1:
            axes[0].plot(self.diverged_at - 1, finite[self.diverged_at - 2], "kx", ms=9, mew=2)
        axes[0].set(xlabel="step", ylabel="loss of the batch (nats)", yscale="log")
        axes[1].plot(steps, self.accuracy, **style)
        tested = {row.step: row.test_accuracy for row in self.rows if row.test_accuracy is not None}
        axes[1].plot(tested.keys(), tested.values(), linestyle="none", color="black", marker=STYLE[run]["marker"])
        axes[1].set(xlabel="step", ylabel="accuracy (share)", ylim=(-0.02, 1.02))
        for axis in axes:
            axis.xaxis.get_major_locator().set_params(integer=True)


# ----------------------------------------------------------------------------------------------- evaluation
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
        raise not_allowed("data_iter", data_iter, "an iterator of at least one batch")
    if getattr(data_iter, "ranks", 1) > 1:
        batches = [[part.cpu() for part in batch] for batch in batches]
        batches = [share for shares in zip(*_of_all_ranks(batches), strict=True) for share in shares]
    losses, predictions, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    counts = multiclass_confusion_matrix(predictions, labels, logits.shape[1]).cpu()
    accuracy = (counts.trace() / counts.sum()).item()
    return Evaluation(losses.mean().item(), accuracy, counts, losses.cpu(), predictions.cpu())


# ------------------------------------------------------------------------------------------------- training
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

    Raises ValueError (a parameter; a checkpoint that is damaged, or of another network, optimizer, schedule or data).
    """
    p = check_parameters(lr=lr, num_epochs=num_epochs, precision=precision, checkpoint=str(checkpoint or ""))
    for name, every in (("log_every", 1 if log_every is None else log_every), ("checkpoint_every", checkpoint_every)):
        if every < 1:
            raise not_allowed(name, every, "a whole number from 1" + ", or None" * (name == "log_every"))
    device = next(net.parameters()).device
    net.to(memory_format=torch.channels_last).train()
    optimizer = optimizer(net.parameters(), lr=p.lr)
    scheduler = scheduler(optimizer) if scheduler else None
    total = max(1, round(p.num_epochs * len(train_iter)))
    saved = _Checkpoint(checkpoint, net, optimizer, scheduler, p.lr, train_iter)
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
            loss, numbers = _of_the_batch(loss, logits, y)
            if not loss.is_cuda and history.add(*numbers()) and stop_at_nonfinite:
                break

            # backward: the gradient of each weight; then a step against it
            optimizer.zero_grad()
            loss.backward()
            # To ask a GPU for numbers is to wait for it; so it is asked when it has work for the meantime.
            if loss.is_cuda and history.add(*numbers()) and stop_at_nonfinite:
                break
            optimizer.step()
            if scheduler:
                scheduler.step()

            # beside it: the bar, a line, a test, a checkpoint, the figure, each when it is due
            after_step()
    optimizer.zero_grad()  # the gradients take as much memory as the weights
    return history


# ------------------------------------------------------------------------------------------------ beside it
def _batches(train_iter, step, total):
    """The batches from step `step` on, `total` less those that were before, over as many epochs as it takes."""
    while step < total:
        epoch, skip = divmod(before := step, len(train_iter) or 1)
        if hasattr(train_iter, "set_epoch"):
            train_iter.set_epoch(epoch, skip)
            skip = 0
        for batch in itertools.islice(train_iter, skip, skip + total - step):
            step += 1
            yield batch
        if step == before:
            raise not_allowed("train_iter", train_iter, "an iterator of at least one batch, as its len says, per epoch")


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

    first = not find_rank()[0]
    figure.update(history)  # above the bar
    try:
        with tqdm(total=total, initial=len(history.loss), unit="step", file=sys.stdout,
                  disable=not (progress and first), mininterval=2, ncols=100) as bar:
            yield after_step
    finally:
        figure.update(history, seconds_between=0)


class _LiveFigure:
    """Shows a History while it grows, in one place of the notebook; nothing where there is none."""

    def __init__(self, wanted, run):
        self.wanted = wanted and hasattr(get_ipython(), "kernel") and not find_rank()[0]
        self.run, self.drawn, self.pause, self.place = run, 0.0, 3.0, display.DisplayHandle().display_id
        # One for all drawings, and not pyplot's: Jupyter would keep each, 3 MB, until the cell ends.
        self.figure = Figure(figsize=(9, 3)) if self.wanted else None

    def update(self, history, seconds_between=None):
        """Draws, if the last drawing is so many seconds ago; None: so many that drawing takes 1/20 of the time."""
        start = time.monotonic()
        if not self.wanted or start - self.drawn < (self.pause if seconds_between is None else seconds_between):
            return
        self.figure.clear()
        history.plot(self.figure.subplots(1, 2), self.run)
        helpers.show(self.figure, "Live curves of the run: the loss, and the accuracy, of each step's batch.",
                     display_id=self.place, update=self.drawn > 0)
        self.drawn = time.monotonic()
        self.pause = max(3.0, 20 * (self.drawn - start))


class _Checkpoint:
    """The state of one training run in one file; with no path it does nothing."""

    def __init__(self, path, net, optimizer, scheduler, lr, train_iter):
        self.path, self.parts = path, {"net": net, "optimizer": optimizer}
        if scheduler:
            self.parts["scheduler"] = scheduler
        data = train_iter if hasattr(train_iter, "set_epoch") else f"{len(train_iter)} batches"
        # what must be the same when the run is taken up again
        self.run = (f"{net}\noptimizer {type(optimizer).__name__}, schedule {type(scheduler).__name__}, lr {lr}, {data}"
                    f", settings {optimizer.defaults}")

    def save(self, history):
        """Rank 0 writes, and with it the random numbers of each rank."""
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
        randoms = _of_all_ranks(random) if self.path else []
        if self.path and not find_rank()[0]:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            with helpers.replacing(self.path) as file:
                torch.save({**state, "randoms": randoms, "run": self.run, "history": history.model_dump_json()}, file)

    def load(self):
        """The history so far, and net, optimizer, schedule and random numbers set to where it ended."""
        rank, ranks = find_rank()
        state = [self._read() if self.path and not rank else None]
        if self.path and ranks > 1:  # the file may lie on another machine
            distributed.broadcast_object_list(state)
        state, = state
        if not state:
            return History()
        if state["run"] != self.run:
            pieces = (re.split(r"[(),\n]+ *", about) for about in (state["run"], self.run))
            theirs, ours = next((a, b) for a, b in itertools.zip_longest(*pieces, fillvalue="nothing") if a != b)
            raise not_allowed("checkpoint", str(self.path),
                              f"of another run: it has {theirs}, this one has {ours}; give another path, or delete it")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        cpu, *gpus = state["randoms"][rank % len(state["randoms"])]
        torch.set_rng_state(cpu)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(gpus)
        return state["history"]

    def _read(self):
        helpers.unfinished(self.path).unlink(missing_ok=True)  # of a run that was killed while it wrote
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            return state | {"history": History.model_validate_json(state["history"]), "run": state["run"],
                            "randoms": state["randoms"]}
        except FileNotFoundError:
            return None
        except Exception:
            raise not_allowed("checkpoint", str(self.path), "what train wrote whole; delete it to start anew") from None


# ---------------------------------------------------------------------------------------------------- ranks
def _on_all_ranks(net, optimizer):
    """What is called in the place of net: net itself, or, where ranks exist, what averages their gradients."""
    rank, ranks = find_rank()
    if ranks == 1:
        return net
    torch.manual_seed(torch.initial_seed() + rank)  # or dropout would drop the same units of each share
    on_cuda = next(net.parameters()).is_cuda
    if on_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer.register_step_post_hook(lambda *_: [distributed.broadcast(buffer, 0) for buffer in net.buffers()])
    model = nn.parallel.DistributedDataParallel(net)

    def mean_of_each(_, bucket):
        futures = [distributed.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
        return torch.futures.collect_all(futures).then(lambda _: bucket.buffer().div_(ranks))

    if not on_cuda:
        # DDP averages the gradients of several weights at once, and sorts them anew after the first step: in another
        # place the ranks are added in another order, and a resumed run would have other last digits.
        model.register_comm_hook(None, mean_of_each)
    return model


def _of_the_batch(loss, logits, y):
    """(what to go back from, a function that gives loss and accuracy), of the batch that all ranks share."""
    right, (_, ranks) = logits.argmax(1) == y, find_rank()
    if ranks == 1:
        numbers = torch.stack([loss.detach().reshape(()), right.float().mean()]).to("cpu", non_blocking=loss.is_cuda)
        arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
        return loss, lambda: (arrived and arrived.synchronize()) or numbers.tolist()
    loss = loss * len(y) if len(y) else logits.sum()  # of no images: 0, and so are its gradients
    sums = torch.stack([loss.detach().double().reshape(()), right.sum().double(),
                        right.new_tensor(len(y), dtype=torch.float64)])
    distributed.all_reduce(sums)
    total, right, images = sums.tolist()
    return loss * (ranks / images), lambda: (total / images, right / images)


def _of_all_ranks(thing):
    """[what each rank gives], on all of them."""
    things = [thing] * find_rank()[1]
    if len(things) > 1:
        distributed.all_gather_object(things, thing)
    return things


# -------------------------------------------------------------------------------------------------- outcome
def final_loss(losses):
    """The loss at which a run ended: the median of its last third; NaN if any loss is not finite.

    Takes the loss of each step, at least one, as floats or text ("NaN", as JSON has them). Raises ValueError.
    """
    losses = [float(loss) for loss in losses]
    if not losses:
        raise not_allowed("losses", losses, "at least one loss")
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


# --------------------------------------------------------------------------------------------------- sweeps
class Sweep:
    """The finished units of a sweep, kept in a JSON file, so that an interrupted sweep goes on where it stopped.

    path        the file, written anew after each unit; read first if it exists; "" keeps them in memory only
    settings    a dict of what all units share, kept in the file too

    Several processes may work at one file: none loses what another has finished. ValueError: damaged, other settings.
    """

    def __init__(self, path="", settings=None):
        self.path, self.settings, self.units = str(path), to_jsonable_python(settings or {}), []
        self.lock, self.workers = threading.Lock(), None
        self._read()

    def _read(self):
        if not os.path.isfile(self.path):
            return
        try:
            saved = json.loads(pathlib.Path(self.path).read_text(encoding="utf-8"))
            found, self.units = saved["settings"], saved["units"]
        except (ValueError, KeyError, TypeError):
            raise not_allowed("sweep file", self.path, "what a sweep wrote whole; delete it to start anew") from None
        if found != self.settings:
            raise not_allowed("sweep file", self.path, f"of another sweep ({found}); give another path, or delete it")

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
            with FileLock(path.with_name(f".{path.name}.lock")) if self.path else self.lock:
                self._read()
                if self.find(**unit) is None:
                    self.units.append(fresh)
                    helpers.save_results(self.path, {"settings": self.settings, "units": self.units})
        return self.find(**unit)

    def each(self, do, items, scheduler="", name="runs"):
        """Call do(*item) for each item, with a progress bar: in turn; or, with the address of a Dask scheduler, all at
        once, while its workers run what they ask of this sweep. Units are kept in the order in which they are finished.

        The workers must be able to import training. Raises ValueError for an address where no scheduler answers.
        """
        bar = functools.partial(tqdm, total=len(items), desc=name, file=sys.stdout, ncols=80, mininterval=5)
        if not check_parameters(scheduler=scheduler).scheduler:
            for item in bar(items):
                do(*item)
            return
        from distributed import Client  # a second to import
        from distributed.protocol import pickle

        def on_a_worker(run, unit):
            with self.lock:
                if run not in sent:  # once, as it may hold a network; and pickled: the scheduler has no torch
                    sent[run] = client.submit(pickle.loads, pickle.dumps(functools.partial(_alone, run)))
            return client.submit(operator.methodcaller("__call__", unit), sent[run]).result()

        warnings.filterwarnings("ignore", "Sending large graph")
        try:
            client = Client(scheduler, timeout=5, set_as_default=False)
        except (OSError, ValueError):
            raise not_allowed("scheduler", scheduler, Parameters.model_fields["scheduler"].description) from None
        sent, self.workers = {}, on_a_worker
        try:
            with ThreadPoolExecutor(len(items) or 1) as threads, client:
                for done in bar(as_completed([threads.submit(do, *item) for item in items])):
                    done.result()
        finally:
            self.workers = None


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
