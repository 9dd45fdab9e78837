"""Notebooks in a real JupyterLab, by its menus: opened, run to the end, and once more from a new kernel."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request

import nbformat
import pytest
from conftest import PYTHON, ROOT

SMALL = {"01_architecture": {"image_size": 67},
         "03_failing_lr": {"image_size": 67, "batch_size": 100, "max_steps": 3},
         "04_fixed_lr": {"image_size": 67, "batch_size": 20, "num_epochs": 0.04, "log_every": 60, "test_images": 100},
         "07_clinic": {"patient": "padded_row"}}
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, not those in sight
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
# What is seen in the page while cells run: progress bars, and the live figure's states, and how many of it at once.
LOOK = """() => {
    window.seen = {bars: [], pictures: [], most: 0};
    setInterval(() => {
        const bars = document.querySelector('.jp-Notebook').textContent.match(/\\d+%\\|[^|]*\\| \\d+\\/\\d+/g);
        (bars || []).forEach(bar => seen.bars.includes(bar) || seen.bars.push(bar));
        const live = [...document.querySelectorAll('.jp-Notebook img[alt^="Live curves"]')];
        seen.most = Math.max(seen.most, live.length);
        live.forEach(({src}) => seen.pictures.includes(src) || seen.pictures.push(src));
    }, 100);
}"""
LAST_PROMPT = "text => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1).textContent === text"


def small_copy(name, folder):
    """The notebook with small parameters, as somebody would write them into its cell."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
    parameters = notebook.cells[1]
    for key, value in SMALL[name].items():
        parameters.source, done = re.subn(rf"^({key}: \w+ = )\S+", rf"\g<1>{value!r}", parameters.source, flags=re.M)
        assert done == 1, key
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None  # so that a number tells of this run
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    """The address of a JupyterLab, and its process."""
    for name, settings in SETTINGS.items():
        place = folder / f".settings/@jupyterlab/{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JUPYTERLAB_SETTINGS_DIR": ".settings", "JUPYTERLAB_WORKSPACES_DIR": ".workspaces",
           "JUPYTER_CONFIG_DIR": ".config", "JUPYTER_RUNTIME_DIR": ".runtime", "JUPYTER_PREFER_ENV_PATH": "1"}
    environment = os.environ | {key: str(folder / value) if value[0] == "." else value for key, value in own.items()}
    environment["PYTHONPATH"] = str(ROOT)
    with open(folder / ".log", "w") as log:
        server = subprocess.Popen([PYTHON, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}",
                                   "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
                                   f"--ServerApp.root_dir={folder}"], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(120):
        try:
            urllib.request.urlopen(address + "api/status")
            break
        except OSError:
            assert server.poll() is None, (folder / ".log").read_text()
            time.sleep(0.5)
    yield address
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


def menu(page, name, command):
    page.locator(".lm-MenuBar-item", has_text=name).click()
    page.locator(f".lm-Menu-item[data-command='{command}']").click()


def ran_to_the_end(page, path, cells):
    """Waits for the last cell's number, saves, and returns the notebook as the file then has it."""
    page.wait_for_function(f"text => ({LAST_PROMPT})(text) || document.querySelector("
                           "'[data-mime-type=\"application/vnd.jupyter.error\"]')", arg=f"[{cells}]:", timeout=240_000)
    before = path.stat().st_mtime_ns
    menu(page, "File", "docmanager:save")
    for _ in range(100):
        if path.stat().st_mtime_ns != before:
            break
        time.sleep(0.1)
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, cells + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    return outputs


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_by_the_menu_and_once_more(name, folder, lab, chromium):
    if not (ROOT / f"notebooks/{name}.ipynb").exists():
        pytest.skip(f"there is no notebook {name}")
    saved = small_copy(name, folder)
    cells = sum(cell.cell_type == "code" for cell in saved.cells)
    figures = [output for cell in saved.cells for output in cell.get("outputs", ())
               if "image/png" in output.get("data", {})]
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{lab}lab/workspaces/{name}/tree/{name}.ipynb")  # one alone
    page.wait_for_function("count => document.querySelectorAll('.jp-Notebook .jp-Cell').length === count",
                           arg=len(saved.cells))
    page.wait_for_selector(".jp-StatusBar-TextItem:text('| Idle')", timeout=60_000)
    # a notebook that nobody has trusted yet shows its figures, with their texts
    page.wait_for_function("count => [...document.querySelectorAll('.jp-OutputArea-output img')].filter("
                           "({alt, naturalWidth}) => alt.length > 20 && naturalWidth > 100).length === count",
                           arg=len(figures))

    page.evaluate(LOOK)
    menu(page, "Run", "runmenu:run-all")
    outputs = ran_to_the_end(page, folder / f"{name}.ipynb", cells)
    seen = page.evaluate("seen")
    live = sum("Live curves" in output.get("data", {}).get("text/plain", "") for output in outputs)
    if name == "04_fixed_lr":
        assert len(seen["bars"]) >= 3, "the bar moves"
        saved_ones = {re.search(r'src="([^"]+)"', output.data["text/html"])[1] for output in figures}
        assert len({*seen["pictures"]} - saved_ones) >= 2, "the figure is redrawn"
        assert live == seen["most"] == 1, "and stands there once"

    menu(page, "Run", "runmenu:restart-and-run-all")
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    page.wait_for_function(LAST_PROMPT, arg="[*]:", timeout=60_000)
    ran_to_the_end(page, folder / f"{name}.ipynb", cells)
    page.close()
