#!/usr/bin/env bash
# Builds, tests and measures lvrpo on a machine with a GPU, in one command of ten minutes a part.
#
#   benchmarks/gpu.sh [--part attention|head] [--out DIR] [--wheels DIR] [--cpu]
#
#   --part NAME   packed attention and whole updates, or the loss head and the other ops; default: both
#   --out DIR     logs and results; default $OUT, or else gpu-results
#   --wheels DIR  wheels of peers to install from, without dependencies and without a network
#   --cpu         a rehearsal at small size on a machine without a GPU
#
# Needs Python with torch, pytest, pytest-benchmark, pybind11, ninja and setuptools; what is missing
# of the last four is also taken from --wheels. A stage that fails is recorded, and the next one runs.
set -uo pipefail

out=${OUT:-gpu-results} wheels="" device=cuda size=gpu part=both
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --wheels) wheels=$(realpath "${2:?--wheels needs a folder}") || exit 2; shift 2 ;;
    --part) part=${2:?--part needs attention or head}; shift 2 ;;
    --cpu) device=cpu size=small; shift ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
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

failed=0 deadline=570
case $part in
  attention | head) ;;
  both) deadline=1140 ;;
  *) echo "--part is $part, expected attention or head" >&2; exit 2 ;;
esac
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

rm -f "$out"/{stages.txt,log.txt,attention.json,update.json,loss_head.json,ops.json}
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
  tests=(tests/ops/test_gather_logprobs.py tests/ops/test_packed_attention_order.py)
fi
kernels="triton or cuda or flash or varlen"
case $part in
  attention) kernels="attention and ($kernels)" ;;
  head) kernels="(triton or cuda) and not attention" ;;
esac
stage tests 150 "$python" -m pytest "${tests[@]}" -q -p no:cacheprovider -k "$kernels"
unset TRITON_INTERPRET
# measure NAME SECONDS PYTEST-ARGUMENTS...: one table.
measure() {
  local name=$1 seconds=$2
  shift 2
  stage "$name" "$seconds" "$python" -m pytest "$@" -q -p no:cacheprovider --benchmark-only \
    --size="$size" --time-wrong --benchmark-json="$out/$name.json"
}
if [ "$part" != head ]; then
  measure attention 300 benchmarks/bench_packed_attention.py
  measure update 120 benchmarks/bench_update.py
fi
if [ "$part" != attention ]; then
  measure loss_head 330 benchmarks/bench_loss_head.py
  measure dispatch 60 benchmarks/bench_dispatch.py
  measure ops 60 benchmarks --ignore=benchmarks/bench_{dispatch,loss_head,packed_attention,train_step,update}.py
fi
for name in attention update loss_head dispatch ops; do
  [ -s "$out/$name.json" ] && stage "table_$name" 60 "$python" benchmarks/plot.py "$out/$name.json"
done
echo "logs and results: $out"
exit "$failed"
