"""Programs kept on disk by what they are made of: a later process loads them without tracing.

JAX's persistent cache is asked with a program that has been traced and lowered, which for thirty unrolled layers takes
longer than loading it. Here two names lead to a program: what it is made of (this source, the versions, the machine,
and the settings and shapes of the graph), and the text that it is lowered to, which stays when a change of the source
does not touch it. When they are more than ``MOST_BYTES``, those that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import platform
import threading
from pathlib import Path
from typing import Any

import jax
import xxhash
from jax.experimental import serialize_executable

from jaxsys.surroundings import code, digest, variables, versions
from parallelism.placement import Moves

DIGEST = 16  # bytes before those of a file
MOST_BYTES = 2 << 30  # of a directory; those of one model of 30 layers are some 25 MB
# Two that are loaded at once take twice as long each (glibc has one arena, see malloc.py), and one is wanted first.
_one_at_a_time = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a program beside itself. text: its other name. outputs: a tree such as it returns. costs:
    fields of ``GraphStats``."""

    text: str
    outputs: Any
    moves: Moves
    costs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class By:
    """How a program is kept: in a directory, for a device, under the name of what it is made of. What is damaged there
    counts as missing and is written anew."""

    directory: Path
    device: jax.Device
    made_of: str

    def known(self) -> Known | None:
        """What was known of it when its program was kept, which is there too."""
        known = _unpickled(_read(self._of_name))
        return known if isinstance(known, Known) and self._of_text(known.text).exists() else None

    def know(self, known: Known) -> None:
        """Lets what it is made of lead to a program that is there by its text."""
        _write(self._of_name, pickle.dumps(known))
        _evict(self.directory)

    def load(self, text: str, arguments: Any, outputs: Any) -> Any:
        """The program of a text; None if it is not there or XLA does not take it.

        arguments: a tuple such as it takes; outputs: a tree such as it returns.
        """
        data = _read(self._of_text(text))
        if data is None:
            return None
        trees = jax.tree.structure((arguments, {})), jax.tree.structure(outputs)
        try:
            with _one_at_a_time:
                return serialize_executable.deserialize_and_load(
                    data, *trees, self.device.client, execution_devices=[self.device]
                )
        except Exception:  # whatever XLA raises for what it cannot use
            return None

    def keep(self, text: str, compiled: Any) -> bool:
        """Writes a program that XLA has compiled in this process; whether it could be."""
        try:
            data, _, _ = serialize_executable.serialize(compiled)
        except (ValueError, TypeError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError):
            return False
        return _write(self._of_text(text), data)

    @property
    def _of_name(self) -> Path:
        return self.directory / f"{self.made_of}.known"

    def _of_text(self, text: str) -> Path:
        return self.directory / f"{text}.program"


def kept() -> Path | None:
    """The directory of kept programs, beside JAX's persistent cache; None where that is off or on no disk."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    if not directory or "://" in str(directory) or jax.process_count() > 1:
        return None
    return Path(directory) / "kept"


def name_of(*made_of: Any) -> str:
    """Of a program by what it is made of, beside the source. Raises ValueError for what has an address, no text."""
    text = repr(made_of)
    if (at := text.find(" at 0x")) >= 0:
        raise ValueError(f"a program cannot be kept by an object without a text: {text[max(at - 60, 0) : at]}")
    return _name(code(), text)


def name_of_text(text: str, *options: Any) -> str:
    """Of a program by what it is lowered to."""
    return _name(text, repr(options))


def _name(*parts: str) -> str:
    return digest(part.encode() for part in (*parts, repr(_surroundings())))


def _surroundings() -> tuple:
    """What else a program depends on: versions, the device and its processor, and JAX's settings."""
    device = jax.devices()[0]  # all of a process are of a kind
    settings = [(name, str(value)) for name, value in sorted(jax.config.values.items()) if "cache" not in name]
    kind = device.device_kind, device.client.platform_version, _processor()
    return versions(), variables(), kind, settings


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _unpickled(data: bytes | None) -> Any:
    try:
        return None if data is None else pickle.loads(data)
    except Exception:  # the classes of another version
        return None


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # not ours
        os.utime(path)  # so that it goes after what was not used since
    head, data = data[:DIGEST], data[DIGEST:]
    return data if xxhash.xxh3_128_digest(data) == head else None


def _write(path: Path, data: bytes) -> bool:
    """Whether it could be written."""
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(xxhash.xxh3_128_digest(data) + data)
        temporary.replace(path)
    except OSError:  # full, or not ours: a cache is not worth an end
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def _evict(directory: Path) -> None:
    """Removes what was not used for longest until no more than ``MOST_BYTES`` are left; who was about to load that
    compiles it."""
    found = []
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError):  # gone meanwhile
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            left -= size
