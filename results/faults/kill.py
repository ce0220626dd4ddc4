"""Kill real training at random instants, and see that nothing is lost: the same bits in the end.

    python results/faults/kill.py 60        # so many SIGKILLs; about ten seconds each
    python results/faults/kill.py 12 TERM   # the same with SIGTERM, or INT: it saves, and says so

A run of train.py on drawn shapes is started again and again in a fresh folder and killed: while its
store is built, while the cache is filled, while a checkpoint is written, or anywhere; after a few
kills it may end. Then weights, optimiser, store and cache must equal those of a run that was left
in peace, byte for byte, every step must have its line in metrics.jsonl, and no temporary file may
lie about. Prints a table of what was hit.
"""

import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402

ENVIRONMENT = model.environment(torch.device("cpu"))
PER_RUN = 6  # kills, before a run may end
COMMAND = [*(
    "train.py --dataset shapes --max_samples 1000 --teacher demo --teacher_size 32 "
    "--student vit_tiny_patch16_224 "
    "--student_size 32 --batch_size 20 --epochs 6 --teacher_views 2 --save_every 2 --log_every 5 "
    "--precision fp32 --device cpu"
).split(), "--student_args", "embed_dim=48 depth=2 num_heads=2"]
PLACES = {  # what must be there before the kill, and the longest wait after that, in seconds
    "building the store": ("cache/stores/*.tmp", 0.3),
    "filling the cache": ("cache/targets/*/view_*.tmp", 0.5),
    "writing a checkpoint": ("run/*.tmp", 0.01),
    "training": ("run/checkpoint_latest.pth", 3.0),
    "anywhere": ("", 8.0),
}


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, *COMMAND, "--run_dir", str(folder / "run"), *more]
    command += ["--cache_dir", str(folder / "cache")]
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also under nohup


def outcome(folder: Path) -> dict:
    """What a finished run left: digests of everything that must not depend on its history."""
    saved = torch.load(folder / "run" / "checkpoint_latest.pth", weights_only=True)
    flat, digest = [saved["objective"], saved["optimiser"]["state"]], hashlib.sha256()
    while flat:
        item = flat.pop()
        if isinstance(item, dict):
            flat += item.values()
        elif isinstance(item, torch.Tensor):
            digest.update(item.numpy().tobytes())
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    out = dict(weights=digest.hexdigest(), steps=[json.loads(line)["step"] for line in lines])
    for kind in ("stores", "targets"):
        files = sorted(f for f in (folder / "cache" / kind).rglob("*") if f.suffix != ".lock")
        digest = hashlib.sha256()
        for file in files:
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes() if file.is_file() else b"")
        out[kind] = digest.hexdigest()
    out["files"] = str(sorted(f.name for f in (folder / "run").iterdir()))
    left = [*folder.rglob("*.tmp")]
    assert not left, left
    return out


def disturb(folder: Path, number: int, place: str) -> str:
    """Start the run, and signal it at a random instant; returns where it was, or 'ended'."""
    pattern, longest = PLACES[place]
    process, begin = start(folder), time.time()
    while pattern and process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.001)
        if time.time() - begin > 60:  # what is waited for has been before
            break
    time.sleep(random.uniform(0, longest))
    hit = process.poll() is None
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    if not hit or process.returncode == 0:
        assert process.returncode == 0, text[-2000:]
        return "ended"
    # Before the first step and after the last one SIGTERM ends the process at once.
    assert process.returncode in (-number, 128 + number), text
    if process.returncode == 128 + number:
        assert "run the same command" in text and "Traceback" not in text, text
    return place


def main(kills: int, number: int) -> None:
    print(f"# {ENVIRONMENT}", flush=True)
    random.seed(0)
    hits, runs = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        peace = Path(scratch) / "peace"
        assert start(peace).wait() == 0
        expected = outcome(peace)
        while sum(hits.values()) < kills:
            folder = Path(scratch) / f"run_{runs}"
            places = ["building the store", "filling the cache"]
            places += random.choices([*PLACES][1:], k=9)
            for place in places[:PER_RUN]:
                where = disturb(folder, number, place)
                if where == "ended":
                    break
                hits[where] += 1
            process = start(folder)
            text, _ = process.communicate()
            assert process.returncode == 0, text[-2000:]
            found, runs = outcome(folder), runs + 1
            if number != signal.SIGKILL:  # it also logs the steps at which it stops
                found["steps"] = [s for s in found["steps"] if s in expected["steps"]]
            assert found == expected, {k: (found[k], expected[k]) for k in expected}
            print(f"# run {runs}: {sum(hits.values())} so far, same bits", flush=True)
    name = signal.Signals(number).name
    print(f"\n| {name} while | times |\n|---|---|")
    for place, times in hits.most_common():
        print(f"| {place} | {times} |")
    print(
        f"\n{sum(hits.values())} times {name} in {runs} runs: weights, optimiser, store, cache and "
        "logged\nsteps equal those of an undisturbed run in all, and no temporary file was left."
    )


if __name__ == "__main__":
    kind = sys.argv[2] if len(sys.argv) > 2 else "KILL"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60, getattr(signal, f"SIG{kind}"))
