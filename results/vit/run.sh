#!/usr/bin/env bash
# A teacher of 21.6 M parameters, students of a fifth and a tenth of it, and the default student, on a GPU:
#     bash results/vit/run.sh CIFAR10 TINY_IMAGENET WEIGHTS
# The data sets as folders, WEIGHTS of tf_efficientnet_lite0.
set -euo pipefail
cifar=$1 tiny=$2
conv="--teacher tf_efficientnet_lite0 --teacher_weights $3 --teacher_size 160 --teacher_views 2"
vit="--teacher dinov2_vits14 --teacher_weights runs/vit-teacher/student.safetensors --teacher_size 112"
small="--student vit_tiny_patch16_224 --student_size 64 --epochs 30"
mkdir -p runs

train() {  # NAME SETTINGS
    python train.py --run_dir "runs/$1" "${@:2}" --save_every 0 --eval_at_end > "runs/$1.out" 2>&1
}

python results/vit/mix.py "$cifar" "$tiny" runs/mixed
train vit-teacher --dataset runs/mixed --eval_dataset "$cifar" $conv --epochs 20 \
    --student vit_small_patch14_dinov2 --student_size 112 --student_args init_values=0.1
for seed in 0 1 2; do
    train "vit-fifth-$seed" --dataset "$cifar" $vit $small --seed $seed \
        --student_args "patch_size=8 embed_dim=256 depth=5 num_heads=4" &
    train "vit-tenth-$seed" --dataset "$cifar" $vit $small --seed $seed \
        --student_args "patch_size=8 embed_dim=192 depth=4 num_heads=3" &
done
wait
train vit-s-default --dataset "$cifar" $conv --epochs 50
