#!/usr/bin/env bash
# Measures everything that one GPU can show, without a network: about 8 minutes, or 5 with --quick.
#
#   OUT=output/gpu bench/gpu.sh [--quick]
#
# The parts run in order of worth, each with a time limit of its own. Each appends its results as JSON lines to
# $OUT/gpu.jsonl as they come, so that whatever ends the script keeps what was measured; logs are beside it.
# `python -m bench.gpu page $OUT/gpu.jsonl` brings them into bench/gpu.json and the documents. DEVICE=cpu rehearses it.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-output/gpu} PYTHONPATH=. HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUT/compiled}
python=${PYTHON:-python3} device=${DEVICE:-cuda} quick=${1:-} scale=1
[ "$device" = cuda ] || scale=10
[ -z "$quick" ] || [ "$quick" = --quick ] || { echo "usage: bench/gpu.sh [--quick]" >&2; exit 2; }
mkdir -p "$OUT"
started=$SECONDS

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$(($2 * scale)) before=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  $python -m bench.gpu note "$OUT/gpu.jsonl" "$name" "$code" "$((SECONDS - before))" "$limit" "$OUT/$name.log"
  tail -n 4 "$OUT/$name.log"
}

measure() {
  part "$1" "$2" $python -m bench.gpu "${@:3}" --device "$device" --out "$OUT/gpu.jsonl"
}

part tests 120 $python -m pytest -v -o addopts= -p no:cacheprovider tests/test_gpu.py
measure compiled 150 step compiled
measure eager 60 step eager
measure original 90 step original compiled eager --terms original
measure inference 90 inference
if [ -z "$quick" ]; then
  measure largest_batch 180 largest
fi
echo "$((SECONDS - started)) s; results in $OUT/gpu.jsonl"
