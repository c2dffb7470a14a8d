#!/usr/bin/env bash
# Builds the native module with the address and undefined-behaviour sanitizers and runs the kernels' tests with it.
# Arguments go to pytest, in place of the default folders.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { printf 'sanitize: %s\n' "$*" >&2; exit 1; }

compiler=$(command -v g++) || stop "g++ is needed: its sanitizers are what the tests run under."
asan=$("$compiler" -print-file-name=libasan.so)
[ -e "$asan" ] || stop "$compiler has no libasan; install the compiler's sanitizer libraries."

home=build/sanitize
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$home"
CXX=$compiler .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "$home/new" \
    --config-settings=cmake.define.BITWRIGHT_SANITIZE=ON --config-settings=build-dir="$home/objects" \
    --config-settings=install.strip=false .
rm -rf "$home/site" && mv "$home/new" "$home/site"
# An environment of its own: the editable installation in .venv would be imported before it.
[ -x "$home/venv/bin/python" ] || .venv/bin/python -m venv --without-pip "$home/venv"
paths=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n%s\n' "$PWD/$home/site" "$site" >"$paths/bitwright.pth"

# The interpreter and torch keep memory until they end, which is no leak of the kernels.
LD_PRELOAD="$asan $("$compiler" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$home/venv/bin/python" -m pytest -p no:cacheprovider "${@:-tests/kernels}"
