"""What averaging the gradients costs over a cable of 1 Gb/s, and what bf16 would change.

    python results/speed/reduce.py cost             # as root, on Linux, with `ip` and `tc`
    python results/speed/reduce.py loss 0 1 2       # seeds

Two processes in two network namespaces are joined by a veth pair (results/faults/elastic.py).
`cost`: they all-reduce one flat tensor, as `train.average_gradients` does, of as many numbers as a
student has parameters, over the link as it is and over 1 Gb/s each way (tc's tbf).
`loss`: they train the demo for one epoch, with gradients reduced in float32 and in bf16; one
process alone shows what another order of sums does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import train  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from results.faults.elastic import network, start  # noqa: E402

REPEATS = 10
STUDENTS = {"ViT-S/16": Config(), "the demo's": Config(**PRESETS["demo"])}
LIMIT = "tc qdisc add dev eth0 root tbf rate 1gbit burst 128kb latency 50ms"


# ================================================================ what each of the processes runs


def time_reduce() -> list:
    """(student, type, parameters, milliseconds of each all-reduce) of every student and type."""
    dist.init_process_group("gloo")
    rows = []
    for name, cfg in STUDENTS.items():
        count = sum(p.numel() for p in model.build_student(cfg).parameters())
        for dtype in (torch.float32, torch.bfloat16):
            taken = []
            for _ in range(REPEATS + 1):  # the first warms up
                flat = torch.ones(count, dtype=dtype)
                dist.barrier()
                begin = time.perf_counter()
                dist.all_reduce(flat)
                taken.append(1000 * (time.perf_counter() - begin))
                assert (flat == 2).all()
            rows.append((name, str(dtype).removeprefix("torch."), count, taken[1:]))
    dist.destroy_process_group()
    return rows


def average_in_bf16(module) -> None:
    """`train.average_gradients` with half the bytes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    flat = flat.bfloat16()
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def losses(average, seed: str) -> list:
    """One epoch of the demo: its losses, the means of five steps."""
    settings = PRESETS["demo"] | dict(optimiser="adamw", lr=3e-3, epochs=1, log_every=5,
                                      eval_at_end=False, device="cpu")
    folder = f"{average.__name__}-{os.environ['WORLD_SIZE']}-{seed}"
    with mock.patch("train.average_gradients", average):
        train.main(Config(**settings, seed=int(seed), run_dir=folder))
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def losses_float32(seed: str) -> list:
    return losses(train.average_gradients, seed)


def losses_bf16(seed: str) -> list:
    return losses(average_in_bf16, seed)


# ================================================================ the tables


def run(spaces: dict, folder: Path, function, *arguments: str, world: int = 2):
    """What a function of this file returns on rank 0 of `world` processes, a namespace each."""
    nodes = list(spaces)[:world]
    running = []
    for rank, node in enumerate(nodes):
        variables = dict(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world),
                         MASTER_ADDR="node1", MASTER_PORT="29501")
        command = str(Path(__file__).resolve()), function.__name__, *arguments
        running.append(start(node, spaces[node], folder, *command, **variables))
    for process, node in zip(running, nodes, strict=True):
        assert process.wait() == 0, (folder / f"{node}.txt").read_text()
    return json.loads((folder / "answer.json").read_text())


def cost(spaces: dict, folder: Path) -> None:
    found = {"veth": run(spaces, folder, time_reduce)}
    for space in spaces.values():
        subprocess.run(["ip", "netns", "exec", space, *LIMIT.split()], check=True)
    found["1 Gb/s"] = run(spaces, folder, time_reduce)
    for space in spaces.values():
        subprocess.run(f"ip netns exec {space} tc qdisc del dev eth0 root".split(), check=True)
    print(f"{REPEATS} all-reduces. 'at 1 Gb/s': computed for the bytes alone; the limit lets a "
          "burst of\n128 kB pass, which saves 1 ms.\n\n"
          "| gradients of | type | MB | link | at 1 Gb/s, ms | median, ms | lowest | highest |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in zip(*found.values(), strict=True):
        for link, (name, dtype, count, ms) in zip(found, rows, strict=True):
            size = count * getattr(torch, dtype).itemsize
            bytes_alone = f"{size * 8 / 1e6:.1f}" if link == "1 Gb/s" else ""
            print(f"| {name}, {count / 1e6:.2f} M | {dtype} | {size / 1e6:.2f} | {link} | "
                  f"{bytes_alone} | {statistics.median(ms):.1f} | {min(ms):.1f} | {max(ms):.1f} |",
                  flush=True)


def loss(spaces: dict, folder: Path, *seeds: str) -> None:
    print("The demo with --epochs 1, 125 steps. Loss: mean of the last 25 steps. Difference: the "
          "largest\nof 25 means of five steps, to float32 of two processes.")
    print("| seed | float32 | bf16 | one process | difference of bf16 | of one process |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed in seeds:
        full = run(spaces, folder, losses_float32, seed)
        half = run(spaces, folder, losses_bf16, seed)
        alone = run(spaces, folder, losses_float32, seed, world=1)
        ends = " | ".join(f"{statistics.mean(some[-5:]):.4f}" for some in (full, half, alone))
        worst = " | ".join(f"{max(abs(a - b) for a, b in zip(some, full, strict=True)):.1g}"
                           for some in (half, alone))
        print(f"| {seed} | {ends} | {worst} |", flush=True)


def main(table, *arguments: str) -> None:
    print(f"{model.environment(torch.device('cpu'))}, gloo, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f} by other work\n")
    with tempfile.TemporaryDirectory() as scratch, network() as spaces:
        table(spaces, Path(scratch), *arguments)


if __name__ == "__main__":
    function, arguments = globals()[sys.argv[1]], sys.argv[2:]
    if "RANK" not in os.environ:
        main(function, *arguments)
    else:  # one of the processes
        answer = function(*arguments)
        if os.environ["RANK"] == "0":
            Path("answer.json").write_text(json.dumps(answer))
