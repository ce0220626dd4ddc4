"""What a smaller copy of the student's crops beside the targets could save: reading and cutting.

    python results/speed/rows.py FOLDER      # needs 4 GB of disk, and root for the cold rows

Rows of 224 px (151 kB) and of 96 px (28 kB), random bytes, in batches of 256 in random order, as a
training reads them. Prints milliseconds a batch: the median of 20 from the page cache, the mean
of 20 after the cache was dropped, and the CPU's own cut of the student's views out of the rows."""

import os
import sys
from pathlib import Path
from time import monotonic, process_time

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402

COUNT, BATCH, TIMES = 16_384, 256, 20


def times(job):
    """Seconds, and CPU seconds, of each of TIMES calls."""
    found = []
    for _ in range(TIMES):
        begin, used = monotonic(), process_time()
        job()
        found.append((monotonic() - begin, process_time() - used))
    return np.array(found) * 1000


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
    for size in (224, 96):
        path = folder / f"rows-{size}.u8"
        with open(path, "wb") as file:
            for _ in range(COUNT // BATCH):
                file.write(rng.bytes(BATCH * 3 * size * size))
            os.fsync(file.fileno())
        rows = data.Rows([path], torch.uint8, (COUNT, 3, size, size))
        read = lambda rows=rows: rows[rng.choice(COUNT, BATCH, replace=False)]  # noqa: E731
        times(read)
        wall, cpu = np.median(times(read), 0)
        print(f"{size} px, page cache: {wall:.1f} ms, {cpu:.1f} ms of CPU", flush=True)
        images, crops = read(), data.view_crops(np.arange(BATCH), 0, 0, 0.4)
        wall, _ = np.median(times(lambda: data.render(images, 96, *crops)), 0)  # noqa: B023
        print(f"{size} px, cut to 96 px on the CPU: {wall:.0f} ms", flush=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        print(f"{size} px, cold disk: {times(read).mean(0)[0]:.0f} ms", flush=True)
        path.unlink()
