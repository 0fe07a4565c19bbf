#!/usr/bin/env bash
# Make .venv: Python 3.11 or 3.12, the packages pinned in requirements/all.txt, and the project itself, editable.
#
#   scripts/setup_env.sh             make or repair the environment; instant when nothing changed
#   scripts/setup_env.sh --archive   make the environment, and add Ray (requirements/archive.txt)
#   scripts/setup_env.sh --browser   only check for Chromium, which the tests of the page use; installs it as root
#
# PYTHON=/path/to/python chooses the interpreter. Safe to interrupt: the next run continues and repairs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

browser() {
    command -v "${CHROMIUM:-chromium}" >/dev/null && return 0
    [ -z "${CHROMIUM:-}" ] || die "CHROMIUM is $CHROMIUM, which does not exist. Set it to a Chromium or Chrome, or unset it."
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing Chromium for the tests of the page …"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
            >/dev/null || die "apt-get could not install chromium. Its messages are above."
    else
        die "The tests need Chromium. Install it (sudo apt install chromium), or set CHROMIUM=/path/to/chrome."
    fi
}

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || die "PYTHON is $PYTHON, which is not Python 3.11 or 3.12. Set it to one, or unset it."
        python=$PYTHON
        return
    fi
    for python in python3.11 python3.12 python3 python; do
        if suitable "$python"; then return; fi
    done
    die "Python 3.11 or 3.12 is required; python3 is: $(python3 --version 2>/dev/null || echo missing). Install it (Debian: sudo apt install python3.11 python3.11-venv), or set PYTHON=/path/to/python3.11."
}

free_gb() { df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}'; }

# uv for .venv, with the index of pip.
use_uv() {
    local index uv=.venv/bin/uv
    export VIRTUAL_ENV=$PWD/.venv
    # uv fails without a folder for its cache, as in a home that cannot be written.
    mkdir -p "$($uv cache dir)" 2>/dev/null && [ -w "$($uv cache dir)" ] || export UV_NO_CACHE=1
    # uv does not read pip's settings, where a private index is usually set.
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        index=${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
        [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
    fi
}

archive() {
    environment
    if ! .venv/bin/python -c 'import ray' 2>/dev/null; then
        use_uv
        .venv/bin/uv pip install --quiet --compile-bytecode -r requirements/archive.txt \
            || die "Ray could not be installed. The messages are above. Run the command again to continue."
        say "Ray is installed in .venv."
    fi
}

environment() {
    local here stamp inputs place python version started=$SECONDS
    here=$(pwd -P)
    stamp=.venv/.complete      # checksum of the environment's inputs; written last
    place=.venv/.place         # its folder, which its scripts contain
    inputs=$(cat requirements/all.txt pyproject.toml scripts/setup_env.sh | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$inputs" ] && [ "$(cat $place)" = "$here" ]; then return; fi

    # Start over if the interpreter is gone, or the environment was made in another folder or is incomplete.
    if [ -e .venv ] && { ! suitable .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1 \
        || { [ -e $place ] && [ "$(cat $place)" != "$here" ]; }; }; then
        say "The environment .venv is unusable here. Making it again."
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        find_python
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        "$python" -c 'import ensurepip, venv' 2>/dev/null \
            || die "This Python cannot make environments. Install python$version-venv (sudo apt install python$version-venv), and run the command again."
    fi
    if [ ! -e $place ] && [ "$(free_gb)" -lt 8 ]; then
        die "$here has $(free_gb) GB free, the environment needs 8 GB while it is made. Free some space, or clone to a larger disk."
    fi
    if [ ! -e .venv ]; then
        say "Making the environment (.venv, Python $version). The first time downloads about 3 GB …"
        "$python" -m venv .venv || die "$python -m venv failed. Its messages are above."
    fi

    # Compile now, once: otherwise each part compiles at its first start, or, with PYTHONDONTWRITEBYTECODE, at every start.
    local uv=.venv/bin/uv options=(--compile-bytecode)
    rm -f $stamp
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -m 1 -o '^uv==[^ ;]*' requirements/all.txt)" \
        || die "pip could not install uv. Its messages are above."
    use_uv
    [ -t 2 ] || options+=(--quiet)
    # A package whose installation was interrupted can look complete: install all again, from uv's cache.
    [ ! -e .venv/.unfinished ] || options+=(--reinstall)
    : > .venv/.unfinished
    $uv pip sync "${options[@]}" requirements/all.txt \
        || die "The packages could not be installed. The messages are above. Run the command again to continue."
    $uv pip install --quiet --no-deps --no-build-isolation --editable . || die "The project could not be installed. The messages are above."
    rm .venv/.unfinished
    printf '%s\n' "$here" > $place
    printf '%s\n' "$inputs" > $stamp
    say "Environment ready in $((SECONDS - started)) s."
}

case "${1:-}" in
    "") environment ;;
    --archive) archive ;;
    --browser) browser ;;
    *) die "The option $1 does not exist. Use --archive, --browser or none." ;;
esac
