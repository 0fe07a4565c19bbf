#!/usr/bin/env bash
# Makes .venv: Python >= 3.11, < 3.13 with everything pinned in requirements/all.txt and the project itself, editable.
#
#   scripts/setup_env.sh             make or repair the environment; instant when nothing changed
#   scripts/setup_env.sh --browser   only check for Chromium, which the tests of the page drive (installs it when root)
#
# PYTHON=/path/to/python chooses the interpreter. Safe to interrupt: the next run goes on, and repairs what was half done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

browser() {
    command -v "${CHROMIUM:-chromium}" >/dev/null && return 0
    [ -z "${CHROMIUM:-}" ] || die "CHROMIUM=$CHROMIUM is not there; point it at a Chromium or Chrome, or unset it."
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing Chromium for the tests of the page …"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
            >/dev/null || die "apt-get could not install chromium (see above)."
    else
        die "the tests drive the page in Chromium: install it (sudo apt install chromium), or set CHROMIUM=/path/to/chrome."
    fi
}

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or 3.12."
        python=$PYTHON
        return
    fi
    for python in python3.11 python3.12 python3 python; do
        if suitable "$python"; then return; fi
    done
    die "Python 3.11 or 3.12 is needed, and here is $(python3 --version 2>/dev/null || echo none); install it (Debian: sudo apt install python3.11 python3.11-venv), or set PYTHON=/path/to/python3.11."
}

free_gb() { df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}'; }

environment() {
    local here stamp wanted place python version index started=$SECONDS
    here=$(pwd -P)
    stamp=.venv/.complete      # what this environment was made from; written last
    place=.venv/.place         # where it was made: its scripts name that folder
    wanted=$(cat requirements/all.txt pyproject.toml scripts/setup_env.sh | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && [ "$(cat $place)" = "$here" ]; then return; fi

    # An interpreter that went away, another folder's environment, a half-made one: start over.
    if [ -e .venv ] && { ! suitable .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1 \
        || { [ -e $place ] && [ "$(cat $place)" != "$here" ]; }; }; then
        say "The environment .venv is unusable here; making it again."
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        find_python
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        "$python" -c 'import ensurepip, venv' 2>/dev/null \
            || die "this Python cannot make environments: install python$version-venv (sudo apt install python$version-venv), then run the command again."
    fi
    if [ ! -e $place ] && [ "$(free_gb)" -lt 8 ]; then
        die "$(free_gb) GB are free in $here, and the environment takes about 8 GB while it is made; make room, or clone to a larger disk."
    fi
    if [ ! -e .venv ]; then
        say "Making the environment (.venv, Python $version); the first time fetches about 3 GB …"
        "$python" -m venv .venv || die "$python -m venv failed (see above)."
    fi

    # Compiled at once: every part's first start would have to, each for itself, and where PYTHONDONTWRITEBYTECODE is set
    # each start would (MLflow's takes four times as long so).
    local uv=.venv/bin/uv options=(--compile-bytecode)
    rm -f $stamp
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -m 1 -o '^uv==[^ ;]*' requirements/all.txt)" \
        || die "pip could not fetch uv (see above)."
    export VIRTUAL_ENV=$here/.venv
    # uv reads none of pip's settings; who has an index of their own has mostly told pip.
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        index=${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
        [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
    fi
    [ -t 2 ] || options+=(--quiet)
    # A package whose installation was cut off can look installed: after an interruption install each again (uv keeps them).
    [ ! -e .venv/.unfinished ] || options+=(--reinstall)
    : > .venv/.unfinished
    $uv pip sync "${options[@]}" requirements/all.txt \
        || die "the packages could not be installed (see above); run the command again to go on where it stopped."
    $uv pip install --quiet --no-deps --no-build-isolation --editable . || die "the project could not be installed (see above)."
    rm .venv/.unfinished
    printf '%s\n' "$here" > $place
    printf '%s\n' "$wanted" > $stamp
    say "Environment ready in $((SECONDS - started)) s."
}

case "${1:-}" in
    "") environment ;;
    --browser) browser ;;
    *) die "unknown option $1; it takes --browser or nothing." ;;
esac
