#!/usr/bin/env bash
# Run the image on this host:   DATA=my_music ./docker/train.sh [ARGUMENT ...]
#
#   MODE=train       (the default) smoke, generate, dataset, runpod, lambda or shell
#   DATA, MODEL      folders of music and of the base model, read-only, or an address and a Hub id (./data if it is there;
#                    the published model)
#   OUTPUT           folder for results (./output)
#   LORA_CFG         folder with a LoRA JSON, read-only; LORA_CONFIG may also name a file on this host
#   CACHE            volume or folder for latents and downloads (acestep-lora-cache)
#   IMAGE, ENGINE    the image (acestep-lora); docker or podman (whichever is there)
#   GPUS, SHM_SIZE   as of the engine (all, if there are any; 8g)
#   STOP_TIMEOUT     seconds from SIGTERM to SIGKILL, enough for an update and a checkpoint (120)
#   DRY_RUN=1        print the command instead
#
# `--help` says which variables (EPOCHS, RANK, …) the image takes; they are passed on from here.
set -euo pipefail

# Generated from acestep_pipeline/container/variables.py by `make image-variables`.
# <variables>
VARIABLES=(
    PRESET
    EXP_NAME
    EPOCHS
    MAX_TRAIN_STEPS
    LEARNING_RATE
    BATCH_SIZE
    GRAD_ACCUM
    GRAD_CLIP
    RANK
    ALPHA
    DROPOUT
    LORA_CONFIG
    OPTIMIZER
    MIXED_PRECISION
    MAX_DURATION_S
    TRIGGER_WORD
    VARIANT_DIR
    VALIDATION_FRACTION
    SEED
    EVERY_N_TRAIN_STEPS
    RESUME
    REPORT_TO
    PUSH_TO_S3
    PUSH_TO_HUB
    HUB_MODEL_ID
    HUB_PRIVATE_REPO
    HUB_TAG
    MODE
    NUM_GPUS
    LOG_FORMAT
    ACESTEP_MODEL
    ACESTEP_DATA
    ACESTEP_CACHE_DIR
    ACESTEP_S3_ROOT
    ACESTEP_DEBUG
    ACESTEP_JOBS_DATA
    ACESTEP_JOBS_MODEL
    ACESTEP_JOBS_OUTPUT
    ACESTEP_ADAPTERS
    AWS_ENDPOINT_URL
    AWS_ACCESS_KEY_ID
    AWS_SECRET_ACCESS_KEY
    AWS_SESSION_TOKEN
    AWS_REGION
    AWS_DEFAULT_REGION
    HF_TOKEN
    HF_ENDPOINT
    HF_HUB_OFFLINE
    WANDB_API_KEY
    HTTPS_PROXY
    NO_PROXY
)
# </variables>

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

mount() { # FOLDER, TARGET, rw or ro
    [[ -d $1 ]] || die "$1, for $2, is no folder."
    arguments+=(--volume "$(cd -- "$1" && pwd -P):$2:$3")
}

engine=${ENGINE:-}
if [[ -z $engine ]]; then
    engine=$(command -v docker || command -v podman) || die "neither docker nor podman is here; install one, or name it with ENGINE."
fi

arguments=(run --rm --init --shm-size "${SHM_SIZE:-8g}" --stop-timeout "${STOP_TIMEOUT:-120}")
[[ -t 0 && -t 1 ]] && arguments+=(--interactive --tty)

gpus=${GPUS:-}
if [[ -z $gpus ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    gpus=all
fi
if [[ -n $gpus && ${engine##*/} == podman ]]; then
    arguments+=(--device "nvidia.com/gpu=$gpus")
elif [[ -n $gpus ]]; then
    arguments+=(--gpus "$gpus")
fi

output=${OUTPUT:-output}
if [[ ! -e $output ]]; then
    mkdir -p -- "$output"
    # Root's own folder is not for the image's user, who is not root.
    [[ $(id -u) != 0 ]] || chown 10001:10001 -- "$output"
fi
mount "$output" /output rw
if [[ $(id -u) != 0 ]]; then
    arguments+=(--user "$(id -u):$(id -g)")
    [[ ${engine##*/} != podman ]] || arguments+=(--userns keep-id)
fi

# A folder is mounted; an address or a Hub id is told.
data=${DATA:-${ACESTEP_DATA:-}}
[[ -n $data || ! -d data ]] || data=data
unset ACESTEP_DATA
if [[ $data == *://* ]]; then
    export ACESTEP_DATA=$data
elif [[ -n $data ]]; then
    mount "$data" /data ro
fi
model=${MODEL:-${ACESTEP_MODEL:-}}
unset ACESTEP_MODEL ACESTEP_CACHE_DIR
if [[ -d $model ]]; then
    mount "$model" /model ro
elif [[ -n $model ]]; then
    export ACESTEP_MODEL=$model
fi
if [[ -n ${LORA_CFG:-} ]]; then
    mount "$LORA_CFG" /lora-cfg ro
elif [[ -n ${LORA_CONFIG:-} ]]; then
    [[ -f $LORA_CONFIG ]] || die "LORA_CONFIG=$LORA_CONFIG is no file."
    mount "$(dirname -- "$LORA_CONFIG")" /lora-cfg ro
    LORA_CONFIG=$(basename -- "$LORA_CONFIG")
    export LORA_CONFIG
fi
cache=${CACHE:-acestep-lora-cache}
if [[ $cache == */* ]]; then
    mkdir -p -- "$cache"
    cache=$(cd -- "$cache" && pwd -P)
fi
arguments+=(--volume "$cache:/cache:rw")

# By name: the engine takes the values from this environment, and no secret shows in a list of processes.
for name in "${VARIABLES[@]}"; do
    [[ -z ${!name:-} ]] || { export "${name?}" && arguments+=(--env "$name"); }
done
# Names alone, of what the environment has: a misspelt one is an error there, not silence.
ACESTEP_HOST_NAMES=$(compgen -e | grep -vxF -e DATA -e MODEL -e OUTPUT -e LORA_CFG -e CACHE -e IMAGE -e ENGINE -e GPUS \
    -e SHM_SIZE -e STOP_TIMEOUT -e DRY_RUN | tr '\n' ' ')
export ACESTEP_HOST_NAMES
arguments+=(--env ACESTEP_HOST_NAMES "${IMAGE:-acestep-lora}" "$@")

if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$engine" "${arguments[@]}"
    printf '\n'
else
    exec "$engine" "${arguments[@]}"
fi
