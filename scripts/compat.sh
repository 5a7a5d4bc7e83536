#!/usr/bin/env bash
# Runs the diffusers adapters' tests with several versions of diffusers, each in its own environment.
#   scripts/compat.sh [FOLDER] [VERSION...]   FOLDER: keeps the environments, default build/compat; VERSION: default all
# Packages that do not depend on the diffusers version come from constraints.txt. Only pip uses the network.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/compat}
shift || true
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.36.0 0.38.0 0.42.1)
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg

# A transformers of the same period, with the libraries that it needs.
transformers() {
  case $1 in
    0.42.*) echo "transformers==5.23.0" ;;
    *) echo "transformers==4.57.6 huggingface_hub<1 tokenizers<0.23" ;;
  esac
}

mkdir -p "$folder"
failed=()
for version in "${versions[@]}"; do
  printf '\n== diffusers %s\n' "$version"
  venv=$folder/diffusers-$version
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  grep -v -E '^(diffusers|transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt > "$venv/constraints.txt"
  read -r -a tied <<< "$(transformers "$version")"
  "$venv/bin/python" -m pip install --quiet -c "$venv/constraints.txt" "diffusers==$version" "${tied[@]}" \
    torch triton accelerate einops numpy safetensors pillow matplotlib pytest hypothesis
  "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/models tests/api tests/sampler \
    tests/micro/test_pipelines.py tests/micro/test_evaluation.py \
    tests/kernels/test_diffusers_backend.py \
    || failed+=("$version")
done

if [ ${#failed[@]} -gt 0 ]; then
  printf '\n== failed with diffusers: %s\n' "${failed[*]}"
  exit 1
fi
printf '\n== passed with diffusers: %s\n' "${versions[*]}"
