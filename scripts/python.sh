# Sourced from the repository root: sets PYTHON, unless the caller has, to the virtual environment that
# scripts/quickstart.sh and scripts/test.sh make (VENV, else .venv), or without one to the `python` on PATH.

PYTHON="${PYTHON:-${VENV:-$PWD/.venv}/bin/python}"
if ! command -v "$PYTHON" >/dev/null; then PYTHON=python; fi
export PYTHON
