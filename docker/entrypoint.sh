#!/bin/sh
# The image's entrypoint: MODE and the other variables are understood by acestep_pipeline/container, which becomes the
# command itself, so that signals reach it and its exit status is the container's.
set -eu
exec python -m acestep_pipeline.container "$@"
