"""At which size is a teacher best? Learns from 10,000 training images, tests 2,000 others.

    python results/vit/sizes.py IMAGES SPLIT TEACHER WEIGHTS sizes.jsonl 70 84 98

SPLIT is train, of which a tenth is held out to test on, or a split that the teacher has not seen.
The last line that it prints is the size of the best k-NN accuracy.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval as evaluation
import model
from config import Config

if __name__ == "__main__":
    images, split, teacher, weights, file, *sizes = sys.argv[1:]
    cfg = Config(dataset=images, test_split=split, teacher=teacher, teacher_weights=weights)
    evaluator = evaluation.Evaluator(cfg, max_train=10_000, max_test=2_000)
    rows = []
    for size in map(int, sizes):
        backbone = model.load_teacher(replace(cfg, teacher_size=size))
        rows.append(evaluator.row(f"{teacher} at {size} px", backbone))
    text = "".join(json.dumps(row | model.environment(evaluator.device)) + "\n" for row in rows)
    Path(file).write_text(text)
    print(max(rows, key=lambda row: row["knn20"])["size"])
