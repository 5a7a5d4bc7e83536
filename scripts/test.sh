#!/usr/bin/env bash
# Installs the package with pinned versions into a virtual environment, and runs every check.
#   scripts/test.sh [VENV]     VENV: made when missing, default .venv
# PYTHON is the interpreter that creates it (default python3.11, with which the versions were recorded, else python3).
# Only pip uses the network. The kernels are compiled with the pinned Triton and with the oldest supported one, which pip
# puts into a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest_triton=3.6.0
venv=${1:-.venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

step() { printf '\n== %s\n' "$1"; }

step "install"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
venv=$(cd "$venv" && pwd)
"$venv/bin/python" -m pip install --quiet -c constraints.txt ".[test,docs]"
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg

step "ruff"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .

step "types"
"$venv/bin/mypy"

step "documentation"
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet --site-dir "$scratch/site"

step "tests (kernels on a CPU run in Triton's interpreter)"
# Each test runs on one thread, up to four at a time.
cores=$(nproc)
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q --durations 12 -n $((cores < 4 ? cores : 4)) --dist worksteal

# The next checks run outside the checkout, so that they use the installed package and its data files.
cd "$scratch"
step "kernels compile without a GPU"
"$venv/bin/python" -m specedit_kernels.compile_check

step "kernels compile with Triton $oldest_triton, the oldest supported"
"$venv/bin/python" -m pip install --quiet --no-deps --target "$scratch/oldest-triton" "triton==$oldest_triton"
PYTHONPATH=$scratch/oldest-triton "$venv/bin/python" -m specedit_kernels.compile_check

step "demo, small"
"$venv/bin/specedit" demo --size 256 --out "$scratch/demo"
ls "$scratch/demo"
step "all checks passed"
