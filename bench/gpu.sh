#!/usr/bin/env bash
# Benchmarks on a GPU machine, in under eight minutes on an H100, without network: bandwidth utilization of decode steps,
# speedup of the methods, comparison with transformers and vLLM. Run `python -m bench.first_light` first, which checks
# that decoding is correct.
#
#   bench/gpu.sh [FOLDER]        writes results to FOLDER (default: gpu-results) and prints a summary
#
# FOLDER gets summary.txt and results.tar.gz, updated after each part: logs, journals and JSON; for an interrupted part,
# the journal of its finished cells. Other files belong to the current part.
# PYTHON: interpreter with this project (default: python3). SPECDEC_VLLM_PYTHON: interpreter with vLLM, if different.
# BUDGET: seconds for all parts (default: 450; without a GPU 1500). PARTS: parts to run, space-separated (default: all).
# GRACE: seconds between interrupting a part at its limit and killing it (default: 20).
# The default pair needs SPECDEC_CACHE with the files that `pytest bench/` downloaded on another machine, or the pieces
# of `python -m bench.first_light --pack` in the folder SPECDEC_FIRST_LIGHT_WEIGHTS; else it is skipped.
# Without a GPU everything is scaled down. If a part fails, the others still run, and the exit status is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

keep() { # replaces the archive of results atomically
  tar -czf "$out/results.tar.gz.new" --exclude='*.lock' -C "$work" . && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}

part() { # NAME SECONDS COMMAND...: logs the output and prints its end
  local name=$1 seconds=$2 start=$SECONDS left=$((budget - SECONDS))
  shift 2
  [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return
  printf '\n== %s: %s\n' "$name" "$*"
  if [ "$left" -lt 15 ]; then
    failed+=("$name: no time was left")
    return
  fi
  # SIGINT, so that pytest can write its results
  ((seconds < left)) || seconds=$left
  timeout --signal=INT --kill-after="${GRACE:-20}" "$seconds" "$@" >"$work/$name.log" 2>&1 || failed+=("$name")
  tail -n 60 "$work/$name.log"
  printf -- '-- %s took %d s\n' "$name" $((SECONDS - start))
  keep
}

measure() { # NAME SECONDS OPTIONS...: runs the benchmark
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" -m pytest -q -p no:cacheprovider "$@" \
    --journal "$work/$name.jsonl" --benchmark-json "$work/$name.json" --benchmark-quiet
}

if reason=$("$python" -c 'import sys; from bench.measure.machine import why_no_gpu; sys.exit(why_no_gpu())' 2>&1); then
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$work/gpu.csv"
  budget=${BUDGET:-450} limit=120
  tests=(tests/runtime/test_devices.py tests/runtime/test_recording.py tests/models/test_fusion.py)
  sweep=(--pairs llama-8b-1b-shape) sweep_small=(--pairs smollm2-135m-shape)
  shape=(--pairs llama-8b-1b-shape,smollm2-135m-shape --num-prompts 3 --max-tokens 64 --batch-sizes 1,3)
  plain=(--pairs smollm2-135m-shape,llama-8b-1b-shape --num-prompts 3 --max-tokens 32)
  real=(--num-prompts 8 --max-tokens 128 --batch-sizes 1,4,8)
  load=(--rate 8,64 --duration 10 --batch-sizes 32 --num-prompts 32 --max-tokens 128)
else
  echo "no GPU: everything is scaled down ($reason)"
  budget=${BUDGET:-1500} limit=600
  tests=(tests/runtime/test_devices.py)
  sweep=(--smoke) sweep_small=(--smoke)
  shape=(--pairs tiny-random --num-prompts 2 --max-tokens 8)
  plain=("${shape[@]}")
  real=(--num-prompts 2 --max-tokens 8 --batch-sizes 1,2)
  load=(--rate 2 --duration 2 --batch-sizes 2 --num-prompts 2 --max-tokens 8)
fi
smoke=(bench/ --workloads bench/catalogue/models/tiny/smoke.txt)
# random weights and prescribed acceptance rates: measures step costs and checks the predicted speedup
shape+=("${smoke[@]}" --gammas 2,4 --synthetic-acceptance-rates 0.75,0.6,0.5,0.4)

measure roofline "$limit" bench/cost_sweep.py "${sweep[@]}" -k "width or context or batch"
measure roofline-135m "$limit" bench/cost_sweep.py "${sweep_small[@]}" -k "width or context or batch"
measure shapes "$limit" "${shape[@]}" --engines specdec --methods autoregressive,draft_model,eagle,hybrid,ngram
measure transformers "$limit" "${smoke[@]}" "${plain[@]}" --engines specdec,transformers --methods autoregressive
if "$python" -m bench.first_light.pieces; then
  measure pair "$limit" bench/ --engines specdec,transformers --gammas 4 "${real[@]}" \
    --methods autoregressive,ngram,draft_model,eagle,hybrid
  measure load "$limit" bench/ --engines specdec --methods autoregressive,hybrid --gammas 4 "${load[@]}"
fi
part correctness "$limit" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "not default_pair"
if [ -n "${SPECDEC_VLLM_PYTHON:-}" ] || "$python" -c 'import vllm' 2>/dev/null; then  # last, because vLLM takes minutes to start
  measure shapes-vllm $((2 * limit)) "${shape[@]}" --engines specdec,vllm --methods autoregressive,draft_model
fi

printf '\n== summary\n'
{
  for journal in "$work"/*.jsonl; do  # an interrupted run may have no JSON
    [ -e "$journal" ] || continue
    result=${journal%l}
    [ -s "$result" ] || result=$journal
    printf '\n%s\n' "$(basename "$result")"
    "$python" -m bench.report "$result" || failed+=("report of $(basename "$result")")
  done
  printf '\n%d s; failed: %s\n' "$SECONDS" "${failed[*]:-nothing}"
} >"$out/summary.txt" 2>&1
cat "$out/summary.txt"
cp "$out/summary.txt" "$work" && keep
[ ${#failed[@]} -eq 0 ]
