"""At which size is a teacher best? Learns from 10,000 training images, tests 2,000 others.

    python results/vit/sizes.py IMAGES SPLIT TEACHER WEIGHTS sizes.jsonl 70 84 98

SPLIT is train, of which a tenth is held out to test on, or a split that the teacher has not seen.
Adds a line to sizes.jsonl for each size. The last line that it prints is the size of the best k-NN
accuracy.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import eval as evaluation  # noqa: E402
import model  # noqa: E402
from config import Config  # noqa: E402
from results.records import add  # noqa: E402

if __name__ == "__main__":
    images, split, teacher, weights, file, *sizes = sys.argv[1:]
    cfg = Config(dataset=images, test_split=split, teacher=teacher, teacher_weights=weights)
    evaluator = evaluation.Evaluator(cfg, max_train=10_000, max_test=2_000)
    rows = []
    for size in map(int, sizes):
        backbone = model.load_teacher(replace(cfg, teacher_size=size))
        rows.append(evaluator.row(f"{teacher} at {size} px", backbone))
        add(Path(file), dict(teacher=teacher) | rows[-1] | model.environment(evaluator.device))
    print(max(rows, key=lambda row: row["knn20"])["size"])
