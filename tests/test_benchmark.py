"""The benchmark runs with tiny sizes, says what it measured, and refuses what makes no sense."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import HERE

SCRIPT = HERE / "tests" / "benchmarks" / "benchmark.py"
TINY = ["--repeats", "1", "--batch-size", "5", "--image-size", "67", "--workers", "1", "--data-batches", "2",
        "--test-images", "10", "--batch-sizes", "2", "3", "--image-sizes", "67"]


def benchmark(*options, cwd=HERE):
    return subprocess.run([sys.executable, SCRIPT, *options], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_every_part_gives_a_table_and_the_same_as_json(tmp_path):
    done = benchmark(*TINY, "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["parameters"]["batch_size"] == 5
    for name, value in found["environment"].items():
        assert f"{name:12s} {value}" in done.stdout.splitlines()
    parts = found["benchmark"]
    assert list(parts) == ["training", "precision", "choices", "data", "evaluation", "watch", "memory", "growth"]
    for part, rows in parts.items():
        assert rows or sys.platform == "win32"
        for row in rows:
            figure = f"{row['gigabytes']:.2f}" if part == "memory" else f"{row['rate']:.1f}"
            assert float(figure) > 0
            assert any(str(row["what"]) in line and figure in line.split() for line in done.stdout.splitlines())
    assert [(row["over"], row["what"]) for row in parts["growth"]][:3] == [
        ("batch size", 2), ("batch size", 3), ("image size", 67)]


FAT_PARENT = """
import argparse, torch, benchmark
ballast = torch.ones(2, 10**9, dtype=torch.uint8)
rows = benchmark.memory(argparse.Namespace(batch_size=5, image_size=67, workers=0))
print(max(row["gigabytes"] for row in rows))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no peak is measured there")
def test_memory_is_that_of_the_training_not_of_the_process_that_asks():
    done = subprocess.run([sys.executable, "-c", FAT_PARENT], cwd=SCRIPT.parent, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    assert 0.1 < float(done.stdout) < 1.9


def test_bad_options_end_with_one_line_that_names_them(tmp_path):
    cases = {("--repeats", "0"): "'0' is not allowed", ("--image-sizes", "20"): "image_size = 20 is not allowed",
             ("--json", str(tmp_path / "no" / "x.json")): "results_path = "}
    with ThreadPoolExecutor(2) as two_at_a_time:
        for message, done in zip(cases.values(), two_at_a_time.map(lambda case: benchmark(*case), cases), strict=True):
            assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_what_more_processes_buy(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT.with_name("processes.py"), "--processes", "1", "--repeats", "1",
                           "--steps", "1", "--batch-size", "4", "--image-size", "67", "--runs", "2",
                           "--json", "p.json"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    training, sweep = json.loads((tmp_path / "p.json").read_text())["processes"]
    assert training["rate"] > 0 < sweep["rate"] and f"1 process   {sweep['rate']:8.2f}" in done.stdout


def test_what_a_notebook_costs(tmp_path):
    def costs(*options):
        return subprocess.run([sys.executable, SCRIPT.with_name("notebooks.py"), *options], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)

    done = costs("01_architecture", "--precision", "float32", "--json", "mine.json")
    assert done.returncode == 0, done.stderr
    found, = json.loads((tmp_path / "mine.json").read_text())["notebooks"]
    assert found["notebook"] == "01_architecture" and 0.3 < found["gigabytes"] < 4 and found["seconds"] > 1
    assert f"{found['seconds']:.0f} s" in done.stdout and f"{found['gigabytes']:.2f} GB" in done.stdout
    refused = costs("01_architecture", "1_architecture")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "notebooks.py: error: '1_architecture' is not allowed; NAME is one of 01_architecture, 02_data_iterator,")
