"""What a user relies on in helpers.py and training.py, on the real data sets."""

import base64
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

import helpers
from helpers import AlexNet, LeNet, check_parameters, init_weights, load_data
from training import History, Row, Sweep, evaluate, outcome, train

CPU = torch.device("cpu")
settings.register_profile("shared machine", deadline=None)  # a slow machine is no failure
settings.load_profile("shared machine")


def digits(**options):
    """(train_iter, test_iter) of small original-size MNIST."""
    return load_data(**{"image_size": 28, "train_images": 600, "test_images": 200, "batch_size": 50} | options)


def run_python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=tempfile.gettempdir(), **options)


# ---------------------------------------------------------------------------------------------- parameters
def test_strings_of_a_shell_or_yaml_are_coerced():
    p = check_parameters(lr="1e-3", all_relus="false", batch_size="100", num_epochs="0.5")
    assert (p.lr, p.all_relus, p.batch_size, p.num_epochs) == (0.001, False, 100, 0.5)


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("lr", "abc", "a finite number above 0"), ("lr", -1, "above 0"), ("lr", math.inf, "finite"),
    ("lr", math.nan, "finite"), ("batch_size", 0, "from 1"), ("batch_size", 2.5, "whole number"),
    ("dataset", "CIFAR", "'MNIST' or 'FashionMNIST'"),
    ("image_size", 20, "from 67"), ("init", "foo", "'kaiming'"), ("all_relus", "perhaps", "true or false"),
    ("num_epochs", 0, "above 0"), ("test_images", 10_001, "to 10000"),
    ("grid_size", 1, "from 2"), ("steps", 2, "from 3"), ("relus", 5, "true or false"), ("seeds", 0, "from 1"),
    ("sweep", "/no/such/folder/x.json", "folder"), ("results_path", "/no/such/folder/x.json", "folder"),
    ("checkpoint", tempfile.gettempdir(), "file in a folder"),
    ("momentum", 0.9, "no parameter")])
def test_a_bad_parameter_is_one_line_with_name_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        check_parameters(**{"seed": 1, name: value})
    message = str(error.value)
    assert message.startswith(f"{name} = {value!r} is not allowed; ") and "\n" not in message


def test_of_several_paths_the_one_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^results_path = "):
        check_parameters(sweep=str(tmp_path / "x.json"), results_path=str(tmp_path / ("x" * 300) / "x.json"))


@given(st.floats())
def test_lr_is_taken_if_and_only_if_it_is_finite_and_positive(lr):
    with contextlib.nullcontext() if 0 < lr < math.inf else pytest.raises(ValueError):
        assert check_parameters(lr=lr).lr == lr


class Short(list):
    """An iterator of no batch whose len says three: an epoch that brings nothing would be asked for ever."""

    def __len__(self):
        return 3


@pytest.mark.parametrize("call", [
    lambda: load_data("CIFAR"), lambda: load_data(batch_size=0), lambda: load_data(image_size=20), lambda: AlexNet(66),
    lambda: init_weights(LeNet(), "foo"), lambda: train(LeNet(), [1], lr="abc"), lambda: train(LeNet(), [1], lr=-1),
    lambda: train(LeNet(), [1], log_every=0), lambda: train(LeNet(), [1], checkpoint="/no/such/folder/file"),
    lambda: helpers.save_results("/no/such/folder/file", {}),
    lambda: evaluate(LeNet(), []), lambda: train(LeNet(), []), lambda: outcome([]),
    lambda: train(LeNet(), [], checkpoint_every=0), lambda: train(LeNet(), Short(), progress=False),
    lambda: Sweep("/no/such/folder/file")(dict)])
def test_functions_refuse_bad_arguments_the_same_way(call):
    with pytest.raises(ValueError, match=r"^\w+ = .+ is not allowed; "):
        call()


# ---------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_batches_equal_torchvisions_own_transform(dataset):
    resize = v2.Compose([v2.Resize((244, 244)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    reference = helpers.load_dataset(dataset, transform=resize)
    train_iter, test_iter = load_data(dataset, device=CPU)
    X, y = train_iter.take(torch.arange(40))
    theirs, labels = zip(*(reference[i] for i in range(40)), strict=True)
    assert X.shape == (40, 1, 244, 244) and X.dtype == torch.float32 and 0 <= X.min() and X.max() <= 1
    # PIL enlarges in two passes and rounds to 8 bits after each: half a grey level twice
    assert (X - torch.stack(theirs)).abs().max() <= 1 / 255 + 1e-6
    assert y.tolist() == list(labels) and len(train_iter) == 600 and len(test_iter) == 100


@settings(max_examples=25)
@given(images=st.integers(1, 300), batch_size=st.integers(1, 80), seed=st.integers(0, 2**32 - 1),
       epoch=st.integers(0, 50))
def test_every_image_comes_once_an_epoch(images, batch_size, seed, epoch):
    train_iter, _ = load_data(image_size=28, batch_size=batch_size, train_images=images, seed=seed, device=CPU)
    train_iter.set_epoch(epoch)
    batches = list(train_iter)
    assert len(batches) == len(train_iter) == math.ceil(images / batch_size)
    seen = sorted(X.sum().item() for X in torch.cat([X for X, _ in batches]))
    assert seen == pytest.approx(sorted((train_iter.images / 255).sum((1, 2)).tolist()), rel=1e-4)


@pytest.mark.parametrize("images", [100, 600, 5000, 20_000, 30_000])
def test_a_part_of_the_training_set_has_its_share_of_both_groups_of_writers(images):
    odd = {image.numpy().tobytes() for image in helpers.load_dataset("MNIST").data[1::2]}
    train_iter, _ = load_data(image_size=28, train_images=images, device=CPU)
    share = sum(image.numpy().tobytes() in odd for image in train_iter.images) / images
    assert 0.45 < share < 0.55


def labels_of(train_iter, epoch, skip=0):
    train_iter.set_epoch(epoch, skip)
    return torch.cat([y for _, y in train_iter])


def test_order_depends_on_seed_and_epoch_alone():
    (first, _), (same, _), (other, _) = digits(seed=3), digits(seed=3), digits(seed=4)
    next(iter(first))  # a look at one batch must not change what training sees
    assert torch.equal(labels_of(first, 5), labels_of(same, 5))
    assert torch.equal(labels_of(first, 5, skip=4), labels_of(same, 5)[200:])
    assert not torch.equal(labels_of(first, 0), labels_of(first, 1))
    # torch's DistributedSampler alone draws epoch 1 of seed 3 like epoch 0 of seed 4
    assert not torch.equal(labels_of(first, 1), labels_of(other, 0))


def test_iterating_twice_gives_two_epochs():
    train_iter, test_iter = digits()
    assert not torch.equal(*(torch.cat([y for _, y in train_iter]) for _ in range(2)))
    assert torch.equal(*(torch.cat([y for _, y in test_iter]) for _ in range(2)))


def test_normalize_uses_the_training_pixels():
    train_iter, _ = load_data(image_size=28, normalize=True, batch_size=10_000, device=CPU)
    X = torch.cat([X for X, _ in train_iter])
    assert X.mean().abs() < 1e-3 and (X.std() - 1).abs() < 1e-3


def test_a_subset_is_spread_over_the_set():
    _, test_iter = load_data(image_size=28, test_images=100)
    whole = helpers.load_dataset(train=False)
    assert test_iter.labels.tolist() == whole.targets[::100].tolist()


@pytest.fixture
def data_copy(tmp_path):
    """A fresh clone's data folder: the .gz files alone."""
    for name in ("MNIST", "FashionMNIST"):
        shutil.copytree(helpers.HERE / "data" / name, tmp_path / name, ignore=shutil.ignore_patterns("*ubyte", ".*"))
    return tmp_path


def damage(path, how):
    whole = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(
        whole[: len(whole) // 2] if how == "truncated" else whole[:5000] + b"?" + whole[5001:])


@pytest.mark.parametrize("how", ["damaged", "truncated", "missing"])
def test_a_bad_original_file_is_one_error_with_its_name_and_the_way_out(data_copy, how):
    bad = data_copy / "MNIST/raw/train-images-idx3-ubyte.gz"
    damage(bad, how)
    before = sorted(data_copy.rglob("*"))
    with pytest.raises(RuntimeError, match="git checkout") as error:
        load_data(data_dir=data_copy)
    assert str(bad) in str(error.value) and sorted(data_copy.rglob("*")) == before


def test_reading_writes_nothing(data_copy):
    before = sorted(data_copy.rglob("*"))
    images = helpers.load_dataset("FashionMNIST", data_dir=data_copy)
    assert images.data.shape == (60_000, 28, 28) and sorted(data_copy.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ networks
@settings(max_examples=20)
@given(size=st.integers(67, 512), all_relus=st.booleans())
def test_alexnet_gives_ten_scores_for_every_usable_size(size, all_relus):
    with torch.device("meta"):  # shapes without arithmetic
        net, x = AlexNet(size, all_relus=all_relus), torch.empty(2, 1, size, size)
        for name, layer in net.named_children():
            before, x = x, layer(x)
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                window = layer.kernel_size, layer.stride, layer.padding
                k, s, p = (size[0] if isinstance(size, tuple) else size for size in window)
                assert x.shape[-1] == (before.shape[-1] + 2 * p - k) // s + 1 >= 1, name
    assert x.shape == (2, 10)


def test_both_forms_of_alexnet():
    with torch.device("meta"):
        article, original = AlexNet(), AlexNet(all_relus=True, dropout=0.5)
    assert sum(w.numel() for w in article.parameters()) == sum(w.numel() for w in original.parameters()) == 58_299_082
    extra = {name for name, _ in original.named_children()} - {name for name, _ in article.named_children()}
    assert extra == {"relu3", "relu4", "dropout1", "dropout2"}
    shapes, x = {}, torch.empty(1, 1, 244, 244, device="meta")
    for name, layer in article.named_children():
        shapes[name] = tuple((x := layer(x)).shape[1:])
    assert (shapes["conv1"], shapes["pool1"], shapes["pool2"]) == ((96, 59, 59), (96, 29, 29), (256, 14, 14))
    assert (shapes["conv4"], shapes["pool3"], shapes["fc3"]) == ((384, 14, 14), (256, 6, 6), (10,))


def test_lenet():
    assert LeNet()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert sum(w.numel() for w in LeNet().parameters()) == 61_706


@pytest.mark.parametrize("scheme", ["normal", "kaiming", "default", "krizhevsky"])
def test_init_statistics(scheme):
    torch.manual_seed(0)
    net = AlexNet(67)
    biases = {name: layer.bias.clone() for name, layer in net.named_children() if hasattr(layer, "bias")}
    init_weights(net, scheme)
    for name, old in biases.items():
        layer = net.get_submodule(name)
        fan_in = layer.weight[0].numel()
        std = {"normal": 1, "kaiming": (2 / fan_in) ** 0.5, "default": (1 / 3 / fan_in) ** 0.5,
               "krizhevsky": 0.01}[scheme]
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(layer.weight.mean().item()) < 0.05 * std
        if scheme == "krizhevsky":
            assert layer.bias.unique().tolist() == [float(name in ("conv2", "conv4", "conv5", "fc1", "fc2"))]
        else:
            assert torch.equal(layer.bias, old) == (scheme != "default")


# ------------------------------------------------------------------------------------- evaluation, training
class Fixed(nn.Module):
    """Gives these scores whatever the images are."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.unused = logits, nn.Parameter(torch.zeros(1))

    def forward(self, X):
        return self.logits[: len(X)] + 0 * self.unused


def test_evaluation_equals_a_hand_count():
    logits = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0], [4.0, 0, 0], [0, 1.0, 0]])
    result = evaluate(Fixed(logits), [(torch.zeros(5, 1, 2, 2), torch.tensor([0, 1, 1, 2, 1])),
                                      (torch.zeros(1, 1, 2, 2), torch.tensor([0]))])
    assert result.confusion.tolist() == [[2, 0, 0], [0, 2, 1], [1, 0, 0]]
    assert result.accuracy == pytest.approx(4 / 6)
    expected = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(
        [*logits.tolist(), logits[0].tolist()], [0, 1, 1, 2, 1, 0], strict=True)]
    assert result.losses.tolist() == pytest.approx(expected) and result.loss == pytest.approx(sum(expected) / 6)
    assert result.predictions.tolist() == [0, 1, 2, 0, 1, 0]


def test_a_dead_network_scores_the_share_of_class_0():
    _, test_iter = load_data(image_size=28)
    result = evaluate(Fixed(torch.full((100, 10), math.nan)), test_iter)
    assert result.accuracy == pytest.approx(980 / 10_000) and math.isnan(result.loss)


@pytest.mark.slow
def test_training_learns_and_tests_on_the_test_set():
    train_iter, test_iter = load_data(image_size=28)
    torch.manual_seed(0)
    net = init_weights(LeNet(), "normal")
    history = train(net, train_iter, test_iter, 0.5, 0.1, log_every=120, progress=False)
    assert [row.step for row in history.rows] == [120, 240, 300] and len(history.loss) == 300
    assert history.rows[1].train_loss == pytest.approx(sum(history.loss[120:240]) / 120)
    assert history.rows[2].train_accuracy == pytest.approx(sum(history.accuracy[240:]) / 60)
    assert history.rows[-1].test_accuracy == evaluate(net, test_iter).accuracy > 0.6
    wrong = [(X, (y + 1) % 10) for X, y in digits()[1]]
    assert train(net, train_iter, wrong, 1 / 600, 0.1, progress=False).rows[0].test_accuracy < 0.3


def test_training_without_logged_lines_is_the_same_training(capsys):
    torch.manual_seed(0)
    net, (train_iter, _) = LeNet(), digits()
    twin = copy.deepcopy(net)
    silent = train(net, train_iter, None, 1, 0.1, log_every=None, progress=False)
    assert not silent.rows and not capsys.readouterr().out
    assert silent.loss == train(twin, train_iter, None, 1, 0.1, log_every=5, progress=False).loss


def test_any_loss():
    torch.manual_seed(0)
    net, (train_iter, _) = LeNet(), digits()
    twin = copy.deepcopy(net)
    plain = train(net, train_iter, None, 1, 0.2, progress=False)
    doubled = train(twin, train_iter, None, 1, 0.1, progress=False,
                    loss_fn=lambda logits, y: 2 * nn.functional.cross_entropy(logits, y).reshape(1))
    assert doubled.loss == pytest.approx([2 * loss for loss in plain.loss], rel=1e-4)


def test_any_optimizer_and_schedule():
    seen = []

    def schedule(optimizer):
        seen.append(optimizer)
        return torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=10)

    net = init_weights(LeNet(), "normal")
    history = train(net, digits()[0], None, 10, 0.01, optimizer=torch.optim.Adam, scheduler=schedule, progress=False)
    assert isinstance(seen[0], torch.optim.Adam) and seen[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert sum(history.loss[-10:]) < sum(history.loss[:10])


@pytest.mark.parametrize("stop", [True, False])
def test_a_diverging_run(stop):
    torch.manual_seed(0)
    net = init_weights(AlexNet(67), "normal")
    data = load_data(image_size=67, batch_size=5, train_images=25)[0]
    history = train(net, data, None, 1, 0.1, log_every=1, progress=False, stop_at_nonfinite=stop)
    assert history.diverged_at == 2 and not math.isfinite(history.loss[1])
    assert len(history.loss) == (2 if stop else 5) and len(history.rows) == (1 if stop else 5)
    assert all(w.isfinite().all() for w in net.parameters()) == stop


def test_same_seed_same_curve():
    def curve():
        torch.manual_seed(1)
        return train(LeNet(), digits(seed=1)[0], None, 1, 0.5, progress=False).loss

    assert curve() == curve()


@given(st.lists(st.floats()), st.one_of(st.none(), st.integers(1)))
def test_history_survives_json(loss, diverged_at):
    history = History(loss=loss, accuracy=[0.5] * len(loss), diverged_at=diverged_at,
                      rows=[{"step": 1, "train_loss": v, "train_accuracy": 0, "test_accuracy": None} for v in loss])
    text = history.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert repr(History.model_validate_json(text)) == repr(history)


TRAINING = """
import sys, torch, helpers, training
train_iter, test_iter = helpers.load_data(image_size=67, batch_size=10, train_images=120, test_images=20)
torch.manual_seed(0)
net = helpers.init_weights(helpers.AlexNet(67, dropout=0.5), "kaiming").to(helpers.find_device())
def momentum(parameters, lr): return torch.optim.SGD(parameters, lr, momentum=0.9)
def schedule(optimizer): return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
history = training.train(net, train_iter, test_iter, 2, 1e-4, optimizer=momentum, scheduler=schedule, log_every=5,
                         checkpoint=sys.argv[1], checkpoint_every=3, progress=False)
torch.save({"history": history.model_dump_json(), "net": net.state_dict()}, sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_history_and_weights(tmp_path):
    def start(name):
        files = tmp_path / f"{name}.checkpoint", tmp_path / f"{name}.result"
        return subprocess.Popen([sys.executable, "-c", TRAINING, *files])

    assert start("whole").wait(timeout=300) == 0
    killed = 0
    for patience in (0.1, 0.6):  # seconds after a checkpoint appears: in the midst of a step, or of a save
        process, checkpoint = start("killed"), tmp_path / "killed.checkpoint"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(patience)
        process.kill()
        killed += process.wait() == (-signal.SIGKILL if os.name != "nt" else 1)
    assert killed == 2, "the runs were over before they could be killed"
    assert start("killed").wait(timeout=300) == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.result", weights_only=True) for name in ("whole", "killed"))
    assert whole["history"] == resumed["history"] and len(History.model_validate_json(whole["history"]).loss) == 24
    assert all(torch.equal(whole["net"][name], resumed["net"][name]) for name in whole["net"])
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused_and_kept(tmp_path):
    path = tmp_path / "checkpoint"
    train(LeNet(), digits()[0], None, 1, 0.1, checkpoint=path, progress=False)
    for lr, data, theirs, ours in (
            (0.2, {}, "lr 0.1", "lr 0.2"), (0.1, {"seed": 1}, "seed 0", "seed 1"),
            (0.1, {"dataset": "FashionMNIST"}, "dataset MNIST", "dataset FashionMNIST"),
            (0.1, {"batch_size": 60}, "batches of 50", "batches of 60")):
        with pytest.raises(ValueError, match=f"of another run: it has {theirs}, this one has {ours};"):
            train(LeNet(), digits(**data)[0], None, 1, lr, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="it has LeNet, this one has Sequential;"):
        train(nn.Sequential(*LeNet()), digits()[0], None, 1, 0.1, checkpoint=path, progress=False)
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    with pytest.raises(ValueError, match=r"it has 'momentum': 0, this one has 'momentum': 0\.9;"):
        train(LeNet(), digits()[0], None, 1, 0.1, optimizer=momentum, checkpoint=path, progress=False)
    damage(path, "truncated")
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="wrote whole; delete it"):
        train(LeNet(), digits()[0], None, 1, 0.1, checkpoint=path, progress=False)
    assert path.read_bytes() == kept


def test_what_a_killed_run_left_half_written_goes_at_its_next_start(tmp_path):
    class Stopped(list):
        def __iter__(self):
            raise KeyboardInterrupt

    left = tmp_path / ".run.checkpoint.unfinished"
    left.write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        train(LeNet(), Stopped([1]), checkpoint=tmp_path / "run.checkpoint", progress=False)
    assert not left.exists()


def test_a_run_that_went_on_after_its_death_is_not_taken_up_again_by_one_that_would_have_stopped(tmp_path):
    bad = [(torch.full((2, 1, 28, 28), math.nan), torch.tensor([0, 1]))] * 3
    options = {"log_every": None, "checkpoint": tmp_path / "run.checkpoint", "progress": False}
    dead = train(LeNet(), bad, None, 1, 0.1, stop_at_nonfinite=False, **options)
    again = train(LeNet(), bad, None, 2, 0.1, **options)
    assert dead.diverged_at == again.diverged_at == 1 and len(dead.loss) == len(again.loss) == 3


def test_a_history_is_drawn_and_shown_with_its_alternative_text(monkeypatch):
    shown, (figure, axes) = [], plt.subplots(1, 2)
    monkeypatch.setattr(helpers.display, "display", lambda data, **_: shown.append(data))
    row = Row(step=2, train_loss=1.5, train_accuracy=0.2, test_accuracy=0.3)
    History(loss=[2.0, 1.0, math.inf], accuracy=[0.1, 0.2, 0.3], rows=[row], diverged_at=3).plot(axes, "A")
    (loss, death), (accuracy, tested) = (axis.lines for axis in axes)
    assert str(loss.get_ydata().tolist()) == "[2.0, 1.0, nan]" and death.get_xydata().tolist() == [[2, 1.0]]
    assert [*accuracy.get_ydata()] == [0.1, 0.2, 0.3] and tested.get_xydata().tolist() == [[2, 0.3]]
    helpers.show(figure, 'two "axes", loss < 3')
    assert shown[0]["text/html"].startswith('<img alt="two &quot;axes&quot;, loss &lt; 3" src="data:image/png;base64,')
    assert len(base64.b64decode(shown[0]["image/png"])) < 30_000 and not plt.fignum_exists(figure.number)


# ------------------------------------------------------------------------------------------ outcome, sweeps
@pytest.mark.parametrize(("losses", "expected"), [
    ([2.9, 1e5, 1e24, math.nan], "nan"), ([2.9, math.inf, 2.0], "nan"), ([2.9, 1e5, "NaN"], "nan"),
    ([math.nan], "nan"), ([2.9, 13, 44, 17, 8.6, 3.3, 1.0, 0.5, 0.2], "learned"),  # a catapult
    ([2.9, 2.5, 2.2, 1.9, 1.7, 1.5], "learned"), ([2.3] * 6, "stalled"), ([2.9, 2.9, 2.9], "stalled"),
    ([2.09, 2.08, 2.08, 2.07, 2.07, 2.07], "stalled"), ([2.09, 1.9, 1.7], "learned"),  # judged by its own start too
    ([641, 514, 387, 297, 226, 166], "stalled"),  # better than at the start, and still worse than ignorance
    ([2.9, 9, 20, 55, 90, 140], "blew up"), ([2.1, 2.4, 2.6], "blew up"), ([641, 1e3, 1e4, 1e5], "blew up"),
    ([2.0, 2.0, 900, 0.5, 0.4, 0.3], "learned"), ([3.0] + [1.0] * 6 + [50.0, 1.0], "learned")])  # one spike
def test_the_outcome_of_planted_curves(losses, expected):
    assert outcome(losses) == expected


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=30), st.floats(0, 1e30))
def test_outcome_is_one_of_four_and_only_the_end_and_the_start_count(losses, other):
    fate = outcome(losses)
    assert fate in ("blew up", "stalled", "learned")
    assert outcome([*losses, math.inf]) == outcome([math.nan, *losses]) == "nan"
    if len(losses) >= 5:  # the second of five is neither first nor in the last third
        assert outcome([losses[0], other, *losses[2:]]) == fate
    assert outcome([losses[0] + 2.3, *losses[1:], *[2.0] * (2 * len(losses) + 1)]) == "learned"


def test_a_sweep_keeps_what_is_finished_and_does_not_run_it_again(tmp_path):
    path, calls = tmp_path / "sweep.json", []

    def run(scale, lr):
        calls.append((scale, lr))
        if lr > 1:
            raise RuntimeError("the machine went down")
        return {"loss": [scale, math.inf, math.nan]}

    first = Sweep(path, {"steps": 3, "sizes": (1, 2)})
    fresh = first(run, scale=0.1, lr=0.3)
    with pytest.raises(RuntimeError):
        first(run, scale=0.1, lr=3.0)
    again = Sweep(path, {"steps": 3, "sizes": (1, 2)})
    assert again(run, scale=0.1, lr=0.3) == fresh == again.find(lr=0.3) and again.find(lr=3.0) is None
    assert calls == [(0.1, 0.3), (0.1, 3.0)]
    assert outcome(fresh["loss"]) == "nan"
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {path.name for path in tmp_path.iterdir()} <= {"sweep.json", ".sweep.json.lock"}


SWEEPING = """
import sys, training
sweep = training.Sweep(sys.argv[1], {"steps": 3})
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    sweep(lambda number: {"loss": [number]}, number=number)
"""


@pytest.mark.slow
def test_two_processes_at_one_sweep_lose_nothing(tmp_path):
    path = tmp_path / "sweep.json"
    both = [subprocess.Popen([sys.executable, "-c", SWEEPING, path, *part]) for part in (("0", "40"), ("20", "60"))]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert sorted(unit["number"] for unit in json.loads(path.read_text())["units"]) == list(range(60))


@pytest.mark.parametrize(("content", "message"), [
    ('{"settings": {"steps": 4}, "units": []}', "of another sweep"), ("{", "wrote whole"), ("[]", "wrote whole"),
    ('{"a": 1}', "wrote whole")])
def test_a_sweep_refuses_a_file_that_is_not_its_own_and_keeps_it(tmp_path, content, message):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Sweep(path, {"steps": 3})
    assert path.read_text() == content


def test_results_are_whole_json_or_nothing(tmp_path):
    path = tmp_path / "run.json"
    helpers.save_results(path, {"loss": [1.0, math.nan, math.inf], "history": History(loss=[math.nan])})
    results = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert results["loss"] == [1.0, "NaN", "Infinity"] and results["history"]["loss"] == ["NaN"]
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["commit"]
    before = path.read_text()
    with pytest.raises(Exception, match="serialize"):
        helpers.save_results(path, {"net": object()})
    assert path.read_text() == before and os.listdir(tmp_path) == ["run.json"]


def test_the_commit_is_this_projects_own(tmp_path, monkeypatch):
    inside = tmp_path / "theirs/unpacked"
    inside.mkdir(parents=True)
    monkeypatch.setattr(helpers, "HERE", inside)
    author = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for folder in (inside.parent, inside):
        before = helpers.environment()["commit"]
        for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
    assert before == "unknown" != helpers.environment()["commit"]


@pytest.mark.parametrize(("features", "precision"), [
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),  # slower there
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32), ({}, torch.float32)])
def test_precision_is_bfloat16_only_where_the_hardware_is_faster_with_it(monkeypatch, features, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert helpers.find_precision(CPU) == precision
    assert helpers.find_precision(CPU, "bfloat16") == torch.bfloat16
    assert helpers.find_precision(CPU, "float32") == torch.float32
    with pytest.raises(ValueError, match="precision"):
        helpers.find_precision(CPU, "half")


def test_bfloat16_training_is_close_to_float32():
    def losses(precision):
        torch.manual_seed(0)
        batches = list(itertools.islice(digits()[0], 6))
        return train(init_weights(LeNet(), "normal"), batches, None, 1, 0.1, precision=precision, progress=False).loss

    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=0.1)
