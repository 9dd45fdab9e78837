"""What do more processes buy on one machine: ranks that train one network, workers that share out a sweep?

    python tests/benchmarks/processes.py                  some minutes on two CPU cores
    python tests/benchmarks/processes.py --help           how many, repeats, the JSON file

The cores are shared out: one process with all of them as threads, or several with their part. Contenders are measured
in turn after one round that does not count; a figure is the median of the repeats.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmark import above_0, fresh_net, in_turn, median_rates
from distributed import Client, LocalCluster

import helpers
from training import Sweep, train

SELF = pathlib.Path(__file__).resolve()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def threads_of_each(processes):
    return str(max(1, CORES // processes))


def train_one_network(options):
    """What each rank does: seconds of so many steps, once the first two are made."""
    net = fresh_net(options.image_size)
    train_iter, _ = helpers.load_data(batch_size=options.batch_size, image_size=options.image_size)
    for steps in (2, options.steps):
        start = time.perf_counter()
        train(net, train_iter, None, steps / len(train_iter), 0.001, log_every=None, progress=False, live=False)
    if not helpers.find_rank()[0]:
        print(json.dumps(time.perf_counter() - start))


def ranks(options, processes):
    """Seconds that so many processes take for the steps of one network."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", SELF,
               "--as-rank", *(f"--{name.replace('_', '-')}={getattr(options, name)}"
                              for name in ("steps", "batch_size", "image_size"))]
    variables = {"OMP_NUM_THREADS": threads_of_each(processes), "PYTHONPATH": str(helpers.HERE)}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def place(image_size, seed):
    """A run as the map of notebook 5 has 49, with its grid_size 7: eight steps on three images."""
    net = fresh_net(image_size)
    train_iter, _ = helpers.load_data(batch_size=3, image_size=image_size, train_images=3, seed=seed)
    return {"loss": train(net, train_iter, None, 8, 0.001, log_every=None, progress=False, live=False).loss}


def workers(options, processes):
    """Seconds of a sweep, kept in a file, by so many workers; 1: by this process, with all threads."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(pathlib.Path(folder, "sweep.json"))
        units = [(options.image_size, seed) for seed in range(options.runs)]

        def seconds(address):
            sweep.each(lambda size, seed: sweep(place, image_size=size, seed=seed), units, address)
            return time.perf_counter() - start

        if processes == 1:
            start = time.perf_counter()
            return seconds("")
        threads = {"OMP_NUM_THREADS": threads_of_each(processes)}
        with LocalCluster(n_workers=processes, threads_per_worker=1, dashboard_address=None, env=threads) as cluster:
            with Client(cluster) as client:
                client.run(place, options.image_size, 0)  # workers that are under way already, as a cluster's are
            start = time.perf_counter()
            return seconds(cluster.scheduler_address)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"processes": 2, "repeats": 3, "steps": 5, "batch_size": 100, "image_size": 244,
                          "runs": 49}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=above_0, default=default, help=f"default {default}")
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        return train_one_network(options)
    try:
        helpers.check_parameters(batch_size=options.batch_size, image_size=options.image_size,
                                 results_path=options.json)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for what, measure, count in (
            ("training of one network, images per second", ranks, options.steps * options.batch_size),
            ("sweep, runs per second", workers, options.runs)):
        contenders = {n: functools.partial(measure, options, n) for n in (1, options.processes)}
        for row in median_rates(in_turn(contenders, options.repeats, lambda contender: contender()), count):
            n = row["what"]
            rows.append(row | {"what": what, "processes": n})
            print(f"{what:45s} {n} process{'es' * (n > 1):2s} {row['rate']:8.2f}   "
                  f"({row['least']:.2f} … {row['most']:.2f})", flush=True)
    del options.as_rank
    helpers.save_results(options.json, {"processes": rows, "parameters": vars(options)})


if __name__ == "__main__":
    main()
