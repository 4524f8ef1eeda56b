#!/bin/sh
# Prints a Python 3.8 that runs: on PATH, or under pyenv (whose shim may be there and not run).
for candidate in python3.8 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.8*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 8))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
