#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes and without network: installs the checkout, draws
# masks, runs the tests marked gpu, times every op and whole steps, and writes benchmarks/results/gpu-<name>.json.
#
#   benchmarks/gpu_check.sh [--part all|masks|tests|ops|step|tune ...] [--out DIR] [--seconds N]
#   benchmarks/gpu_check.sh --device cpu --tiny      the same chain, small, on a machine without a GPU
#
# PYTHON names the Python that has torch (python3). IJEPA_FAST_COMMIT names the commit where the checkout has no .git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
