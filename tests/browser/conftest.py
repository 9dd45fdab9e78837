"""A browser, the web edition and a JupyterLab for these tests; what they need says tests/browser/README.md."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SERIES_PYTHON", ROOT / ".venv/bin/python")  # which has the README's packages
SITE = ROOT / "docs/_build/html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_ignore_collect(collection_path, config):
    """The README's test command passes by this folder: a reader has neither the packages nor the site."""
    if collection_path.parent == Path(__file__).parent and config.inipath != Path(__file__).parent / "pytest.ini":
        return True


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"])
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the built web edition."""
    assert (SITE / "index.html").is_file(), "build the web edition first: python docs/build.py"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
