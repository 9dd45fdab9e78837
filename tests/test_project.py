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
from helpers import HERE
from training import History, outcome

README = (HERE / "README.md").read_text(encoding="utf-8")
MODULES = ast.literal_eval(re.search(r"py-modules = (.+)", (HERE / "pyproject.toml").read_text())[1])
# Used without an import: run by name, or as a pytest or Jupyter plugin.
BY_NAME = {"jupyterlab": "jupyter lab", "papermill": "papermill ", "ipykernel": "python3", "nbval": "--nbval",
           "ruff": "ruff", "pytest-xdist": "--numprocesses"}
IMPORT_NAMES = {"PyYAML": "yaml"}


def requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert lines.pop().startswith("-e .  ")
    assert all(re.fullmatch(r"\S+\s+# .+", line) for line in lines), "one package a line, with its reason"
    names = [line.split("#")[0].strip() for line in lines]
    return [Requirement(name) for name in names]


def imported():
    paths = [path for path in [*(HERE / f"{name}.py" for name in MODULES), *(HERE / "tests").rglob("*.py")]
             if path.parent.name != "browser"]  # whose packages, and those of docs/, no reader needs
    sources = [path.read_text(encoding="utf-8") for path in paths]
    for path in (HERE / "notebooks").rglob("*.ipynb"):
        sources += [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    own = {path.stem for path in paths} | {"nan_cases"}
    return modules_in(sources) - set(sys.stdlib_module_names) - own


def modules_in(sources):
    modules = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


def test_everything_imported_is_listed_and_everything_listed_is_used():
    listed = {IMPORT_NAMES.get(r.name, r.name) for r in requirements()}
    # these come with one that is listed: IPython with ipykernel, pydantic_core with pydantic, packaging with pytest,
    # numpy and PIL with torchvision; and of the last two the tests are skipped where they are not installed
    brought_along = {"IPython", "pydantic_core", "packaging", "numpy", "PIL"}
    optional = {"lightning", "transformers"}
    assert imported() - listed <= brought_along | optional
    assert listed - imported() <= set(BY_NAME)
    everything = "\n".join([README, (HERE / "pyproject.toml").read_text(), (HERE / "tests/test_project.py").read_text(),
                            (HERE / "notebooks/01_architecture.ipynb").read_text(encoding="utf-8")])
    assert all(use in everything for use in BY_NAME.values())


def test_each_module_can_be_read_in_one_sitting_and_imports_in_one_direction_only():
    texts = {name: (HERE / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    assert {name: modules_in([text]) & {*MODULES} for name, text in texts.items()} == {
        "helpers": set(), "training": {"helpers"}, "whynan": set()}
    assert all(len(texts[name].splitlines()) < 500 for name in ("helpers", "training"))
    assert all(f"| `{name}.py` |" in README for name in MODULES)


def test_what_is_installed_is_within_the_ranges_and_all_are_ranges():
    for requirement in requirements():
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


def test_environment_yml_delegates_to_requirements_txt():
    dependencies = yaml.safe_load((HERE / "environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": ["-r requirements.txt"]}
    python = next(d for d in dependencies if str(d).startswith("python"))
    assert python.removeprefix("python") in (HERE / "pyproject.toml").read_text()


def test_what_the_web_edition_and_its_tests_import_is_in_their_own_requirements():
    lines = (HERE / "docs/requirements.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\S+\s+# .+", line) for line in lines)
    listed = {Requirement(line.split("#")[0]).name.replace("-", "_") for line in lines}
    sources = [path.read_text(encoding="utf-8") for folder in ("docs", "tests/browser")
               for path in (HERE / folder).glob("*.py")]
    assert modules_in(sources) - set(sys.stdlib_module_names) - {"conftest", "nbformat"} <= listed  # with myst-nb
    assert listed & {requirement.name.replace("-", "_") for requirement in requirements()} == {"pytest", "matplotlib"}


def test_workflows_and_ci_build_the_web_edition_by_the_readmes_command():
    command, = [line for line in README.splitlines() if "docs/build.py" in line and line.startswith("python3 -m venv")]
    set_up, _, build = command.rpartition(" && ")
    workflow = (HERE / ".github/workflows/pages.yml").read_text()
    assert set_up in workflow and build in workflow and "secrets." not in workflow
    script = (HERE / "tests/browser/run").read_text()
    assert build in script and "install -q -r docs/requirements.txt" in script
    assert "bash tests/browser/run" in (HERE / ".ci/run").read_text().splitlines()
    assert "bash tests/browser/run" in (HERE / ".github/workflows/test.yml").read_text()


def test_the_ways_in_install_what_the_readme_says():
    command, = [line for line in README.splitlines() if "--torch-backend" in line]
    container = (HERE / ".devcontainer/devcontainer.json").read_text()
    assert f'"postCreateCommand": "{command}"' in container


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
            sizes = found["parameters"]  # a GPU, which nobody shares, repeats 100 steps, a processor one
            assert sizes["repeats"] >= (3 if sizes["steps"] >= 100 else 5) and sizes["batch_size"] == 100
        elif name.startswith("08"):  # its lines say which rate; it notes the clock before each step, and at the end
            assert all(unit["images"] > 0 and len(unit["seconds"]) == len(unit["loss"]) + 1 > 1
                       for unit in found["units"]) and found["settings"]["image_size"] == 244
        elif "deaths" in found:
            assert found["deaths"] and found["counts"]
        elif name.startswith("05"):  # places of a map, and what was measured beside it
            maps = [unit for unit in found["units"] if {"scale", "lr"} <= unit.keys()]
            assert maps and all(unit["loss"] and unit["lr"] > 0 for unit in maps) and found["settings"]["steps"]
            assert all(unit.get("rate", 1) > 0 for unit in found["units"])
        elif "units" in found:
            assert all(unit["loss"] and unit["lr"] > 0 if unit["steps"] else unit["curvature"] > 0
                       for unit in found["units"]) and found["settings"]["steps"]
        elif "processes" in found:
            assert all(row["rate"] > 0 for row in found["processes"]) and found["parameters"]["repeats"] >= 3
        elif name.startswith("notebooks"):
            assert all(row["seconds"] > 1 and row["gigabytes"] > 0.1 for row in found["notebooks"])
        else:
            history = History.model_validate(found["history"])
            assert history.rows[-1].step == len(history.loss)
        assert {"device", "precision", "threads", "torch", "commit"} <= set(found["environment"])
        assert re.search(rf"`{name}\.json`.*results/{name}\.json", RECORDS), "its command"
    assert {"04_mnist", "04_mnist_200", "04_fashionmnist_h100", "04_mnist_h100", "05_mnist", "06_mnist", "08_mnist",
            "08_mnist_chosen", "08_mnist_h100", "08_mnist_h200", "08_mnist_parts", "08_mnist_zen4", "benchmark",
            "benchmark_h100", "benchmark_h200", "benchmark_memory", "benchmark_memory_kept",
            "benchmark_xeon", "benchmark_zen4"} <= set(names)


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
    found = float(re.search(r"with images of 244 pixels: found (\S+)", printed)[1])
    lowest = min(unit["lr"] for unit in record("05_mnist")["units"] if "lr" in unit)
    assert 5 <= math.log10(lowest / found) < 6
    assert "more than five powers of ten below the map's lowest" in prose("05_stability_map")


def runs(name, line, images, **which):
    return [unit for unit in record(name)["units"]
            if {"line": line, "images": images, **which}.items() <= unit.items()]


def mean(units, key):
    return statistics.fmean(unit[key] for unit in units)


def seconds(units):
    return statistics.fmean(unit["seconds"][-1] for unit in units)


def test_figures_of_the_speedrun_are_those_of_its_records():
    text, chosen, at_random = prose("08_speedrun"), "+ images chosen", "+ the middle first"
    tested = {(name, images): runs(f"08_mnist_{name}", chosen, images, tested=True)
              for name in ("chosen", "zen4", "h200") for images in (4000, 7000)}
    told = {place: (mean(units, "test_accuracy"), seconds(units)) for place, units in tested.items()}
    for name, words in (("chosen", "In float32, on an Intel Xeon, that is {:.4f} of the test set in {:.0f} s and "),
                        ("zen4", "in bfloat16, on an AMD EPYC, {:.4f} in {:.0f} s and ")):
        assert (words + "{:.4f} in {:.0f} s").format(*told[name, 4000], *told[name, 7000]) in text
    assert all(unit["test_accuracy"] >= 0.98 + (images == 7000) / 100 for (_, images), units in tested.items()
               for unit in units) and "for each seed" in text
    (one, soon), (other, later) = (told["h200", images] for images in (4000, 7000))
    choosing = [statistics.fmean(unit["seconds"][0] for unit in tested["h200", images]) / told["h200", images][1]
                for images in (4000, 7000)]
    assert ("on one NVIDIA H200 {:.4f} in {:.1f} s and {:.4f} in {:.1f} s, {:.0%} and {:.0%} of that for the choice"
            ).format(one, soon, other, later, *choosing) in text
    same, newer = record("08_mnist_zen4")["units"], record("08_mnist_zen5_before")["units"]
    assert [unit["loss"] for unit in same] == [unit["loss"] for unit in newer] and len(newer) == 6
    soon, later = (seconds([unit for unit in newer if unit["images"] == images]) for images in (4000, 7000))
    assert f"the same six runs, bit for bit, take {soon:.0f} s and {later:.0f} s on a Zen 5" in text
    faster = {images: runs("08_mnist_zen5", chosen, images, tested=True) for images in (4000, 7000)}
    assert ("On the same Zen 5 it reaches {:.4f} in {:.0f} s and {:.4f} in {:.0f} s".format(
        *(of for units in faster.values() for of in (mean(units, "test_accuracy"), seconds(units))))) in text
    assert all(mean(units, "held_out") >= 0.98 + (images == 7000) / 100 for images, units in faster.items())
    choosing = [unit["held_out"] for images in (4000, 7000)
                for unit in runs("08_mnist_zen5", chosen, images) if unit["seed"] in (12345, 12346)]
    seven = runs("08_mnist_zen5", chosen, 7000)
    assert len(seven) == 7 and f"all seven, to {mean(seven, 'held_out'):.4f}" in text
    assert "to {:.4f} and {:.4f} of the held-out images after 4,000, and to {:.4f} and {:.4f} after 7,000".format(
        *choosing) in RECORDS
    assert f"the two runs that choose come to {statistics.fmean(choosing[2:]):.4f} of the held-out images" in text
    assert all(unit["test_accuracy"] >= 0.98 + (images == 7000) / 100 for images, units in faster.items()
               for unit in units)
    for words, name in (("Intel Xeon, float32", "chosen"), ("AMD Zen 4, bfloat16", "zen4"),
                        ("AMD Zen 5, bfloat16: the same runs, bit for bit", "zen5_before"),
                        ("AMD Zen 5, bfloat16, the present recipe", "zen5"),
                        ("NVIDIA H200, bfloat16, the present recipe", "h200")):
        cells = [(mean(units, "test_accuracy"), seconds(units)) for images in (4000, 7000)
                 for units in [runs(f"08_mnist_{name}", chosen, images, tested=True)]]
        cells = " | ".join(f"{right:.2%} in {taken:.{'1f' if taken < 10 else '0f'}} s" for right, taken in cells)
        assert f"| {words} | {cells} |" in README
    assert {(unit["images"], unit["seed"]): (f"{unit['test_accuracy']:.4f}", f"{unit['seconds'][-1]:.0f}")
            for unit in record("08_mnist_zen4")["units"]} == {
        (4000, 0): ("0.9903", "73"), (4000, 1): ("0.9874", "70"), (4000, 2): ("0.9902", "75"),
        (7000, 0): ("0.9919", "109"), (7000, 1): ("0.9916", "111"), (7000, 2): ("0.9925", "117")}

    by_choice = [round(5000 * unit["held_out"]) for unit in runs("08_mnist_chosen", chosen, 7000)
                 if "tested" not in unit]
    assert by_choice == [4950, 4950]
    assert "both runs that chose are right on 4,950 of the 5,000: exactly the goal" in text
    same = {images: images * told["chosen", images][1] / (told["chosen", images][1] - statistics.fmean(
        unit["seconds"][0] for unit in tested["chosen", images])) for images in (4000, 7000)}
    fits = {images: images / (1 - statistics.fmean(unit["seconds"][0] for unit in tested["h200", images])
                              / told["h200", images][1]) for images in (4000, 7000)}
    assert f"in the seconds of 4,000 chosen images {fits[4000]:,.0f} at random would fit, and 7,000 reach 98%" in text
    many, = (unit["held_out"] for unit in runs("08_mnist", at_random, 20_000) if unit.get("drawn"))
    assert mean(runs("08_mnist", at_random, 7000, tested=True), "test_accuracy") > 0.98 > fits[7000] / 20_000
    assert f"{fits[7000]:,.0f} would fit, and even 20,000 had {many:.4f} of the held-out images" in text
    random = {images: mean(runs("08_mnist", at_random, images, tested=True), "test_accuracy")
              for images in (5000, 7000)}
    drawn = {unit["images"]: unit["held_out"] for unit in record("08_mnist")["units"]
             if unit.get("drawn") and "tested" not in unit}
    assert (f"At 98% that is {same[4000]:,.0f}, in float32; with 5,000 at random three runs come to "
            f"{random[5000]:.4f}") in text
    assert (f"At 99% it is {same[7000]:,.0f}; with 7,000 three runs come to {random[7000]:.4f}, and one with 10,000 to "
            f"{drawn[10_000]:.4f} of the held-out images, where the chosen 7,000 have "
            f"{mean(tested['chosen', 7000], 'held_out'):.4f}") in text
    assert random[5000] < 0.98 and random[7000] < 0.99 and same[4000] < 5000 and same[7000] < 10_000
    assert f"{7000 / same[4000]:.1f} times the seconds to 98%" in text
    assert round(5000 * (0.99 - drawn[30_000])) == 1 and "miss 99% by one held-out image in 5,000" in text
    assert f"would take {30_000 / same[7000]:.1f} times" in text
    article, = runs("08_mnist_chosen", "the article's fixed run", 3000)
    first = next(row for row in record("04_mnist")["history"]["rows"] if row["test_accuracy"] >= 0.98)
    factor = 100 * first["step"] * article["seconds"][-1] / 3000 / told["chosen", 4000][1]
    assert f"{factor:.0f} times, to 98%: but that compares us with a rate that never falls" in text
    assert max(unit.get("test_accuracy", 0) for unit in record("06_mnist")["units"]) < 0.97
    mild = runs("08_mnist", at_random, 5000, tested=True)
    assert (f"{mean(mild, 'held_out'):.4f} of the held-out images were right, and {random[5000]:.4f} of the test set"
            ) in text
    looks = [unit for name in ("", "_chosen", "_zen4", "_zen5", "_h100", "_h200")
             for unit in record(f"08_mnist{name}")["units"] if "test_accuracy" in unit]
    assert len(looks) == 35 and "Thirty-five finished networks" in text
    for line in ("half of them hard", chosen, "all of them hard"):
        for seed in range(3):
            (with_choice,), (without,) = (runs("08_mnist_chosen", which, 3000, seed=seed)
                                          for which in (line, "+ memory kept"))
            assert with_choice["held_out"] > without["held_out"]
    assert (runs("08_mnist_chosen", "+ memory kept", 3000, seed=0)[0]["loss"]
            == runs("08_mnist_chosen", at_random, 3000, seed=0)[0]["loss"]), "where memory lies changes no bit"
    parts = {unit["line"].removeprefix("without "): [] for unit in record("08_mnist_parts")["units"]}
    for unit in record("08_mnist_parts")["units"]:
        whole, = runs("08_mnist_parts", chosen, 3000, seed=unit["seed"])
        parts[unit["line"].removeprefix("without ")].append(whole["held_out"] - unit["held_out"])
    assert set(map(len, parts.values())) == {3} and len(parts) == 10
    carry = parts.pop("Adam") + parts.pop("warm-up, then down to 0")
    assert min(carry) > 0.07 and "seven points and more are gone, whichever the seed" in text
    third, second, first = sorted(parts.pop("batches of 25"))
    assert (f"{100 * second:.0f} {100 * first:.0f} {100 * third:.0f}" == "8 11 1"
            and "missed by eight and eleven points with two seeds, and by one with the third" in text)
    some = parts.pop("quiet last layer") + parts.pop("BatchNorm, rate × 3")
    assert all(0.009 < lost < 0.025 for lost in some) and "worth one or two points with each seed" in text
    relus = parts.pop("the missing ReLUs")
    assert 0 < min(relus) < max(relus) < 0.01 and "with each seed, and the missing ReLUs less than one" in text
    parts.pop(chosen)
    assert len(parts) == 3 and all(min(lost) <= 0 for lost in parts.values())
    assert "None of the other three is missed by every seed" in text
    line = {unit["line"]: unit for unit in record("08_mnist")["units"] if unit["images"] == 3000}
    momentum, adam = line["SGD with momentum"], line[at_random]
    assert f"SGD with momentum came to {momentum['held_out']:.3f} and Adam to {adam['held_out']:.3f}" in text
    assert (f"brings −{line['+ batches of 25']['held_out'] - adam['held_out']:.3f}, which is chance, and "
            f"{adam['seconds'][-1]:.0f} s in the place of {line['+ batches of 25']['seconds'][-1]:.0f} s") in text
    wrong = [1 - mean(runs("08_mnist_chosen", which, 3000), "held_out") for which in ("+ memory kept", chosen)]
    assert 0.3 < 1 - wrong[1] / wrong[0] < 0.36 and "a third of the wrong answers is gone" in text

def test_figures_quoted_in_prose_are_those_of_the_records():
    places, remedies = record("05_mnist")["units"], record("06_mnist")["units"]
    fixed, whole = record("04_mnist_200"), record("04_mnist")
    assert whole["history"]["loss"][:200] == fixed["history"]["loss"], "one is the beginning of the other"
    text, rows, gpu = prose("04_fixed_lr"), whole["history"]["rows"], record("04_mnist_h100")
    assert (f"gets {fixed['article_accuracy']:.2f} in the article's way is right on {fixed['test_accuracy']:.2f} of "
            "the test images") in text
    promised = next(row["step"] for row in rows if row["test_accuracy"] >= fixed["article_accuracy"] - 1e-6)
    assert f"What that column promised comes true after {promised:,} steps." in text
    assert (f"the false measure says {gpu['article_accuracy']:.2f}, and the truth is {gpu['test_accuracy']:.3f}: "
            f"a hundred of a hundred, where the network really misses {round(1e4 * (1 - gpu['test_accuracy']))} of "
            "10,000") in text
    their = {200: (0.566, 0.868), 400: (0.158, 0.956), 2800: (0.043, 0.987), 3000: (0.039, 0.988)}
    far = {row["step"]: max(abs(row["train_loss"] - their[row["step"]][0]),
                            abs(row["train_accuracy"] - their[row["step"]][1]))
           for row in gpu["history"]["rows"] if row["step"] in their}
    assert max(far[200], far[400]) < 0.02 and "its first two lines agree with ours to within two hundredths" in text
    assert max(far[2800], far[3000]) < 0.01 and "of steps 2,800 and 3,000 to within a hundredth" in text

    top = max(gpu["history"]["loss"])
    assert gpu["history"]["loss"].index(top) == 3 and f"the loss jumps to {top:.0f} within four steps" in text

    *_, last, end = record("04_fashionmnist_h100")["history"]["rows"]
    assert (f"From step {last['step']:,} to step {end['step']:,} the training loss went *down*, from "
            f"{last['train_loss']:.3f} to {end['train_loss']:.3f}, and the true accuracy went down with it, from "
            f"{last['test_accuracy']:.3f} to {end['test_accuracy']:.3f}") in text

    thrown = next(unit for unit in places if abs(unit.get("scale", 0) - 0.42) < 0.005 and unit.get("lr") == 0.1)["loss"]
    told = ", ".join(f"{loss:.3g}" for loss in thrown[:-1]) + f" and {thrown[-1]:.3g}"
    assert f"its losses are {told}:" in prose("solutions/05_solutions")
    text, beside = prose("05_stability_map"), record("05_mnist_67")["units"]
    strip = [unit["loss"] for unit in beside if "thrown" in unit]
    home = sum(float(losses[-1]) < 0.9 * math.log(3) for losses in strip)
    assert f"Of {len(strip)} thrown runs {home} have learned after {max(map(len, strip))} steps. Two" in text
    assert sum("NaN" in losses for losses in strip) == 2 and len(strip) - home == 3
    edges = {unit["edge_of"]: unit["rate"] for unit in beside if "edge_of" in unit and unit["scale"] == 1}
    lazy = next(unit for unit in beside if unit.get("phase") == "lazy")
    assert (f"thrown far at {edges['squared error'] * lazy['kernel'][0]:.1f}/λ; with cross-entropy, which grows only "
            f"linearly, at {edges['cross-entropy'] * lazy['sharpness'][0]:.0f}/λ") in text
    whole = record("05_mnist")["units"]
    limit = 2 / next(unit["gauss_newton"] for unit in whole if unit.get("curvature_at") == 1)
    below, climbs = ([*map(float, next(unit["loss"] for unit in whole if unit.get("scale") == 1
                                       and math.isclose(unit.get("lr", 0), lr)))] for lr in (1e-4, 10**-3.5))
    assert below == sorted(below, reverse=True) and max(climbs[2:]) > 2 * min(climbs[:2]) > 20 * climbs[-1]
    assert f"falls at every step at {1e-4 / limit:.2f} times 2/λ; at four times it climbs" in text
    assert 3.5 < 10**-3.5 / limit < 4.5
    apart = [next(unit["rate"] for unit in units if unit.get("other") == "other ReLUs")
             / next(unit["rate"] for unit in units if unit.get("edge_of") == "cross-entropy" and unit["scale"] == 1)
             for units in (whole, beside)]
    assert f"{apart[0]:.1f} times the rate, where 2/λ promised 3.5. But each edge is found to within a third" in text
    assert f"on images of 67 pixels the same two stand {apart[1]:.1f} apart" in text
    panels = [unit for unit in beside if "panel" in unit]
    assert 85 < sum(unit["seconds"] for unit in panels) < 96 and "took a minute and a half on one core" in text
    assert f"These {sum(len(row) for unit in panels for row in unit['rows']):,} runs" in text

    text = prose("06_remedies")
    runs = {(unit["network"], unit["remedy"], unit["lr"], unit["seed"]): unit for unit in remedies
            if unit["steps"] in (20, 100)}

    tops = [max(runs["AlexNet", "a smaller rate alone", 0.001, seed]["loss"]) for seed in range(6)]
    assert f"at 0.001 its loss first climbs, to between {min(tops):.0f} and {max(tops):.0f}, and comes back" in text
    dead = {place[1] for place, unit in runs.items() if place[0] == "transformer" and "NaN" in unit["loss"]}
    assert not any("Adam" in remedy or "clipping" in remedy for remedy in dead) and len(dead) == 7
    ends = {place: outcome(unit["loss"]) for place, unit in runs.items()}
    high = [(place[1], end) for place, end in ends.items() if place[0] == "AlexNet" and abs(place[2] - 0.1) < 0.01]
    learned = [remedy for remedy, end in high if end == "learned"]
    assert set(high) <= {(remedy, end) for remedy in ("BatchNorm", "clipping at 1") for end in (
        "learned", "stalled", "blew up")} and len(high) == 12 and learned == ["clipping at 1"] * 2
    assert "None of their twelve runs died. But by the measure above only two learned, both clipped." in text
    at_1 = {remedy: [ends["transformer", remedy, 1.0, seed] for seed in range(6)] for remedy in (
        "a smaller rate alone", "warm-up, 10% of the steps", "warm-up, half of the steps")}
    assert [found.count("nan") for found in at_1.values()] == [6, 3, 4]
    assert not any("learned" in found for found in at_1.values()) and "saves three of them from NaN" in text
    judged = [runs["AlexNet", "BatchNorm", 0.01, seed] for seed in range(6)]
    lost = statistics.fmean(unit["test_accuracy_anew"] - unit["test_accuracy"] for unit in judged)
    assert abs(lost - 1 / 8) < 0.01 and "an eighth of the images is lost" in text
    long = {(unit["remedy"], unit["seed"]): unit.get("test_accuracy_anew", unit["test_accuracy"])
            for unit in remedies if unit["steps"] == 150}
    errors = {remedy: 1 - statistics.fmean(long[remedy, seed] for seed in range(3)) for remedy, _ in long}
    plain = errors["a smaller rate alone"]
    gains = f"was 0.36 and is {plain - errors['BatchNorm']:.2f}, Adam's was 0.22 and is {plain - errors['Adam']:.2f}"
    assert gains in text
    assert f"BatchNorm still makes {plain / errors['BatchNorm']:.1f} times fewer errors" in text


def speed_table(machine, name, memory):
    """One of the tables under "How fast is it?", from the records."""
    def told(rate):
        return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"

    parts = record(name)["benchmark"]
    rows = [f"| {machine} | the article's code | this series | ratio | the machine's roof |",
            "|---|---|---|---|---|"]
    for part, title in (("training", "training in batches of 100, images per second"),
                        ("data", "data iterator, images per second"), ("evaluation", "testing, images per second")):
        rates = {row["what"].split(":")[0]: row["rate"] for row in parts[part]}
        first = parts[part][0]["rate"]
        ours = next(rate for what, rate in rates.items() if what.startswith(("helpers.", "training.")))
        roof = f"{told(rates['roof'])}; {ours / rates['roof']:.0%} reached" if "roof" in rates else ""
        ratio = f"{ours / first:.{'0' if ours > 100 * first else '2'}f}"
        rows.append(f"| {title} | {told(first)} | {told(ours)} | {ratio} | {roof} |")
    first, ours = (row["gigabytes"] for row in record(memory)["benchmark"]["memory"])
    return [*rows, f"| peak memory of training, GB | {first:.2f} | {ours:.2f} | {ours / first:.2f} | |"]


def today(what):
    """The name that it has now: the trainer was in helpers.py when these records were made."""
    return re.sub(r"^helpers\.(?=train|evaluate)", "training.", what)


def tables_of_rates():
    """The tables of tests/benchmarks/README.md, from the records."""
    machines = {"AMD, float32": "benchmark", "Intel Xeon, float32": "benchmark_xeon",
                "AMD Zen 4, bfloat16": "benchmark_zen4"}
    rows = [f"| images per second, batches of 100 | {' | '.join(machines)} |", "|---" * (1 + len(machines)) + "|"]
    for same in zip(*(record(name)["benchmark"]["training"] for name in machines.values()), strict=True):
        assert len({today(row["what"]) for row in same}) == 1
        cells = (f"{row['rate']:.1f} ({row['least']:.0f} … {row['most']:.0f})" for row in same)
        rows.append(f"| {today(same[0]['what'])} | {' | '.join(cells)} |")
    yield rows
    columns = {"as it comes": "benchmark", "memory kept": "benchmark_memory_kept",
               "bfloat16, as it comes": "benchmark_zen4"}
    said = {"batch size": "{} images of 244 pixels", "image size": "20 images of {} pixels",
            "threads": "20 images of 244 pixels, threads: {}"}
    rows = [f"| GFLOP per second | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for same in zip(*(record(name)["benchmark"]["growth"] for name in columns.values()), strict=True):
        assert len({(row["over"], row["what"]) for row in same}) == 1
        figures = " | ".join(f"{row['gflops']:.0f}" for row in same)
        rows.append(f"| {said[same[0]['over']].format(same[0]['what'])} | {figures} |")
    yield rows
    rows = ["| | ms per step | images per second | times the article's loop | of the roof |", "|---|---|---|---|---|"]
    gpu = record("benchmark_h200")["benchmark"]
    *loops, roof = gpu["training"]
    for row in (*loops[:2], *gpu["choices"], roof):
        what = row["what"].replace("both, and", "torch.compile, CUDA graphs,")
        rows.append(f"| {what} | {100_000 / row['rate']:.2f} | {row['rate']:,.0f} | "
                    f"{row['rate'] / loops[0]['rate']:.1f} | {row['rate'] / roof['rate']:.2f} |")
    yield rows


def test_what_more_processes_buy_is_told_from_the_record():
    rates = [row["rate"] for row in record("processes")["processes"]]
    assert f"two ranks train at {rates[1] / rates[0]:.2f} of the rate of one process with two threads" in README
    assert f"two workers with a thread each finish {rates[3] / rates[2]:.2f} times as many small runs" in README


def test_what_bends_the_rate_is_told_from_the_records():
    text = (HERE / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    for rows in tables_of_rates():
        assert "\n".join(rows) in text
    for name, words in (("benchmark_zen4", "made {1:.1f} images per second in bfloat16 and {0:.1f} in float32"),
                        ("benchmark_xeon", "made {1:.1f} against {0:.1f}")):
        assert words.format(*(row["rate"] for row in record(name)["benchmark"]["precision"])) in text
    writing = next(row["rate"] for row in record("benchmark")["benchmark"]["data"] if "roof" in row["what"])
    weights = sum(map(torch.numel, helpers.AlexNet().parameters()))
    assert f"{weights:,} weights" in text and f"{4 * weights / 1e6:.0f} MB" in text
    assert (f"writes {writing * 244**2 * 4 / 1e9:.1f} GB per second; if it reads as fast, that is "
            f"{6 * weights / (writing * 244**2):.3f} s per step") in text
    gpu = {row["what"]: row["milliseconds"] for row in record("benchmark_h100")["benchmark"]["step"]}
    read, unread, *_, graph = (gpu[what] for what in gpu if what[:5] in ("a loo", "the s", "nothi"))
    assert (f"took {read - unread:.1f} ms of {read:.2f}; without reading anything a step took {unread:.2f}, and the "
            f"whole step as a CUDA graph, which waits for nothing, {graph:.2f}") in text
    parts = record("benchmark_h200")["benchmark"]
    training, choices, data = (
        {row["what"]: row["rate"] for row in parts[part]} for part in ("training", "choices", "data"))
    (article, *_, roof), loader = training.values(), data["the article's loader"]
    series, *_, all_of_it = choices.values()
    assert f"The bare products are {roof / article:.1f} times as fast as that loop" in text
    assert (f"**{training['training.train'] / article:.1f} times the article's loop, and with all that we tried "
            f"{all_of_it / article:.1f}.**") in text
    assert f"Its loader alone, with four workers, makes {loader:,.0f} images per second" in text
    seconds_saved = [60_000 / series - 60_000 / rate for rate in (choices["conv1 unshuffled"], all_of_it)]
    assert f"{seconds_saved[0]:.1f} s of an epoch's {60_000 / series:.1f}, all three {seconds_saved[1]:.1f} s" in text
    alike = [choices[what] / series for what in ("again, to see the noise", "without channels_last", "fused SGD")]
    assert max(abs(ratio - 1) for ratio in alike) < 0.005 and "change nothing that can be measured" in text
    ratios = [ours["gflops"] / first["gflops"] for first, ours in zip(
        record("benchmark")["benchmark"]["growth"], record("benchmark_zen4")["benchmark"]["growth"], strict=True)]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as high" in text


@pytest.mark.parametrize(("machine", "name", "memory"), [
    ("two cores, float32", "benchmark", "benchmark_memory"),
    ("two cores, bfloat16", "benchmark_zen4", "benchmark_zen4"),
    ("one NVIDIA H200, bfloat16", "benchmark_h200", "benchmark_h200")])
def test_the_readmes_tables_of_speed_are_the_recorded_ones(machine, name, memory):
    assert "\n".join(speed_table(machine, name, memory)) in README
    for there in (record(name)["environment"], record(memory)["environment"]):
        assert machine.endswith(there["precision"])
        assert there["threads"] == 2 if machine.startswith("two cores") else there["device"] in machine


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


def test_what_a_notebook_costs_is_what_was_measured():
    costs, fast, slim = (record(name)["notebooks"] for name in ("notebooks", "notebooks_bfloat16", "notebooks_cpu"))
    assert [row["notebook"] for row in costs] == sorted(path.stem for path in (HERE / "notebooks").glob("*.ipynb"))
    for row, other, without in zip(costs, fast, slim, strict=True):
        line = next(line for line in README.splitlines() if f"(notebooks/{row['notebook']}.ipynb) |" in line)
        assert row["notebook"] == other["notebook"] == without["notebook"] and line.endswith(
            f"| {row['seconds']:.0f} s | {other['seconds']:.0f} s | {row['gigabytes']:.1f} GB | "
            f"{without['gigabytes']:.1f} GB |")
        assert 0.35 < row["gigabytes"] - without["gigabytes"] < 0.45 and "it is 0.4 GB less" in README
    assert "+cpu" in record("notebooks_cpu")["environment"]["torch"]
    too_large = [row["notebook"] for row in slim if row["gigabytes"] > 1.8]  # of Binder's 2, the server takes 0.1
    assert too_large == ["08_speedrun"] and "all notebooks but the eighth fit" in README


def test_what_watching_costs_is_what_was_measured():
    prices = {row["what"]: row["price"] for row in record("benchmark_watch")["benchmark"]["watch"]}
    assert prices["AlexNet, watched"] < 1.05 and "nothing that could be measured for AlexNet" in README
    assert (f"{prices['a small transformer, watched']:.1f} times as long for a small transformer, "
            f"{prices['a tiny MLP, watched']:.1f} times for a tiny MLP") in README
    prices = {row["what"]: row["price"] for row in record("benchmark_h200")["benchmark"]["watch"]}
    assert "on a GPU (an H200) {:.1f}, {:.1f} and {:.1f} times".format(
        *(prices[f"{net}, watched"] for net in ("AlexNet", "a small transformer", "a tiny MLP"))) in README
