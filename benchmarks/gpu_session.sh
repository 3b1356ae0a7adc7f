#!/usr/bin/env bash
# What is to be known of the kernels on a GPU, in steps:
#
#     bash benchmarks/gpu_session.sh [build smoke sanitize tests claims bench profile job]
#
# A call ends within $MINUTES (9), and the next one goes on where it was stopped. What was done is not done again until
# a source changes. There has to be what `pip install -e ".[test]"` installs, setuptools, cmake, ninja, pybind11 and
# nvcc; nothing is downloaded. Everything lands in $SESSION, by default gpu_session in the current folder:
# environment.json (GPU, driver, versions, commit), results.csv and claims.csv (rows), a log of every part.
# RESULTS=FOLDER: at the end these are copied there, the logs as one archive. JOBS: processes of the build and the
# tests. DRY=1: on a machine without a GPU, in the smallest form.
set -uo pipefail
SESSION=$(realpath -m "${SESSION:-gpu_session}")
RESULTS=${RESULTS:+$(realpath -m "$RESULTS")}
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
DRY=${DRY:-0}
DEADLINE=$((${MINUTES:-9} * 60)) # in seconds since the start
if [ "$DRY" = 1 ]; then DEVICE=cpu; else DEVICE=cuda; fi
if [ -d /usr/local/cuda/bin ]; then PATH=$PATH:/usr/local/cuda/bin; fi
export PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 CMAKE_BUILD_PARALLEL_LEVEL=$JOBS
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-gpu-session}
mkdir -p "$SESSION"

sources() {
    find csrc vocabdistil triton_kernels benchmarks tests setup.py CMakeLists.txt -type f \
        ! -name '*.so' ! -name '*.pyc' ! -name '*.csv' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}
SOURCES=$(sources)

# run PART COMMAND...: with what is left of the time; a log, the end of it shown. A part that came to its end leaves its
# exit status, whatever it is: it is not run again before a source changes.
run() {
    local part=$1 left=$((DEADLINE - SECONDS)) made status
    shift
    if read -r made status 2> /dev/null < "$SESSION/$part.done" && [ "$made" = "$SOURCES" ]; then
        echo "$part: done before, exit status $status"
        return "$status"
    fi
    if [ "$left" -lt 10 ]; then
        echo "$part: no time left"
        return 124
    fi
    timeout --signal=INT --kill-after=10 "$left" "$@" > "$SESSION/$part.txt" 2>&1
    status=$?
    tail -n 25 "$SESSION/$part.txt"
    case $status in
        124 | 130 | 137 | 143) echo "!! $part: stopped, exit status $status" ;;
        *) echo "$SOURCES $status" > "$SESSION/$part.done" ;;
    esac
    if [ "$status" != 0 ]; then echo "!! $part: exit status $status"; fi
    return "$status"
}

loadable() {
    "$PYTHON" -c "
import sys
from vocabdistil.core import native
error = native.load_error() or ('' if $DRY or native.module().cuda_compiler else 'it was built without CUDA')
sys.exit(f'vocabdistil._C: {error}' if error else 0)"
}

# Beside the sources, which are what is imported; for the architecture of this GPU alone.
build() {
    if [ "$DRY" = 1 ] && loadable; then return 0; fi
    VOCABDISTIL_CUDA=$([ "$DRY" = 1 ] && echo OFF || echo ON) run build \
        "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps -e . && loadable
}

environment() {
    "$PYTHON" -c "
import json, vocabdistil as vd
from benchmarks.report import environment
print(json.dumps({'rows': environment('$DEVICE'), **vd.backends()}, indent=1))" > "$SESSION/environment.json"
}

smoke() { run smoke "$PYTHON" -m benchmarks smoke --device "$DEVICE"; }

# What tests cannot see: accesses out of bounds, races between warps. Without the allocator's cache every tensor has
# bounds of its own.
sanitize() {
    local tool operation failed=0
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not here"
        [ "$DRY" = 1 ]
        return
    fi
    for tool in memcheck racecheck synccheck; do
        for operation in span_mean span_loss matched_kl remapped_kl relation_loss linear_matched_kl span_likelihood \
            linear_span_likelihood linear_remapped_kl contrastive remap; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool-$operation" compute-sanitizer --tool "$tool" \
                --report-api-errors no --error-exitcode 1 "$PYTHON" -m benchmarks.launches small "$operation" || failed=1
        done
    done
    return "$failed"
}

tests() {
    local failed=0 pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --durations 8)
    if [ "$DRY" = 1 ]; then
        run tests "${pytest[@]}" --collect-only tests/test_gpu.py
        return
    fi
    # Most of the time goes into compiling, on the CPU.
    if "$PYTHON" -c "import xdist" 2> /dev/null; then pytest+=(-n "$((JOBS > 8 ? 8 : JOBS))" --dist worksteal); fi
    run tests-build "${pytest[@]}" tests/test_cuda_build.py || failed=1
    run tests-remap "${pytest[@]}" tests/test_gpu_remap.py || failed=1
    run tests-matched-kl "${pytest[@]}" tests/test_gpu_matched_kl.py || failed=1
    run tests-vocabulary "${pytest[@]}" tests/test_gpu_vocabulary.py || failed=1
    run tests-spans "${pytest[@]}" tests/test_gpu.py -k "not test_hidden_sizes" || failed=1
    run tests-hidden-sizes "${pytest[@]}" tests/test_gpu.py -k test_hidden_sizes || failed=1
    return "$failed"
}

# measured PART FILE ARGUMENTS...: rows of cases that the file has of this commit are not measured again.
measured() {
    local part=$1 file=$2
    shift 2
    if [ "$DRY" = 1 ]; then set -- "$@" --quick; fi
    run "$part" "$PYTHON" -m benchmarks "$@" --device "$DEVICE" --missing --out "$SESSION/$file"
}

goals() { "$PYTHON" -m benchmarks goals "$SESSION/$1" > "$SESSION/goals.txt"; head -n 60 "$SESSION/goals.txt"; }

# Ours and the reference alone: compiling rivals takes longer than measuring.
claims() {
    local failed=0
    if [ "$DRY" = 1 ]; then
        measured claims claims.csv span_loss --case b8-l256-d768-60% --providers ours
        return
    fi
    measured claims-linear claims.csv linear_matched_kl --providers ours reference || failed=1
    measured claims-spans claims.csv span_loss --case b --providers ours reference || failed=1
    goals claims.csv
    return "$failed"
}

bench() {
    local name failed=0
    if [ "$DRY" = 1 ]; then
        measured bench results.csv span_mean --case b8-l256-d768 --providers ours
        return
    fi
    for name in span_mean linear_matched_kl matched_kl remapped_kl linear_remapped_kl relation_loss contrastive remap \
        pooled_loss similarity_loss attention_loss span_likelihood linear_span_likelihood span_loss; do
        measured "bench-$name" results.csv "$name" || failed=1
    done
    goals results.csv
    return "$failed"
}

profile() {
    if ! command -v ncu > /dev/null; then
        echo "ncu is not here"
        [ "$DRY" = 1 ]
        return
    fi
    if [ "$DRY" = 1 ]; then return 0; fi
    run profile ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
        --section LaunchStats --section WarpStateStats --section SchedulerStats --kernel-name regex:loss -c 40 --csv \
        --page raw --log-file "$SESSION/ncu.csv" "$PYTHON" -m benchmarks.launches large
}

# The main job, on what the package brings along.
job() {
    if [ "$DRY" = 1 ]; then
        run job "$PYTHON" -m vocabdistil --help
        return
    fi
    run job "$PYTHON" -m vocabdistil demo --overwrite --out "$SESSION/demo"
}

copy_results() {
    local file
    mkdir -p "$RESULTS"
    for file in environment.json results.csv claims.csv goals.txt ncu.csv; do
        if [ -e "$SESSION/$file" ]; then cp "$SESSION/$file" "$RESULTS"; fi
    done
    (cd "$SESSION" && tar -czf "$RESULTS/logs.tar.gz" ./*.txt)
}

steps=("$@")
if [ $# = 0 ]; then steps=(build smoke sanitize tests claims bench profile job); fi
for step in "${steps[@]}"; do
    case $step in
        build | smoke | sanitize | tests | claims | bench | profile | job) ;;
        *)
            echo "gpu_session.sh: expected build, smoke, sanitize, tests, claims, bench, profile or job, got $step" >&2
            exit 2
            ;;
    esac
done
# Every call makes what is not there: a machine may be a fresh one.
build || exit 1
environment || echo "!! environment.json could not be written"
failed=()
for step in "${steps[@]}"; do
    if [ "$step" = build ]; then continue; fi
    printf '== %s (%s)\n' "$step" "$(date +%T)"
    "$step" || failed+=("$step")
done
if [ -n "$RESULTS" ]; then copy_results; fi
if [ ${#failed[@]} != 0 ]; then
    echo "failed or unfinished: ${failed[*]}"
    exit 1
fi
