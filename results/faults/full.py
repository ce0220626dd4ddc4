"""Fill a real disk while training writes to it, and see that nothing is lost.

    python results/faults/full.py        # as root, on Linux: it mounts a tmpfs; about two minutes

The run of kill.py has its cache and run folder on a file system of 16 MB, and a ballast file beside
them that leaves too little space for one thing after the other. Each time training must end with
status 2 and a message, keep its last checkpoint, and leave no temporary file; after the ballast is
gone the same command goes on. In the end all must equal, byte for byte, a run with space enough.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

from kill import ENVIRONMENT, outcome, start

CASES = (  # what is full, what must be there before the disk is, the bytes left, the message
    ("the store", "", 1_000_000, "0.0 GB do not fit into"),
    ("its images", "cache/stores/*.tmp/images.u8", 0, "No space left"),
    ("the cache", "cache/stores/*[0-9a-f]/info.json", 200_000, "0.0 GB do not fit into"),
    ("a log line", "run/metrics.jsonl", 0, r"cannot write \S+/metrics.jsonl: .*No space left"),
    ("a checkpoint", "run/checkpoint_latest.pth", 200_000, r"cannot write \S+checkpoint_\S+.pth: "),
    ("the student", "", 200_000, r"cannot write \S+/student.safetensors: "),
)


@contextlib.contextmanager
def small_disk(size: str):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill(disk: Path, room: int) -> None:
    """Take all but `room` bytes of what is free; training may be writing at the same time."""
    with open(disk / "ballast", "wb") as file:
        while True:
            state = os.statvfs(disk)
            taken = state.f_bavail * state.f_frsize - room
            with contextlib.suppress(OSError):  # it has become less since
                os.posix_fallocate(file.fileno(), 0, taken // state.f_frsize * state.f_frsize)
                return


def run(disk: Path, before: str = "", room: int | None = None) -> tuple[int, str]:
    """Train; once `before` is there, all but `room` bytes are taken. Status and output."""
    if room is not None and not before:
        fill(disk, room)
    process = start(disk, "--log_every", "1")
    if before:
        while process.poll() is None and not list(disk.glob(before)):
            time.sleep(0.001)
        fill(disk, room)
    text, _ = process.communicate()
    (disk / "ballast").unlink(missing_ok=True)
    return process.returncode, text


def main() -> None:
    print(f"{ENVIRONMENT}\n\n| the disk is full for | message |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as peace, small_disk("16m") as disk:
        status, text = run(Path(peace))
        assert status == 0, text
        expected, latest = outcome(Path(peace)), disk / "run" / "checkpoint_latest.pth"
        for what, before, room, words in CASES:
            if what == "the student":  # of a run that lacks no more than that
                assert run(disk)[0] == 0
                (disk / "run" / "student.safetensors").unlink()
            status, text = run(disk, before, room)
            message = text[text.find("error: ") :].strip()
            assert status == 2 and re.search(words, message), text
            assert "Traceback" not in text and not list(disk.glob("run/*.tmp")), text
            assert not latest.exists() or not zipfile.ZipFile(latest).testzip()
            print(f"| {what} | {message.replace(str(disk), 'DISK')} |", flush=True)
        status, text = run(disk)
        assert status == 0 and outcome(disk) == expected, text
    print("\nThe run ended with the weights, optimiser, store, cache and logged steps of another.")


if __name__ == "__main__":
    main()
