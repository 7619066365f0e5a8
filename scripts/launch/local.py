"""Runs a command as several processes of one job on this machine, each with virtual CPU devices of its own.

    python scripts/launch/local.py --processes 2 --devices 4 -- jaxsys train --config smollm2_finetune

Each line of output begins with the process it is from; a signal goes to all processes; the exit code is that of the
process that failed first. Once one has failed the others have ``--grace`` seconds to say why they end, then they are
killed, as they are (on Linux) when this script is. With ``--devices 0`` the command sees whatever devices the machine
has.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import BinaryIO

_print = threading.Lock()

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_c = ctypes.CDLL(None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many processes (2)")
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices of each (4)")
    parser.add_argument("--grace", type=float, default=90, help="seconds from one's failure to the end of all (90)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command: give it after --")
    if args.processes < 1 or args.devices < 0:
        parser.error(f"--processes {args.processes} --devices {args.devices}: expected at least 1 and 0")
    if shutil.which(command[0]) is None:
        parser.error(f"{command[0]}: no such program: give its path, or activate the environment that it is in")
    return run(command, args.processes, args.devices, args.grace)


def run(command: Sequence[str], count: int, devices: int, grace: float) -> int:
    port = free_port()
    processes: list[subprocess.Popen] = []
    # Before the first process is there: none may be left behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: [send(process, number) for process in processes])
    for index in range(count):
        # A session of its own: Ctrl-C in a terminal would otherwise reach each process twice.
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables(index, count, devices, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        processes.append(process)
    pumps = [
        threading.Thread(target=pump, args=(source, target.buffer, f"[{i}] ".encode()), daemon=True)
        for i, process in enumerate(processes)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for thread in pumps:
        thread.start()
    first, deadline = 0, float("inf")
    killed: set[int] = set()
    while True:
        running = {i: process for i, process in enumerate(processes) if process.poll() is None}
        failed = {i: process.returncode for i, process in enumerate(processes) if process.returncode}
        if failed and not first:
            index, first = next(iter(failed.items()))
            deadline = time.monotonic() + grace
            others = f"; process {named(running)} gets {grace:g} s to end" if running else ""
            say(f"process {index} {how_it_ended(first)}{others}")
        if not running:
            break
        if time.monotonic() > deadline and running.keys() - killed:
            say(f"process {named(running.keys() - killed)} did not end: killed")
            for process in running.values():
                send(process, signal.SIGKILL)
            killed |= running.keys()
        time.sleep(0.05)
    for thread in pumps:
        thread.join(timeout=5)
    return 128 - first if first < 0 else first


def named(indices: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(indices)))


def how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def say(text: str) -> None:
    with _print:
        print(f"local.py: {text}", file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """In a new process, before its program: the kernel kills it when this script is gone, however that ended."""
    _c.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def variables(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What tells a process which it is."""
    job = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_PROCESS_COUNT": str(count),
        "JAX_PROCESS_INDEX": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    return job | ({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} if devices else {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def pump(source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
    for line in source:
        with _print:
            target.write(prefix + line.rstrip(b"\n") + b"\n")
            target.flush()


if __name__ == "__main__":
    sys.exit(main())
