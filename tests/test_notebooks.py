"""The notebooks as documents, and as programs that papermill runs with other parameters.

nbval, by the settings in pyproject.toml, runs their cells with the defaults; here are the things it can't see.
"""

import ast
import base64
import collections
import functools
import io
import itertools
import json
import linecache
import math
import os
import re
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import births
from nan_cases import DEATHS
from nan_cases.clinic import PATIENTS
from PIL import Image
from torch import nn

import helpers
import whynan
from helpers import HERE, AlexNet, Parameters
from training import Sweep, open_sweep, train

FOLDER = HERE / "notebooks"
CHAPTERS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))


def name_of(path):
    return path.stem


# ----------------------------------------------------------------------------------------------- as documents
@pytest.fixture(params=CHAPTERS + SOLUTIONS, ids=name_of)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


@pytest.fixture(params=CHAPTERS, ids=name_of)
def chapter(request):
    return nbformat.read(request.param, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_chapter_has_its_solutions():
    assert [path.stem[:2] for path in CHAPTERS] == [path.stem[:2] for path in SOLUTIONS]


def test_every_row_belongs_to_a_table_with_a_head(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for rows, lines in itertools.groupby(cell.source.splitlines(), lambda line: line.startswith("|")):
                assert not rows or set([*lines][1]) <= set("|-: "), "a blank line parts a table from its head"


def test_saved_from_one_clean_run(notebook):
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs, "stripped outputs would turn nbval into nothing"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if "\r" in output.get("text", "")], "a progress bar's earlier states"
    kinds = [[(output.output_type, output.get("name", i)) for i, output in enumerate(cell.outputs)] for cell in cells]
    assert not [pair for kind in kinds for pair in itertools.pairwise(kind) if pair[0] == pair[1]], "print in pieces"
    text = nbformat.writes(notebook)
    assert len(text) < 1_500_000
    assert not re.search(r"/home/|/root/|/Users/|/tmp/|/work/|site-packages|[A-Z]:\\\\", text), "a machine's path"


def test_figures_are_small_and_have_a_text(notebook):
    for cell in code(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                png = output.data["image/png"].strip()
                assert len(png) * 3 / 4 < 100_000, cell.source
                alt = re.fullmatch(f'<img alt="([^"<>]+)" src="data:image/png;base64,{re.escape(png)}">',
                                   output.data["text/html"])
                assert alt and len(alt[1]) > 30, cell.source


def test_cells_are_short_enough_to_read(notebook):
    for cell in code(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= 22 and max(map(len, lines)) <= 112, cell.source


def test_anatomy(chapter):
    first = chapter.cells[0].source
    assert first.startswith("# ") and all(f"**{word}" in first for word in ("You will", "You need", "Run time"))
    parameters = chapter.cells[1]
    assert parameters.metadata.tags == ["parameters"]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool) = .+  # .+", line), line
    behind = [*itertools.takewhile(lambda cell: cell.cell_type == "code", chapter.cells[2:])]  # imports, then the check
    assert "\np = check_parameters(" in f"\n{behind[-1].source}"
    headings = re.findall(r"^## (.+)$", "\n".join(c.source for c in chapter.cells if c.cell_type == "markdown"), re.M)
    assert headings[-3:] == ["Check yourself", "Exercises", "Summary"]
    assert "save_results(p.results_path" in chapter.cells[-1].source
    assert "results_path: str" in parameters.source


@pytest.mark.parametrize("number", range(len(CHAPTERS)))
def test_links_to_the_neighbours_and_all_others(number):
    text = "\n".join(c.source for c in nbformat.read(CHAPTERS[number], 4).cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    for link in links:
        assert link.startswith("http") or (FOLDER / link).exists(), link
    neighbours = {CHAPTERS[i].name for i in (number - 1, number + 1) if 0 <= i < len(CHAPTERS)}
    assert neighbours <= set(links) and "../README.md" in links
    assert f"solutions/{SOLUTIONS[number].name}" in links


# ------------------------------------------------------------------------------------------------ exercises
HEAD = r"### (\d) · (.+) \*\((?:easy|medium|harder), \d+ minutes\)\*"


def exercises_of(name):
    """[(heading, title, code cell)] of the exercises of a notebook."""
    cells = nbformat.read(FOLDER / f"{name}.ipynb", 4).cells
    found = [(re.search(HEAD, cell.source), check) for cell, check in itertools.pairwise(cells)]
    return [(int(head[1]), head[2], check) for head, check in found if head]


@pytest.mark.parametrize("name", [path.stem for path in CHAPTERS if path.stem != "07_clinic"])
def test_every_exercise_has_a_head_a_check_and_a_solution(name):
    exercises = exercises_of(name)
    assert [number for number, _, _ in exercises] == list(range(1, len(exercises) + 1)) and len(exercises) >= 3
    solved = nbformat.read(FOLDER / f"solutions/{name[:2]}_solutions.ipynb", 4)
    solutions = "\n".join(cell.source for cell in solved.cells)
    for number, title, check in exercises:
        assert check.source.startswith("answer = None\n") and check.outputs[0].text == "no answer yet\n"
        assert f"## {number} · {title}\n" in solutions


def joined(conv3, conv4):
    """Weight and bias of the one convolution that does what both do."""
    weight = F.conv2d(conv3.weight.transpose(0, 1), conv4.weight.flip(2, 3), padding=2).transpose(0, 1)
    return weight, conv4.bias + conv4.weight.sum((2, 3)) @ conv3.bias


BLOCK = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1))
ENLARGING = F.interpolate(torch.eye(28)[None, None], size=(40, 28), mode="bilinear")[0, 0]
WINDOWS = ((11, 4, 0), (3, 2, 0), (5, 1, 2), (3, 2, 0), (3, 2, 0))  # conv1, pool1, conv2 and the other pools
KNOWN = {"01_architecture": {"LADDER": [("", window) for window in WINDOWS], "x": torch.rand(1, 3, 9, 9),
                             "block1": nn.Identity(), "block2": nn.Identity(), "block3": BLOCK},
         "02_data_iterator": {"eight": torch.randint(256, (1, 28, 28))}}
PLACES = torch.tensor([[25, 21, 22, 24], [17, 6, 5, 13], [18, 4, 2, 11], [24, 17, 15, 16]]) / 100
BORN = [types.SimpleNamespace(phase=phase) for phase in ("loss", "forward", "update", "backward")]


@pytest.mark.parametrize(("name", "number", "right", "wrong"), [
    ("01_architecture", 1, (227, 258), (224, 258)), ("01_architecture", 2, 0.3705, 0.63),
    ("01_architecture", 3, joined(*BLOCK), joined(BLOCK[0], nn.Conv2d(4, 5, 3))), ("01_architecture", 4, 6.6, 0.0056),
    ("02_data_iterator", 1, 0.93, 1.0), ("02_data_iterator", 2, 3.57, 14.3),
    ("02_data_iterator", 3, ENLARGING, ENLARGING.flip(0)), ("02_data_iterator", 4, 0.4, 0.95),
    ("03_failing_lr", 1, 3.79, 2e23), ("03_failing_lr", 2, 2.30, 1.2), ("03_failing_lr", 3, BORN, BORN[:3]),
    ("03_failing_lr", 4, [0.95, 1.1] * 10, [1.1] * 20), ("03_failing_lr", 5, (256, 64), (2, 1)),
    ("04_fixed_lr", 1, 54.6, 3.78), ("04_fixed_lr", 2, (4, 6), (1, 8)), ("04_fixed_lr", 3, 0.168, 0.97),
    ("04_fixed_lr", 4, (0.77, 0.46), (0.46, 0.77)),
    ("05_stability_map", 1, 0.42, 0.5), ("05_stability_map", 2, 10, 1), ("05_stability_map", 3, 2.1, 32),
    ("05_stability_map", 4, (7.0, 7.55), (7.0, 7.0)), ("06_remedies", 1, 3.84, 10), ("06_remedies", 2, 4.3, 1),
    ("06_remedies", 3, 53, 190), ("06_remedies", 4, (2.62, False), (2.62, True)),
    ("08_speedrun", 1, (0.033, 0.238), (0.238, 0.033)), ("08_speedrun", 2, 0.33, 0.14),
    ("08_speedrun", 3, PLACES, PLACES.roll(1, 0)), ("08_speedrun", 4, (-0.32, 1.98), (-0.24, 1.51)),
    ("08_speedrun", 5, (0.938, 0.738), (0.738, 0.938))])
def test_a_check_takes_the_right_answer_and_no_wrong_one(name, number, right, wrong, capsys):
    check = exercises_of(name)[number - 1][2].source
    for answer, verdict in ((right, "True"), (wrong, "False")):
        names = vars(functions_of(name, **KNOWN.get(name, {})))
        exec(check.replace("answer = None", "", 1), {**names, "answer": answer})
        assert capsys.readouterr().out == f"{verdict}\n"


# ----------------------------------------------------------------------------------- the functions they define
def functions_of(chapter, **names):
    """What a notebook imports and defines, as attributes, without running anything else of it; names: what it finds."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    source = [node for cell in code(nbformat.read(FOLDER / f"{chapter}.ipynb", 4))
              for node in ast.parse(cell.source).body if isinstance(node, kept)]
    namespace = {"device": torch.device("cpu"), "p": Parameters(), **names}
    exec(compile(ast.Module(source, []), chapter, "exec"), namespace)
    return types.SimpleNamespace(**namespace)


@pytest.fixture(scope="module")
def chapter_5():
    return functions_of("05_stability_map")


@pytest.mark.parametrize(("losses", "expected"), [
    ([2.7, 180, 8e4, math.nan], "NaN"), ([2.7, math.inf, 1.0], "NaN"),
    ([2.7, 5.8, 12.7, 1.0, 0.6, 1e-4, 1e-5, 1e-5], "learned"),  # a catapult
    ([2.09, 2.08, 2.08, 2.07, 2.07, 2.07], "asleep"),  # below ln 10, but it began there
    ([2.3, 1.9, 1.6, 1.4, 1.2, 1.12], "asleep"),  # knows the frequencies of three labels, and no more
    ([2.3, 2.25, 2.2, 2.13, 1.99, 1.43, 0.708, 77.6], "thrown"), ([0.9, 0.88, 0.87], "asleep"),
    ([601.0, 919, 1720, 315, 1160, 700], "thrown"), ([601.0, 500, 400, 300], "asleep")])
def test_the_fate_of_planted_curves(chapter_5, losses, expected):
    assert chapter_5.fate(losses, math.log(3)) == expected


def test_knowing_the_frequencies_is_the_entropy_of_the_labels(chapter_5):
    assert chapter_5.knowing([9, 3, 5]) == pytest.approx(math.log(3))
    assert chapter_5.knowing([1, 1, 1, 1]) == 0 and chapter_5.knowing([0, 1, 0, 1]) == pytest.approx(math.log(2))


def planted_problem(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4))
    return net, 3 * torch.randn(20, 8), torch.randint(4, (20,))


@pytest.mark.parametrize("seed", range(5))
def test_ends_of_the_spectrum_against_the_full_hessian(chapter_5, seed):
    net, X, y = planted_problem(seed)
    shapes = {name: value.shape for name, value in net.named_parameters()}

    def loss_at(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, weights, X), y)

    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_at, flat))
    product = chapter_5.hessian_product(net, lambda net: nn.functional.cross_entropy(net(X), y))
    (low, _), (high, _) = chapter_5.lanczos(product, net.parameters(), 40)
    assert (low, high) == pytest.approx((exact[0].item(), exact[-1].item()), rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_an_eigenvalue_lies_within_the_residual_of_each_end(chapter_5, seed, products):
    spectrum = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 100
    ends = chapter_5.lanczos(lambda v: [spectrum * v[0]], [spectrum], products)
    for value, residual in ends:
        assert (spectrum - value).abs().min() <= residual + 0.01
    mirrored = torch.cat([torch.linspace(-0.5, 0.5, 48), torch.tensor([-3.0, 3.0])])
    (low, _), (high, _) = chapter_5.lanczos(lambda v: [mirrored * v[0]], [mirrored], 12)
    assert (low, high) == pytest.approx((-3, 3), rel=0.01)


def test_the_tangent_kernel_and_gauss_newton_against_all_gradients_written_down(chapter_5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(20, 10))
    X, weights = torch.randn(3, 1, 8, 8), list(net.parameters())
    logits = net(X)
    rows = [torch.autograd.grad(logit, weights, retain_graph=True) for logit in logits.flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    kernel = chapter_5.tangent_kernel(net, X)
    assert torch.allclose(kernel, J @ J.T, rtol=1e-4, atol=1e-4)
    net.to(memory_format=torch.channels_last)  # as after a training
    assert torch.allclose(chapter_5.tangent_kernel(net, X), kernel, rtol=1e-4, atol=1e-4)
    S = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in logits.detach().softmax(1)))
    exact = torch.linalg.eigvalsh(J.T @ S @ J / 3)[-1].item()
    assert chapter_5.gauss_newton(kernel, logits) == pytest.approx(exact, rel=1e-3)


def test_networks_side_by_side_are_the_same_as_one_by_one(chapter_5):
    scales, rates = [0.5, 2.0], [0.01, 0.1, 1.0]
    lr, X, targets, *weights = chapter_5.small_networks(3, scales, rates, seeds=2)
    found = chapter_5.descend_all((lr, X, targets, *weights), steps=6)
    assert found.shape == (12, 6)
    for at in (0, 4, 11):
        net = nn.Sequential(nn.Flatten(), nn.Linear(10, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False),
                            nn.ReLU(), nn.Linear(32, 10, bias=False))
        with torch.no_grad():
            for layer, w in zip(net[1::2], weights, strict=True):
                layer.weight.copy_(w[at].T)
        batch = [(X[at, ..., None, None], targets[at].argmax(1))]
        alone = train(net, batch, None, 6, lr[at].item(), log_every=None, progress=False, live=False,
                      precision="float32", stop_at_nonfinite=False).loss
        assert found[at].tolist() == pytest.approx(alone, rel=1e-3)


def test_adam_side_by_side_is_torchs(chapter_5):
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    optimizer, memory, ours = torch.optim.Adam([w], lr=0.1), (torch.zeros(3), torch.zeros(3)), w.detach().clone()
    for step in range(1, 6):
        w.grad = torch.tensor([1.0, -step, 1e-3]) / step
        ours -= 0.1 * chapter_5.adam(w.grad, memory, step)
        optimizer.step()
    assert torch.allclose(w, ours)


@settings(max_examples=15, deadline=None)
@given(st.floats(-15, 15), st.floats(0.01, 1))
def test_a_slope_is_found_within_its_error(chapter_5, slope, cell):
    points = [(i / 8, cell * round((slope * i / 8 - 3) / cell)) for i in range(9)]
    found, error = chapter_5.fit(points, cell)
    assert abs(found - slope) <= 5 * error and error > 0
    if len({y for _, y in points}) == 9 and slope == 1:
        assert error < cell


def test_normalised_networks_do_not_die_and_scale_and_rate_are_one_dial(chapter_5):
    losses = chapter_5.descend_all(chapter_5.small_networks(4, [1.0, 10.0], [1e-2, 1.0, 1e8], 1), normalise=True)
    assert losses.isfinite().all() and not chapter_5.far(losses).any()
    assert torch.allclose(losses[3 + 1], losses[0], rtol=1e-2), "ten times the weights, a hundred times the rate"


def test_the_map_to_touch_needs_no_network_and_has_all_runs():
    cells = code(nbformat.read(FOLDER / "05_stability_map.ipynb", 4))
    page, = (output.data["text/html"] for cell in cells for output in cell.outputs
             if "touch05" in output.get("data", {}).get("text/html", ""))
    assert "http" not in page and "src=" not in page and "@import" not in page
    assert len(json.loads(re.search(r"runs = (\[.+?\]), columns = 13", page)[1])) == 169


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_the_bisected_critical_rate_of_a_quadratic_is_two_over_lambda(chapter_5, largest, guess):
    curvatures = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64) * largest

    def diverges(lr):
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr)
        for _ in range(100):
            optimizer.zero_grad()
            (0.5 * curvatures * w**2).sum().backward()
            optimizer.step()
        return not w.norm() < 3

    assert chapter_5.critical_lr(diverges, guess, 1.02) == pytest.approx(2 / largest, rel=0.02)


@pytest.fixture(scope="module")
def chapter_8():
    learn, judge = torch.randperm(60_000, generator=torch.Generator().manual_seed(0)).split([55_000, 5000])
    return functions_of("08_speedrun", p=Parameters(image_size=131), LEARN=learn, JUDGE=judge, MIDDLE_SHARE=0.9,
                        MARGIN=32)


@pytest.fixture(scope="module")
def speedrun_source(chapter_8):
    return chapter_8.load_data(image_size=131)[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 240), st.integers(2, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_a_speedrun_sees_each_image_once_and_none_that_is_held_out(chapter_8, speedrun_source, more, batch_size, seed,
                                                                   middle):
    images = batch_size + more  # the notebook refuses fewer images than a batch
    order = chapter_8.images_of(speedrun_source, images, seed)
    data = chapter_8.OnePass(speedrun_source, order, batch_size, chapter_8.MARGIN if middle else 0)
    batches = list(data)
    assert len(order) == images and len(batches) == len(data) == len(data.seconds) == images // batch_size
    chosen = torch.cat(data.batches)
    assert torch.equal(chosen, order[:len(chosen)])
    held_out = set(chapter_8.JUDGE.tolist())
    assert len(set(chosen.tolist())) == len(chosen) and held_out.isdisjoint(chosen.tolist())
    assert len(held_out) == 5000 and held_out != set(range(55_000, 60_000))
    assert all(torch.equal(y, speedrun_source.labels[part]) for (_, y), part in zip(batches, data.batches, strict=True))
    sides = [X.shape[-1] for X, _ in batches]
    assert all(len(X) == len(y) == batch_size for X, y in batches)
    assert sides == [67 if middle and number < 0.9 * len(data) else 131 for number in range(len(data))]


def test_all_images_but_those_held_out_where_a_speedrun_takes_all(chapter_8):
    everything = torch.cat([chapter_8.images_of(None, 0, 3), chapter_8.JUDGE])
    assert torch.equal(everything.sort().values, torch.arange(60_000))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(4850, 5000), min_size=6, max_size=6))
def test_a_speedrun_opens_the_test_set_only_where_the_mean_of_those_that_choose_is_enough(right):
    numbers, choosers, record = (4, 7, 14), (11, 12), Sweep()
    judged = dict(zip(itertools.product(numbers, choosers), right, strict=True))
    chapter = functions_of("08_speedrun", p=Parameters(seeds=2), GOALS=(0.98, 0.99))
    for unit in itertools.chain.from_iterable(chapter.to_the_goals(record, "last", numbers, choosers)):
        # as evaluate gives it, a share in float32
        record(lambda images, seed, **_: {"held_out": (torch.tensor(judged.get((images, seed), 0)) / 5000).item()},
               **unit)
    enough = [next((n for n in numbers if judged[n, 11] + judged[n, 12] >= goal), None) for goal in (9800, 9900)]
    assert [chapter.enough(record, "last", numbers, choosers, goal) for goal in (0.98, 0.99)] == enough
    tested = {(unit["images"], unit["seed"]) for unit in record.units if unit.get("tested")}
    assert tested == {(images, seed) for images in enough if images for seed in (0, 1)}
    tried = [(unit["images"], unit["seed"]) for unit in record.units if "tested" not in unit]
    assert tried == [place for place in judged if not enough[1] or place[0] <= enough[1]]


def chosen_by(chapter_8, losses, order, images, share):
    """What `choose` takes of `order` if a small network's losses, in the order of the file, are these."""
    source = types.SimpleNamespace(images=losses, labels=losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chapter_8.choose.__globals__, "ask_small_network",
                      lambda images, labels, seed: (None, types.SimpleNamespace(losses=images)))
        return chapter_8.choose(source, order, images, share, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_chosen_images_are_the_hardest_and_others_in_the_order_given(chapter_8, images, more, share, seed):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:images + more]
    losses = torch.rand(200)
    chosen = chosen_by(chapter_8, losses, order, images, share).tolist()
    assert len(set(chosen)) == len(chosen) == images
    places = [order.tolist().index(image) for image in chosen]
    assert places == sorted(places)
    hardest = order[losses[order].argsort(descending=True)][:round(share * images)]
    assert set(hardest.tolist()) <= set(chosen)


@pytest.mark.parametrize("images", [0, 60, 70])
def test_no_image_is_chosen_twice_where_all_are_wanted(chapter_8, images):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen_by(chapter_8, torch.rand(60), order, images, 0.8), order)


def test_a_small_network_finds_wrong_labels_hard(chapter_8):
    source = chapter_8.load_data(train_images=6000)[0]
    labels = source.labels.clone()
    labels[::100] = (labels[::100] + 1) % 10
    losses = chapter_8.ask_small_network(source.images, labels, 0)[1].losses
    assert losses.shape == (6000,)
    assert losses[::100].median() > 20 * losses.median() and (losses[::100] > losses.median()).float().mean() > 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(131, 512))
def test_the_middle_takes_one_ring_of_the_last_map_away(image_size):
    with torch.device("meta"):
        convolutions = nn.Sequential(*list(AlexNet(image_size))[:-6])
        whole, middle = (convolutions(torch.zeros(1, 1, size, size)).shape for size in (image_size, image_size - 64))
    assert whole[-1] - middle[-1] == 2


def test_the_middle_and_the_whole_agree_where_no_padding_reaches():
    torch.manual_seed(0)
    maps = nn.Sequential(*list(AlexNet(244))[:3])  # conv1 has no padding
    X = torch.rand(2, 1, 244, 244)
    assert torch.allclose(maps(X)[..., 4:-4, 4:-4], maps(X[..., 32:-32, 32:-32]), atol=1e-5)


def test_the_outer_ring_starts_without_a_say(chapter_8):
    net = chapter_8.build(0, middle=True)
    scores = nn.Sequential(*list(net)[-6:])
    maps = torch.rand(2, 256, 3, 3)
    changed = maps.clone()
    changed[..., 0, :] = changed[..., -1] = 7.0
    assert torch.equal(scores(maps), scores(changed)) and not torch.equal(scores(maps), scores(2 * maps))
    assert torch.equal(scores(maps[..., 1:2, 1:2]), scores(maps))


def test_fc1_in_two_is_fc1_and_learns_its_ring_only_from_whole_maps(chapter_8):
    net, plain = chapter_8.build(0, middle=True), chapter_8.build(0)
    inner = net.fc1.inner
    assert sum(map(torch.numel, net.parameters())) == sum(map(torch.numel, plain.parameters()))
    assert torch.equal(net.fc1.weight, plain.fc1.weight[:, inner])
    with torch.no_grad():
        net.fc1.ring.copy_(plain.fc1.weight[:, ~inner])
    maps = torch.rand(2, 256, 3, 3)
    scores, of_plain = (nn.Sequential(*list(network)[-6:]) for network in (net, plain))
    assert torch.allclose(scores(maps), of_plain(maps), atol=1e-5)
    scores(maps[..., 1:2, 1:2]).sum().backward()
    assert net.fc1.ring.grad is None and net.fc1.weight.grad is not None
    scores(maps).sum().backward()
    assert net.fc1.ring.grad is not None


@given(st.integers(1, 3000))
def test_the_rate_rises_then_falls_and_is_never_0(chapter_8, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = chapter_8.warm_up_then_down(optimizer, steps)
    rates = [schedule.lr_lambdas[0](step) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == 1 and all(0 < rate <= 1 for rate in rates)
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_running_accuracy_is_that_of_the_last_images(chapter_8):
    unit = {"images": 100, "accuracy": [0.0] * 5 + [1.0] * 5, "seconds": list(range(11))}
    found = chapter_8.running_accuracy(unit, window=20)
    assert found[0] == (20, 2, 0) and found[4] == (60, 6, 0.5) and found[-1] == (100, 10, 1)


def test_a_level_that_is_not_reached_is_reached_never(chapter_8):
    unit = {"images": 1000, "accuracy": [0.0] * 50 + [1.0] * 50, "seconds": list(range(101))}
    assert [chapter_8.first_above(unit, level) for level in (0.5, 1)] == ["750", "1000"]
    assert chapter_8.first_above(unit | {"accuracy": [0.0] * 100}, 0.5) == "never"


# ------------------------------------------------------------------------------ what notebooks 6 and 8 both call
@pytest.mark.parametrize(("kind", "norms"), [("batch", (nn.BatchNorm2d, nn.BatchNorm1d)),
                                             ("layer", (nn.GroupNorm, nn.GroupNorm))])
def test_norms_stand_behind_each_layer_but_the_last_and_change_no_weight(kind, norms):
    torch.manual_seed(0)
    plain = AlexNet(67)
    torch.manual_seed(0)
    net = helpers.add_norms(AlexNet(67), kind)
    assert [name for name, _ in net.named_children()] == [name for name, _ in plain.named_children()]
    for (name, layer), treated in zip(plain.named_children(), net.children(), strict=True):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name != "fc3":
            inner, norm = treated
            assert torch.equal(inner.weight, layer.weight) and isinstance(norm, norms[isinstance(layer, nn.Linear)])
        else:
            assert type(treated) is type(layer)
    assert net(torch.rand(2, 1, 67, 67)).shape == (2, 10)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"^kind = 'group' is not allowed; kind is 'batch' or 'layer'"):
        helpers.add_norms(AlexNet(67), "group")


def test_a_sweep_without_a_file_shows_the_record_and_writes_nothing(tmp_path, capsys):
    recorded = HERE / "results" / "06_mnist.json"
    before = recorded.read_bytes()
    settings = json.loads(before)["settings"]
    shown = open_sweep("", "06_mnist", settings)
    assert shown.units == json.loads(before)["units"] and "06_mnist.json: cpu" in capsys.readouterr().out
    shown(lambda **_: {"loss": [1.0]}, remedy="none")
    assert recorded.read_bytes() == before
    for name, other in (("06_mnist", settings | {"steps": 7}), ("99_none", settings)):
        assert not open_sweep("", name, other).units
        assert f"{name}.json: no record for these parameters" in capsys.readouterr().out
    mine = open_sweep(tmp_path / "mine.json", "06_mnist", settings)
    assert not mine.units and not capsys.readouterr().out
    mine(lambda **_: {"loss": [1.0]}, remedy="none")
    assert open_sweep(tmp_path / "mine.json", "06_mnist", settings).units == mine.units


# ------------------------------------------------------------------------------------------------ as programs
def papermill(notebook, folder, cwd=HERE, **parameters):
    """Start one papermill run, with results.json in folder."""
    if "results_path" not in parameters:
        parameters["results_path"] = str(folder / "results.json")
    options = [word for item in parameters.items() for word in ("-p", item[0], str(item[1]))]
    path = os.path.relpath(FOLDER / f"{notebook}.ipynb", cwd)
    return subprocess.Popen([sys.executable, "-m", "papermill", path, str(folder / "out.ipynb"), *options], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def results_of(process, folder):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return json.loads((folder / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


SMALL = {"image_size": 67, "batch_size": 50}

LIVE = """
import gc, sys
sys.path.insert(0, {folder!r})
import training
from matplotlib.figure import Figure
live, history = training._LiveFigure(True, "C"), training.History()
for loss in range(1, 6):
    history.loss.append(loss)
    history.accuracy.append(0.5)
    live.update(history, seconds_between=0)
gc.collect()
print(sum(type(thing) is Figure for thing in gc.get_objects()), "figure")
"""


def test_a_live_figure_drawn_often_is_one_figure_shown_once(tmp_path):
    cell = nbformat.v4.new_code_cell(LIVE.format(folder=str(HERE)))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "in.ipynb")
    subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", "in.ipynb", "out.ipynb"], cwd=tmp_path,
                   check=True, capture_output=True, timeout=300)
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    shown, = (output for output in outputs if output.output_type == "display_data")
    assert "image/png" in shown.data, "a picture, not its name"
    assert "".join(output.get("text", "") for output in outputs) in ("0 figure\n", "1 figure\n")


def test_03_dies_by_default_and_lives_at_the_small_rate_also_on_fashion_mnist(tmp_path):
    results = results_of(papermill("03_failing_lr", tmp_path, max_steps=6, **SMALL), tmp_path)
    assert results["parameters"]["lr"] == 0.1 and results["nan"]["A"] and results["nan"]["B"]
    assert results["nan"]["LeNet"] is None and results["histories"]["A"]["loss"][-1] == "NaN"
    assert results["births"]["A"]["phase"] == "forward"
    options = {"max_steps": 6, "lr": "1e-3", "init": "kaiming", "dataset": "FashionMNIST", **SMALL}
    lives = results_of(papermill("03_failing_lr", tmp_path, **options), tmp_path)
    assert lives["parameters"]["dataset"] == "FashionMNIST"
    assert lives["nan"] == {"LeNet": None, "A": None, "B": None} and lives["births"] == {"A": None, "B": None}
    assert len(lives["histories"]["B"]["loss"]) == 6


def test_04_lives_by_default_its_results_are_true_and_it_resumes(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = {"test_images": 300, "log_every": 9, **SMALL}
    results = results_of(papermill("04_fixed_lr", tmp_path, cwd=elsewhere, num_epochs=0.02, **options), tmp_path)
    assert results["parameters"]["lr"] == 0.001 and results["nan"] is False
    history = results["history"]
    assert len(history["loss"]) == 24 and all(map(math.isfinite, history["loss"]))
    assert [row["step"] for row in history["rows"]] == [9, 18, 24]
    assert sum(history["loss"][-6:]) < sum(history["loss"][:6])
    confusion = results["confusion"]
    assert sum(map(sum, confusion)) == results["test_images"] == 300
    assert results["test_accuracy"] == pytest.approx(sum(confusion[i][i] for i in range(10)) / 300)
    assert history["rows"][-1]["test_accuracy"] == pytest.approx(results["test_accuracy"])

    options["checkpoint"] = tmp_path / "run.checkpoint"
    for num_epochs in (0.015, 0.02):  # as far as step 18, and on from there
        resumed = results_of(papermill("04_fixed_lr", tmp_path, num_epochs=num_epochs, **options), tmp_path)
    assert resumed["history"] == history and resumed["confusion"] == confusion


def test_the_training_cell_of_04_run_twice_starts_again(tmp_path):
    notebook = nbformat.read(FOLDER / "04_fixed_lr.ipynb", 4)
    sources = [cell.source for cell in notebook.cells]
    at = next(number for number, source in enumerate(sources) if "history = train(" in source)
    notebook.cells[at + 1:] = map(nbformat.v4.new_code_cell, [
        "once = history.loss", sources[at], "assert history.loss == once, 'it trained on'"])
    nbformat.write(notebook, tmp_path / "04_fixed_lr.ipynb")
    process = papermill(tmp_path / "04_fixed_lr", tmp_path, num_epochs=0.005, test_images=20, **SMALL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


PEAK = "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)"


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="memory is used and counted otherwise")
@pytest.mark.parametrize("name", ["01_architecture", "02_data_iterator"])  # the quick ones of them
def test_a_notebook_needs_no_more_memory_than_the_readme_says(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    results_of(papermill(tmp_path / name, tmp_path), tmp_path)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"\(notebooks/(\w+)\.ipynb\).*\| ([\d.]+) GB \| [\d.]+ GB \|$", readme, re.MULTILINE))
    assert list(told) == [path.stem for path in CHAPTERS]
    # versions of torch differ by a tenth
    assert float(nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text) < min(2, float(told[name]) + 0.3)


def test_the_pictures_of_the_edge_show_its_nans():
    cells = nbformat.read(FOLDER / "05_stability_map.ipynb", 4).cells
    output, = [cell.outputs[0] for cell in cells if "each shows new islands" in cell.source]
    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
    units = json.loads((HERE / "results/05_mnist_67.json").read_text())["units"]
    rows = next(unit["rows"] for unit in units if unit.get("panel") == 0)
    dead = sum(row.count("d") for row in rows) / len(rows) ** 2
    inside = [picture.getpixel((x, y)) for x in range(35, 270) for y in range(15, 250)]  # of the first panel
    assert dead > 0.02 and inside.count((255, 255, 255)) / len(inside) == pytest.approx(dead, abs=0.01)


def units_when_killed(name, count, folder, sweep, **options):
    """The units of a sweep whose notebook was killed as soon as it had finished so many."""
    process = papermill(name, folder, sweep=sweep, **options)
    while not (sweep.exists() and len(json.loads(sweep.read_text())["units"]) >= count):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.terminate()
    process.wait()
    assert not (folder / "results.json").exists()
    return json.loads(sweep.read_text())["units"]


def test_05_maps_fashion_mnist_too_and_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    sweep, options = tmp_path / "sweep.json", {"image_size": 67, "images": 2, "steps": 3, "grid_size": 3,
                                               "dataset": "FashionMNIST", "relus": "true"}
    kept = units_when_killed("05_stability_map", 6, tmp_path, sweep, **options)
    lost = kept.pop(4)
    kept[0]["mark"] = "finished"  # would be lost if it were made again
    sweep.write_text(json.dumps(json.loads(sweep.read_text()) | {"units": kept}))
    results = results_of(papermill("05_stability_map", tmp_path, sweep=sweep, **options), tmp_path)
    units = json.loads(sweep.read_text())["units"]
    assert units[:len(kept)] == kept and lost in units[len(kept):] and "loss" in lost
    assert results["parameters"]["relus"] is True and results["parameters"]["dataset"] == "FashionMNIST"
    assert len(results["map"]) == 9
    assert {place["fate"] for place in results["map"]} <= {"NaN", "thrown", "asleep", "learned"}
    assert results["map"][-1]["scale"] > 2.8 and results["map"][-1]["fate"] == "NaN"
    assert len(results["edges"]) == 10 and len(results["layers"]) == 8 and len(results["phases"]) == 5


def test_06_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    sweep = tmp_path / "sweep.json"
    options = {"seeds": 1, "image_size": 67, "batch_size": 4, "steps": 3, "test_images": 20}
    first = units_when_killed("06_remedies", 2, tmp_path, sweep, **options)
    second = units_when_killed("06_remedies", len(first) + 2, tmp_path, sweep, **options)
    assert second[:len(first)] == first and len({json.dumps(unit) for unit in second}) == len(second)
    assert (first[0]["network"], first[0]["remedy"], first[0]["lr"]) == ("AlexNet", "a smaller rate alone", 0.00032)


@pytest.mark.parametrize(("notebook", "parameters"), [
    ("02_data_iterator", {}), ("06_remedies", {"steps": 3, "test_images": 20}),
    ("08_speedrun", {"image_size": 131, "batch_size": 20, "train_images": 100, "test_images": 20}),
    ("04_fixed_lr", {"num_epochs": 0.01, "test_images": 100})])
def test_fashion_mnist(notebook, parameters, tmp_path):
    process = papermill(notebook, tmp_path, cwd=FOLDER, dataset="FashionMNIST", **SMALL | parameters)
    assert results_of(process, tmp_path)["parameters"]["dataset"] == "FashionMNIST"


BAD = [("lr", "abc"), ("batch_size", "0"),  # the others: test_helpers.py
       ("results_path", os.path.join("no", "such", "folder", "x.json")),
       ("learning_rate", "0.1"), ("max_steps", "5")]  # no notebook has the one, others have the other


def test_bad_parameters_end_with_one_line_that_names_them(tmp_path):
    def run(case):
        name, value = case
        folder = tmp_path / f"{name}{value}".replace(os.sep, "")
        folder.mkdir()
        process = papermill("04_fixed_lr", folder, **{name: value})
        return *case, process.communicate(timeout=600)[0], process.returncode

    with ThreadPoolExecutor(2) as two_at_a_time:
        for name, value, output, code in two_at_a_time.map(run, BAD):
            assert code != 0
            shown = re.escape(repr(value)[1:-1])  # a number comes without quotes
            line = output.strip().splitlines()[-1]
            assert re.search(rf"ValueError.*{name} = '?{shown}'? is not allowed; {name} is .+", line), output
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_help_lists_every_parameter_with_type_and_help(path):
    done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", path], capture_output=True, text=True)
    assert done.returncode == 0
    for line in nbformat.read(path, 4).cells[1].source.splitlines():
        name, kind, help_text = re.fullmatch(r"(\w+): (\w+) = .+?  # (.+)", line).groups()
        assert re.search(rf"{name}: {kind} \(default .*\)\s+{re.escape(help_text)}", done.stdout), done.stdout


# ------------------------------------------------------------------------------------------------- the clinic
CLINIC = nbformat.read(FOLDER / "07_clinic.ipynb", 4)
ANCHORS = {heading.replace(" ", "-") for cell in CLINIC.cells if cell.cell_type == "markdown"
           for heading in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)}


@pytest.fixture(scope="module")
def clinic():
    """All that notebook 7 imports, defines and assigns; no patient has been run."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    namespace = {"__name__": "clinic"}
    for number, cell in enumerate(code(CLINIC)):
        body = [node for node in ast.parse(cell.source).body if isinstance(node, kept)]
        file = f"cell {number} of the clinic"
        linecache.cache[file] = len(cell.source), None, cell.source.splitlines(keepends=True), file
        exec(compile(ast.Module(body, []), file, "exec"), namespace)
    return types.SimpleNamespace(**namespace)


def calls(name, cells=None):
    """The arguments of each call of a function in a notebook's cells, as source."""
    return [[ast.unparse(argument) for argument in node.args] for cell in cells or code(CLINIC)
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def reports():
    """{patient: (step, phase, module, operation, verdict)} as the saved notebook prints it."""
    found = {}
    for cell in code(CLINIC):
        asked = [who for who, in calls("ask", [cell])] or re.findall(r'births\["(\w+)"\] = b', cell.source)
        text = "".join(output.get("text", "") for output in cell.outputs)
        first = re.search(r"^(?:NaN|inf) at step (\d+), (\w+) phase, (.+), (?:is born: (\w+)|enters)$", text, re.M)
        if first:
            step, phase, module, operation = first.groups()
            module = "" if module.startswith(("outside", "the network itself")) else module.partition(" ")[0]
            verdict = next(v for v in whynan.VERDICTS if re.search(rf"^{re.escape(v)}: ", text, re.MULTILINE))
            found[asked[0]] = int(step), phase, module, operation or "", verdict
    return found


def test_the_reports_that_the_clinic_shows_are_the_truths():
    truths = {name: (t.step, t.phase, t.module, t.operation, t.verdict) for name, t in PATIENTS.items()
              if not name.startswith("sealed")}
    assert reports() == truths


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("name", PATIENTS)
def test_of_each_patient_an_independent_instrument_sees_the_birth_and_the_cure_is_silent(clinic, name):
    truth, patient, losses = PATIENTS[name], getattr(clinic, name), []
    if name == "spike":
        clinic.run(patient)
        patient = clinic.last_hundred  # from the checkpoint on, as the notebook does
    seen = {(operation, node is not None) for operation, node, _ in births(
        lambda: losses.extend(clinic.run(patient)), nan_of_inf=True)}
    assert not all(map(math.isfinite, losses))
    assert (truth.operation, truth.phase == "backward") in seen or not truth.operation
    birth = clinic.birth_of(patient)
    assert (birth.phase, birth.module, birth.verdict) == (truth.phase, truth.module, truth.verdict)
    # where scores grow for hundreds of steps, the last one depends on the machine's rounding
    assert birth.step == truth.step or (name == "no_bottom" and abs(birth.step - truth.step) < 60)
    assert truth.line in birth.line.text
    for _, *change in (arguments for arguments in calls("see") if arguments[0] == name and len(arguments) > 1):
        assert not clinic.birth_of(clinic.changed(getattr(clinic, name), *map(ast.literal_eval, change)))


def test_every_patient_is_in_the_list_and_every_anchor_leads_somewhere(clinic):
    asked = {arguments[0] for arguments in calls("ask")} | {"spike"}
    assert asked == set(clinic.PATIENTS.split(", ")) == {n for n in PATIENTS if n[:6] != "sealed"} | {"stuck"}
    assert all(hasattr(clinic, name) for name in asked)
    links = re.findall(r"\]\(#([^)]+)\)", "\n".join(cell.source for cell in CLINIC.cells))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    links += (in_readme := re.findall(r"07_clinic\.ipynb#([^)]+)\)", readme))
    assert set(links) <= ANCHORS and "The-procedure" in in_readme
    table = "\n".join(cell.source for cell in CLINIC.cells if "## Find your symptom" in cell.source)
    patients = {a for a in ANCHORS if a in links} - {
        "The-patients", "The-procedure", "A-tree-of-questions", "Find-your-symptom"}
    assert set(re.findall(r"\]\(#([^)]+)\)", table)) == patients


def test_the_code_to_paste_needs_nothing_but_whynan(capsys):
    block, = re.findall(r"```python\n(.+?)```", prose_of(CLINIC, "## The procedure"), re.DOTALL)
    torch.manual_seed(0)
    X, y = torch.rand(24, 1, 4, 4), torch.randint(3, (24,))
    X[0, 0, 0, 0], X[13, 0, 2, 1] = 7, math.nan
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3))
    loader, drawn = torch.utils.data.DataLoader([*zip(X, y, strict=True)], 8), []

    def loss_of(net, X, y):
        return nn.functional.cross_entropy(net(X), y)

    def train(net, loader):
        drawn.append(torch.random.get_rng_state())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in loader:
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            optimizer.step()

    before = torch.random.get_rng_state()
    with pytest.raises(whynan.NonFiniteError) as caught:
        exec(block, {"net": net, "loader": loader, "loss_of": loss_of, "train": train})
    told = capsys.readouterr().out
    assert "batch 1 rows [5]" in told and float(told.split()[-1]) == pytest.approx(math.log(3), rel=0.3)
    assert "inputs 0.00" in told and " to 7.0 " in told, "of all the data"
    assert torch.equal(drawn[0], before), "the run draws what it would have drawn"
    assert caught.value.phase == "data" and caught.value.step == 2

    X, y = torch.rand(6), torch.rand(6)  # X of one dimension, and a bad label
    y[4] = math.inf
    exec(block, {"net": net, "loader": [(X, y)], "loss_of": lambda net, X, y: (X - y).abs().sum(),
                 "train": lambda net, loader: None})
    assert "batch 0 rows [4]" in capsys.readouterr().out


def prose_of(notebook, heading):
    return next(cell.source for cell in notebook.cells if cell.source.startswith(heading))


def leaves():
    """[(the answers that lead to it, what the leaf says)] of the tree in notebook 7."""
    path, found = [], []
    for line in re.findall(r"^ *- .+$", prose_of(CLINIC, "## The procedure"), re.MULTILINE):
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.strip("- ")]
        if "→" in line:
            answers = [re.match(r"\*([^*]+?)\.?\*", part)[1] for part in path[1:]]
            found.append((tuple(answers), line.partition("→")[2].strip()))
    return found


def walk(losses, birth=None, expected=1.0, last=None):
    """The answers that a run gives to the questions of the tree."""
    if not birth:
        stays = max(losses) < 1.1 * losses[0] and min(losses) > 0.9 * losses[0]
        if min(losses) < -1:
            return "No", "It falls without end, below zero"
        return "No", "It stays where it began" if stays else "It climbs, and comes back" if (
            max(losses) > 1.5 * losses[0] and losses[-1] < losses[0]) else "It falls, and has a lower bound"
    shown = [*birth.operands, *([birth.result] if birth.result else [])]
    masks = [e for e in birth.operands if 1e38 < e.smallest == e.largest]
    sizes = [e.largest for e in birth.operands if not math.isnan(e.largest) and e not in masks]
    kinds = {e.dtype for e in shown}
    steps = {step: max(size for s, phase, *_, size in birth.trail if (s, phase) == (step, "update"))
             for step in {s for s, phase, *_ in birth.trail if phase == "update"}}
    grown = bool(steps) and steps[max(steps)] > 10 * steps[min(steps)]
    answers = ["Yes", "Yes" if birth.phase == "data" else "No"]
    at_once, largest = not losses[0] < 1000 * expected, max(sizes, default=0)
    for answer in (torch.float16 in kinds or (torch.bfloat16 in kinds and bool(masks)), at_once,
                   largest > (100 if at_once else 1e10), grown, (last or birth.step) > 100):
        if tuple(answers) in dict(leaves()):
            break
        answers.append("Yes" if answer else "No")
    return tuple(answers)


LEAVES = {  # a part of the leaf: the verdicts of births that end there
    "A hole in the table": {"bad data", "bad weight", "constant normalised"},
    "Float16": {"float16 range", "vanished eps", "Adam's denominator", "mask overflow"},
    "notebook 3": {"wrong scale", "exp overflow"}, "notebook 4": {"steps too long"}, "A spike": {"steps too long"},
    "The long way back": {"exploding gradient"}}
LEAVES["The patients"] = set(whynan.VERDICTS) - set.union(*LEAVES.values()) | {
    "constant normalised", "exp overflow", "mask overflow"}


def masked(mixed):
    """A step of attention whose mask is made by mixed(a mask of the least number of all)."""
    x = nn.Embedding(8, 4)(torch.arange(8))
    scores = x @ x.T + mixed(torch.full((8, 8), torch.finfo(torch.float32).min).triu())
    scores.softmax(1).sum().backward()


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_every_path_of_the_tree_is_walked_by_cases_and_ends_where_their_verdicts_belong(clinic):
    tree, ends = dict(leaves()), {}
    deaths = {name: (case.run(cured=False), functools.partial(case.run, cured=False)) for name, case in DEATHS.items()}
    deaths |= {name: (clinic.run(getattr(clinic, name)), functools.partial(clinic.run, getattr(clinic, name)))
               for name in PATIENTS}
    for name, mixed in (("two masks added", lambda mask: mask + mask), ("a mask rounded", torch.Tensor.bfloat16)):
        deaths[name] = [3.0], functools.partial(masked, mixed)  # at some later step of a run
    for name, (losses, run) in deaths.items():
        with pytest.raises(whynan.NonFiniteError) as caught, whynan.watch():
            run()
        expected = {"regression_lr": 100.0, "lbfgs_closure": 200.0}.get(name, 10.0)  # the mean of y²
        leaf = tree[walk(losses, caught.value, expected)]
        assert any(part in leaf and caught.value.verdict in verdicts for part, verdicts in LEAVES.items()), (name, leaf)
        ends[name] = leaf
    fixed = json.loads((HERE / "results/04_mnist_200.json").read_text())["history"]["loss"]
    for losses, part in ((clinic.run(clinic.stuck), "Stuck"), (fixed, "notebook 5"), (fixed[100:], "notebook 6"),
                         (clinic.run(clinic.no_bottom)[:200], "Early-warning")):
        leaf = tree[walk(losses)]
        assert part in leaf
        ends[part] = leaf
    assert "The patients" in ends["two masks added"] and "Float16" in ends["a mask rounded"]
    assert set(ends.values()) == set(tree.values()) and len(tree) == 12
    assert "notebook 3" in ends["vae"] and "An-exponential" in ends["vae"]
    at_the_edge = sum("The patients" in leaf for name, leaf in ends.items() if name in DEATHS)
    assert f"{at_the_edge} of the {len(DEATHS)} that this project collected" in prose_of(CLINIC, "[Solutions]")
    patients = collections.Counter(leaf for name, leaf in ends.items() if name in clinic.PATIENTS)
    at_the_edge = [leaf for leaf in patients.elements() if "The patients" in leaf]
    assert len(at_the_edge) > max(count for leaf, count in patients.items() if leaf not in at_the_edge)
    assert "more patients end there than at any other" in prose_of(CLINIC, "## The procedure")


def test_a_patient_that_is_not_there_is_refused_with_the_names_of_those_that_are(tmp_path, clinic):
    process = papermill("07_clinic", tmp_path, patient="padded_roe")
    output = process.communicate(timeout=300)[0].strip().splitlines()[-1]
    assert process.returncode and output == (
        f"ValueError: patient = 'padded_roe' is not allowed; patient is all or one of {clinic.PATIENTS}")


def test_one_patient_alone(tmp_path):
    results = results_of(papermill("07_clinic", tmp_path, patient="padded_row"), tmp_path)
    assert list(results["births"]) == list(results["detect_anomaly"]) == ["padded_row"] and not results["signs"]
    assert results["births"]["padded_row"]["verdict"] == "empty softmax row"
    assert list(results["losses"]) == ["padded_row", "padded_row, cured"]


def test_a_sealed_case_takes_a_right_answer_and_refuses_wrong_ones(clinic, capsys):
    judge, sealed = clinic.judge, clinic.sealed_1
    judge(sealed, None)
    assert capsys.readouterr().out == "sealed_1: no answer yet\n"
    cure = "points / points.norm(dim=1, keepdim=True)", "F.normalize(points)"
    judge(sealed, ("loss", "points.norm", cure))
    assert "found and cured" in capsys.readouterr().out
    for phase, part, change, complaint in (
            ("forward", "points.norm", cure, "not born in the phase"), ("loss", "square", cure, "in a line with"),
            ("loss", "points.norm", ("lr=1e-3", "lr=1e-4"), "still dies"),
            ("loss", "points.norm", (cure[0], "0 * points"), "ends above")):
        with pytest.raises(AssertionError, match=complaint):
            judge(sealed, (phase, part, change))
    with pytest.raises(ValueError, match=r"old = 'no such text' is not allowed; old is a part of exactly one line"):
        judge(sealed, ("loss", "points.norm", ("no such text", "")))


def test_the_judge_is_fair_to_a_variance_and_to_steps_that_are_too_long(clinic, capsys):
    born, both = ("loss", "torch.log(variance)"), "/ variance + torch.log(variance)"
    for change in ((born[1], "torch.log(variance.clamp(min=1e-6))"),  # it still divides by a negative one
                   (both, "/ variance.clamp(min=1e-6) + torch.log(variance.clamp(min=1e-6))")):
        with pytest.raises(AssertionError, match="ends above"):
            clinic.judge(clinic.sealed_2, (*born, change))
    for positive in ("F.softplus(variance)", "variance.exp()"):
        clinic.judge(clinic.sealed_2, (*born, ("unbind(1)", f"unbind(1); variance = {positive}")))
    for phase, part in (("loss", "query @ key.mT"), ("update", "learn(")):
        clinic.judge(clinic.sealed_5, (phase, part, ("lr=1.0", "lr=0.1")))
    assert capsys.readouterr().out.count("found and cured") == 4
    with pytest.raises(AssertionError, match=r"ask print\(birth_of\(sealed_5\)\)"):
        clinic.judge(clinic.sealed_5, ("loss", "query", ("lr=1.0", "lr=0.9")))
