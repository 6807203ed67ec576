#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes and without network: installs the checkout, draws
# masks, runs the tests marked gpu, times whole steps and every op, and writes benchmarks/results/gpu-<name>.json.
# What does not fit into nine minutes has parts of its own, which a whole run leaves out: step with all the time for it,
# scaling (time per token over batch and image size), accuracy (what training buys), tune (proposals for the kernels).
# A part that is run again replaces that part of the file in --out and keeps the others, so give every run the same.
# By estimate, --part all comes to the first one to three whole steps; --part step --steps WORDS adds others to them.
# Without the tests of its GPU and commit, no time of a file is shown.
#
#   benchmarks/gpu_check.sh [--part all|masks|tests|step|ops|scaling|accuracy|tune ...] [--out DIR] [--seconds N]
#   benchmarks/gpu_check.sh --part step --steps compile --seconds 590
#   benchmarks/gpu_check.sh --part accuracy --data cifar10_vits4=PATH imagenette=PATH --seconds 7200
#   benchmarks/gpu_check.sh --device cpu --tiny      the same chain, small, on a machine without a GPU
#
# PYTHON names the Python that has torch (python3). IJEPA_FAST_COMMIT names the commit where the checkout has no .git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
