"""Checkpoints in an object store, S3 or Google Cloud Storage or what speaks like them: ``ObjectStore``.

The names are those of ``checkpoint.storage``, after the prefix of the URL. An object appears whole or not at all, so
the manifest, put last, is a step's commit. Nothing tells a store that a process died, as the kernel tells a lock on a
file, so the writer holds a ``Lease``. Requests go through TensorStore; all end, well or with an ``ObjectError``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import posixpath
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from checkpoint.machine import machine, process
from checkpoint.manifest import CorruptError
from checkpoint.storage import MissingError, is_step, place_of
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

READ_BYTES = 8 << 20  # by one request; a connection alone does not fill the line
READS = 4  # requests at once for one caller
PROBE_BYTES = 1 << 20
SETTLE_SECONDS = 1.5  # longer than a store takes from asking whether a lock is free to writing it
RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}  # some 15 seconds

_SCHEMES = {"s3": "s3", "gs": "gcs"}


class ObjectError(OSError, UserError):
    """An object store cannot be reached or refuses, in one line."""

    def __init__(self, message: str):
        super().__init__(message)
        self.strerror = message


@dataclasses.dataclass(frozen=True)
class Object:
    """What a key holds, and the generation that a conditional write names; data is None where there is nothing."""

    data: bytes | None
    generation: bytes


class Bucket:
    """One bucket, each of whose requests ends within ``timeout`` seconds, tries after failures included.

    url: ``s3://bucket/...`` or ``gs://bucket/...``. For S3 the standard variables say the rest: AWS_ENDPOINT_URL,
    AWS_REGION and where credentials come from.
    Raises UserError if TensorStore is not there or the URL names no bucket.
    """

    def __init__(self, url: str, timeout: float):
        scheme, _, rest = url.partition("://")
        name = rest.partition("/")[0]
        if scheme not in _SCHEMES or not name:
            raise UserError(f"{url!r} is no place for checkpoints; use s3://bucket/..., gs://bucket/... or a path")
        driver = _SCHEMES[scheme]
        try:
            import tensorstore
        except ImportError as e:
            raise UserError(f"{url} needs the package tensorstore: pip install 'jaxsys[objects]'") from e
        self._root, self._timeout = f"{scheme}://{name}", timeout
        self.no_bucket = f"there is no bucket {name!r}; make it or check the URL"
        self._server = "the server"
        spec: dict[str, Any] = {"driver": driver, "bucket": name, f"{driver}_request_retries": RETRIES}
        if scheme == "s3":
            if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
                self._server = endpoint
                spec["endpoint"] = endpoint
                spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            if os.environ.get("AWS_ACCESS_KEY_ID"):  # they come first anyway: without a look at files and networks
                spec["aws_credentials"] = {"type": "environment"}
        try:
            self._kv: Any = tensorstore.KvStore.open(spec).result(timeout)
        except (ValueError, OSError) as e:
            raise UserError(f"cannot open {url}: {_line(e)}; check the URL and AWS_ENDPOINT_URL") from e
        self._range: Any = tensorstore.KvStore.KeyRange

    def url(self, key: str) -> str:
        return f"{self._root}/{key}"

    def get(self, key: str) -> Object:
        return self._object(self._end(self._kv.read(key), key))

    def read(self, key: str, spans: Iterable[tuple[int, int | None]]) -> Iterator[bytes | None]:
        """The bytes from start to stop (None: to the end) for each span; None where the object is not that long.

        Some spans are read at once. Raises FileNotFoundError if there is no such object.
        """
        waiting: list[Any] = []
        for start, stop in spans:
            waiting.append(self._kv.read(key, byte_range=slice(start, stop)))
            if len(waiting) == READS:
                yield self._part(waiting.pop(0), key)
        for future in waiting:
            yield self._part(future, key)

    def _part(self, future: Any, key: str) -> bytes | None:
        try:
            found = self._object(self._end(future, key))
        except _OutOfRange:
            return None
        if found.data is None:
            raise FileNotFoundError(key)
        return found.data

    @staticmethod
    def _object(found: Any) -> Object:
        return Object(found.value if found.state == "value" else None, found.stamp.generation)

    def put(self, key: str, data: bytes) -> None:
        self._end(self._kv.write(key, data), key)

    def swap(self, key: str, data: bytes | None, generation: bytes) -> bool:
        """Replace what has this generation (None: remove it); return whether it was done."""
        stamp = self._end(self._kv.write(key, data, if_equal=generation), key)
        # A request whose answer was lost is made again, and refused because of itself.
        return bool(stamp.generation) or self.get(key).data == data

    def remove(self, keys: Iterable[str]) -> None:
        for future, key in [(self._kv.write(key, None), key) for key in keys]:
            self._end(future, key)

    def keys(self, prefix: str) -> list[str]:
        """All that begin with ``prefix``, which ends in a slash or is empty, without it."""
        span = self._range(prefix, prefix[:-1] + chr(ord("/") + 1)) if prefix else self._range()
        # TensorStore could strip the prefix, but takes the process down when a server answers with other keys too.
        found = [key.decode() for key in self._end(self._kv.list(span), prefix)]
        return [key.removeprefix(prefix) for key in found if key.startswith(prefix)]

    def _end(self, future: Any, key: str) -> Any:
        try:
            return future.result(self._timeout)
        except TimeoutError:
            raise ObjectError(
                f"{self.url(key)}: no answer from {self._server} within {self._timeout:g} seconds; "
                f"check the network{self._credentials()}"
            ) from None
        except (ValueError, OSError, RuntimeError) as e:
            raise self._explained(_line(e), key) from e

    def _explained(self, said: str, key: str) -> Exception:
        code = said.partition(":")[0]
        if code == "OUT_OF_RANGE":
            return _OutOfRange(said)
        if code == "NOT_FOUND":
            return ObjectError(f"{self.url(key)}: {self.no_bucket}")
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            return ObjectError(
                f"{self.url(key)}: access is denied ({said}); check the rights on the bucket{self._credentials()}"
            )
        if "CURL" in said or "retry attempts" in said:
            return ObjectError(f"{self.url(key)}: {self._server} does not serve ({said}); check network and URL")
        return ObjectError(f"{self.url(key)}: {said}; check the URL, the region and the rights on the bucket")

    def _credentials(self) -> str:
        if self._root.startswith("gs:"):
            return " and the credentials (GOOGLE_APPLICATION_CREDENTIALS)"
        return f" and the credentials (AWS_ACCESS_KEY_ID is {'' if os.environ.get('AWS_ACCESS_KEY_ID') else 'not '}set)"


class _OutOfRange(Exception):
    """A range that begins or ends beyond the object's end."""


def _line(error: Exception) -> str:
    """What TensorStore says, in one line, without the bodies of answers."""
    return " ".join(re.sub(r"\s*\[[\w-]+='.*", "", str(error), flags=re.DOTALL).split()) or type(error).__name__


class ObjectFiles:
    """The files of the checkpoint whose objects begin with ``prefix``."""

    def __init__(self, bucket: Bucket, prefix: str, sizes: dict[str, int] | None = None):
        self.where = bucket.url(prefix)
        self._bucket, self._prefix = bucket, prefix
        self._sizes = {} if sizes is None else sizes

    def _key(self, name: str) -> str:
        return posixpath.normpath(posixpath.join(self._prefix, name))

    def _missing(self, name: str) -> MissingError:
        return MissingError(self._bucket.url(self._key(name)), name)

    def read(self, name: str) -> bytes:
        data = self._bucket.get(self._key(name)).data
        if data is None:
            raise self._missing(name)
        return data

    def size(self, name: str) -> int:
        """TensorStore does not tell it. What this store did not write itself is found by trying where it ends."""
        key = self._key(name)
        if key not in self._sizes:
            low, high = 0, PROBE_BYTES
            while self._reaches(name, high):
                low, high = high, 2 * high
            while high - low > PROBE_BYTES:
                middle = (low + high) // 2
                low, high = (middle, high) if self._reaches(name, middle) else (low, middle)
            rest = self._at(name, low, None) if low else self.read(name)
            self._sizes[key] = low + len(rest or b"")
        return self._sizes[key]

    def written(self, name: str) -> float | None:
        return None

    def _reaches(self, name: str, offset: int) -> bool:
        return self._at(name, offset, offset + 1) is not None

    def _at(self, name: str, start: int, stop: int | None) -> bytes | None:
        try:
            return next(self._bucket.read(self._key(name), [(start, stop)]))
        except FileNotFoundError:
            raise self._missing(name) from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        starts = range(0, len(buffer), READ_BYTES)
        spans = ((offset + at, offset + min(at + READ_BYTES, len(buffer))) for at in starts)
        try:
            for at, data in zip(starts, self._bucket.read(self._key(name), spans), strict=True):
                if data is None:
                    raise CorruptError(
                        f"file {self._bucket.url(self._key(name))} is truncated: it ends before byte "
                        f"{offset + len(buffer)}; use another checkpoint"
                    )
                buffer[at : at + len(data)] = data
        except FileNotFoundError:
            raise self._missing(name) from None


def files_at(url: str, timeout: float = 60.0) -> ObjectFiles:
    """The files of one checkpoint, which may be among the steps of a run or alone."""
    return ObjectFiles(Bucket(url, timeout), _prefix(url))


def _prefix(url: str) -> str:
    return url.partition("://")[2].partition("/")[2]


class Lease:
    """The right to write, as long as its holder lives: an object that the holder rewrites four times in ``seconds``.

    Who finds one that stays as it is for the time it says takes it over; at once, if its holder is a process of
    the same machine that is gone. Nobody's clock is compared with another's. Where conditional writes are atomic (S3
    itself, Google Cloud Storage) there is one holder. Elsewhere a store may ask first and write then: so a new holder
    looks again after SETTLE_SECONDS whether it still is the one. A holder that was stopped for longer than the lease,
    or cut off, finds out before it writes again (``check``), but what it had under way may still arrive.
    """

    def __init__(self, bucket: Bucket, key: str, where: str, seconds: float):
        self._bucket, self._key, self._where, self._seconds = bucket, key, where, seconds
        self._held: dict[str, Any] | None = None
        self._renewed = 0.0  # by time.monotonic
        self._lost: str | None = None
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, mark: str = "") -> None:
        """Blocks for the time of the lease if there is a holder of which nobody knows whether it lives."""
        held = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "process": process(os.getpid()),
            "mark": mark,
            "id": uuid.uuid4().hex,
            "seconds": self._seconds,
            "beats": 0,
        }
        seen: tuple[bytes | None, float] | None = None
        while True:
            found = self._bucket.get(self._key)
            holder = _holder(found.data)
            if holder is not None:
                alive = _alive(holder)
                if alive is None:
                    if seen is None:
                        logger.warning("%s; waiting up to %g s to see if it lives", self._by(holder), holder["seconds"])
                        seen = found.data, time.monotonic()
                    alive = found.data != seen[0]
                    if not alive and time.monotonic() - seen[1] < holder["seconds"]:
                        time.sleep(SETTLE_SECONDS)
                        continue
                if alive:
                    raise UserError(f"{self._by(holder)}; stop that or choose another place")
            began = time.monotonic()
            written = self._bucket.swap(self._key, json.dumps(held).encode(), found.generation)
            time.sleep(SETTLE_SECONDS)
            now = self._bucket.get(self._key)
            if written and _id(now) == held["id"]:
                break
            if now == found:
                raise ObjectError(f"cannot lock {self._where}: a write is refused, {self._bucket.no_bucket}")
            # Somebody else was faster; the next turn finds it alive.
        self._held, self._renewed, self._lost = held, began, None
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, name="checkpoint-lease", daemon=True)
        self._thread.start()

    def _by(self, holder: dict[str, Any]) -> str:
        return f"{self._where} is being written by process {holder['pid']} on host {holder['host']}"

    def mark(self) -> str | None:
        return (_holder(self._bucket.get(self._key).data) or {}).get("mark")

    def release(self) -> None:
        if self._held is None:
            return
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        try:
            found = self._bucket.get(self._key)
            if _id(found) == self._held["id"]:
                self._bucket.swap(self._key, None, found.generation)
        except OSError as e:
            logger.warning("%s; the lease ends by itself in %g s", e, self._seconds)
        self._held = None

    def check(self) -> None:
        """Raise ObjectError if this was the holder and is no more. Of the other processes of a job it asks nothing."""
        if self._held is None:
            return
        if time.monotonic() - self._renewed > self._seconds / 2:
            self._renew()
        if self._lost is not None:
            raise ObjectError(self._lost)

    def _beat(self) -> None:
        while self._lost is None and not self._ended.wait(self._seconds / 4):
            with contextlib.suppress(OSError):  # it is tried again, and before writing it must succeed
                self._renew()

    def _renew(self) -> None:
        with self._mutex:
            assert self._held is not None
            began = time.monotonic()
            found = self._bucket.get(self._key)
            self._held["beats"] += 1
            content = json.dumps(self._held).encode()
            if _id(found) == self._held["id"] and self._bucket.swap(self._key, content, found.generation):
                self._renewed = began
            elif self._lost is None:
                holder = _holder(found.data)
                now = self._by(holder) if holder else f"the lock of {self._where} was removed"
                self._lost = f"this process did not renew its lease in time, and now {now}; end one of the two"
                logger.error("%s", self._lost)


def _holder(data: bytes | None) -> dict[str, Any] | None:
    """Who wrote a lease; None if it is nobody's, or not a lease."""
    with contextlib.suppress(ValueError, TypeError):
        found = json.loads(data or b"")
        if isinstance(found, dict) and isinstance(found.get("seconds"), int | float):
            return {"host": "?", "pid": "?"} | found
    return None


def _id(found: Object) -> str | None:
    return (_holder(found.data) or {}).get("id")


def _alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder lives; None if it is on another machine, so that this one cannot know."""
    if holder.get("machine") != machine():
        return None
    return holder.get("process") == process(holder["pid"])


class ObjectStore:
    """Checkpoints under ``url``: ``s3://bucket/prefix`` or ``gs://bucket/prefix``. The bucket must exist.

    file_bytes: the largest data file that it wants, as each is in memory until it is sent. lease: seconds after which a
    writer that is not heard of is taken for dead. timeout: seconds that one request may take, so that
    ``file_bytes`` must pass in them.
    Requests raise ObjectError. Safe to use from several threads; files made in several are sent at the same time.
    """

    file_bytes: int | None = 64 << 20
    near = cached = False

    def __init__(self, url: str, *, lease: float = 60.0, timeout: float = 60.0):
        self.where = str(place_of(url))
        self._bucket = Bucket(self.where, timeout)
        prefix = _prefix(self.where)
        self._prefix = f"{prefix}/" if prefix else ""
        self._sizes: dict[str, int] = {}  # of what was written here
        self._lease = Lease(self._bucket, f"{self._prefix}.lock", self.where, lease)

    def acquire(self, mark: str = "") -> None:
        self._lease.acquire(mark)

    def mark(self) -> str | None:
        return self._lease.mark()

    def release(self) -> None:
        self._lease.release()

    def close(self) -> None:
        self.release()

    def names(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for key in self._bucket.keys(self._prefix):
            directory, _, name = key.partition("/")
            if is_step(directory) and name and "/" not in name:
                found.setdefault(directory, set()).add(name)
        return found

    def open(self, directory: str) -> ObjectFiles:
        return ObjectFiles(self._bucket, f"{self._prefix}{directory}", self._sizes)

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self.put(directory, name, file.getvalue())

    def put(self, directory: str, name: str, data: bytes) -> None:
        self._lease.check()
        key = self._key(directory, name)
        self._bucket.put(key, data)
        self._sizes[key] = len(data)

    def patch(self, directory: str, name: str, offset: int, data: bytes) -> None:
        """The object is written anew, whole."""
        there = self._bucket.get(self._key(directory, name)).data or b""
        before, after = there[:offset].ljust(offset, b"\0"), there[offset + len(data) :]
        self.put(directory, name, before + data + after)

    def delete(self, directory: str, names: Iterable[str]) -> None:
        self._lease.check()
        keys = [self._key(directory, name) for name in names]
        self._bucket.remove(keys)
        for key in keys:
            self._sizes.pop(key, None)

    def _key(self, directory: str, name: str) -> str:
        return f"{self._prefix}{directory}/{name}"
