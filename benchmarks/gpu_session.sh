#!/usr/bin/env bash
# What is to be known of the kernels on a GPU, in steps of under ten minutes each:
#
#     benchmarks/gpu_session.sh [build smoke sanitize tests claims bench profile job]
#
# No network: torch, triton, pytest, pybind11, cmake, ninja and nvcc have to be there. A step that was done is not done
# again; tests and bench go on where they were stopped. Everything lands in $OUT, by default gpu_session in the current
# folder: results.csv beside the logs, and environment.json (GPU, driver, versions, commit).
# DRY=1: on a machine without a GPU, in the smallest form; JOBS: processes of the build and the tests.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=$(realpath -m "${OUT:-$OLDPWD/gpu_session}")
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
DRY=${DRY:-0}
LIMIT=560  # seconds of a step
if [ "$DRY" = 1 ]; then DEVICE=cpu; else DEVICE=cuda; fi
if [ -d /usr/local/cuda/bin ]; then PATH=$PATH:/usr/local/cuda/bin; fi
export PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CMAKE_BUILD_PARALLEL_LEVEL=$JOBS TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/triton}
mkdir -p "$OUT"

# limit NAME COMMAND...: what is left of the step's time; output to a log and, the end of it, here.
limit() {
    local name=$1 left=$((LIMIT - SECONDS)) code
    shift
    if [ "$left" -lt 5 ]; then echo "no time left for $name"; return 124; fi
    timeout --signal=INT --kill-after=20 "$left" "$@" > "$OUT/$name.txt" 2>&1
    code=$?
    tail -n "${LINES_SHOWN:-25}" "$OUT/$name.txt"
    if [ "$code" != 0 ]; then echo "!! $name: exit status $code"; fi
    return "$code"
}

# once PART COMMAND...: a part of a step that is not repeated once it is done.
once() {
    local part=$1
    shift
    if [ -e "$OUT/$part.done" ]; then echo "$part: done before"; return 0; fi
    limit "$part" "$@" || return 1
    touch "$OUT/$part.done"
}

built() {
    "$PYTHON" - "$DRY" << 'P' 2> /dev/null
import sys
from vocabdistil.core import native
sys.exit(native.load_error() is not None or not (native.module().cuda_compiler or int(sys.argv[1])))
P
}

# For the architecture of the GPU alone; the module is made beside the sources, and the sources are what is imported.
build() {
    if [ "$DRY" = 1 ] && built; then return 0; fi
    if built && [ -e "$OUT/build.done" ]; then return 0; fi
    VOCABDISTIL_CUDA=$([ "$DRY" = 1 ] && echo OFF || echo ON) limit build \
        "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps -e . || return 1
    built || { echo "!! the module was built without CUDA or cannot be loaded"; return 1; }
    touch "$OUT/build.done"
}

environment() {
    "$PYTHON" - "$DEVICE" << 'P' > "$OUT/environment.json"
import json, sys, vocabdistil as vd
from benchmarks.report import environment
print(json.dumps({"rows": environment(sys.argv[1]), **vd.backends()}, indent=1))
P
}

smoke() { once smoke "$PYTHON" -m benchmarks smoke --device "$DEVICE"; }

# What tests cannot see: accesses out of bounds, races between warps. Without the allocator's cache every tensor has
# bounds of its own.
sanitize() {
    local tool failed=0
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not here"
        once launches "$PYTHON" -m benchmarks.launches small && [ "$DRY" = 1 ]
        return
    fi
    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 once "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m benchmarks.launches small || failed=1
    done
    return "$failed"
}

# File by file, the longest in two parts, as most of the time goes into compiling on the CPU.
tests() {
    local failed=0 pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --durations 8)
    if [ "$DRY" = 1 ]; then once tests "${pytest[@]}" --collect-only -m gpu tests/test_gpu.py; return; fi
    if "$PYTHON" -c "import xdist" 2> /dev/null; then pytest+=(-n "$((JOBS > 8 ? 8 : JOBS))" --dist worksteal); fi
    once tests-build "${pytest[@]}" tests/test_cuda_build.py || failed=1
    once tests-remap "${pytest[@]}" tests/test_gpu_remap.py || failed=1
    once tests-vocabulary "${pytest[@]}" tests/test_gpu_vocabulary.py || failed=1
    once tests-spans "${pytest[@]}" tests/test_gpu.py -k "not test_hidden_sizes" || failed=1
    once tests-hidden-sizes "${pytest[@]}" tests/test_gpu.py -k test_hidden_sizes || failed=1
    once tests-rest "${pytest[@]}" -m gpu --ignore tests/test_gpu.py --ignore tests/test_gpu_remap.py \
        --ignore tests/test_gpu_vocabulary.py tests || failed=1
    return "$failed"
}

measured() {
    local part=$1
    shift
    if [ "$DRY" = 1 ]; then set -- "$@" --quick; fi
    once "$part" "$PYTHON" -m benchmarks "$@" --device "$DEVICE" --out "$OUT/results.csv"
}

# The cases with a goal, ours and the reference alone: compiling rivals takes longer than measuring.
claims() {
    if [ "$DRY" = 1 ]; then measured claims span_loss --case b8-l256-d768-60% --providers ours; return; fi
    local failed=0
    measured claims-spans span_loss --case b --providers ours reference || failed=1
    measured claims-linear linear_matched_kl --providers ours reference || failed=1
    LINES_SHOWN=60 limit goals "$PYTHON" -m benchmarks goals "$OUT/results.csv" || true
    return "$failed"
}

bench() {
    if [ "$DRY" = 1 ]; then measured bench span_mean --case b8-l256-d768 --providers ours; return; fi
    local name failed=0
    for name in span_loss span_mean linear_matched_kl matched_kl remapped_kl contrastive relation_loss remap \
        pooled_loss similarity_loss attention_loss; do
        measured "bench-$name" "$name" || failed=1
    done
    LINES_SHOWN=90 limit goals "$PYTHON" -m benchmarks goals "$OUT/results.csv" || true
    return "$failed"
}

profile() {
    if ! command -v ncu > /dev/null; then echo "ncu is not here"; [ "$DRY" = 1 ]; return; fi
    if [ "$DRY" = 1 ]; then return 0; fi
    once profile ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
        --section LaunchStats --section WarpStateStats --section SchedulerStats --kernel-name regex:loss -c 40 --csv \
        --page raw --log-file "$OUT/ncu.csv" "$PYTHON" -m benchmarks.launches large
}

# The main job, on what the package brings along.
job() {
    if [ "$DRY" = 1 ]; then once job "$PYTHON" -m vocabdistil --help; return; fi
    once job "$PYTHON" -m vocabdistil demo --out "$OUT/demo"
}

steps=("$@")
if [ $# = 0 ]; then steps=(build smoke sanitize tests claims bench profile job); fi
for step in "${steps[@]}"; do
    case $step in
        build | smoke | sanitize | tests | claims | bench | profile | job) ;;
        *) echo "gpu_session.sh: expected build, smoke, sanitize, tests, claims, bench, profile or job, got $step" >&2; exit 2 ;;
    esac
done
# A fresh machine has nothing: every call makes what is not there.
build && environment || exit 1
failed=()
for step in "${steps[@]}"; do
    if [ "$step" = build ]; then continue; fi
    SECONDS=0
    printf '== %s (%s)\n' "$step" "$(date +%T)"
    "$step" || failed+=("$step")
done
if [ ${#failed[@]} != 0 ]; then echo "failed or unfinished: ${failed[*]}"; exit 1; fi
