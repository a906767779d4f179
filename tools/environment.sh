#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, once. Sourced: it defines functions and runs nothing.
#
#   prepare_environment    .venv at the repository's root, with everything installed as tools/constraints.txt pins it.
#                          Sets $root and $python. Does nothing when the environment is up to date.
#
# ADACORR_PYTHON names the interpreter to use, where the one found first is not the right one.

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
extras=build,cpu,rtx,serve,video,bench,dev

say() { printf '%s\n' "$*" >&2; }

is_usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Prints the first interpreter that can make an environment. 3.11 comes first: the pins were tried on it most.
find_python() {
    local candidate
    for candidate in ${ADACORR_PYTHON:+"$ADACORR_PYTHON"} python3.11 python3.12 python3.13 python3.10 python3 python; do
        if is_usable_python "$candidate"; then
            command -v -- "$candidate"
            return
        elif [ "$candidate" = "${ADACORR_PYTHON:-}" ]; then
            say "error: ADACORR_PYTHON=$candidate is no Python 3.10 to 3.13 with the venv and ensurepip modules."
            return 1
        fi
    done
    say "error: no Python 3.10 to 3.13 with the venv module was found. Install one (Debian: apt-get install python3-venv)," \
        "or name it: ADACORR_PYTHON=/path/to/python bash tools/test.sh"
    return 1
}

# What the environment depends on: the two files, the interpreter and the place (an editable install holds a path).
fingerprint() {
    cat -- "$root/pyproject.toml" "$root/tools/constraints.txt"
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    printf '%s\n' "$extras" "$root"
}

is_up_to_date() {
    [ -x "$python" ] && [ -f "$venv/adacorr-installed" ] &&
        [ "$(fingerprint 2>/dev/null | cksum)" = "$(cat -- "$venv/adacorr-installed")" ]
}

# An environment is used as it is unless an install into it was cut off (a half-unpacked package can look installed to
# pip), it came with a copied or moved clone (its commands then start another environment's Python), or it is broken.
is_sound_venv() {
    [ ! -e "$venv/adacorr-installing" ] && is_usable_python "$python" || return 1
    case $("$venv/bin/pip" --version 2>/dev/null) in
        *" from $venv/"*) return 0 ;;
        *) return 1 ;;
    esac
}

make_venv() {
    if is_sound_venv; then
        return
    fi
    local interpreter
    interpreter=$(find_python) || return 1
    say "Making .venv with $interpreter ($("$interpreter" --version))"
    "$interpreter" -m venv --clear -- "$venv"
}

# pip with its full output in a log, and a line on the terminal for each package that it takes up.
pip_install() {
    "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off -c "$root/tools/constraints.txt" "$@" \
        2>&1 | tee -a -- "$venv/install.log" | sed -n -u -E 's/^ *((Downloading|Using cached|Processing|Installing collected) .{1,100}).*/  \1/p' >&2
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        tail -n 20 -- "$venv/install.log" >&2
        say "error: pip failed (its whole output: .venv/install.log). Check the network and the disk, then run this again."
    fi
    return "$status"
}

prepare_environment() {
    if is_up_to_date; then
        return
    fi
    # Two scripts started together must not install into the same environment at once.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
    fi
    if ! is_up_to_date; then
        make_venv || return 1
        rm -f -- "$venv/adacorr-installed" "$venv/install.log"
        : >"$venv/adacorr-installing"
        say "Installing adacorr-deploy[$extras] with the versions of tools/constraints.txt: a few minutes the first time"
        # The build backend comes first, so that it is pinned too and no second environment is downloaded for it.
        pip_install setuptools || return 1
        (cd -- "$root" && pip_install --no-build-isolation -e ".[$extras]") || return 1
        fingerprint | cksum >"$venv/adacorr-installed"
        rm -f -- "$venv/adacorr-installing"
        say "The environment is ready: .venv ($("$python" --version))"
    fi
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
}
