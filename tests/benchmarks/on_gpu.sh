#!/usr/bin/env bash
# Everything that a machine with CUDA can tell about this project, in eight minutes and without network:
#
#     tests/benchmarks/on_gpu.sh OUT [WHEELS]         benchmark, notebook 8, then tests and notebooks 3, 4 and 7 at
#                                                     once: JSON files and logs in OUT
#     tests/benchmarks/on_gpu.sh --wheels WHEELS      before, on a machine with network: what that one may lack
#
# torch and torchvision must be there (PYTHON=… says in which Python; else python3); all that lies in WHEELS goes into
# OUT, so take out what the machine has. For a machine of another kind add pip's own words, as in: --wheels WHEELS
# --python-version 3.12 --platform manylinux2014_x86_64. Where there is no CUDA, all of it runs on the CPU, with small
# sizes, to try the script. It ends after SECONDS_IN_ALL=450, whatever is not done. OUT/summary.json has each part's
# exit status and seconds; if one fails, the script does.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-450}))

# what tests and notebooks import; pytorch and what it brings are never fetched
needed=$(sed -n 's/^\([A-Za-z][^ ]*\) .*/\1/p' "$top/requirements.txt" |
         grep -Ev '^(torch|torchvision|torchmetrics|jupyterlab|nbval|ruff|PyYAML)[^a-z]')
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
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)

"$python" -m venv --without-pip "$out/venv"
beside=$(echo "$out"/venv/lib/python3*/site-packages)/beside.pth  # a venv of a venv would see neither's packages
"$python" -c 'import site; [print(f"import site; site.addsitedir({p!r})") for p in site.getsitepackages()]' > "$beside"
own=$out/venv/bin/python
if [ $# -gt 1 ]; then
    "$own" -m pip install -q --no-index --no-deps "$2"/*.whl > "$out/install.log" 2>&1 ||
        { tail -5 "$out/install.log"; exit 1; }
fi
export PYTHONPATH=$top JUPYTER_PREFER_ENV_PATH=1 MPLBACKEND=agg PATH=$out/venv/bin:$PATH
cd "$top"

device=(--device cuda) tests=() sizes=(--repeats 3) pixels=() epochs=(-p num_epochs 5 -p batch_size 100)
runs="4000 7000" seeds="0 1 2"
if ! "$own" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA here: small sizes on the CPU"
    device=() tests=(-k "evaluation or exp or sweep or loss") pixels=(-p image_size 67) epochs=() runs=200 seeds=0
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
pytest=("$own" -m pytest -q -p no:cacheprovider -o addopts= --durations=5 -n $((($(nproc) + 3) / 4)) "${tests[@]}")
notebook() {  # notebook NAME FILE PARAMETERS…
    local name=$1 file=$2
    shift 2
    part "$name" "$own" -m papermill --no-progress-bar -k python3 "notebooks/$file" "$out/$name.ipynb" \
         -p results_path "$out/$name.json" "$@"
}
rm -f "$out"/*.status
# what measures first, and one at a time
part benchmark "$own" tests/benchmarks/benchmark.py --parts training choices data evaluation watch memory "${sizes[@]}" \
     --json "$out/benchmark.json"
for seed in $seeds; do
    for images in $runs; do
        notebook "08_${images}_$seed" 08_speedrun.ipynb -p train_images "$images" -p test_images 0 -p seed "$seed" \
                 "${pixels[@]}"
    done
done
export OMP_NUM_THREADS=$(( ($(nproc) + 7) / 8 ))  # with more, the eight at once would only wait for each other
part test_helpers "${pytest[@]}" tests/test_helpers.py &
part test_whynan "${pytest[@]}" "${device[@]}" tests/test_whynan.py &
part test_whynan_verdicts "${pytest[@]}" "${device[@]}" tests/test_whynan_verdicts.py &
notebook 03_failing_lr 03_failing_lr.ipynb "${pixels[@]}" &
notebook 04_fixed_lr 04_fixed_lr.ipynb "${pixels[@]}" &
notebook 07_clinic 07_clinic.ipynb &
for dataset in MNIST FashionMNIST; do
    notebook "04_$dataset" 04_fixed_lr.ipynb -p dataset "$dataset" "${epochs[@]}" "${pixels[@]}" &
done
wait
{ echo "{"; cat "$out"/*.status | paste -sd,; echo "}"; } > "$out/summary.json"
rm -f "$out"/*.status
! grep -Eq '"exit_status": [1-9]' "$out/summary.json"
