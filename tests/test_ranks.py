"""Training on several processes, with real ones under torchrun, and sweeps that Dask's workers share."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import HERE, LeNet, load_data
from training import History, Sweep, evaluate, train

CPU = torch.device("cpu")
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "tests")])}

SCRIPT = """
import hashlib, itertools, json, math, os, pathlib, sys
import torch, helpers, training, whynan
from torch import nn
from torch.distributed.fsdp import fully_shard

folder, rank, ranks = pathlib.Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
# 20 steps of 30 images, but each tenth of 1: of these no other rank has a share
train_iter, test_iter = helpers.load_data(image_size=28, batch_size=30, train_images=271, test_images=201, seed=5,
                                          device=torch.device("cpu"))
def start():
    torch.manual_seed(0)
    return helpers.LeNet()
net = start()
history = training.train(net, train_iter, test_iter, 2, 0.5, log_every=7, precision="float32", progress=False)
result = training.evaluate(net, test_iter, "float32")

start()  # the same random numbers on each rank
dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
momentum = lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9)
dropped = training.train(dropping, train_iter, None, 6, 0.02, optimizer=momentum, log_every=None, precision="float32",
                         progress=False, checkpoint=folder / "checkpoint", checkpoint_every=4)
weights = [weight.detach().numpy().tobytes() for weight in dropping.parameters()]
print(f"rank {rank} ended")
if rank == 0:
    (folder / "result").write_text(json.dumps({
        "history": history.model_dump(), "loss": result.loss, "confusion": result.confusion.tolist(),
        "losses": result.losses.tolist(), "predictions": result.predictions.tolist(), "dropped": dropped.model_dump(),
        "weights": hashlib.sha256(b"".join(weights)).hexdigest()}))

if ranks == 2:
    class Root(nn.Module):
        def forward(self, X):
            return (X * (rank == 0)).abs().sqrt()  # at 0, on rank 1, its slope is infinite

    def report(name, net, loop, *args, **options):
        try:
            with whynan.watch(net):
                loop(net, *args, **options)
        except whynan.NonFiniteError as error:
            (folder / f"report{rank} {name}").write_text(f"{error.rank} {error.verdict}: {error}")

    def loop(net, lr):
        optimizer = torch.optim.SGD(net.parameters(), lr)
        for X, y in itertools.chain(train_iter, train_iter):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X), y).backward()
            optimizer.step()

    # FSDP2: of each weight, a DTensor, a rank holds the half
    for name, between, lr in (("endless", nn.ReLU(), math.inf), ("long", nn.ReLU(), 1e15), ("root", Root(), 0.1)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), between, nn.Linear(4, 10))
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for part in (net[1], net[3], net):
            fully_shard(part, mesh=mesh)
        report(f"sharded {name}", net, loop, lr)

    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), Root(), nn.Linear(4, 10))
    report("root", net, training.train, train_iter, None, 1, 0.1, log_every=None, progress=False)
"""


def torchrun(ranks, script, *words, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                             *words, script, script.parent], text=True, env=ALONE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """What 2 and 4 ranks make of the script: {ranks: (result, output, reports)}."""
    found = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        (folder / "train.py").write_text(SCRIPT)
        output, _ = torchrun(ranks, folder / "train.py").communicate(timeout=300)
        assert (folder / "result").exists(), output
        # reports have files of their own: what two ranks print at one time may stand within one another
        reports = {path.name: path.read_text() for path in folder.glob("report*")}
        found[ranks] = json.loads((folder / "result").read_text()), output, reports
    return found


def test_ranks_take_turns_at_no_image():
    train_iter, _ = load_data(image_size=28, batch_size=5, train_images=11, device=CPU)
    whole = [y.tolist() for _, y in train_iter]
    shares = []
    for rank in range(3):
        train_iter.rank, train_iter.ranks = rank, 3
        train_iter.set_epoch(0)
        shares.append([y.tolist() for _, y in train_iter])
    assert [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)] == whole
    assert [[len(part) for part in share] for share in shares] == [[2, 2, 1], [2, 2, 0], [1, 1, 0]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_curve_is_that_of_one_process_and_the_evaluation_too(spread, ranks):
    train_iter, test_iter = load_data(image_size=28, batch_size=30, train_images=271, test_images=201, seed=5,
                                      device=CPU)
    torch.manual_seed(0)
    net = LeNet()
    alone = train(net, train_iter, test_iter, 2, 0.5, log_every=7, precision="float32", progress=False)
    result, (found, output, _) = evaluate(net, test_iter, "float32"), spread[ranks]
    history = History.model_validate(found["history"])
    assert len(history.loss) == 20 and history.loss == pytest.approx(alone.loss, rel=1e-5)
    assert history.accuracy == pytest.approx(alone.accuracy, abs=1e-6)
    assert [row.test_accuracy for row in history.rows] == [row.test_accuracy for row in alone.rows]
    assert found["confusion"] == result.confusion.tolist() and found["predictions"] == result.predictions.tolist()
    assert found["losses"] == pytest.approx(result.losses.tolist(), rel=1e-4)
    assert found["loss"] == pytest.approx(result.loss, rel=1e-5)
    # rank 0 alone prints what train has to tell, and all of them come to the end
    assert output.count("step     7") == output.count("step    20") == 1
    assert all(f"rank {rank} ended" in output for rank in range(ranks))


def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_been(spread, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    process, checkpoint = torchrun(4, tmp_path / "train.py", "--max-restarts=1"), tmp_path / "checkpoint"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.kill(int((tmp_path / "pid2").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "exitcode: -9" in output, output
    assert output.count("rank 0 ended") == 1, "it was over before it could be killed"
    found = json.loads((tmp_path / "result").read_text())
    assert len(found["dropped"]["loss"]) == 60 and found == spread[4][0]
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


@pytest.mark.parametrize("kind", ["root", "sharded root"])
def test_whynan_names_the_rank(spread, kind):
    first, second = (spread[2][2][f"report{rank} {kind}"] for rank in (0, 1))
    assert second.startswith("1 infinite slope: rank 1: inf at step 1, backward phase, 2 (Root), is born: div\n")
    assert first.startswith("0 unknown: rank 0: NaN at step 1, backward phase, outside of all modules, enters\n")
    assert "unknown: another rank's gradient, it seems: read that rank's report." in first


@pytest.mark.parametrize("rank", [0, 1])
def test_whynan_sees_the_weights_that_fsdp_shares_out(spread, rank):
    endless, long = (spread[2][2][f"report{rank} sharded {name}"] for name in ("endless", "long"))
    assert f"rank {rank}: NaN at step 1, update phase, 1 (FSDPLinear), is born: " in endless
    assert "it reaches 1.weight as it is written" in endless and "gradient of 1.weight 2×784" in endless
    assert long.startswith(f"{rank} steps too long: rank {rank}: inf at step 3, forward phase, 3 (FSDPLinear), is born")
    # what other ranks send is not there yet when it is asked for: memory that nobody has filled
    assert "the outputs were up to" not in long and re.search(r"step 1: forward 0\.\d+ in", long), long


# -------------------------------------------------------------------------------------------- sweeps with Dask
SWEEPING = """
import sys, time
import torch, helpers, training

path, scheduler, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
batch = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(10)

def run(seed, lr):
    time.sleep(seconds)
    torch.manual_seed(seed)
    net = helpers.LeNet()
    history = training.train(net, [batch] * 3, None, 1, lr, log_every=None, precision="float32", progress=False)
    return {"loss": history.loss}

sweep = training.Sweep(path, {"steps": 3})
rates = map(float, sys.argv[4:])
sweep.each(lambda seed, lr: sweep(run, seed=seed, lr=lr), [(seed, lr) for lr in rates for seed in range(4)], scheduler)
"""


def sweeping(path, scheduler, seconds, *rates):
    return subprocess.Popen([sys.executable, "-c", SWEEPING, path, scheduler, str(seconds), *map(str, rates)],
                            env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def units_of(path):
    return json.loads(path.read_text())["units"] if path.exists() else []


@pytest.fixture
def cluster(tmp_path):
    """(address, two worker processes of one thread) of a real Dask cluster."""
    def start(command, *words):
        return subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{command}", *words], cwd=tmp_path,
                                env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    file = tmp_path / "scheduler.json"
    words = "--scheduler-file", file, "--no-dashboard"
    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0", *words)]
    processes += [start("worker", "--no-nanny", "--nthreads", "1", *words) for _ in range(2)]
    try:
        while not file.exists() or not file.read_text():
            assert processes[0].poll() is None
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"], processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_sweep_on_dask_workers_loses_nothing_and_keeps_nothing_twice_though_one_is_killed(cluster, tmp_path):
    address, (first, _) = cluster
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    process, in_turn = sweeping(shared, address, 0.3, 0.1, 1, 10), sweeping(alone, "", 0, 0.1, 1, 10)
    while len(units_of(shared)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    assert len(units_of(shared)) < 8, "too late to kill one in the middle"
    first.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "12/12" in output and "Warning" not in output, output

    output, _ = in_turn.communicate(timeout=300)
    assert in_turn.returncode == 0, output
    in_order = [sorted(units_of(path), key=lambda unit: (unit["lr"], unit["seed"])) for path in (alone, shared)]
    assert len(in_order[0]) == 12 and in_order[0] == in_order[1]
    assert json.loads(alone.read_text())["settings"] == json.loads(shared.read_text())["settings"]

    # a unit's own error comes out as it is, what was finished is kept, and nothing is run again
    sweep, before = Sweep(shared, {"steps": 3}), shared.read_text()
    with pytest.raises(RuntimeError, match="no such run: seed 5"):
        sweep.each(lambda lr, seed: sweep(failing, lr=lr, seed=seed), [(1, 2), (10, 5)], address)
    assert shared.read_text() == before and sweep.workers is None


def failing(lr, seed):
    raise RuntimeError(f"no such run: seed {seed}")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense"])
def test_an_address_where_no_scheduler_answers_is_one_clear_line_within_seconds(address):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^scheduler = '\S+' is not allowed; scheduler is .*Dask.* tcp://host:8786$"):
        Sweep().each(print, [(1,)], address)
    assert time.monotonic() - start < 20
