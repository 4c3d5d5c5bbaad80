#!/usr/bin/env bash
# Sets up an environment of its own in .venv and runs every check: formatting, lint, types, import direction, tests.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "test.sh: needs Python 3.11 or newer; PYTHON=... names one" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
export OMP_NUM_THREADS=1  # two threads on two shared cores are slower than one
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
