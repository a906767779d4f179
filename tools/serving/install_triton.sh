#!/usr/bin/env bash
# Installs a real Triton Inference Server (2.51, which is 24.10) for this machine's CPU, without root and without Docker:
# its binary, Python backend and stubs come in the wheel of nvidia-pytriton. Beside it stands an environment with what
# adacorr-serve's requirements-cpu.txt and -telemetry.txt ask for. About 400 MB; does nothing when it is installed already.
#
#   bash tools/serving/install_triton.sh       then: adacorr-serve BUNDLE -o REPO --run
#
# ADACORR_TRITON names another folder than ~/.cache/adacorr-deploy/triton-2.51.0. The server runs models with the Python of
# .venv, which is made if it is missing.
set -euo pipefail
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../environment.sh"

wheel=nvidia-pytriton==0.7.0
export PYTHONPATH=$root
[ -x "$python" ] || prepare_environment
interpreter=$python
folder=$("$interpreter" -c 'from adacorr_deploy.serving.local_server import install_folder; print(install_folder())')
version=$("$interpreter" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
requirements=$("$interpreter" -c '
from adacorr_deploy.serving.config_text import Machine
from adacorr_deploy.serving.server_packages import requirements, telemetry_requirements
print(requirements(Machine.CPU) + telemetry_requirements(), end="")')
if [ "$version" = 3.13 ]; then
    say "note: no server of this Triton runs models on Python 3.13: NumPy 1.26 has no build for it. Its tests are skipped."
    exit 0
fi
state=$(printf '%s\n' "$wheel" "$version" "$requirements" "$folder" | cksum)

if [ -f "$folder/installed" ] && [ "$(cat -- "$folder/installed")" = "$state" ]; then
    say "Triton is installed: $folder"
    exit 0
fi
mkdir -p -- "$folder"
if command -v flock >/dev/null; then
    exec 8>"$folder/lock"
    flock 8
    if [ -f "$folder/installed" ] && [ "$(cat -- "$folder/installed")" = "$state" ]; then exit 0; fi
fi
say "Installing Triton into $folder"
rm -rf -- "$folder/installed" "$folder/env" "$folder/wheel" "$folder/backends" "$folder/tritonserver"
"$interpreter" -m venv -- "$folder/env"
pip=("$folder/env/bin/python" -m pip install --disable-pip-version-check --no-input --quiet)
printf '%s\n' "$requirements" >"$folder/requirements.txt"
"${pip[@]}" -r "$folder/requirements.txt"
"${pip[@]}" --no-deps --target "$folder/wheel" "$wheel"

server=$folder/wheel/pytriton/tritonserver
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
if [ ! -f "$stub" ]; then
    say "error: $wheel has no stub for Python $version. Make .venv with Python 3.10 to 3.12: ADACORR_PYTHON."
    exit 1
fi
# The stub must lie beside the backend, and find this Python's own library: with another one, modules don't load.
mkdir -p -- "$folder/backends/python"
ln -s -- "$server"/backends/python/* "$stub" "$folder/backends/python/"
ln -s -- "$server/bin/tritonserver" "$folder/tritonserver"
"$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))' >"$folder/library-folder"
printf '%s\n' "$state" >"$folder/installed"
say "Triton is installed: $folder"
