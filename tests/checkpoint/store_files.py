"""Files in a store of checkpoints, for tests of stores."""

STEP = "step-00000001"


def write(store, directory, name, data):
    """data: bytes, or some after the other."""
    with store.create(directory, name) as file:
        for part in [data] if isinstance(data, bytes) else data:
            file.write(part)
