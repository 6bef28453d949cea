"""One run of fio, on a machine that was left to settle."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

DIRECT = ("--direct=1", "--ioengine=libaio")
_settling = {"seconds": 0.5, "memory_bytes": 512 << 20}


@dataclass(frozen=True)
class Run:
    """What a run did. Latencies are those of the whole request, in microseconds."""

    iops: float
    mb_s: float
    mb_s_with_sync: float
    p99_us: float
    p999_us: float
    max_us: float


def hurry() -> None:
    """Settle for less: figures are rougher."""
    _settling.update(seconds=0.1, memory_bytes=256 << 20)


def settle(*, drop_caches: bool = False) -> None:
    """The dirty pages and the discards of one run are not the next one's burden.

    Memory is touched and given back, so that in a virtual machine the host need not back it during the run.
    """
    os.sync()
    if drop_caches:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    time.sleep(_settling["seconds"])
    memory_bytes = int(_settling["memory_bytes"])
    with mmap.mmap(-1, memory_bytes) as memory:
        for offset in range(0, memory_bytes, mmap.PAGESIZE):
            memory[offset] = 1


def run(path: Path, options: tuple[str, ...], size_bytes: int, seconds: float, log: Path | None = None) -> Run:
    """Run fio on a file; ``seconds`` bounds it. With ``log`` each request's latency is written there."""
    command = ["fio", "--name=row", f"--filename={path}", f"--size={size_bytes}", "--fallocate=none"]
    command += ["--output-format=json", "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=99:99.9"]
    command += options
    if seconds:
        command.append(f"--runtime={seconds}")
    if log is not None:
        command += [f"--write_lat_log={log}", "--log_max_value=1", "--log_avg_msec=100"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = job["read"] if job["read"]["io_bytes"] else job["write"]
    percentiles = side["lat_ns"]["percentile"]
    return Run(
        iops=side["iops"],
        mb_s=side["bw_bytes"] / 1e6,
        # fio leaves the time of a final fsync out of the bandwidth.
        mb_s_with_sync=side["io_bytes"] / max(1, job["job_runtime"]) / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        p999_us=percentiles["99.900000"] / 1000,
        max_us=side["lat_ns"]["max"] / 1000,
    )
