# shellcheck shell=bash
# The environment that the scripts beside this file run in. To be sourced, from bash with `set -euo pipefail`:
#
#     . "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
#     tower_env EXTRAS [PIP ARGUMENTS...]       e.g. tower_env demo,test
#
# It installs the checkout (editable) with those extras and sets
#
#     TOWER_ROOT      the checkout
#     TOWER_PYTHON    the environment's python, to be called by this path
#
# and `tower_say`, `tower_fail` for its own messages.
#
# Which environment, first that applies: the folder in TOWER_VENV; the active one (VIRTUAL_ENV, CONDA_PREFIX);
# `.venv` in the checkout. A folder that is not there yet is made, by the python named in PYTHON or the first
# Python >= 3.10 on the PATH. A second call is quick: a stamp, written only after pip has succeeded, says that this
# pyproject.toml with these extras is installed.

TOWER_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
TOWER_PYTHON=""

tower_say() { printf '%s\n' "$*"; }
tower_fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# True if "$1" runs and is Python 3.10 or newer. A name on the PATH proves nothing: version managers put stubs there.
_tower_is_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Prints a python >= 3.10 to make an environment with. TOWER_PYTHONS names the candidates.
_tower_find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        _tower_is_python "$PYTHON" || tower_fail "PYTHON=$PYTHON does not run or is older than 3.10; name another or unset it"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in ${TOWER_PYTHONS:-python3.13 python3.12 python3.11 python3.10 python3 python}; do
        if _tower_is_python "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    tower_fail "no Python >= 3.10 found (tried ${TOWER_PYTHONS:-python3.13 python3.12 python3.11 python3.10 python3 python});" \
        "install one, or name it: PYTHON=/path/to/python3"
}

# Makes the virtual environment "$1" unless a working one is there.
_tower_make_venv() {
    local venv="$1" python
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    # Whatever else lies there is not ours to delete; a virtual environment that was cut short is.
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A -- "$venv")" ]; then
        tower_fail "$venv is there but is no virtual environment; move it away or name another folder: TOWER_VENV=..."
    fi
    python="$(_tower_find_python)"
    tower_say "Making a virtual environment in $venv ($("$python" --version))"
    if ! "$python" -m venv --clear "$venv"; then
        rm -rf -- "$venv"
        tower_fail "$python could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"
    fi
}

tower_env() {
    local extras="$1" venv stamp want installed compile=--no-compile
    shift
    if [ -n "${TOWER_VENV:-}" ]; then
        venv="$TOWER_VENV"
        _tower_make_venv "$venv"
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        venv="$VIRTUAL_ENV"
        tower_say "Using the active environment $venv"
    elif [ -n "${CONDA_PREFIX:-}" ]; then
        venv="$CONDA_PREFIX"
        tower_say "Using the active environment $venv"
    else
        venv="$TOWER_ROOT/.venv"
        _tower_make_venv "$venv"
    fi
    venv="$(cd -- "$venv" && pwd)"
    TOWER_PYTHON="$venv/bin/python"
    _tower_is_python "$TOWER_PYTHON" || tower_fail "$TOWER_PYTHON does not run or is older than 3.10; use another environment"

    stamp="$venv/.hf_timm_tower.${extras//,/-}"
    want="$(cat -- "$TOWER_ROOT/pyproject.toml"; printf '%s\n' "$extras" "$@"; "$TOWER_PYTHON" --version)"
    # Another checkout may have been installed over this one since: ask whose the package is now.
    installed="$("$TOWER_PYTHON" - "$TOWER_ROOT" <<'PYTHON'
import json, pathlib, sys
from importlib import metadata

try:
    origin = json.loads(metadata.distribution("hf_timm_tower").read_text("direct_url.json") or "{}")
except metadata.PackageNotFoundError:
    origin = {}
here = {"dir_info": {"editable": True}, "url": pathlib.Path(sys.argv[1]).as_uri()}
print("yes" if origin == here else "no")
PYTHON
)"
    if [ "$installed" = yes ] && [ -f "$stamp" ] && [ "$(cat -- "$stamp")" = "$want" ]; then
        return
    fi
    rm -f -- "$stamp"
    tower_say "Installing hf_timm_tower[$extras] into $venv (PyTorch is large: the first time takes minutes)"
    # pip would compile every module of every package, for a minute and more; Python compiles those that are imported,
    # and keeps what it compiled unless it was told not to.
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
    # Of pip's talk only the large files are worth a line; what it complains of goes to stderr as it is.
    if ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$TOWER_PYTHON" -m pip install --progress-bar off "$compile" \
        --editable "${TOWER_ROOT}[$extras]" "$@" |
        { grep --line-buffered -E '(Downloading|Using cached) .*\.whl.* \([0-9.]+ [MG]B\)' || true; }; then
        tower_fail "pip could not install hf_timm_tower[$extras] into $venv; its message is above. Run this again to go on"
    fi
    printf '%s\n' "$want" >"$stamp"
}
