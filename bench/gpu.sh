#!/usr/bin/env bash
# Measures everything that one GPU can show, without a network, in at most 8 minutes. --quick: tests and our steps, 5.
#
#   OUT=output/gpu bench/gpu.sh [--quick]
#
# The parts run in order of worth, each with a time limit of its own. Each appends its results as JSON lines to
# $OUT/gpu.jsonl as they come, so that whatever ends the script keeps what was measured; logs are beside it, at most
# seven files in all. `python -m bench.gpu page $OUT/gpu.jsonl` brings them into bench/gpu.json and the documents.
# DEVICE=cpu tries it on small nets.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-output/gpu} PYTHONPATH=. HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/dlip_compiled}
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
  printf '{"part": "ended", "name": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" "$((SECONDS - before))" "$limit" >>"$OUT/gpu.jsonl"
  tail -n 4 "$OUT/$name.log"
}

measure() {
  part "$1" "$2" $python -m bench.gpu "${@:3}" --device "$device" --out "$OUT/gpu.jsonl"
}

part tests 100 $python -m pytest -v -o addopts= -p no:cacheprovider tests/test_gpu.py
measure compiled 140 step compiled
measure eager 45 step eager
if [ -z "$quick" ]; then
  measure original 75 step original eager compiled --terms original --rounds 4
  measure inference 65 inference
  measure largest_batch 55 largest
fi
echo "$((SECONDS - started)) s; results in $OUT/gpu.jsonl"
