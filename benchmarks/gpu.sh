#!/usr/bin/env bash
# Runs on a GPU machine what only a GPU can show, each part well within 9 minutes.
#   benchmarks/gpu.sh [--out FOLDER] [--part tests|kernels|micro|forecast|train]...     default: tests, kernels and micro
#
#   tests     the kernels' tests compiled, bf16 included, and compute-sanitizer where it is installed
#   kernels   every kernel against its peers, with the machine's own ceilings
#   micro     the embedded editor: quality of every preset on 64 tasks, and clock against FLOPs
#   forecast  temporal caches alone and with SpecEdit on the embedded editor, 64 tasks; goes on where it was stopped
#   train     goes on training the embedded editor for TRAIN_MINUTES (default 7); its weights land in FOLDER/editor.tar.*
#
# JSON goes to FOLDER (default benchmarks/results). Uses the python3 on the PATH and whatever torch and Triton it has.
set -euo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results
parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --part) parts+=("$2"); shift 2 ;;
    *) echo "gpu.sh: expected --out FOLDER or --part NAME, got $1" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels micro)
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 MPLBACKEND=Agg
python3 -c 'import torch; assert torch.cuda.is_available(), "gpu.sh: expected a CUDA GPU, found none"'

run_tests() {
  timeout 400 python3 -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/test_interpreter.py
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 -m pytest -q -p no:cacheprovider tests/kernels/test_attention.py -k "test_packed and triton" -x
    done
  fi
}

run_kernels() {
  timeout 500 python3 -m pytest -q -p no:cacheprovider benchmarks/test_attention.py benchmarks/test_tokens.py \
    benchmarks/test_weighted_sum.py --benchmark-disable-gc --results "$out/kernels.json"
}

run_micro() {
  timeout 120 python3 -m specedit.cli bench --size 512 --repeat 5 --json "$out/end_to_end-micro-gpu.json"
  timeout 380 python3 benchmarks/quality.py --cases 64 --size 512 --out "$out/quality-512-gpu.json"
}

run_forecast() {
  timeout 530 python3 benchmarks/forecast.py --cases 64 --size 512 --resume --out "$out/forecast-512-gpu.json"
}

run_train() {
  local scratch
  scratch=$(mktemp -d)
  timeout 530 python3 -m specedit.micro.train --out "$scratch" --start specedit/micro/weights/kontext \
    --text-minutes 0.7 --minutes "${TRAIN_MINUTES:-7}" --batch-scale 8 --device cuda
  cp "$scratch/log.json" "$out/train-log.json"
  # In pieces, because machines that are lent often hand back small files only: cat editor.tar.* | tar -x
  tar -C "$scratch" -c editor | split -b 12m - "$out/editor.tar."
}

for part in "${parts[@]}"; do
  case $part in
    tests | kernels | micro | forecast | train) printf '\n== %s\n' "$part"; "run_$part" ;;
    *) echo "gpu.sh: expected a part named tests, kernels, micro, forecast or train, got $part" >&2; exit 2 ;;
  esac
done
