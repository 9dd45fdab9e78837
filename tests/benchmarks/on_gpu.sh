#!/usr/bin/env bash
# Everything that a machine with CUDA can tell about this project, in eight minutes and without network:
#
#     tests/benchmarks/on_gpu.sh OUT [WHEELS]         tests, notebooks 3, 4 and 7, benchmark: JSON files and logs in OUT
#     tests/benchmarks/on_gpu.sh --wheels WHEELS      before, on a machine with network: what that one may lack
#
# torch and torchvision must be there (PYTHON=… says in which Python; else python3); what else is missing is installed
# from WHEELS, into OUT. For a machine of another kind add pip's own words, as in: --wheels WHEELS --python-version 3.12
# --platform manylinux2014_x86_64. Where there is no CUDA, all of it runs on the CPU, with small sizes, to try the script.
# OUT/summary.json has each part's exit status and seconds; the script fails if one of them does.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-450}))

# what tests and notebooks import; pytorch and what it brings are never fetched
needed=$(sed -n 's/^\([A-Za-z][^ ]*\) .*/\1/p' "$top/requirements.txt" |
         grep -Ev '^(torch|torchvision|torchmetrics|jupyterlab|nbval|ruff|PyYAML|pytest-xdist)[^a-z]')
with_torch="lightning-utilities torchmetrics"  # pure Python, but they would ask for torch

if [ "${1:-}" = --wheels ]; then
    wheels=$2
    shift 2
    # shellcheck disable=SC2086  # lists of words
    "$python" -m pip download -q --only-binary=:all: -d "$wheels" "$@" $needed packaging setuptools typing-extensions
    # shellcheck disable=SC2086
    "$python" -m pip download -q --only-binary=:all: --no-deps -d "$wheels" "$@" $with_torch
    rm -f "$wheels"/{numpy,pillow}-*  # large, and torchvision has brought them
    exit
fi
if [ $# -lt 1 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)

"$python" -m venv --without-pip "$out/venv"
beside=$(echo "$out"/venv/lib/python3*/site-packages)/beside.pth  # a venv of a venv would see neither's packages
"$python" -c 'import site; [print(f"import site; site.addsitedir({p!r})") for p in site.getsitepackages()]' > "$beside"
own=$out/venv/bin/python
if [ $# -gt 1 ]; then
    # shellcheck disable=SC2086
    "$own" -m pip install -q --no-index --find-links "$2" $needed $with_torch > "$out/install.log" 2>&1 ||
        { tail -5 "$out/install.log"; exit 1; }
fi
export PYTHONPATH=$top JUPYTER_PREFER_ENV_PATH=1 MPLBACKEND=agg PATH=$out/venv/bin:$PATH
cd "$top"

small=() tests=() sizes=()
if ! "$own" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA here: small sizes on the CPU"
    small=(-p image_size 67) tests=(-k "evaluation or exp or sweep or loss")
    sizes=(--repeats 1 --steps 1 --batch-size 5 --image-size 67 --workers 1 --data-batches 2 --test-images 10
           --batch-sizes 2 3 --image-sizes 67)
fi
"$own" -c 'import json, helpers; print(json.dumps(helpers.environment(), indent=1))' | tee "$out/environment.json"

part() {  # part NAME COMMAND…: its output goes to OUT/NAME.log, its exit status and seconds to OUT/NAME.status
    local name=$1 start=$SECONDS status=0
    shift
    timeout --kill-after=10 $((deadline > SECONDS ? deadline - SECONDS : 1)) "$@" > "$out/$name.log" 2>&1 || status=$?
    echo "\"$name\": {\"exit_status\": $status, \"seconds\": $((SECONDS - start))}" > "$out/$name.status"
    echo "$name: exit status $status, $((SECONDS - start)) s"
}
pytest=("$own" -m pytest -q -p no:cacheprovider -o addopts= --durations=5 "${tests[@]}")
rm -f "$out"/*.status
for name in test_helpers test_whynan test_whynan_verdicts; do
    part "$name" "${pytest[@]}" --junitxml="$out/$name.xml" "tests/$name.py" &
done
for notebook in notebooks/03_*.ipynb notebooks/04_*.ipynb notebooks/07_*.ipynb; do
    if [ -f "$notebook" ]; then
        name=$(basename "$notebook" .ipynb)
        part "$name" "$own" -m papermill -k python3 "$notebook" "$out/$name.ipynb" \
             -p results_path "$out/$name.json" "${small[@]}" &
    fi
done
wait
# alone, since it measures
part benchmark "$own" tests/benchmarks/benchmark.py "${sizes[@]}" --json "$out/benchmark.json"
{ echo "{"; cat "$out"/*.status | paste -sd,; echo "}"; } > "$out/summary.json"
rm -f "$out"/*.status
! grep -Eq '"exit_status": [1-9]' "$out/summary.json"
