"""Two processes on one machine that find each other over gloo."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

WORLD = 2


def run_pair(script, *arguments, seconds):
    """Run a script in WORLD processes; it finds its rank in the environment. One that fails ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with ExitStack() as stack:
        running = []
        for rank in range(WORLD):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, script, *map(str, arguments)],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append((process, output))
        end = time.monotonic() + seconds
        while time.monotonic() < end and {process.poll() for process, _ in running} <= {None, 0}:
            if all(process.returncode == 0 for process, _ in running):
                return
            time.sleep(0.1)
        found = []
        for process, output in running:
            output.seek(0)
            found.append(f"rank {len(found)}, code {process.returncode}: {output.read()[-3000:]}")
        raise AssertionError("\n".join(found))
