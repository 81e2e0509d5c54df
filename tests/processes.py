"""Two processes on one machine that find each other over gloo."""

import os
import socket
import subprocess
import sys

WORLD = 2


def run_pair(script, *arguments, seconds):
    """Run a script in WORLD processes; it finds its rank in the environment."""
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
    running = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
            process.communicate()
