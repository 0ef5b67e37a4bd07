#!/usr/bin/env bash
# Builds, tests and measures lvrpo on a machine with a GPU, in one command and within ten minutes.
#
#   benchmarks/gpu.sh [--out DIR] [--wheels DIR] [--cpu]
#
#   --out DIR     logs and results; default $OUT, or else gpu-results
#   --wheels DIR  wheels of peers to install from, without dependencies and without a network
#   --cpu         a rehearsal at small size on a machine without a GPU
#
# Needs Python with torch, pytest, pytest-benchmark, pybind11, ninja and setuptools; what is missing
# of the last four is also taken from --wheels. A stage that fails is recorded, and the next one runs.
set -uo pipefail

out=${OUT:-gpu-results} wheels="" device=cuda size=gpu
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --wheels) wheels=$(realpath "${2:?--wheels needs a folder}") || exit 2; shift 2 ;;
    --cpu) device=cpu size=small; shift ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(realpath "$out") || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No GPU: torch sees no CUDA device. --cpu rehearses without one." >&2
  exit 1
fi

failed=0
deadline=570
# stage NAME SECONDS COMMAND...: its output in log.txt, one line of what came of it here and in stages.txt.
stage() {
  local name=$1 seconds=$2 began=$SECONDS code=0
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" >>"$out/log.txt"
  ((seconds < deadline - SECONDS)) || seconds=$((deadline - SECONDS))
  if ((seconds > 0)); then
    # An interrupted pytest still writes what it has measured, unless it is interrupted twice.
    timeout --foreground --signal=INT --kill-after=15 "$seconds" "$@" >>"$out/log.txt" 2>&1 </dev/null || code=$?
  else
    code=124
    echo "no time left" >>"$out/log.txt"
  fi
  ((code == 0)) || failed=1
  printf '%-16s exit %-3d %4d s  %s\n' "$name" "$code" $((SECONDS - began)) \
    "$(sed -n "/^=== $name:/,\$p" "$out/log.txt" | grep -E '[0-9]+ (passed|failed|error)' | tail -n 1)" | tee -a "$out/stages.txt"
}

rm -f "$out"/{stages.txt,log.txt,loss_head.json,ops.json,update.json}
stage machine 30 bash -c 'nvidia-smi; nvcc --version; uname -a; git rev-parse HEAD; git status --short'
if [ -n "$wheels" ]; then
  # Without dependencies, so that nothing brings another torch; one by one, since some may not fit.
  # shellcheck disable=SC2016
  stage wheels 60 bash -c 'code=0; python=$1; shift
    for wheel; do "$python" -m pip install --quiet --no-index --no-deps "$wheel" || code=1; done
    exit "$code"' bash "$python" "$wheels"/*.whl
fi
stage build 150 env LVRPO_BUILD="${LVRPO_BUILD:-$([ "$device" = cpu ] && echo cpu || echo auto)}" \
  "$python" setup.py build_ext --inplace
stage info 60 "$python" -m lvrpo.info
tests=(tests/ops)
if [ "$device" = cpu ]; then
  export TRITON_INTERPRET=1
  tests=(tests/ops/test_gather_logprobs.py)
fi
stage tests 120 "$python" -m pytest "${tests[@]}" -q -p no:cacheprovider -k triton
unset TRITON_INTERPRET
stage loss_head 330 "$python" -m pytest benchmarks/bench_loss_head.py -q -p no:cacheprovider \
  --benchmark-only --size="$size" --time-wrong --benchmark-json="$out/loss_head.json"
stage ops 90 "$python" -m pytest benchmarks -q -p no:cacheprovider \
  --ignore=benchmarks/bench_loss_head.py --ignore=benchmarks/bench_train_step.py \
  --ignore=benchmarks/bench_update.py --benchmark-only --size="$size" --benchmark-json="$out/ops.json"
stage update 120 "$python" -m pytest benchmarks/bench_update.py -q -p no:cacheprovider \
  --benchmark-only --size="$size" --benchmark-json="$out/update.json"
for name in loss_head ops update; do
  [ -s "$out/$name.json" ] && stage "table_$name" 60 "$python" benchmarks/plot.py "$out/$name.json"
done
echo "logs and results: $out"
exit "$failed"
