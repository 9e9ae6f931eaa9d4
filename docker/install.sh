#!/bin/sh
# Installs the server beside a Triton that is there already: into a virtual environment that sees the packages of the
# system's python3, so that a numpy that came with Triton stays. The image is built with it, and it runs anywhere:
#   install.sh FOLDER dependencies PYPROJECT    makes the environment and installs what the package needs
#   install.sh FOLDER package CHECKOUT          installs the package itself
# TORCH_INDEX, if set, names a further package index, for another build of torch. PYTHON is the interpreter.
set -eu

folder=${1:?usage: install.sh FOLDER dependencies|package PATH}
what=${2:?dependencies or package}
path=${3:?a pyproject.toml or a checkout}
: "${PYTHON:=python3}"

install() {
    "$PYTHON" -m pip --python "$folder/bin/python" --disable-pip-version-check \
        install --no-cache-dir --quiet "$@"
}

case $what in
    dependencies)
        "$PYTHON" -m venv --without-pip --system-site-packages "$folder"
        "$PYTHON" "$(dirname "$0")/requirements.py" "$path" runtime gateway > "$folder/requirements.txt"
        install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement "$folder/requirements.txt"
        ;;
    package)
        install --no-deps "$path"
        ;;
    *)
        echo "install.sh: $what: expected dependencies or package" >&2
        exit 2
        ;;
esac
