"""The demo with Muon in place of AdamW: python results/strong/demo_muon.py 5e-3"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import run  # noqa: E402

import train  # noqa: E402
from config import PRESETS, Config  # noqa: E402

if __name__ == "__main__":
    train.Run = run.MuonBody
    changes = dict(lr=float(sys.argv[1]), run_dir=f"runs/demo-muon-{sys.argv[1]}")
    train.main(Config(**PRESETS["demo"] | changes))
