#!/usr/bin/env bash
# A visit to a machine with a GPU that measures, once `python -m bench.first_light` has found it correct: how near is
# decoding to what the memory allows, what do the methods gain, how fast is it beside transformers and vLLM? In under
# eight minutes on an H100, without a network.
#
#   bench/gpu.sh [FOLDER]        results go to FOLDER (default: gpu-results); the last lines are the summary
#
# FOLDER gets summary.txt and results.tar.gz, which after each part has all that was measured so far: logs, journals and
# JSON, and of a part that was stopped the journal of its finished cells. Other files are of the part in progress.
# PYTHON: the interpreter that has this project (default: python3). SPECDEC_VLLM_PYTHON: one that has vLLM, if another.
# BUDGET: seconds for all parts (default: 450; without a GPU 1500). PARTS: those to run, spaces between (default: all).
# GRACE: seconds between the interrupt that ends a part at its limit and its death (default: 20).
# The default pair needs SPECDEC_CACHE with what `pytest bench/` left there on another machine, or the pieces of
# `python -m bench.first_light --pack` in the folder SPECDEC_FIRST_LIGHT_WEIGHTS; where it is not there it is left out.
# Without a GPU all runs scaled down, in minutes. A part that fails keeps no other from running; the status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

keep() { # what there is so far, replaced in one step
  tar -czf "$out/results.tar.gz.new" --exclude='*.lock' -C "$work" . && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}

part() { # NAME SECONDS COMMAND...: the output goes to a log and, at its end, to the screen
  local name=$1 seconds=$2 start=$SECONDS left=$((budget - SECONDS))
  shift 2
  [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return
  printf '\n== %s: %s\n' "$name" "$*"
  if [ "$left" -lt 15 ]; then
    failed+=("$name: no time was left")
    return
  fi
  # an interrupt, upon which pytest still writes what it has
  ((seconds < left)) || seconds=$left
  timeout --signal=INT --kill-after="${GRACE:-20}" "$seconds" "$@" >"$work/$name.log" 2>&1 || failed+=("$name")
  tail -n 60 "$work/$name.log"
  printf -- '-- %s took %d s\n' "$name" $((SECONDS - start))
  keep
}

measure() { # NAME SECONDS OPTIONS...: a run of the benchmark
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
# random weights and prescribed acceptance: what the shapes cost, and whether the prediction holds
shape+=("${smoke[@]}" --gammas 2,4 --synthetic-acceptance-rates 0.75,0.6,0.5,0.4)

measure roofline "$limit" bench/cost_sweep.py "${sweep[@]}" -k "width or context or batch"
measure roofline-135m "$limit" bench/cost_sweep.py "${sweep_small[@]}" -k "width or context or batch"
measure shapes "$limit" "${shape[@]}" --engines specdec --methods autoregressive,draft_model,eagle,hybrid,ngram
measure transformers "$limit" "${smoke[@]}" "${plain[@]}" --engines specdec,transformers --methods autoregressive
if "$python" -m bench.first_light.real; then
  measure pair "$limit" bench/ --engines specdec,transformers --gammas 4 "${real[@]}" \
    --methods autoregressive,ngram,draft_model,eagle,hybrid
  measure load "$limit" bench/ --engines specdec --methods autoregressive,hybrid --gammas 4 "${load[@]}"
fi
part correctness "$limit" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "not default_pair"
if [ -n "${SPECDEC_VLLM_PYTHON:-}" ] || "$python" -c 'import vllm' 2>/dev/null; then  # last: its starts take minutes
  measure shapes-vllm $((2 * limit)) "${shape[@]}" --engines specdec,vllm --methods autoregressive,draft_model
fi

printf '\n== summary\n'
{
  for journal in "$work"/*.jsonl; do  # a run that was stopped may have no JSON
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
