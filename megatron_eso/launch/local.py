"""Start the ranks of a command that does not train: nothing to save, nothing to restart.

Training goes through launch/supervisor.py.
"""

import os
import socket
import subprocess
import sys
import time


def start_ranks(number: int, arguments: list[str]) -> int:
    """Run ``python -m megatron_eso ARGUMENTS`` on ``number`` ranks; return the exit code.

    If one rank fails, or this process is interrupted, all are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max((os.cpu_count() or 1) // number, 1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_eso", *arguments],
            env={
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(number),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(number)
    ]
    try:
        while True:
            codes = [process.poll() for process in ranks]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                code = failed[0] if failed else 0
                return code if code >= 0 else 128 - code
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
