#!/bin/sh
# Pin the image's packages with the hashes of their files: requirements.lock (CUDA), requirements-cpu.lock. Needs uv.
# The CPU build comes from PyTorch's index, or from PIP_FIND_LINKS.
set -eu
cd "$(dirname "$0")"
: "${UV:=uv}"
compile() {
    "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header "$@" \
        requirements.in
}
compile --output-file requirements.lock
echo 'torch==2.13.0+cpu' >.cpu-override.txt
trap 'rm -f .cpu-override.txt' EXIT
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    compile --override .cpu-override.txt --find-links "$PIP_FIND_LINKS" --output-file requirements-cpu.lock
else
    compile --override .cpu-override.txt --extra-index-url https://download.pytorch.org/whl/cpu \
        --index-strategy unsafe-best-match --output-file requirements-cpu.lock
fi
