#!/usr/bin/env bash
# Runs all that needs a GPU, in under 8 minutes: a dump, the tests, the benchmarks.
#
#   bash tests/benchmarks/gpu.sh
#
# Needs Python with torch, the package's other dependencies, pytest, pytest-xdist and hypothesis. No
# network: a wheel in dist/ is installed next to them, else the package has to be there. Steps come
# in the order of their value, each with its own limit. A step that fails costs the others nothing.
# $OUT gets log.txt and gpu.json. QUICK=1 shows that the script runs: small sizes, no test is run.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-470} OUT=${OUT:-/tmp/gpu-results}
scratch=$(mktemp -d) failed=()
trap 'umount "$scratch/memory" 2>/dev/null; rm -rf "$scratch"' EXIT
mkdir -p "$OUT" "$scratch/site"
exec > >(tee "$OUT/log.txt") 2>&1
export PYTHONUNBUFFERED=1 scratch PYTHON

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  ((limit > LIMIT - began)) && limit=$((LIMIT - began))
  if ((limit < 5)); then
    echo "=== $name: no time left"
    failed+=("$name (no time)")
    return
  fi
  echo "=== $name, at $began s, within $limit s"
  timeout --signal=INT --kill-after=5 "$limit" "$@" # after which Python names the place
  status=$?
  echo "=== $name: exit $status after $((SECONDS - began)) s"
  ((status)) && failed+=("$name")
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max --format=csv
  uname -rm; nproc; free -g | head -2; echo "locked: $(ulimit -l)"; df -hT . "$OUT" /tmp /dev/shm
  ls -d /sys/devices/system/node/node*
  "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.get_arch_list())'
}

smoke() {
  set -e -o pipefail
  cd "$scratch"
  for options in "" "--precision bf16 --dtype bf16" "--no-cuda-graph" "--shard-size 30MB"; do
    # shellcheck disable=SC2086
    "$PYTHON" -m dump_activations --demo --device cuda --n-samples 5000 -o smoke.safetensors \
      --outputs final_hidden,layer_outputs,attn_pattern $options
    "$PYTHON" -c 'from dump_activations.__main__ import run_inspect; run_inspect()' --verify smoke.safetensors | tail -n 1
    rm -f smoke*
  done
}

benchmark() { # benchmark SECTION SECONDS
  step "$1" "$2" "$PYTHON" tests/benchmarks/run.py --only "$1" --runs 1 --seconds 2 \
    --directory "$scratch" --memory "$memory" --json "$OUT/gpu.json"
}

step machine 20 bash -c "$(declare -f machine); machine"
if compgen -G 'dist/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" dist/*.whl || exit 1
  export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
memory=/dev/shm # or a file system of our own where that is small, as in a container
if (($(df --output=avail -BG /dev/shm | tail -n 1 | tr -dc 0-9) < 20)); then
  mkdir "$scratch/memory" && mount -t tmpfs -o size=40g none "$scratch/memory" && memory=$scratch/memory
fi

cuda_tests=("$PYTHON" -m pytest ${QUICK:+--collect-only} -m cuda -n 0 -q -p no:cacheprovider --tb=short --durations=5
  tests/pipeline/test_cuda.py tests/commands/test_bad_input.py)
step smoke 70 bash -c "$(declare -f smoke); smoke"
step tests 100 "${cuda_tests[@]}" -k "not compiled"
benchmark gpu_launches 75
benchmark gpu_forward 45
benchmark gpu_memory 75
benchmark gpu_parts 20
benchmark gpu_profile 30
benchmark gpu_precisions 60
benchmark gpu_stream 40
benchmark gpu_cells 30
benchmark gpu_disk 75
step tests-compiled 90 "${cuda_tests[@]}" -k compiled
echo "=== done at $SECONDS s; failed: ${failed[*]:-none}"
ls -l "$OUT"
exit "${#failed[@]}"
