#!/usr/bin/env bash
# Makes the environment if needed, then runs every gate and every test. Arguments go to pytest:
#   bash tools/test.sh                        everything
#   bash tools/test.sh -m 'not slow' tests/core
set -uo pipefail
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment || exit 1
cd -- "$root" || exit 1

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# One test process per core, each with one thread: more threads than cores only wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

failed=()
gate() {
    local name=$1
    shift
    printf '== %s\n' "$name"
    "$@" || failed+=("$name")
}

# A real inference server for the tests marked triton, in the user's cache; Python 3.13 has none.
gate "triton" bash tools/serving/install_triton.sh
gate "ruff check" "$python" -m ruff check --output-format concise
gate "ruff format" "$python" -m ruff format --check --output-format concise
gate "mypy" "$python" -m mypy
gate "lint-imports" "$venv/bin/lint-imports" --no-logo
gate "pytest" "$python" -m pytest -n auto --dist loadfile "$@"

if [ "${#failed[@]}" -gt 0 ]; then
    printf -v list '%s, ' "${failed[@]}"
    say "FAILED: ${list%, }"
    exit 1
fi
