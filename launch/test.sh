#!/usr/bin/env bash
# Everything that CI checks: install, lint, types, import order, all CPU tests.  bash launch/test.sh [pytest arguments]
source "$(dirname "$0")/setup.sh"
install "[dev,lm-eval]"
# ZeRO on processors compiles an operator of DeepSpeed's
if ! command -v g++ >/dev/null && command -v apt-get >/dev/null; then
    echo "== installing g++"; apt-get install --yes --quiet g++ >/dev/null
fi
# ... into a folder of this checkout's own, where no lock of a killed run can keep the tests waiting
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
echo "== ruff";   ruff check . ; ruff format --check .
echo "== types";  pyright
echo "== imports"; lint-imports --no-cache
# A process per core, and a file to each of them at a time; -n 0 asks for one process. Tiny models gain nothing from
# threads, and processes that share two cores lose much by them. -rs: at the end, what was skipped and why.
echo "== tests"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n auto --maxprocesses 8 --dist loadfile -rs "$@"
