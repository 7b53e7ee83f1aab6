#!/usr/bin/env bash
# Runs the tests with the oldest torch and transformers that pyproject.toml allows; arguments go to pytest.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves several GB of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV_OLDEST:-.venv-oldest}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q -c constraints-oldest.txt torch
"$venv/bin/pip" install -q -c constraints-oldest.txt -e ".[dev]"
"$venv/bin/python" - <<'PY'
import torch, transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
PY
OMP_NUM_THREADS=1 "$venv/bin/pytest" -n "${WORKERS:-2}" -m "not slow" "$@"
