"""Lose one of two machines while they train together, and go on with the same command.

    python results/faults/elastic.py             # as root, on Linux, with `ip`; or one case alone:
    python results/faults/elastic.py separate    # or shared
    python results/faults/elastic.py silent 6    # the machine goes silent; tcp_retries2 is 6

Two network namespaces with host names of their own stand for two machines; a veth pair joins them.
On both torchrun starts train.py as in docs/scale.md, with one process each, on a CPU. After some
steps all processes of one machine get SIGKILL. The other has to end within a minute, with a
message. Then the same command on both has to give the losses of a run that was left in peace,
within 1e-3: once with one folder for both machines, once with a run folder and a cache for each.
Exits with status 1 if any of this fails.

The kernel of a machine whose processes are killed closes their connections. A machine without power
or cable does not: `silent` takes the link down before the kill, and says whether the other ends.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = "node1", "node2"  # torchrun sorts them by name: node1 has rank 0
TORCHRUN = [*(
    "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 "
    "--rdzv_backend=c10d --rdzv_endpoint=node1:29500"
).split(), str(ROOT / "train.py")]
TRAIN = [*(
    "--dataset shapes --max_samples 80 --teacher demo --teacher_size 32 --precision fp32 "
    "--student vit_tiny_patch16_224 --student_size 32 --batch_size 16 --epochs 20 --lr 2e-3 "
    "--teacher_views 2 --save_every 2 --log_every 1 --device cpu --run_dir run --cache_dir cache"
).split(), "--student_args", "embed_dim=48 depth=2 num_heads=2"]
KILL_AFTER = 35  # of 100 steps
MINUTE = 60
CASES = dict(  # the folder of each machine, and the machine that is killed
    shared=(dict(node1="both", node2="both"), "node2"),
    separate=(dict(node1="first", node2="second"), "node1"),
)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def network():
    """Yield {node: its network namespace}; they find each other by name, over eth0."""
    spaces = {node: f"distill-{os.getpid()}-{node}" for node in NODES}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up then, too
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            hosts = Path("/etc/netns", space, "hosts")  # /etc/hosts of `ip netns exec`
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
        one, two = spaces.values()
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "eth0", "netns", two)
        for number, space in enumerate(spaces.values(), 1):
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
        yield spaces
    finally:
        for space in spaces.values():
            with contextlib.suppress(RuntimeError):  # it was not made
                kill(space)
                ip("netns", "delete", space)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)
        with contextlib.suppress(OSError):  # others may have theirs
            os.rmdir("/etc/netns")


def kill(space: str) -> None:
    """SIGKILL to every process of a machine."""
    for number in ip("netns", "pids", space).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


def start(node: str, space: str, folder: Path, *command: str, **variables: str):
    """Run Python on a machine, in a folder; what it prints is in FOLDER/NODE.txt."""
    folder.mkdir(exist_ok=True)
    rename = f'echo {node} > /proc/sys/kernel/hostname && exec "$@"'
    inside = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", rename, "sh"]
    own = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="eth0")
    with open(folder / f"{node}.txt", "w") as file:
        return subprocess.Popen([*inside, sys.executable, *command], cwd=folder, stdout=file,
                                stderr=file, env=os.environ | own | variables)


def start_training(spaces: dict, folders: dict) -> dict:
    return {node: start(node, spaces[node], folders[node], *TORCHRUN, *TRAIN) for node in NODES}


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, as far as the run has come."""
    try:
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def train(spaces: dict, folders: dict) -> str:
    """Run to the end on both machines; what rank 0 printed."""
    for node, process in start_training(spaces, folders).items():
        status = process.wait(5 * MINUTE)
        text = (folders[node] / f"{node}.txt").read_text()
        assert status == 0, f"{node} ended with status {status}:\n{text}"
    return (folders["node1"] / "node1.txt").read_text()


def lose(spaces: dict, folders: dict, lost: str, cut: bool = False) -> tuple[int, float, str]:
    """Train, kill a machine and maybe cut its link before: the last step; how long the other went
    on, in seconds, and its error."""
    other, = {*NODES} - {lost}
    running = start_training(spaces, folders)
    while max(losses(folders["node1"]), default=0) < KILL_AFTER:
        assert not any(process.poll() for process in running.values()), "it ended before the kill"
        time.sleep(0.01)
    if cut:
        ip("-n", spaces[lost], "link", "set", "eth0", "down")
    kill(spaces[lost])
    begin = time.monotonic()
    status = running[other].wait(MINUTE)
    seconds, text = time.monotonic() - begin, (folders[other] / f"{other}.txt").read_text()
    running[lost].wait()
    errors = re.findall(r"^(?:\[rank\d\]: )?((?:[\w.]*Error|error): .*)", text, re.M)
    assert status > 0 and errors, f"{other} ended with status {status}:\n{text}"
    assert not ip("netns", "pids", spaces[other]), f"{other} has left processes"
    return max(losses(folders["node1"])), seconds, errors[0].split(". This is")[0]


def silent(retries: str) -> None:
    """Each machine in turn goes silent: what the other does."""
    print(f"Link cut before the kill, net.ipv4.tcp_retries2 = {retries}:")
    for lost in NODES:
        with tempfile.TemporaryDirectory() as scratch, network() as spaces:
            for space in spaces.values():
                ip("netns", "exec", space, "sysctl", "-qw", f"net.ipv4.tcp_retries2={retries}")
            try:
                folders = {node: Path(scratch, node) for node in NODES}
                _, seconds, message = lose(spaces, folders, lost, cut=True)
                outcome = f"ended after {seconds:.0f} s: {message}"
            except subprocess.TimeoutExpired:
                outcome = f"still waited after {MINUTE} s"
            print(f"- {lost} lost; the other {outcome}", flush=True)


def main(cases: list[str]) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, network() as spaces:
        scratch = Path(scratch)
        machine = re.search("machine .*", train(spaces, dict.fromkeys(NODES, scratch / "peace")))
        expected = losses(scratch / "peace")
        print(f"{machine[0]}, gloo over veth, {os.cpu_count()} cores for both machines\n")
        print("| run folder and cache | killed at step | the other ended after | continued at | "
              "steps | largest difference of a loss |\n|---|---|---|---|---|---|", flush=True)
        messages = []
        for case in cases:
            names, lost = CASES[case]
            folders = {node: scratch / name for node, name in names.items()}
            step, seconds, message = lose(spaces, folders, lost)
            text = train(spaces, folders)
            continued, = re.findall(r"continu\w+ at step (\d+)", text)
            found = losses(folders["node1"])
            assert found.keys() == expected.keys(), [*found]
            assert len(expected) == 100 and 0 < int(continued) <= step < 100, (continued, step)
            worst = max(abs(found[step] - loss) for step, loss in expected.items())
            print(f"| {case} | {lost}, {step} | {seconds:.1f} s | {continued} | {len(found)} | "
                  f"{worst:.1g} |", flush=True)
            assert worst < 1e-3, found
            messages.append(message)
            if case == "separate":
                assert [*(scratch / "second/cache").rglob("view_1*.i8")]
                assert not (scratch / "second/run").exists()  # rank 0 writes it
        print("\nWhat the other printed:")
        for message in messages:
            print(f"- {message}")
    print(f"\n{time.monotonic() - begin:.0f} seconds in all; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["silent"]:
            silent(sys.argv[2])
        else:
            main(sys.argv[1:] or [*CASES])
    except (AssertionError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"failed: {error}")
