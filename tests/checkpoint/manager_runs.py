"""A manager of two levels, and damage to what it saved, for its tests."""

from checkpoint import Level


def levels(paths, ram_keep=2, disk_keep=2, disk_every=1):
    return [Level("ram", paths[0], keep=ram_keep), Level("disk", paths[1], keep=disk_keep, every=disk_every)]


def save(manager, step, state, meta=None, **how):
    return manager.save(step, state.arrays, state.layout, meta or {"at": step}, **how)


def restore(manager, state, step=None):
    return manager.restore(step, layout=state.layout, shardings=state.shardings)


def damage(root, step, at=0.5):
    """Flips a bit; at: which part of the data lies before."""
    (file,) = (root / f"step-{step:08d}").glob("data-*")
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1
    file.write_bytes(data)
