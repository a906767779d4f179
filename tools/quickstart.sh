#!/usr/bin/env bash
# One command from a fresh clone to pictures: makes the environment, builds the demo model into a bundle, samples it with
# and without reuse, checks it against PyTorch, prints a table and the paths of the PNG files. Arguments go to quickstart.py.
set -euo pipefail
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
exec "$python" "$root/tools/quickstart.py" "$@"
