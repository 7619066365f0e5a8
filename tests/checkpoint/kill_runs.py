"""Kills a process that saves, at random moments, and looks at what it leaves.

Arguments: a directory, how many kills, a random seed, and how it saves. ``levels`` saves, promotes,
deletes and copies in one thread and without a device, so that it is killed soon; ``manager`` saves through a
``Manager``. Prints how many steps were committed and copies made.
"""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from crash_checks import CHUNK_BYTES, LAYOUT, check, copy, meta, open_level, there, values, version_of, write

from checkpoint import Level, Manager, cells, open_checkpoint
from parallelism.errors import UserError

KEEP = {"ram": 1, "disk": 2}


def save_by_levels(paths, step, done):
    levels = {name: open_level(paths[name], keep) for name, keep in KEEP.items()}
    for level in levels.values():
        level.acquire("")
    while True:
        step += 1
        write(levels["ram"], step)
        done("ram", step)
        if step % 2:
            continue
        levels["disk"].promote(step, levels["ram"])
        done("disk", step)
        if step % 4 == 0:
            copy(paths["disk"], paths["copies"] / str(step))
            done("copies", step)


def save_by_manager(paths, step, done):
    import jax

    manager = Manager([Level(name, paths[name], keep=keep) for name, keep in KEEP.items()], chunk_bytes=CHUNK_BYTES)
    while True:
        step += 1
        arrays = {name: jax.device_put(value) for name, value in values(step).items()}
        handle = manager.save(step, arrays, LAYOUT, meta(step))
        if step % 3:  # else two at a time
            handle.wait()
            for name in KEEP:
                done(name, step)


def killed(save, paths, step, after, seconds):
    """What a process that saves the steps after ``step`` had done when it was killed, as (where, step).

    That is ``seconds`` after it had done ``after`` things."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writes, b"ready 0\n")
            save(paths, step, lambda where, step: os.write(writes, f"{where} {step}\n".encode()))
        finally:
            os._exit(1)
    os.close(writes)
    with open(reads) as lines:
        done = [lines.readline() for _ in range(1 + after)]
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended before it was killed"
        return [(where, int(step)) for where, step in map(str.split, done[1:] + lines.readlines())]


def main(directory, kills, seed, how):
    cells.CELL_BYTES = 16
    rng = random.Random(int(seed))
    paths = {name: Path(directory, name) for name in (*KEEP, "copies")}
    paths["copies"].mkdir()
    promised = {name: [] for name in KEEP}
    committed = 0
    for _ in range(int(kills)):
        step = max((step for steps in promised.values() for step, _ in steps), default=0)
        save = {"levels": save_by_levels, "manager": save_by_manager}[how]
        for where, saved in killed(save, paths, step, rng.randrange(9), rng.uniform(0, 0.03)):
            if where == "copies":
                version_of(open_checkpoint(paths[where] / str(saved)))
            else:
                promised[where].append((saved, 0))
                committed += 1
        for name, keep in KEEP.items():
            last = check(paths[name], keep, promised[name])
            promised[name] += [(last, 0)]
        for left in {re.sub(r"\D", "", path.name) for path in paths["copies"].iterdir()}:
            try:
                copy(paths["disk"], paths["copies"] / left)
            except UserError:  # it was whole
                version_of(open_checkpoint(paths["copies"] / left))
        for path in paths["copies"].iterdir():
            assert not path.name.startswith("."), f"{path.name} is left over"
            assert there(path) == {"manifest.json", "data-00000.bin"}
    print(committed, len(list(paths["copies"].iterdir())))


if __name__ == "__main__":
    main(*sys.argv[1:])
