"""Notebooks away from home: what an export keeps of them, and what one says that was opened alone."""

import html
import importlib.util
import os
import re
import subprocess
import sys

import nbformat
import pytest

from helpers import HERE

NOTEBOOKS = sorted((HERE / "notebooks").rglob("[0-9]*.ipynb"))


def alternatives(text):
    """The alternative text of each image in HTML, None where one has none."""
    images = re.findall(r"<img\b[^>]*>", text)
    found = [re.search(r'\balt="([^"]*)"', image) for image in images]
    return [alt and html.unescape(alt[1]) for alt in found]


@pytest.fixture(scope="module", params=["html", "markdown"])
def exported(request, tmp_path_factory):
    """A copy of the folder of notebooks, exported in place by the README's command."""
    folder = tmp_path_factory.mktemp("export") / "notebooks"
    for path in NOTEBOOKS:
        place = folder / path.relative_to(HERE / "notebooks")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--log-level=ERROR",
                    "--config", "docs/links_to_exports.py", "--to", request.param, *sorted(folder.rglob("*.ipynb"))],
                   cwd=HERE, env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}, check=True, timeout=300)
    return folder, ".html" if request.param == "html" else ".md"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_alternative_texts_and_links_survive_an_export(path, exported):
    folder, extension = exported
    place = (folder / path.relative_to(HERE / "notebooks")).with_suffix(extension)
    text = place.read_text(encoding="utf-8")
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
    shown = [alternatives(output.data["text/html"])[0] for output in outputs if "image/png" in output.get("data", {})]
    assert alternatives(text) == shown and all(shown)
    if extension == ".html":
        links = re.findall(r'<a\b[^>]*href="([^"]+)"', text)
    else:
        links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    within = [link.split("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    assert any(link.endswith(extension) for link in within) and not any(link.endswith(".ipynb") for link in within)
    for link in within:
        assert (place.parent / link).is_file() or (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opened_alone_says_what_is_missing_and_what_to_do(path, monkeypatch):
    first = next(cell.source for cell in nbformat.read(path, 4).cells if "import helpers" in cell.source
                 or "from helpers" in cell.source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^helpers\.py is missing: download the whole repository"):
        exec(first, {})
