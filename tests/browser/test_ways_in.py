"""What a way into the series would do to an environment that somebody else has made."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PYTHON, ROOT


def test_the_lines_for_colab_leave_the_pytorch_that_is_there_alone(tmp_path):
    """A dry run in an environment that believes to have all that .venv has, but for what the line is to bring."""
    line, = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("!git")]
    wanted = re.search(r"pip install -q (.*)", line)[1].split()
    packages = Path(subprocess.run([PYTHON, "-c", "import torch; print(torch.__path__[0])"], capture_output=True,
                                   text=True, check=True).stdout.strip()).parent
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", tmp_path / "colab"], check=True)
    there = next((tmp_path / "colab").rglob("site-packages"))
    for folder in packages.glob("*.dist-info"):
        if not folder.name.startswith((*wanted, "lightning", "alexnet_nan")):
            shutil.copytree(folder, there / folder.name)
    report = subprocess.run([sys.executable, "-m", "pip", "--python", next((tmp_path / "colab").rglob("bin/python")),
                             "install", "--dry-run", "--quiet", "--report", "-", *wanted], capture_output=True,
                            text=True, check=True, timeout=300).stdout
    brought = {package["metadata"]["name"].lower() for package in json.loads(report)["install"]}
    assert set(wanted) <= brought <= {*wanted, "lightning-utilities"}
