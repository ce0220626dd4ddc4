#!/usr/bin/env bash
# A teacher of 21.6 M parameters in DINOv2's layout, trained with labels, and students of a fifth and of a twelfth of
# it, three seeds of each, on a GPU:
#     bash results/vit/supervised.sh CIFAR10 TINY_IMAGENET
# The data sets as folders.
set -euo pipefail
cifar=$1 tiny=$2
mkdir -p runs
file=runs/supervised.safetensors
python3 results/vit/supervised.py "$cifar" "$tiny" "$file" "${SECONDS_OF_TEACHER:-260}" | tee runs/supervised.log
size=$(python3 results/vit/sizes.py cache/cifar10-held-out test dinov2_vits14 "$file" runs/sizes.jsonl \
    84 98 112 126 140 154 168 | tail -n 1)

student() {  # NAME SETTINGS
    python3 train.py --run_dir "runs/$1" "${@:2}" --dataset "$cifar" --teacher dinov2_vits14 \
        --teacher_weights "$file" --teacher_size "$size" --student vit_tiny_patch16_224 --student_size 32 --lr 2e-3 \
        --epochs "${EPOCHS:-50}" --save_every 0 --eval_at_end > "runs/$1.out" 2>&1
}

for seed in 0 1 2; do
    student "fifth-$seed" --seed $seed --student_args "patch_size=4 embed_dim=256 depth=5 num_heads=4" &
    student "twelfth-$seed" --seed $seed --student_args "patch_size=8 depth=4" &
done
wait
