"""What checkpoints cost: throughput against the disk itself and other libraries, and the stall of a training loop.

    python scripts/bench/checkpoints.py io [--megabytes 1024] [--rounds 5] [--processes 1] [--directory DIR]
    python scripts/bench/checkpoints.py train [--rounds 3]

io: the same arrays of random bytes, cut over eight devices as FSDP does, are saved, restored, and restored onto other
meshes, FSDP over two by tensor parallelism over four, and tensor parallelism over eight, by jaxsys and Orbax, in turn.
In one process there are besides torch's DCP, where torch is installed (one device, so no other mesh), and ``raw``,
which writes the bytes to one file with fsync, and reads them. Seconds are until the call's bytes are on stable storage,
or in arrays; of several processes until the last is done. Restores are out of the page cache for all. Peak memory is
beyond what there was with the arrays, of all processes.

train: the 25M Llama of the other benchmarks trains 20 steps with AdamW, donating, in the split form, without saving and
with a snapshot of every step to RAM and of every tenth to disk, in turn. A stall is time in which the devices have
nothing to do but wait for a save.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from measure import Quiet, Worker, answer

WAYS = ("save", "restore", "onto 2x4", "onto tensor 8")
CHUNK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["io", "train"])
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, choices=[1, 2, 4], default=1, help="that share the eight devices")
    parser.add_argument("--directory", help="on the disk to measure; a temporary one if not given")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(8 // options.processes))
        if options.processes > 1:
            import jax

            jax.distributed.initialize(f"localhost:{options.port}", options.processes, options.process)
        answer(WORKERS[options.worker](Path(options.directory) / options.worker, options.megabytes << 20))
    elif options.what == "io":
        io(options)
    else:
        train(options)


def io(options: argparse.Namespace) -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    try:
        alone = ("raw", "dcp")
        teams = {name: Team(name, root, options) for name in WORKERS if options.processes == 1 or name not in alone}
        for name in [name for name, team in teams.items() if team.ask("begin") is None]:
            teams.pop(name).close()
            print(f"{name}: not measured, it is not installed", file=sys.stderr)
        processes = [worker for team in teams.values() for worker in team.workers]
        with Quiet(processes), contextlib.closing(Memory(room=options.megabytes << 20 << 4)) as ours:
            for round_ in range(options.rounds + 1):
                teams["jaxsys"].ask("others", round_)
                for way in WAYS:
                    for name, team in teams.items():
                        ours.warm()
                        said = team.ask(way, round_)
                        if round_ and said is not None:  # the first warms up
                            found.setdefault((way, name), []).append(said)
        for team in teams.values():
            team.close()
    finally:
        shutil.rmtree(root)
    print(
        f"{options.megabytes} MiB, processes: {options.processes}; median (minimum-maximum) of {options.rounds}, in "
        "MB/s; median of the ratios of each round's rates"
    )
    print("| | | MB/s | to raw | to Orbax | peak beyond its arrays, MiB |\n|---|---|---|---|---|---|")
    for (way, name), values in found.items():
        rates = [options.megabytes * 1.048576 / seconds for seconds, _ in values]
        cells = [f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"]
        for peer in ("raw", "orbax"):
            theirs = found.get(("restore" if way.startswith("onto") and peer == "raw" else way, peer))
            ratios = [t / s for (s, _), (t, _) in zip(values, theirs, strict=True)] if theirs else []
            cells.append(f"{statistics.median(ratios):.2f}x" if ratios else "-")
        cells.append(f"{max(peak for _, peak in values) / 2**20:,.0f}")
        print(f"| {way} | {name} | {' | '.join(cells)} |")


class Team:
    """The processes of a contestant, asked at once: the slowest of them counts, and the memory of all."""

    def __init__(self, name: str, root: Path, options: argparse.Namespace):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = {"megabytes": options.megabytes, "directory": root, "processes": options.processes, "port": port}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, sys.argv[0], "io", *words, "--worker", name, "--process"]
        self.workers = [Worker(name, [*command, str(number)]) for number in range(options.processes)]
        self._pool = ThreadPoolExecutor(options.processes)

    def ask(self, way: str, round_: int = 0) -> tuple[float, float] | None:
        """Seconds and bytes of peak memory; None from who cannot do this."""
        answers = list(self._pool.map(lambda worker: json.loads(worker.ask(f"{round_} {way}")), self.workers))
        if None in answers:
            return None
        seconds, peaks = zip(*answers, strict=True)
        return max(seconds), sum(peaks)

    def close(self) -> None:
        list(self._pool.map(Worker.close, self.workers))


class Memory:
    """Keeps the machine's memory its own while a contestant is measured: all beyond ``room`` bytes is held.

    A virtual machine may give what is free back to its host, within seconds, and what is used next has to come from
    there first: at 0.3 GB/s on one such machine, at another time each time, and whoever came first would pay.
    """

    def __init__(self, room: int):
        self._held = self._take(max(free() - room, 0))

    @staticmethod
    def _take(nbytes: int) -> mmap.mmap:
        memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1
        return memory

    def warm(self) -> None:
        """Take what is free, and let it go."""
        self._take(max(free() - (256 << 20), 0)).close()

    def close(self) -> None:
        self._held.close()


def free() -> int:
    """Bytes of the machine's memory that nothing uses."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree:"))
    return int(line.split()[1]) << 10


# ------------------------------------------------------------------------------------------------------------- workers


def timed(ways: dict[str, Callable[[int], Any]]) -> Callable[[str], str]:
    """The replies of a worker, in JSON: seconds and bytes of peak memory of a way, null of one that it has not."""

    def reply(line: str) -> str:
        round_, way = line.strip().split(" ", 1)
        call = {"begin": int, **ways}.get(way)
        if call is None:
            return "null"
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, began = memory("VmRSS"), time.perf_counter()
        call(int(round_))
        return json.dumps([time.perf_counter() - began, memory("VmHWM") - before])

    return reply


def timed_not(line: str) -> str:
    """The reply of one that is not installed."""
    return "null"


def memory(what: str) -> int:
    """Of this process, in bytes; shared memory that is not its own (a tmpfs) is not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {what}")


def shapes(nbytes: int) -> dict[str, tuple[int, int]]:
    """Kernels as a model of 1024 wide has them, so many that they fill the bytes."""
    one = {"q": (1024, 1024), "up": (1024, 4096), "down": (4096, 1024)}
    layers = nbytes // sum(a * b * 4 for a, b in one.values())
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


def values(nbytes: int) -> Any:
    """Random bytes by name, as float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    for name, shape in shapes(nbytes).items():
        yield name, rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


def placed(nbytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays cut over eight devices, and the shardings to restore them into, by way."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = np.array(jax.devices())
    here = NamedSharding(Mesh(devices, ("fsdp",)), PartitionSpec("fsdp"))
    both = NamedSharding(Mesh(devices.reshape(2, 4), ("fsdp", "tensor")), PartitionSpec("fsdp", "tensor"))
    tensor = NamedSharding(Mesh(devices, ("tensor",)), PartitionSpec(None, "tensor"))
    arrays = {k: jax.make_array_from_callback(v.shape, here, v.__getitem__) for k, v in values(nbytes)}
    return arrays, {"restore": here, "onto 2x4": both, "onto tensor 8": tensor}


def raw(root: Path, nbytes: int) -> Callable[[str], str]:
    import numpy as np

    root.mkdir()
    data = np.concatenate([value.reshape(-1) for _, value in values(nbytes)]).view(np.uint8)

    def save(round_: int) -> None:
        path = root / str(round_)
        with path.open("xb") as file:
            for at in range(0, len(data), CHUNK):
                file.write(data[at : at + CHUNK].data)
            file.flush()
            os.fsync(file.fileno())
        (root / str(round_ - 1)).unlink(missing_ok=True)

    def restore(round_: int) -> None:
        found = np.empty(len(data), np.uint8)
        with (root / str(round_)).open("rb", buffering=0) as file:
            for at in range(0, len(found), CHUNK):
                file.readinto(found[at : at + CHUNK].data)

    return timed({"save": save, "restore": restore})


def jaxsys(root: Path, nbytes: int) -> Callable[[str], str]:
    import jax

    from checkpoint import Level, Manager
    from parallelism.layout import Layout, Logical, Stored

    arrays, targets = placed(nbytes)
    specs = [Logical(name, x.shape, x.dtype, (None, None)) for name, x in arrays.items()]
    layout = Layout([Stored(s.name, s.shape, s.dtype, s.axes, (s,)) for s in specs])
    manager = Manager([Level("disk", root, keep=1)], staging_bytes=256 << 20)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: jax.lax.bitcast_convert_type(
        ~jax.lax.bitcast_convert_type(x, "uint32"), "float32"), tree))  # fmt: skip
    state = {"arrays": arrays}

    def save(round_: int) -> None:
        manager.save(round_ + 1, state["arrays"], layout, {}).wait()

    def restore(round_: int, sharding: Any) -> None:
        found = manager.restore(layout=layout, shardings=dict.fromkeys(arrays, sharding))
        jax.block_until_ready(found.arrays)

    def others(round_: int) -> None:
        """So that the next save finds no byte that is there already."""
        state["arrays"] = jax.block_until_ready(change(state["arrays"]))

    restores = {way: partial(restore, sharding=sharding) for way, sharding in targets.items()}
    return timed({"save": save, "others": others, **restores})


def orbax(root: Path, nbytes: int) -> Callable[[str], str]:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        return timed_not
    import jax

    arrays, targets = placed(nbytes)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    checkpointer = ocp.AsyncCheckpointer(handler)

    def save(round_: int) -> None:
        checkpointer.save(root / str(round_), args=ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=CHUNK))
        checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            shutil.rmtree(root / str(round_ - 1), ignore_errors=True)

    def restore(round_: int, sharding: Any) -> None:
        how = {name: ocp.ArrayRestoreArgs(sharding=sharding) for name in arrays}
        found = checkpointer.restore(root / str(round_), args=ocp.args.PyTreeRestore(restore_args=how))
        jax.block_until_ready(found)

    root.mkdir(exist_ok=True)
    return timed({"save": save, **{way: partial(restore, sharding=sharding) for way, sharding in targets.items()}})


def dcp(root: Path, nbytes: int) -> Callable[[str], str]:
    try:
        import torch
        import torch.distributed.checkpoint as library
    except ImportError:
        return timed_not
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable()
    arrays = {name: torch.from_numpy(value) for name, value in values(nbytes)}

    def save(round_: int) -> None:
        writer = library.FileSystemWriter(root / str(round_), sync_files=True)
        library.save(arrays, storage_writer=writer, no_dist=True)
        shutil.rmtree(root / str(round_ - 1), ignore_errors=True)

    def restore(round_: int) -> None:
        found = {name: torch.empty_like(value) for name, value in arrays.items()}
        library.load(found, checkpoint_id=root / str(round_), no_dist=True)

    return timed({"save": save, "restore": restore})


WORKERS = {"raw": raw, "jaxsys": jaxsys, "orbax": orbax, "dcp": dcp}


# --------------------------------------------------------------------------------------------------------- a training

STEPS = 20


def train(options: argparse.Namespace) -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    ram = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    try:
        with Quiet():
            for round_ in range(options.rounds):
                for name in found:
                    saving = name == "with"
                    found[name].append(run(root / f"{name}-{round_}", ram if saving else None, 10 if saving else 10**6))
    finally:
        for path in (root, ram):
            shutil.rmtree(path)
    steps = {name: [r["step"] for r in rows] for name, rows in found.items()}
    ratios = [a / b for a, b in zip(steps["with"], steps["without"], strict=True)]
    stalls = [r["stall"] / r["saves"] / r["step"] for r in found["with"]]
    for name, rows in found.items():
        peak = max(r["peak"] for r in rows) / 2**20
        print(f"{name}: {statistics.median(steps[name]):.3f} s a step, peak resident memory {peak:,.0f} MiB")
    print(f"step with saving / without: {statistics.median(ratios):.3f}x ({min(ratios):.3f}-{max(ratios):.3f})")
    print(f"stall a save / step: {statistics.median(stalls):.2%} ({min(stalls):.2%}-{max(stalls):.2%})")


def run(directory: Path, ram: Path | None, every: int) -> dict[str, float]:
    """One training of its own process: median seconds of a step, seconds of stall, saves and peak bytes."""
    changes = {"run": directory, "steps": STEPS, "step_form": "split", "checkpoint.every": every}
    changes |= {"eval_every": 0, "eval_batches": 0}
    changes |= {"checkpoint.ram": ram, "checkpoint.ram_every": 1} if ram else {}
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jaxsys.cli.main", "train", "--config", "llama_25m", *options]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(training.pid, 0)
    if status:
        raise SystemExit("the training failed")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row][2:]
    stall = next(row["stall_seconds"] for row in rows if "stall_seconds" in row)
    return {
        "step": statistics.median(seconds),
        "stall": stall,
        "saves": STEPS if ram else 1,
        "peak": used.ru_maxrss << 10,
    }


if __name__ == "__main__":
    main()
