#!/usr/bin/env bash
# Runs on a GPU machine what only a GPU can show, each part well within 9 minutes.
#   benchmarks/gpu.sh [--out FOLDER] [--part tests|compile|kernels|micro|forecast|real|caches|steps|train]... [--dry]
# Default: tests, compile, kernels and micro. --dry prints the commands and runs nothing.
#
#   tests     the kernels' tests compiled, bf16 included, and compute-sanitizer where it is installed
#   compile   every shipped configuration of every kernel, for sm_80, sm_90 and sm_100; needs no GPU
#   kernels   every kernel against its peers, with the machine's own ceilings
#   micro     the embedded editor: quality of every preset on 64 tasks, and clock against FLOPs
#   forecast  temporal caches alone and with SpecEdit on the embedded editor, 64 tasks; goes on where it was stopped
#   real      FLUX.1-Kontext and Qwen-Image-Edit at full size, stock against SpecEdit, for 8 minutes; a later run goes on
#             where FOLDER/end_to_end-real.json ends. REAL holds more arguments of benchmarks/end_to_end.py; all cases
#             are hours, and REAL="--model flux-kontext --size 1024x1024 --batch 1 --preset turbo --shape blob" is a start
#   caches    FLUX.1-Kontext at full size: temporal caches alone (N = 6 and 9) and with SpecEdit, and few-step presets,
#             into FOLDER/end_to_end-real-caches.json, for 8 minutes; a later run goes on where that ends. LESA is left
#             out: nobody has trained its predictor on the full model
#   steps     one step of their transformers against the number of tokens, into FOLDER/transformer-real.json
#   train     goes on training the embedded editor for TRAIN_MINUTES (default 7); its weights land in FOLDER/editor.tar.*
#
# JSON goes to FOLDER (default benchmarks/results). Uses the python3 on the PATH and whatever torch and Triton it has.
set -euo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results
parts=()
dry=
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --part) parts+=("$2"); shift 2 ;;
    --dry) dry=1; shift ;;
    *) echo "gpu.sh: expected --out FOLDER, --part NAME or --dry, got $1" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests compile kernels micro)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 MPLBACKEND=Agg
[ -n "$dry" ] || mkdir -p "$out"

# at_most SECONDS COMMAND...: one step of a part, ended if it takes longer.
at_most() {
  if [ -n "$dry" ]; then
    echo "timeout $*"
  else
    timeout "$@"
  fi
}

[ -n "$dry" ] || python3 -c 'import torch; assert torch.cuda.is_available(), "gpu.sh: expected a CUDA GPU, found none"'

run_tests() {
  local failed=0 tool
  at_most 340 python3 -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/test_interpreter.py || failed=1
  if [ -z "$dry" ] && ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not installed: memcheck and racecheck left out"
    return $failed
  fi
  for tool in memcheck racecheck; do
    # Without PyTorch's cache every tensor is an allocation of its own, whose end the sanitizer knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 at_most 95 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py -k every_kernel_once || failed=1
  done
  return $failed
}

run_compile() {
  at_most 530 python3 -m specedit_kernels.compile_check
}

run_kernels() {
  at_most 500 python3 -m pytest -q -p no:cacheprovider benchmarks/test_attention.py benchmarks/test_tokens.py \
    benchmarks/test_block_attention.py benchmarks/test_weighted_sum.py --benchmark-disable-gc --results "$out/kernels.json"
}

run_micro() {
  local failed=0
  at_most 120 python3 -m specedit.cli bench --size 512 --repeat 5 --json "$out/end_to_end-micro-gpu.json" || failed=1
  at_most 380 python3 -m benchmarks.quality --cases 64 --size 512 --out "$out/quality-512-gpu.json" || failed=1
  return $failed
}

# shellcheck disable=SC2086 # REAL is a list of arguments
run_real() {
  at_most 530 python3 -m benchmarks.end_to_end --minutes 8 --json "$out/end_to_end-real.json" ${REAL:-}
}

run_caches() {
  local json="$out/end_to_end-real-caches.json" failed=0 name n given=(--changes "")
  for name in reuse taylor hermite foca freqca toca duca; do
    for n in 6 9; do given+=(--changes "steps=(0,0,50) forecast='$name' forecast_interval=$n"); done
  done
  for name in taylor hermite; do given+=(--changes "forecast='$name' forecast_interval=3 forecast_order=1"); done
  given+=(--changes "forecast='foca' forecast_interval=3")
  local common=(--model flux-kontext --size 1024x1024 --batch 1 --execution eager --share 20 --shape blob --json "$json")
  at_most 400 python3 -m benchmarks.end_to_end --minutes 6 "${common[@]}" --preset balanced --restore full \
    "${given[@]}" || failed=1
  at_most 130 python3 -m benchmarks.end_to_end --minutes 1.5 "${common[@]}" --preset lightning-8 --preset lightning-6 \
    --restore reference || failed=1
  return $failed
}

# shellcheck disable=SC2086
run_steps() {
  at_most 530 python3 -m benchmarks.end_to_end --part transformer --batch 1 --minutes 8 \
    --json "$out/transformer-real.json" ${REAL:-}
}

run_forecast() {
  at_most 530 python3 -m benchmarks.forecast --cases 64 --size 512 --resume --out "$out/forecast-512-gpu.json"
}

run_train() {
  local scratch
  scratch=$(mktemp -d)
  at_most 530 python3 -m training.micro.train --out "$scratch" --start specedit/micro/weights/kontext \
    --probe-minutes 0.5 --minutes "${TRAIN_MINUTES:-7}" --batch-scale 8 --device cuda
  [ -z "$dry" ] || return 0
  cp "$scratch/log.json" "$out/train-log.json"
  # In pieces, because machines that are lent often hand back small files only: cat editor.tar.* | tar -x
  tar -C "$scratch" -c editor | split -b 12m - "$out/editor.tar."
}

failed=()
for part in "${parts[@]}"; do
  case $part in
    # A part in a process of its own, stopped by its first failure, does not stop the parts behind it.
    tests | compile | kernels | micro | forecast | real | caches | steps | train) printf '\n== %s\n' "$part"
      (set -e; "run_$part") &
      wait $! || failed+=("$part") ;;
    *) echo "gpu.sh: expected a part named tests, compile, kernels, micro, forecast, real, caches, steps or train, got $part" >&2; exit 2 ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf '\n== failed: %s\n' "${failed[*]}"
  exit 1
fi
