#!/bin/sh
# An environment of its own for torchgfn (1.5 GB): setup_torchgfn.sh FOLDER. Only `retrodict bench graphs` uses it.
# Without its own dependencies, of which the graph environment needs these three; it wants numpy 1.
set -eu
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install -qq --disable-pip-version-check --no-deps torchgfn==2.4.1
"$1/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 'numpy<2' tensordict torch_geometric dill
