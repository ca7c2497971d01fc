#!/usr/bin/env bash
# Train on DATA and keep what has been written on S3, at RESULT, so that another machine can go on from there.
#
#   RESULT=s3://bucket/runs/jazz MODEL=tiny PRESET=smoke FLAGS="--rank 8" DATA=/data serverless/train_and_sync.sh
#
# The status is the training's. SIGTERM has it write a checkpoint, which is sent before this ends.
set -euo pipefail
: "${RESULT:?name an s3:// address}"
cd "$(dirname "$0")/.."
output=${OUTPUT:-$HOME/acestep-output/run}
mkdir -p "$output"
# What an earlier machine left. If it can't be told whether there is something, nothing is begun.
there=$(python -c 'import sys; from acestep_pipeline import storage; print(storage.exists(sys.argv[1]))' "$RESULT")
if [ "$there" = True ]; then
    acestep-lora storage sync "$RESULT" "$output"
fi

# FLAGS is several words.
# shellcheck disable=SC2086
python train_ace_step_lora.py --preset "${PRESET:-c}" ${MODEL:+--pretrained_model_name_or_path "$MODEL"} \
    --train_data_dir "${DATA:-/data}" --output_dir "$output" --exp_name "$(basename "$RESULT")" \
    --resume_from_checkpoint latest ${FLAGS:-} &
training=$!
trap 'kill -TERM "$training" 2>/dev/null || true' TERM INT

send() { acestep-lora storage sync --delete "$output" "$RESULT"; }
since=$SECONDS
while kill -0 "$training" 2>/dev/null; do
    sleep 1 || true
    if [ $((SECONDS - since)) -ge "${SYNC_S:-300}" ]; then
        send || echo "warning: the results could not be sent; trying again later." >&2
        since=$SECONDS
    fi
done
status=0
wait "$training" || status=$?
send
exit "$status"
