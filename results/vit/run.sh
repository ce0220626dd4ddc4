#!/usr/bin/env bash
# README's rows of fifty epochs: a ViT-S/14 in DINOv2's layout, its students, and those of EfficientNet-Lite0, on a GPU:
#     bash results/vit/run.sh CIFAR10 TINY_IMAGENET WEIGHTS
# The data sets as folders, WEIGHTS of tf_efficientnet_lite0. Run again, it goes on where it was stopped.
set -euo pipefail
export CIFAR=$1 WEIGHTS=$3 MORE="${MORE:-}"  # MORE: further settings, such as --epochs 2 to try it
mkdir -p runs

train() {  # NAME SETTINGS: the settings of configs/NAME.json, which it overrides
    python3 train.py --preset "results/vit/configs/$1.json" "${@:2}" $MORE
}

student() {  # NAME SEED
    run=runs/$1-$2 weights=runs/teacher.safetensors
    case $1 in default | resnet) weights=$WEIGHTS ;; esac
    if [ -e "$run/eval.json" ]; then return; fi
    train "$1" --dataset "$CIFAR" --teacher_weights "$weights" --seed "$2" --run_dir "$run" > "$run.out" 2>&1
}
export -f train student

python3 results/vit/mix.py "$CIFAR" "$2" runs/mixed
train teacher --teacher_weights "$WEIGHTS"
# Without its metadata the file is loaded as DINOv2's own: a table of 37 x 37 positions, resampled as the official code.
python3 -c "from safetensors.torch import *; import sys; save_file(load_file(sys.argv[1]), sys.argv[2])" \
    runs/teacher/student.safetensors runs/teacher.safetensors
python3 results/vit/sizes.py "$CIFAR" train dinov2_vits14 runs/teacher.safetensors runs/sizes.jsonl \
    70 84 98 112 126 140
for name in default fifth twelfth resnet; do
    for seed in 0 1 2; do echo "$name $seed"; done
done | xargs -P "${JOBS:-9}" -L 1 bash -ec 'student "$@"' _
