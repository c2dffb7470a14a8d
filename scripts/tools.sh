#!/usr/bin/env bash
# Install the optional native tools with apt: faster synthesis, independent timing, RTL simulation, a real cell library.
set -euo pipefail
packages=(yosys opensta iverilog verilator qflow-tech-osu018)
command -v apt-get >/dev/null || { echo "tools: apt-get is not here; install ${packages[*]} with your system's package manager." >&2; exit 1; }
run=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "tools: run this as root, or install sudo." >&2; exit 1; }
    run=(sudo)
fi
${run[@]+"${run[@]}"} apt-get update
${run[@]+"${run[@]}"} apt-get install -y "${packages[@]}"
