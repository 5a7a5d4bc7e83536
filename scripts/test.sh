#!/usr/bin/env bash
# Installs the package with pinned versions into a virtual environment, and checks it.
#   scripts/test.sh [--all] [VENV]     VENV: made when missing, default .venv
# --all, as in .ci/run, adds the tests marked `thorough` and compiles every pair of a kernel's switches: for each
# architecture with the known-good Triton, and once with the oldest supported one, which pip puts into a folder of its
# own that is removed afterwards. `benchmarks/gpu.sh --part compile` compiles every configuration. PYTHON names the
# interpreter that makes VENV (default python3.11, which the known-good set was recorded with, else python3). Only pip
# uses the network. The checks run beside the tests and are shown when the tests have ended. mypy is run by a test.
set -euo pipefail
set -m # each check has a process group of its own, which ends with this script
cd "$(dirname "$0")/.."

oldest_triton=3.6.0
all=
[ "${1:-}" != --all ] || { all=yes; shift; }
venv=${1:-.venv}
[ $# -le 1 ] && [[ $venv != -* ]] || { echo "usage: scripts/test.sh [--all] [VENV]" >&2; exit 2; }
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
scratch=$(mktemp -d)
checks=()
trap 'for check in "${checks[@]}"; do kill -- "-${check%%:*}" 2>/dev/null || true; done; rm -rf "$scratch"' EXIT

step() { printf '\n== %s\n' "$1"; }

# beside TITLE COMMAND...: run it in the background, away from the checkout: it sees the installed package and its data.
beside() {
    local title=$1
    shift
    local number=${#checks[@]}
    (cd "$scratch" && "$@") >"$scratch/$number.log" 2>&1 &
    checks+=("$!:$title")
}

# Wait for every check, show its output, and fail if one failed.
finish() {
    local number status failed=0
    for number in "${!checks[@]}"; do
        status=0
        wait "${checks[$number]%%:*}" || status=$?
        step "${checks[$number]#*:}"
        cat "$scratch/$number.log"
        [ "$status" = 0 ] || { echo "failed with exit code $status"; failed=1; }
    done
    checks=()
    return "$failed"
}

compile_with_the_oldest_triton() {
    "$venv/bin/python" -m pip install --quiet --no-deps --target "$scratch/oldest-triton" "triton==$oldest_triton" &&
        PYTHONPATH=$scratch/oldest-triton "$venv/bin/python" -m specedit_kernels.compile_check --pairwise-archs --jobs 1
}

step "install"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
venv=$(cd "$venv" && pwd)
"$venv/bin/python" -m pip install --quiet -c constraints.txt ".[test,docs]"
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # else each of many processes compiles every file anew

beside "ruff" "$venv/bin/ruff" check "$PWD"
beside "formatting" "$venv/bin/ruff" format --check "$PWD"
if [ "$all" ]; then
    beside "kernels compile without a GPU" "$venv/bin/python" -m specedit_kernels.compile_check --pairwise --jobs 1
    beside "kernels compile with Triton $oldest_triton, the oldest supported" compile_with_the_oldest_triton
fi
beside "demo, small" "$venv/bin/specedit" demo --size 128 --preset few-4 --out demo

step "tests (kernels on a CPU run in Triton's interpreter)"
# Up to four at a time, each on one thread (tests/conftest.py).
failed=0
chosen=()
[ "$all" ] || chosen=(-m "not thorough")
"$venv/bin/python" -m pytest -q --durations 12 "${chosen[@]}" || failed=1
finish || failed=1
[ "$failed" = 0 ] && step "all checks passed"
