"""What stands in two places, or is promised in the README, must agree."""

import ast
import hashlib
import importlib.metadata
import itertools
import json
import math
import re
import statistics
import subprocess
import sys

import nbformat
import pytest
import torch
import torchvision
import yaml
from packaging.requirements import Requirement
from torch import nn

import helpers
from helpers import HERE, History

README = (HERE / "README.md").read_text(encoding="utf-8")
# Used without an import: run by name, or as a pytest or Jupyter plugin.
BY_NAME = {"jupyterlab": "jupyter lab", "papermill": "papermill ", "ipykernel": "python3", "nbval": "--nbval",
           "ruff": "ruff"}
IMPORT_NAMES = {"PyYAML": "yaml"}


def requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert lines.pop().startswith("-e .  ")
    assert all(re.fullmatch(r"\S+\s+# .+", line) for line in lines), "one package a line, with its reason"
    names = [line.split("#")[0].strip() for line in lines]
    return [Requirement(name) for name in names]


def imported():
    paths = [HERE / "helpers.py", HERE / "whynan.py", *(HERE / "tests").rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    for path in (HERE / "notebooks").rglob("*.ipynb"):
        sources += [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    modules = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    own = {path.stem for path in paths} | {"nan_cases"}
    return modules - set(sys.stdlib_module_names) - own


def test_everything_imported_is_listed_and_everything_listed_is_used():
    listed = {IMPORT_NAMES.get(r.name, r.name) for r in requirements()}
    # these come with one that is listed: IPython with ipykernel, pydantic_core with pydantic, packaging with pytest,
    # numpy with torchvision; and of the last two the tests are skipped where they are not installed
    brought_along, optional = {"IPython", "pydantic_core", "packaging", "numpy"}, {"lightning", "transformers"}
    assert imported() - listed <= brought_along | optional
    assert listed - imported() <= set(BY_NAME)
    everything = "\n".join([README, (HERE / "pyproject.toml").read_text(), (HERE / "tests/test_project.py").read_text(),
                            (HERE / "notebooks/01_architecture.ipynb").read_text(encoding="utf-8")])
    assert all(use in everything for use in BY_NAME.values())


def test_what_is_installed_is_within_the_ranges_and_all_are_ranges():
    for requirement in requirements():
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


def test_environment_yml_delegates_to_requirements_txt():
    dependencies = yaml.safe_load((HERE / "environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": ["-r requirements.txt"]}
    python = next(d for d in dependencies if str(d).startswith("python"))
    assert python.removeprefix("python") in (HERE / "pyproject.toml").read_text()


def commands(heading):
    """The lines of the first shell block beneath this heading of the README."""
    block = README.split(f"\n## {heading}\n")[1].split("```bash\n")[1].split("```")[0]
    return block.strip().splitlines()


def test_ci_and_the_workflow_run_the_readmes_test_command():
    command, = commands("Prove that it works")
    assert command.endswith("pytest")
    assert command in (HERE / ".ci/run").read_text().splitlines()
    workflow = yaml.safe_load((HERE / ".github/workflows/test.yml").read_text())
    steps = [step["run"].strip() for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert command in steps
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.10", "3.13"]
    weekly = yaml.safe_load((HERE / ".github/workflows/weekly.yml").read_text())
    assert command in [step.get("run") for step in weekly["jobs"]["newest"]["steps"]]
    assert any("--resolution lowest-direct -r requirements.txt" in step.get("run", "")
               for step in weekly["jobs"]["oldest"]["steps"])


def test_citation_and_licence_say_what_the_project_says():
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (HERE / "pyproject.toml").read_text()
    assert README.startswith(f"# {citation['title']}\n")
    assert (HERE / "LICENSE").read_text().startswith(f"{citation['license']} License\n")


def test_the_reading_and_the_test_command_share_their_set_up():
    reading, = commands("Read and run it")
    proof, = commands("Prove that it works")
    assert reading.rpartition(" && ")[0] == proof.rpartition(" && ")[0]


def test_readme_lists_every_notebook_with_its_title():
    for path in sorted((HERE / "notebooks").glob("*.ipynb")):
        title = nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")
        assert f"[{title}](notebooks/{path.name})" in README


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_data_readme_has_the_checksums_of_the_files(dataset):
    text = (HERE / "data/README.md").read_text()
    files = sorted((HERE / "data" / dataset / "raw").glob("*.gz"))
    assert len(files) == 4
    for path in files:
        md5, sha = (hashlib.new(kind, path.read_bytes()).hexdigest() for kind in ("md5", "sha256"))
        assert f"| `{dataset}/raw/{path.name}` | `{md5}` | `{sha}` |" in text
        assert (path.name, md5) in getattr(torchvision.datasets, dataset).resources


def record(name):
    return json.loads((HERE / "results" / f"{name}.json").read_text())


RECORDS = (HERE / "results/README.md").read_text(encoding="utf-8")


def recorded():
    """The names of the project's own records; what else lies in results/ is a user's."""
    return re.findall(r"^\| `(\w+)\.json` \|", RECORDS, re.MULTILINE)


def git(*words):
    """What git prints about this project; skips where there is no git, or no history as in a ZIP file."""
    try:
        done = subprocess.run(["git", "--git-dir=.git", *words], cwd=HERE, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git")
    if done.returncode == 128:
        pytest.skip("no history")
    return done.stdout.split()


def test_every_record_is_described():
    assert {f"results/{name}.json" for name in recorded()} == set(git("ls-files", "results/*.json"))


def test_what_a_user_is_told_to_write_is_nothing_to_git():
    notebooks = map(prose, [path.stem for path in (HERE / "notebooks").glob("*.ipynb")])
    told = set(re.findall(r"results/[\w.]+\b", "\n".join([README, *notebooks])))
    told -= {"results/README.md", *(f"results/{name}.json" for name in recorded())}
    told |= {"results/.mine.json.lock", "results/.full.checkpoint.unfinished"}
    assert {"results/mine.json", "results/04_fixed_lr.ipynb", "results/full.checkpoint"} <= told
    assert set(git("check-ignore", *told)) == told


def test_recorded_runs_are_whole():
    names = recorded()
    for name in names:
        found = record(name)
        if name.startswith("benchmark"):
            rows = [row for part in found["benchmark"].values() for row in part]
            assert all(row.get("rate", row.get("gigabytes")) > 0 for row in rows)
            assert found["parameters"]["repeats"] >= 5 and found["parameters"]["batch_size"] == 100
        elif name.startswith("07"):  # its lines say which rate; it notes the clock before each step, and at the end
            assert all(unit["images"] > 0 and len(unit["seconds"]) == len(unit["loss"]) + 1 > 1
                       for unit in found["units"]) and found["settings"]["image_size"] == 244
        elif "deaths" in found:
            assert found["deaths"] and found["counts"]
        elif "units" in found:
            assert all(unit["loss"] and unit["lr"] > 0 for unit in found["units"]) and found["settings"]["steps"]
        else:
            history = History.model_validate(found["history"])
            assert history.rows[-1].step == len(history.loss)
        assert {"device", "precision", "threads", "torch", "commit"} <= set(found["environment"])
        assert re.search(rf"`{name}\.json`.*results/{name}\.json", RECORDS), "its command"
    assert {"04_mnist", "04_mnist_200", "04_fashionmnist", "05_mnist", "06_mnist", "07_mnist", "07_mnist_chosen",
            "benchmark", "benchmark_memory", "benchmark_memory_kept", "benchmark_xeon"} <= set(names)


def prose(name):
    return "\n".join(cell.source for cell in nbformat.read(HERE / "notebooks" / f"{name}.ipynb", 4).cells
                     if cell.cell_type == "markdown")


def test_figures_quoted_in_prose_are_those_of_the_network_and_of_the_output():
    with torch.device("meta"):
        layers = list(helpers.AlexNet())
    factors = [math.sqrt(layer.weight[0].numel() / (1 if isinstance(before, nn.Conv2d) else 2))  # a ReLU cuts half
               for before, layer in itertools.pairwise(layers) if hasattr(layer, "weight")]
    assert f"of {min(factors):.0f} to {max(factors):.0f} for the others" in prose("03_failing_lr")

    cells = nbformat.read(HERE / "notebooks/05_stability_map.ipynb", 4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    found = float(re.search(r"largest learning rate of run A: .*found (\S+)", printed)[1])
    lowest = min(unit["lr"] for unit in record("05_mnist")["units"])
    assert 5 <= math.log10(lowest / found) < 6
    assert "more than five powers of ten below the map's lowest" in prose("05_stability_map")


def test_figures_quoted_in_prose_are_those_of_the_records():
    places, remedies = record("05_mnist")["units"], record("06_mnist")["units"]
    fixed, whole = record("04_mnist_200"), record("04_mnist")
    assert whole["history"]["loss"][:200] == fixed["history"]["loss"], "one is the beginning of the other"
    text, rows = prose("04_fixed_lr"), whole["history"]["rows"]
    assert (f"gets {fixed['article_accuracy']:.2f} in the article's way is right on {fixed['test_accuracy']:.2f} of "
            "the test images") in text
    promised = next(row["step"] for row in rows if row["test_accuracy"] >= fixed["article_accuracy"] - 1e-6)
    assert f"What that column promised comes true after {promised:,} steps." in text
    assert (f"the false measure says {whole['article_accuracy']:.2f}, and the truth is {whole['test_accuracy']:.3f}: "
            f"a hundred of a hundred, where the network really misses {round(1e4 * (1 - whole['test_accuracy']))} of "
            "10,000") in text

    top = max(whole["history"]["loss"])
    assert whole["history"]["loss"].index(top) == 3 and f"the loss jumps to {top:.0f} within four steps" in text

    tested = [f"{row['test_accuracy']:.3f}" for row in record("04_fashionmnist")["history"]["rows"]]
    assert "{}, then {}, then {}.".format(*tested) in prose("04_fixed_lr")

    drawn = {unit["images"]: unit["held_out"] for unit in record("07_mnist")["units"]
             if unit.get("drawn") and "tested" not in unit}
    text = prose("07_speedrun")
    assert f"5,000 images come to {drawn[5000]:.3f}" in text
    assert (f"with 20,000 images {drawn[20_000]:.3f} of the held-out images are right, and with 30,000 "
            f"{drawn[30_000]:.4f}") in text

    assert (f"fell from {1 - drawn[5000]:.1%} to {1 - drawn[30_000]:.1%}") in text
    chosen = [unit for unit in record("07_mnist_chosen")["units"] if unit["line"] == "+ images chosen"]
    right = [round(5000 * unit["held_out"]) for unit in chosen if unit["images"] == 7000 and "tested" not in unit]
    assert right == [4950, 4950] and "right on 4,950 of the 5,000 held-out images, both of them" in text
    assert drawn[30_000] < 0.99 and "as good on the held-out images as 30,000 drawn at random" in text
    tested = {images: [unit for unit in chosen if unit["images"] == images and "tested" in unit]
              for images in (4000, 7000)}
    for images, units in tested.items():
        accuracy, seconds = (statistics.fmean(values) for values in (
            [unit["test_accuracy"] for unit in units], [unit["seconds"][-1] for unit in units]))
        assert f"{accuracy:.2%} of the test images right after {images:,} training images and {seconds:.0f} s" in README

    short = {unit["line"]: unit for unit in record("07_mnist_chosen")["units"]
             if unit["images"] == 3000 and unit["seed"] == 0}
    gone = 1 - (1 - short["+ images chosen"]["held_out"]) / (1 - short["+ memory kept"]["held_out"])
    assert round(10 * gone) == 4 and "four of ten wrong answers are gone" in text
    seconds_at_random = 30_000 / 3000 * short["+ the middle first"]["seconds"][-1]
    assert round(seconds_at_random / statistics.fmean(unit["seconds"][-1] for unit in tested[7000])) == 4
    assert "the 30,000 four times as long" in text

    thrown = next(unit for unit in places if abs(unit["scale"] - 0.42) < 0.005 and unit["lr"] == 0.1)["loss"]
    told = ", ".join(f"{loss:.3g}" for loss in thrown[:-1]) + f" and {thrown[-1]:.3g}"
    assert f"its losses are {told}:" in prose("solutions/05_solutions")

    def first_losses(remedy):
        return [float(unit["loss"][0]) for unit in remedies if unit["remedy"] == remedy]

    patient = "smaller LR, nothing else"
    missed = next(u for u in remedies if (u["remedy"], u["lr"], u["seed"]) == (patient, 0.0032, 0))
    text = prose("06_remedies")
    assert f"reads {missed['test_accuracy']:.0%} of the digits all the same" in text
    assert f"by {helpers.final_loss(missed['loss']) - 0.9 * math.log(10):.2f} and reads" in text
    large, usual = (f"{min(losses):.0f} to {max(losses):.0f}"
                    for losses in map(first_losses, ("input normalisation", patient)))
    assert f"the first loss is {large} instead of {usual}" in text


def speed_table():
    """The table under "How fast is it?", from the records."""
    def told(rate):
        return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"

    parts = record("benchmark")["benchmark"]
    rows = ["| two cores, float32 | the article's code | this series | ratio | the machine's roof |",
            "|---|---|---|---|---|"]
    for part, title in (("training", "training in batches of 100, images a second"),
                        ("data", "data iterator, images a second"), ("evaluation", "testing, images a second")):
        rates = {row["what"].split(":")[0]: row["rate"] for row in parts[part]}
        first, ours = parts[part][0]["rate"], rates[next(what for what in rates if what.startswith("helpers."))]
        roof = f"{told(rates['roof'])}; {ours / rates['roof']:.0%} reached" if "roof" in rates else ""
        rows.append(f"| {title} | {told(first)} | {told(ours)} | {ours / first:.2f} | {roof} |")
    first, ours = (row["gigabytes"] for row in record("benchmark_memory")["benchmark"]["memory"])
    return [*rows, f"| peak memory of training, GB | {first:.2f} | {ours:.2f} | {ours / first:.2f} | |"]


def test_the_readmes_table_of_speed_is_the_recorded_one():
    assert "\n".join(speed_table()) in README
    for name in ("benchmark", "benchmark_memory"):
        machine = record(name)["environment"]
        assert machine["threads"] == 2 and machine["precision"] == "float32"


@pytest.mark.slow
def test_the_unit_tests_hold_in_the_precision_that_auto_does_not_find_here():
    here = helpers.find_precision(torch.device("cpu"))
    other = "float32" if here == torch.bfloat16 else "bfloat16"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "quick", "--precision", other, "-p", "no:nbval",
                           "-p", "no:cacheprovider", "-o", "addopts=", HERE / "tests/test_helpers.py"],
                          capture_output=True, text=True, cwd=HERE, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", HERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
