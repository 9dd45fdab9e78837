"""What each notebook costs: the seconds from start to end, and the most memory that its kernel held.

    python tests/benchmarks/notebooks.py [--precision float32] [--json FILE] [NAME ...]

Runs them one after the other with papermill and their default parameters; with no NAME all of notebooks/.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import helpers

# What a kernel reads at its start where the processor's own choice is not wanted: one that is slow with bfloat16.
SLOW = "import torch\ntorch.cpu.get_capabilities = lambda: {'architecture': 'x86_64'}\n"


def cost(notebook, folder):
    """(seconds, gigabytes): the kernel is the largest of the processes that papermill started and waited for."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "papermill", "--no-progress-bar", notebook, os.devnull],
                               env={**os.environ, "IPYTHONDIR": str(folder)}, stderr=subprocess.PIPE, text=True)
    complaint = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{notebook} failed: {complaint[-500:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes or kilobytes
    return time.monotonic() - start, used.ru_maxrss * unit / 1e9


def main():
    known = sorted(path.stem for path in (helpers.HERE / "notebooks").glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--precision", choices=("auto", "float32"), default="auto", help="float32: without bfloat16")
    parser.add_argument("--json", default="", metavar="FILE", help="a file for the figures")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - {*known}):
        parser.error(f"{unknown[0]!r} is not allowed; NAME is one of {', '.join(known)}")
    helpers.check_parameters(results_path=given.json)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        start = pathlib.Path(folder, "profile_default", "startup", "precision.py")
        if given.precision == "float32":
            start.parent.mkdir(parents=True)
            start.write_text(SLOW)
        for name in given.names or known:
            seconds, gigabytes = cost(helpers.HERE / "notebooks" / f"{name}.ipynb", folder)
            found.append({"notebook": name, "seconds": seconds, "gigabytes": gigabytes})
            print(f"{name:22s} {seconds:6.0f} s {gigabytes:6.2f} GB", flush=True)
    helpers.save_results(given.json, {"precision": given.precision, "notebooks": found})


if __name__ == "__main__":
    main()
