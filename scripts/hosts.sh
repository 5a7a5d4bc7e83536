#!/usr/bin/env bash
# Tests the plugins for sglang and vLLM-Omni against the modules of their released wheels, unmodified.
#   scripts/hosts.sh [FOLDER]   FOLDER: keeps the wheels and what is unpacked, default build/hosts
# VENV names the environment with SpecEdit and its test packages, default .venv. The wheels come without their
# dependencies, which are CUDA builds: small ones are installed beside them, all others are stubs (tests/integrations/
# released.py), and are named at the end. Only pip uses the network. Exits with 1 if a test fails.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/hosts}
python=${VENV:-.venv}/bin/python
sglang=0.5.23
vllm=0.33.0
vllm_omni=0.30.0
packages=(msgspec pybase64 aenum cbor2 xxhash nvidia-ml-py orjson setproctitle cachetools cloudpickle dill prometheus_client)
export PYTHONPATH=. HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

mkdir -p "$folder/wheels"
folder=$(cd "$folder" && pwd)

# unpack NAME VERSION: download a wheel, unless it is there, and unpack its Python code.
unpack() {
  local name=$1 version=$2 wheel
  wheel=$(find "$folder/wheels" -name "$name-$version-*.whl" | head -n 1)
  if [ -z "$wheel" ]; then
    "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$folder/wheels" "$name==$version"
    wheel=$(find "$folder/wheels" -name "$name-$version-*.whl" | head -n 1)
  fi
  [ -d "$folder/$name" ] || "$python" - "$wheel" "$folder/$name" << 'PYTHON'
import sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:  # shared objects are what needs CUDA
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if not name.endswith(".so")])
PYTHON
}

unpack sglang "$sglang"
unpack vllm "$vllm"
unpack vllm_omni "$vllm_omni"
[ -d "$folder/packages" ] || "$python" -m pip install --quiet --no-deps --target "$folder/packages" "${packages[@]}"

failed=()
for host in sglang omni; do
  [ "$host" = sglang ] && what="sglang $sglang" || what="vLLM-Omni $vllm_omni, with vLLM $vllm"
  printf '\n== %s\n' "$what"
  # One process a server: the stubs of one are no modules of the other.
  SPECEDIT_HOSTS=$folder "$python" -m pytest -q -p no:cacheprovider -n 0 -rA --no-header \
    tests/integrations/test_servers.py -k "$host" > "$folder/$host.log" 2>&1 || failed+=("$what")
  grep -E '^(PASSED|FAILED|ERROR|E  |Stubs)|[0-9]+ (passed|failed)' "$folder/$host.log" || tail -n 20 "$folder/$host.log"
done

if [ ${#failed[@]} -gt 0 ]; then
  printf '\n== failed: %s\n' "${failed[*]}"
  exit 1
fi
printf '\n== passed: sglang %s, vLLM-Omni %s\n' "$sglang" "$vllm_omni"
