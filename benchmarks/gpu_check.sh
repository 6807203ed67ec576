#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes and without network, most wanted first: installs the
# checkout, holds every op to its definition and runs the step as it is by default (quick), times whole steps, the hottest
# ops and masks, runs the tests marked gpu, and more as time is left. It writes benchmarks/results/gpu-<name>.json after
# every command, and prints a summary, failures first. A part that is run again replaces that part of the file in --out
# and keeps the others, so give every run the same. --part step and ops run all there are; scaling (time per token) is no
# part of a whole run. Without the tests of its GPU and commit, no time of a file is shown.
#
#   benchmarks/gpu_check.sh [--part all|quick|step|ops|masks|tests|more|scaling ...] [--out DIR] [--seconds N]
#   benchmarks/gpu_check.sh --part step --steps compile --seconds 590
#   python -m benchmarks.gpu_cache triton_cache.tar.xz    before, without a GPU: kernels that need not be compiled there
#   benchmarks/gpu_check.sh --device cpu --tiny      the same chain, small, on a machine without a GPU
#
# PYTHON names the Python that has torch (python3). IJEPA_FAST_COMMIT names the commit where the checkout has no .git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
