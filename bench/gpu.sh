#!/usr/bin/env bash
# One visit to a machine with a GPU: is decoding correct there, how near is it to what the memory allows, and how fast
# is it beside transformers and vLLM? In under eight minutes on an H100, without a network.
#
#   bench/gpu.sh [FOLDER]        results go to FOLDER (default: gpu-results); the last lines are the summary
#
# PYTHON: the interpreter that has this project (default: python3). SPECDEC_VLLM_PYTHON: one that has vLLM, if another.
# The default pair and its prompts need SPECDEC_CACHE with what `pytest bench/` left there on another machine, or pip's
# PIP_FIND_LINKS and PIP_NO_INDEX with the wheels that they are in. Without a GPU all runs scaled down, in minutes.
# A part that fails does not keep the others from running; the exit status then is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
failed=()

part() { # NAME SECONDS COMMAND...: the output goes to a log and, at its end, to the screen
  local name=$1 seconds=$2 start=$SECONDS left=$((budget - SECONDS))
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  if [ "$left" -lt 10 ]; then
    failed+=("$name: no time was left")
    return
  fi
  timeout --kill-after=10 $((seconds < left ? seconds : left)) "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 40 "$out/$name.log"
  printf -- '-- %s took %d s\n' "$name" $((SECONDS - start))
}

measure() { # NAME SECONDS OPTIONS...: a run of the benchmark
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" -m pytest -q -p no:cacheprovider "$@" \
    --journal "$out/$name.jsonl" --benchmark-json "$out/$name.json" --benchmark-quiet
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$out/gpu.csv"
  budget=450 limit=120 batches=(4 16)
  sweep=(--pairs llama-8b-1b-shape)
  shape=(--pairs llama-8b-1b-shape --num-prompts 3 --max-tokens 64)
  real=(--num-prompts 8 --max-tokens 128)
  load=(--rate 8,64 --duration 10 --batch-sizes 32 --num-prompts 32 --max-tokens 128)
else
  echo "no GPU: everything is scaled down"
  budget=1500 limit=600 batches=(2)
  sweep=(--smoke)
  shape=(--pairs tiny-random --num-prompts 2 --max-tokens 8)
  real=(--num-prompts 2 --max-tokens 8)
  load=(--rate 2 --duration 2 --batch-sizes 2 --num-prompts 2 --max-tokens 8)
fi
# random weights and prescribed acceptance: what the shapes cost, and whether the prediction holds
shape+=(bench/ --workloads bench/tiny/smoke.txt --methods autoregressive,draft_model --gammas 2,4
  --synthetic-acceptance-rates 0.8,0.65,0.5,0.4)

part correctness "$limit" "$python" -m pytest -q -p no:cacheprovider tests/test_devices.py tests/test_recording.py \
  tests/models/test_fusion.py
measure roofline "$limit" bench/cost_sweep.py "${sweep[@]}" -k "width or context or batch"
measure shapes "$limit" "${shape[@]}" --engines specdec
measure pair "$limit" bench/ --engines specdec,transformers --gammas 4 "${real[@]}" \
  --methods autoregressive,ngram,draft_model,eagle,hybrid
for batch in "${batches[@]}"; do
  measure "pair-batch-$batch" "$limit" bench/ --engines specdec --methods autoregressive,ngram,hybrid --gammas 4 \
    "${real[@]}" --num-prompts "$batch" --batch-sizes "$batch"
done
measure load "$limit" bench/ --engines specdec --methods autoregressive,hybrid --gammas 4 "${load[@]}"
if [ -n "${SPECDEC_VLLM_PYTHON:-}" ] || "$python" -c 'import vllm' 2>/dev/null; then  # last: its starts take minutes
  measure pair-vllm $((2 * limit)) bench/ --engines specdec,vllm --methods autoregressive,ngram --gammas 4 "${real[@]}"
  measure shapes-vllm $((2 * limit)) "${shape[@]}" --engines specdec,vllm --gammas 4
fi

printf '\n== summary\n'
{
  for result in "$out"/*.json; do
    printf '\n%s\n' "$(basename "$result")"
    "$python" -m bench.report "$result" --plots "$out/plots" || failed+=("report of $result")
  done
  printf '\n%d s; failed: %s\n' "$SECONDS" "${failed[*]:-nothing}"
} 2>&1 | tee "$out/summary.txt"
[ ${#failed[@]} -eq 0 ]
