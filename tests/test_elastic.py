"""One of two machines is lost while they train: a case of results/faults/elastic.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def missing() -> str:
    """What this machine lacks for network namespaces and torchrun, or ""."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program in ("ip", "unshare", "torchrun"):
        if not shutil.which(program):
            return f"needs {program}"
    probe = f"distill-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return made.returncode and f"needs network namespaces: {made.stderr.strip()}" or ""


@pytest.mark.slow
def test_the_other_machine_ends_and_the_same_command_gives_the_same_losses():
    if why := missing():
        pytest.skip(why)
    script = ROOT / "results/faults/elastic.py"
    done = subprocess.run([sys.executable, script, "separate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| separate | node1" in done.stdout
