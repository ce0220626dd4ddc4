#!/usr/bin/env bash
# A teacher of 21.5 M parameters in DINOv2's layout, students of a fifth and of a tenth of it, and the default student,
# on a GPU:
#     bash results/vit/run.sh CIFAR10 TINY_IMAGENET WEIGHTS
# The data sets as folders, WEIGHTS of tf_efficientnet_lite0.
set -euo pipefail
cifar=$1 tiny=$2
conv="--teacher tf_efficientnet_lite0 --teacher_weights $3 --teacher_size 160 --teacher_views 2"
mkdir -p runs

train() {  # NAME SETTINGS
    python3 train.py --run_dir "runs/$1" "${@:2}" --save_every 0 > "runs/$1.out" 2>&1
}

train vit-s-default --dataset "$cifar" $conv --epochs "${DEFAULT_EPOCHS:-50}" --eval_at_end &
python3 results/vit/mix.py "$cifar" "$tiny" runs/mixed
train vit-teacher --dataset runs/mixed $conv --epochs "${TEACHER_EPOCHS:-12}" \
    --student vit_small_patch14_dinov2 --student_size 112 --student_args init_values=0.1

# Without its metadata the file is loaded as DINOv2's own: a table of 37 x 37 positions, resampled as the official code.
python3 -c "from safetensors.torch import *; import sys; save_file(load_file(sys.argv[1]), sys.argv[2])" \
    runs/vit-teacher/student.safetensors runs/vit-teacher.safetensors
size=$(python3 results/vit/sizes.py "$cifar" train dinov2_vits14 runs/vit-teacher.safetensors runs/sizes.jsonl \
    70 84 98 112 126 140 | tail -n 1)

vit="--teacher dinov2_vits14 --teacher_weights runs/vit-teacher.safetensors --teacher_size $size"
small="--student vit_tiny_patch16_224 --student_size 64 --epochs ${STUDENT_EPOCHS:-25} --eval_at_end"
for seed in 0 1 2; do
    train "vit-fifth-$seed" --dataset "$cifar" $vit $small --seed $seed \
        --student_args "patch_size=8 embed_dim=256 depth=5 num_heads=4" &
    train "vit-tenth-$seed" --dataset "$cifar" $vit $small --seed $seed \
        --student_args "patch_size=8 embed_dim=192 depth=4 num_heads=3" &
done
wait
