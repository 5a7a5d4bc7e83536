#!/usr/bin/env bash
# Runs on a GPU machine what only a GPU can show, each part well within 9 minutes.
#   benchmarks/gpu.sh [--out FOLDER] [--part NAME]... [--again] [--dry]
# Without --part: doctor, tests, tune, kernels, flux, qwen, klein, steps, caches and train, in this order. A part that is
# complete is left out the next time (FOLDER/gpu-done lists them), unless --part names it or --again is given; one that
# measures for longer than its minutes goes on where it stopped. So the same command, repeated, does all of it.
# --dry runs every line without a GPU, on the fake driver (benchmarks/dry_gpu) and at tiny sizes, to show that it runs.
#
#   doctor    every kernel checked, the providers timed, and what attention="auto" takes
#   tests     the kernels' tests compiled, bf16 included, and compute-sanitizer where it is installed
#   tune      launch parameters for this GPU, into specedit_kernels/gpu/configs and FOLDER
#   kernels   every kernel against its peers, with the machine's own ceilings
#   flux      FLUX.1-Kontext at full size, turbo with both restores at 10 and 20 % edited, against the faster stock
#   qwen      Qwen-Image-Edit likewise
#   klein     FLUX.2-klein-4B, distilled to 4 steps, with the preset few-4
#   steps     one step of their transformers against the number of tokens
#   caches    FLUX.1-Kontext: temporal caches alone (N = 6 and 9) and with SpecEdit, and few-step presets. LESA is left
#             out: nobody has trained its predictor on the full model
#   train     goes on training the embedded editor for TRAIN_MINUTES (default 7); its weights land in FOLDER/editor.tar.*
# By name only:
#   compile   every shipped configuration of every kernel, for sm_80, sm_90 and sm_100; needs no GPU
#   micro     the embedded editor: quality of every preset on 64 tasks, and clock against FLOPs
#   forecast  temporal caches alone and with SpecEdit on the embedded editor, 64 tasks
#   methods   every method, cache and preset on the embedded editor, 64 tasks and 16 textures, with peak memory
#   real      everything of benchmarks/end_to_end.py, hours of it; REAL holds more of its arguments
#
# JSON goes to FOLDER (default benchmarks/results). Uses the python3 on the PATH and whatever torch and Triton it has.
set -euo pipefail
cd "$(dirname "$0")/.."
known=" doctor tests tune kernels flux qwen klein steps caches train compile micro forecast methods real "
out=benchmarks/results
parts=()
again=
dry=
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --part) parts+=("$2"); shift 2 ;;
    --again) again=1; shift ;;
    --dry) dry=1; shift ;;
    *) echo "gpu.sh: expected --out FOLDER, --part NAME, --again or --dry, got $1" >&2; exit 2 ;;
  esac
done
for part in "${parts[@]}"; do
  [[ $known == *" $part "* ]] || { echo "gpu.sh: expected a part among$known, got $part" >&2; exit 2; }
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
finished="$out/gpu-done"
if [ ${#parts[@]} -eq 0 ]; then
  for part in doctor tests tune kernels flux qwen klein steps caches train; do
    if [ -n "$again" ] || ! grep -qx "$part" "$finished" 2> /dev/null; then parts+=("$part"); fi
  done
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 MPLBACKEND=Agg
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
UNFINISHED=75 # a part that goes on the next time

# if_dry WORDS -- WORDS: the first words in a dry run, else those after the dashes; for arguments that differ.
if_dry() {
  local word seen=
  chosen=()
  for word in "$@"; do
    if [ "$word" = -- ] && [ -z "$seen" ]; then
      seen=1
    elif { [ -n "$dry" ] && [ -z "$seen" ]; } || { [ -z "$dry" ] && [ -n "$seen" ]; }; then
      chosen+=("$word")
    fi
  done
}

if [ -n "$dry" ]; then
  # Stands for compute-sanitizer: checks its options and runs the command, which is the same for each tool, once.
  mkdir "$scratch/bin"
  cat > "$scratch/bin/compute-sanitizer" << 'SANITIZER'
#!/usr/bin/env bash
[[ "$1 $2 $3 $4" =~ ^--tool\ (memcheck|racecheck)\ --error-exitcode\ 9$ ]] || exit 3
[ "$2" = memcheck ] || exec "${@:5}"
SANITIZER
  chmod +x "$scratch/bin/compute-sanitizer"
  PATH=$scratch/bin:$PATH
else
  python3 -c 'import torch; assert torch.cuda.is_available(), "gpu.sh: expected a CUDA GPU, found none"'
fi

run_doctor() {
  if_dry --no-interpreter --
  timeout 300 python3 -m specedit.cli doctor "${chosen[@]}"
  timeout 200 python3 -m specedit.cli doctor --json "${chosen[@]}" > "$out/doctor.json"
}

run_tests() {
  local failed=0 tool
  if_dry tests/kernels/test_weighted_sum.py -- tests/kernels --ignore tests/kernels/test_interpreter.py
  export SPECEDIT_KERNELS_SELF_CHECK=0 # the tests themselves say what is wrong
  timeout 340 python3 -m pytest -q -p no:cacheprovider "${chosen[@]}" || failed=1
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not installed: racecheck and memcheck left out"
    return $failed
  fi
  for tool in racecheck memcheck; do
    # Without PyTorch's cache every tensor is an allocation of its own, whose end the sanitizer knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 95 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py -k every_kernel_once || failed=1
  done
  return $failed
}

run_tune() {
  # shellcheck disable=SC2016 # the name is Python's
  local name='import torch; from specedit_kernels.gpu import launch; print(launch.config_file_name(torch.cuda.get_device_name()))'
  if_dry benchmarks.dry_gpu.tune --out "$out/tuned-dry.json" -- specedit_kernels.tune
  timeout 530 python3 -m "${chosen[@]}"
  [ -n "$dry" ] || cp "specedit_kernels/gpu/configs/$(python3 -c "$name")" "$out/"
}

run_kernels() {
  if_dry benchmarks/test_weighted_sum.py benchmarks/test_attention.py -k "weighted_sum or draft" -- \
    benchmarks/test_attention.py benchmarks/test_tokens.py benchmarks/test_block_attention.py benchmarks/test_weighted_sum.py
  timeout 530 python3 -m pytest -q -p no:cacheprovider "${chosen[@]}" --benchmark-disable-gc --results "$out/kernels.json"
}

# measure SECONDS ARGUMENTS...: benchmarks.end_to_end, which goes on where its file ends.
measure() {
  local seconds=$1 code=0
  shift
  if_dry --tiny --repeat 1 --size 128x128 -- --size 1024x1024
  timeout "$seconds" python3 -m benchmarks.end_to_end --batch 1 "${chosen[@]}" "$@" | tee "$scratch/log" || code=$?
  [ $code = 0 ] || return $code
  ! grep -q "run the same command again" "$scratch/log" || return $UNFINISHED
}

# scored SECONDS MODULE ARGUMENTS...: a table of benchmarks.scores, which goes on where its file ends.
scored() {
  local code=0
  timeout "$1" python3 -m "${@:2}" --resume || code=$?
  [ $code != 124 ] || return $UNFINISHED # what timeout says when the time is over
  return $code
}

turbo=(--preset turbo --restore full --restore reference --share 10 --share 20 --shape blob)

# Stock eager and compiled; the faster one is the baseline.
run_flux() {
  if_dry --execution eager -- --execution eager --execution compiled
  measure 530 --minutes 8 --model flux-kontext "${chosen[@]}" "${turbo[@]}" --json "$out/end_to_end-real-flux.json"
}

run_qwen() {
  if_dry --execution eager -- --execution eager --execution compiled
  measure 530 --minutes 8 --model qwen-image-edit "${chosen[@]}" "${turbo[@]}" --json "$out/end_to_end-real-qwen.json"
}

run_klein() {
  measure 530 --minutes 8 --model flux2-klein-4b --stock-steps 4 --execution eager --preset few-4 --restore reference \
    --share 10 --share 20 --shape blob --json "$out/end_to_end-real-klein.json"
}

run_steps() {
  if_dry --execution eager --model flux-kontext --
  measure 530 --part transformer --minutes 8 "${chosen[@]}" --json "$out/transformer-real.json"
}

run_caches() {
  local json="$out/end_to_end-real-caches.json" code=0 left=0 name n given=(--changes "")
  if_dry taylor -- reuse taylor hermite foca freqca toca duca
  for name in "${chosen[@]}"; do
    for n in 6 9; do given+=(--changes "steps=(0,0,50) forecast='$name' forecast_interval=$n"); done
  done
  for name in taylor hermite; do given+=(--changes "forecast='$name' forecast_interval=3 forecast_order=1"); done
  given+=(--changes "forecast='foca' forecast_interval=3")
  local common=(--model flux-kontext --execution eager --share 20 --shape blob --json "$json")
  measure 400 --minutes 6 "${common[@]}" --preset balanced --restore full "${given[@]}" || left=$?
  measure 130 --minutes 1.5 "${common[@]}" --preset lightning-8 --preset lightning-6 --restore reference || code=$?
  [ $left = 0 ] || [ $code != 0 ] || code=$left
  return $code
}

run_train() {
  if_dry --steps 1 --minutes 0.02 --probe-minutes 0 --largest 64 --batch-scale 0.1 --device cpu -- \
    --minutes "${TRAIN_MINUTES:-7}" --probe-minutes 0.5 --batch-scale 8 --device cuda
  timeout 530 python3 -m training.micro.train --out "$scratch" --start specedit/micro/weights/kontext "${chosen[@]}"
  [ ! -f "$scratch/log.json" ] || cp "$scratch/log.json" "$out/train-log.json" # too few steps leave none
  # In pieces, because machines that are lent often hand back small files only: cat editor.tar.* | tar -x
  tar -C "$scratch" -c editor | split -b 12m - "$out/editor.tar."
}

run_compile() {
  if_dry --arch sm_90 --only "gather|copy_rows" --
  timeout 530 python3 -m specedit_kernels.compile_check "${chosen[@]}"
}

run_micro() {
  local code=0 left=0
  if_dry 64 1 1 -- 512 5 64
  local size=${chosen[0]} repeat=${chosen[1]} cases=${chosen[2]}
  timeout 120 python3 -m specedit.cli bench --size "$size" --repeat "$repeat" --json "$out/end_to_end-micro-gpu.json" || code=1
  if_dry --only turbo-reference --
  scored 380 benchmarks.quality --cases "$cases" --size "$size" --out "$out/quality-gpu.json" "${chosen[@]}" || left=$?
  [ $code != 0 ] || code=$left
  return $code
}

run_forecast() {
  if_dry --cases 1 --size 64 --only stock-50 -- --cases 64 --size 512
  scored 530 benchmarks.forecast "${chosen[@]}" --out "$out/forecast-gpu.json"
}

run_methods() {
  if_dry --cases 1 --size 64 --only stock-4 turbo-reference -- --cases 64 --size 512
  scored 530 benchmarks.methods "${chosen[@]}" --out "$out/methods-gpu.json"
}

# shellcheck disable=SC2086 # REAL is a list of arguments
run_real() {
  if_dry --model flux-kontext --execution eager --preset turbo --restore full --share 20 --shape blob --
  measure 530 --minutes 8 "${chosen[@]}" --json "$out/end_to_end-real.json" ${REAL:-}
}

failed=()
unfinished=()
for part in "${parts[@]}"; do
  printf '\n== %s\n' "$part"
  # A part in a process of its own, stopped by its first failure, does not stop the parts behind it.
  (trap - EXIT; set -e; "run_$part") &
  code=0
  wait $! || code=$?
  case $code in
    0) grep -qx "$part" "$finished" 2> /dev/null || echo "$part" >> "$finished" ;;
    "$UNFINISHED") unfinished+=("$part") ;;
    *) failed+=("$part") ;;
  esac
done
[ ${#unfinished[@]} -eq 0 ] || printf '\n== goes on the next time: %s\n' "${unfinished[*]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf '\n== failed: %s\n' "${failed[*]}"
  exit 1
fi
