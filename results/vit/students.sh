#!/usr/bin/env bash
# Fifty epochs on a GPU, three seeds each: students of a fifth and of a twelfth of a ViT-S/14 in DINOv2's layout, and
# the default student and a ResNet-10t of EfficientNet-Lite0:
#     bash results/vit/students.sh CIFAR10 EFFICIENTNET_WEIGHTS VIT_WEIGHTS
# CIFAR10 is a folder. Run again, it goes on where it was stopped.
set -euo pipefail
export OPTIONS="--dataset $1 --epochs ${EPOCHS:-50} --save_every 0"
conv="--teacher tf_efficientnet_lite0 --teacher_weights $2 --teacher_size 160"
vit="--teacher dinov2_vits14 --teacher_weights $3 --teacher_size 112"
small="--student vit_tiny_patch16_224 --student_size 32 --lr 2e-3"
mkdir -p runs

student() {  # NAME SEED SETTINGS
    run=runs/$1-$2
    if compgen -G "$run/eval*.json" > /dev/null; then return; fi
    python3 train.py --run_dir "$run" --seed "$2" "${@:3}" $OPTIONS > "$run.out" 2>&1
    python3 eval.py "$run" $([ "$2" = 0 ] || echo --no_baselines) >> "$run.out" 2>&1
}
export -f student

seeds() {  # NAME SETTINGS
    for seed in 0 1 2; do echo "$1 $seed ${*:2}"; done
}

{
    seeds default $conv
    seeds fifth $vit $small "--student_args 'patch_size=4 embed_dim=256 depth=5 num_heads=4'"
    seeds twelfth $vit $small "--student_args 'patch_size=8 depth=4'"
    seeds resnet $conv --student resnet10t --student_size 64
} | xargs -P "${JOBS:-9}" -L 1 bash -ec 'student "$@"' _
