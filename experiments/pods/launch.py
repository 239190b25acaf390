"""Train one run with several processes of this machine, as so many hosts would.

    python experiments/pods/launch.py --processes 2 --devices 2 -- train CONFIG.yaml

What stands after `--` goes to `lora_jax`, with `--distributed` behind it.  Each process has its
own CPU devices; they find each other over loopback.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO

GRACE = 120
"""Seconds that the others have to end by themselves once one has failed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of each")
    parser.add_argument("words", nargs="+", help="-- train CONFIG.yaml ...")
    options = parser.parse_args()
    port = free_port()
    processes = [start(number, port, options) for number in range(options.processes)]
    readers = [
        threading.Thread(target=prefix, args=(number, process.stdout))
        for number, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: [p.send_signal(n) for p in processes] and None)
    code = wait(processes)
    for reader in readers:
        reader.join()
    return code


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(number: int, port: int, options: argparse.Namespace) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lora_jax", *options.words, "--distributed"],
        env=environment(number, options.processes, options.devices, port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Ctrl-C comes to this process alone, which passes it on once.
        start_new_session=True,
    )


def environment(number: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What tells a process who it is, and gives it CPU devices of its own."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(number),
    }


def prefix(number: int, lines: TextIO) -> None:
    for line in lines:
        print(f"[{number}] {line}", end="", flush=True)


def wait(processes: list[subprocess.Popen]) -> int:
    """The first code that is not 0; the others are killed if they do not end soon after."""
    code, end = 0, float("inf")
    while any(process.poll() is None for process in processes):
        code = code or next((p.returncode for p in processes if p.returncode), 0)
        if code:
            end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    code = code or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
