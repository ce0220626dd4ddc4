#!/usr/bin/env bash
# A teacher of 21.6 M parameters in DINOv2's layout, and its students (students.sh), on a GPU:
#     bash results/vit/run.sh CIFAR10 TINY_IMAGENET WEIGHTS
# The data sets as folders, WEIGHTS of tf_efficientnet_lite0.
set -euo pipefail
cifar=$1 tiny=$2
mkdir -p runs
python3 results/vit/mix.py "$cifar" "$tiny" runs/mixed
python3 train.py --run_dir runs/vit-teacher --dataset runs/mixed --epochs "${TEACHER_EPOCHS:-12}" --save_every 0 \
    --teacher tf_efficientnet_lite0 --teacher_weights "$3" --teacher_size 160 --teacher_views 2 \
    --student vit_small_patch14_dinov2 --student_size 112 --student_args init_values=0.1

# Without its metadata the file is loaded as DINOv2's own: a table of 37 x 37 positions, resampled as the official code.
python3 -c "from safetensors.torch import *; import sys; save_file(load_file(sys.argv[1]), sys.argv[2])" \
    runs/vit-teacher/student.safetensors runs/vit-teacher.safetensors
python3 results/vit/sizes.py "$cifar" train dinov2_vits14 runs/vit-teacher.safetensors runs/sizes.jsonl \
    70 84 98 112 126 140
bash results/vit/students.sh "$cifar" "$3" runs/vit-teacher.safetensors
