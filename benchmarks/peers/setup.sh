#!/bin/sh
# An environment of its own for the strongest peer (2 GB): setup.sh FOLDER. Only `retrodict bench constraints` uses it.
set -eu
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 genlm-control==0.4.1
