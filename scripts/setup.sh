# Sourced by scripts/quickstart.sh and scripts/test.sh: goes to the repository root, makes sure that a virtual
# environment with the pinned packages exists, and sets PYTHON. Installs only when requirements.txt or pyproject.toml
# changed since the last time. VENV chooses another folder than .venv; PYTHON3 another interpreter to make it from.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-$PWD/.venv}"
PYTHON="$VENV/bin/python"
setup_stamp="$VENV/.contranorm-installed"
setup_wanted="$(cat requirements.txt pyproject.toml | cksum) $PWD"

if [ ! -x "$PYTHON" ] || [ "$(cat "$setup_stamp" 2>/dev/null)" != "$setup_wanted" ]; then
    if [ ! -x "$PYTHON" ]; then
        echo "creating $VENV" >&2
        "${PYTHON3:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $("${PYTHON3:-python3}" --version 2>&1) is too old: 3.11 or newer is needed; set PYTHON3 to one" >&2
            exit 2
        }
        "${PYTHON3:-python3}" -m venv "$VENV"
    fi
    echo "installing the pinned packages into $VENV (once)" >&2
    # bytecode afterwards, on all cores: pip compiles on one, and with PYTHONDONTWRITEBYTECODE each process would anew
    install() { "$PYTHON" -m pip install --quiet --no-compile "$@"; }
    install "$(grep '^torch==' requirements.txt)" "$(grep '^torchvision==' requirements.txt)"
    install -r requirements.txt
    install --no-deps -e .
    "$PYTHON" -m compileall -qq -j 0 "$VENV/lib" || true # a few files of the packages are templates
    echo "$setup_wanted" >"$setup_stamp"
fi
export PYTHON VENV
