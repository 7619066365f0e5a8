"""A store in another process: ``Server`` answers for a ``LocalStore``, ``RemoteStore`` is the store that asks it.

Both sides show that they know the job's secret before anything else is done. S and C are 32 random bytes each, and the
name of the server's host is in what is signed, so that nobody is led to another host:

    server -> client    8 bytes MAGIC, S
    client -> server    C, HMAC-SHA256(secret, "client", S, C, host)
    server -> client    HMAC-SHA256(secret, "server", S, C, host)

Then messages go both ways, each a header (JSON, with the number of bytes ``nbytes`` that follow it) and those bytes:

    4 bytes length of the header, 32 bytes HMAC-SHA256(key, number of the message, header), header, bytes

There is a key of each direction, made of S and C, so a message of another connection, another direction or out of turn
is none. The bytes are bound to it by the connection only, and nothing is secret: chunks and manifests have digests of
their own, and the secret itself came by the job's coordination service, in the clear. A network on which others can
change what is on the way is not one for this.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import io
import json
import logging
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from checkpoint.header import is_file_name
from checkpoint.manifest import CorruptError, resolved
from checkpoint.storage import LocalStore
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

MAGIC = b"jaxsys/1"
SECRET_BYTES = 32
STRANGERS = 256
"""Connections that have not shown the secret yet; of more, the oldest is dropped, so nobody can hold the server."""
HANDSHAKE_SECONDS = 5.0

_NONCE_BYTES = _MAC_BYTES = 32
_LENGTH = struct.Struct(">I")
_HEADER_BYTES = 64 << 10
_PART_BYTES = 1 << 20  # what the server has of a file in memory
_UNANSWERED = 4  # writes under way to a server: so it receives the next while it writes one
_DIRECTORY = re.compile(r"step-[0-9]{8,20}")


class DisconnectedError(OSError):
    """The other side is gone, or does not speak as it should. silent: it said nothing for too long."""

    def __init__(self, why: str, silent: bool = False):
        super().__init__(errno.ECONNABORTED, why)
        self.why, self.silent = why, silent


class UnreachableError(OSError):
    """A host does not answer."""

    def __init__(self, host: str, why: str):
        super().__init__(errno.EHOSTUNREACH, f"host {host} cannot be reached ({why})")


@contextlib.contextmanager
def _on_socket() -> Iterator[None]:
    try:
        yield
    except DisconnectedError:
        raise
    except TimeoutError:
        raise DisconnectedError("no answer in time", silent=True) from None
    except OSError as e:
        raise DisconnectedError(e.strerror or str(e)) from None


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), hashlib.sha256)


class Connection:
    """A connection both sides of which know the secret; for one thread at a time.

    seconds: how long the other side may be silent in the middle of an exchange. All raise DisconnectedError.
    """

    def __init__(self, sock: socket.socket, send_key: bytes, receive_key: bytes, seconds: float):
        self._socket, self._seconds = sock, seconds
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(seconds)

    def send(self, header: dict[str, Any], data: Any = b"") -> None:
        view = memoryview(data).cast("B")
        self._send_header(header, len(view))
        with _on_socket():
            self._socket.sendall(view)

    def send_file(self, header: dict[str, Any], file: BinaryIO, offset: int, nbytes: int) -> None:
        """A message whose bytes are those of a file, from ``offset`` on."""
        self._send_header(header, nbytes)
        with _on_socket():
            if nbytes and self._socket.sendfile(file, offset, nbytes) != nbytes:
                raise DisconnectedError("the file was cut while it was sent")

    def _send_header(self, header: dict[str, Any], nbytes: int) -> None:
        head = json.dumps({**header, "nbytes": nbytes}).encode()
        assert len(head) <= _HEADER_BYTES
        mac = _hmac(self._send_key, self._sent.to_bytes(8, "big"), head)
        self._sent += 1
        with _on_socket():
            self._socket.sendall(_LENGTH.pack(len(head)) + mac + head)

    def receive(self) -> dict[str, Any]:
        """The next header; its ``nbytes`` bytes are to be taken (``receive_into``, ``parts``) before the next."""
        header = self._receive()
        if header is None:
            raise DisconnectedError("it closed the connection")
        return header

    def receive_when_it_comes(self) -> dict[str, Any] | None:
        """``receive``, however long that takes; None if the other side closed the connection instead."""
        with _on_socket():
            self._socket.settimeout(None)
            try:
                return self._receive()
            finally:
                self._socket.settimeout(self._seconds)

    def _receive(self) -> dict[str, Any] | None:
        length = bytearray(_LENGTH.size)
        with _on_socket():
            begun = self._socket.recv_into(length)
            self._socket.settimeout(self._seconds)
        if not begun:
            return None
        self.receive_into(memoryview(length)[begun:])
        (nbytes,) = _LENGTH.unpack(length)
        if nbytes > _HEADER_BYTES:
            raise DisconnectedError(f"a header of {nbytes} bytes")
        rest = bytearray(_MAC_BYTES + nbytes)
        self.receive_into(memoryview(rest))
        mac, head = bytes(rest[:_MAC_BYTES]), bytes(rest[_MAC_BYTES:])
        if not hmac.compare_digest(mac, _hmac(self._receive_key, self._received.to_bytes(8, "big"), head)):
            raise DisconnectedError("a message that is not signed with the key of this connection")
        self._received += 1
        return json.loads(head)

    def receive_into(self, buffer: memoryview) -> None:
        """Bytes of a message, as many as the buffer has."""
        done = 0
        with _on_socket():
            while done < len(buffer):
                n = self._socket.recv_into(buffer[done:])
                if not n:
                    raise DisconnectedError("it closed the connection in the middle of a message")
                done += n

    def receive_data(self, header: dict[str, Any]) -> bytes:
        """All bytes of a message."""
        data = bytearray(header["nbytes"])
        self.receive_into(memoryview(data))
        return bytes(data)

    def parts(self, header: dict[str, Any]) -> Iterator[memoryview]:
        """The bytes of a message piece by piece, all in the same small buffer."""
        left = header["nbytes"]
        buffer = memoryview(bytearray(min(left, _PART_BYTES)))
        while left:
            part = buffer[:left]
            self.receive_into(part)
            left -= len(part)
            yield part

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _exactly(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < nbytes:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(nbytes - len(data))
        if not part:
            raise DisconnectedError("it closed the connection")
        data += part
    return data


def _proof(secret: bytes, side: bytes, nonces: bytes, host: str) -> bytes:
    return _hmac(secret, side, nonces, host.encode())


def _keys(secret: bytes, nonces: bytes, host: str) -> tuple[bytes, bytes]:
    """Of what the client says, and of what the server says."""
    return _proof(secret, b"client says", nonces, host), _proof(secret, b"server says", nonces, host)


def connect(address: str, port: int, secret: bytes, host: str, seconds: float, within: float) -> Connection:
    """A connection to the server of a host, made within so many seconds; ``seconds`` as in ``Connection``.

    Raises DisconnectedError if there is no server, or one that does not know the secret.
    """
    deadline = time.monotonic() + within
    with _on_socket():
        sock = socket.create_connection((address, port), timeout=max(within, 0.001))
        try:
            hello = _exactly(sock, len(MAGIC) + _NONCE_BYTES, deadline)
            if not hello.startswith(MAGIC):
                raise DisconnectedError("something else listens there")
            own = secrets.token_bytes(_NONCE_BYTES)
            nonces = hello[len(MAGIC) :] + own
            sock.sendall(own + _proof(secret, b"client", nonces, host))
            if not hmac.compare_digest(_exactly(sock, _MAC_BYTES, deadline), _proof(secret, b"server", nonces, host)):
                raise DisconnectedError("it does not know the secret of this job")
            send_key, receive_key = _keys(secret, nonces, host)
            return Connection(sock, send_key, receive_key, seconds)
        except BaseException:
            sock.close()
            raise


def listen(address: str | None = None) -> socket.socket:
    """A socket on a free port: of this address only, or of all that the machine has."""
    if address is not None:
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, 0), family=family, backlog=1024)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)


class Server:
    """Serves a store to those that know the secret, in a thread of its own and one for each connection."""

    def __init__(self, listener: socket.socket, store: LocalStore, secret: bytes, host: str, seconds: float):
        self._listener, self._store = listener, store
        self._secret, self._host, self._seconds = secret, host, seconds
        self._lock = threading.Lock()
        self._closed = False
        self._strangers: dict[socket.socket, None] = {}
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, name=f"checkpoint-server-{host}", daemon=True).start()

    def close(self) -> None:
        """Stop, also in the middle of what is under way."""
        with self._lock:
            self._closed = True
            open_ = [self._listener, *self._strangers, *self._connections]
        for sock in open_:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed; or too many open files
                time.sleep(0.05)
                continue
            with self._lock:
                self._strangers[sock] = None
                if len(self._strangers) > STRANGERS:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)  # its thread finds out, and closes it
            try:
                threading.Thread(target=self._serve, args=(sock,), name="checkpoint-connection", daemon=True).start()
            except RuntimeError:  # no more threads
                self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(sock, None)
            self._connections.discard(sock)
        sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with contextlib.suppress(DisconnectedError), _on_socket():
                connection = self._authenticated(sock)
                with self._lock:
                    self._strangers.pop(sock, None)
                    self._connections.add(sock)
                    if self._closed:
                        return
                while (request := connection.receive_when_it_comes()) is not None:
                    self._answer(connection, request)
        finally:
            self._forget(sock)

    def _authenticated(self, sock: socket.socket) -> Connection:
        deadline, own = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_bytes(_NONCE_BYTES)
        sock.settimeout(HANDSHAKE_SECONDS)
        sock.sendall(MAGIC + own)
        hello = _exactly(sock, _NONCE_BYTES + _MAC_BYTES, deadline)
        nonces, proof = own + hello[:_NONCE_BYTES], hello[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", nonces, self._host)):
            raise DisconnectedError("it does not know the secret of this job")
        sock.sendall(_proof(self._secret, b"server", nonces, self._host))
        # A client whose machine is gone is found out within two minutes, or its thread would wait for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        receive_key, send_key = _keys(self._secret, nonces, self._host)
        return Connection(sock, send_key, receive_key, self._seconds)

    def _answer(self, connection: Connection, request: dict[str, Any]) -> None:
        # What comes with a request is taken before anything can fail, so that the next one is found after it.
        data = connection.receive_data(request)
        try:
            match request["op"]:
                case "names":
                    names = {directory: sorted(files) for directory, files in self._store.names().items()}
                    connection.send({}, json.dumps(names).encode())
                case "size":
                    directory, name = _place(request)
                    connection.send({"size": self._store.open(directory).size(name)})
                case "read":
                    self._read(connection, *_place(request), request["offset"], request["count"])
                case "create":
                    self._create(connection, *_place(request))
                case "put":
                    self._store.put(*_place(request), data)
                    connection.send({})
                case "patch":
                    self._store.patch(*_place(request), request["offset"], data)
                    connection.send({})
                case "delete":
                    places = [_place({**request, "name": name}) for name in json.loads(data)]
                    self._store.delete(_directory(request), [name for _, name in places])
                    connection.send({})
                case "acquire":
                    self._store.acquire(request["mark"])
                    connection.send({})
                case "mark":
                    connection.send({"mark": self._store.mark()})
                case "release":
                    self._store.release()
                    connection.send({})
                case op:
                    raise UserError(f"host {self._host} was asked for {op!r}; run the same version on all hosts")
        except DisconnectedError:
            raise
        except (UserError, OSError) as e:
            connection.send(_to_json(e))
        except (KeyError, TypeError, ValueError) as e:
            raise DisconnectedError(f"a request that makes no sense ({e})") from e

    def _read(self, connection: Connection, directory: str, name: str, offset: int, count: int | None) -> None:
        """count: None for all that there is from ``offset`` on."""
        path, size = self._store.root / directory / name, self._store.open(directory).size(name)
        count = size - offset if count is None else count
        if min(offset, count) < 0 or size < offset + count:
            raise CorruptError(
                f"file {path} is truncated: {size} bytes, expected at least {offset + count}; use another checkpoint"
            )
        with open(path, "rb") as file:
            connection.send_file({}, file, offset, count)

    def _create(self, connection: Connection, directory: str, name: str) -> None:
        failure: OSError | None = None
        with self._store.create(directory, name) as file:
            connection.send({})
            # Between two writes as much time may pass as the client needs to copy from its devices.
            while (request := connection.receive_when_it_comes() or {"op": None})["op"] == "write":
                for part in connection.parts(request):
                    try:
                        if failure is None:
                            file.write(part)
                    except OSError as e:
                        failure = e
                connection.send(_to_json(failure) if failure else {})
            if request["op"] != "end":
                raise DisconnectedError("it is gone in the middle of a file")
        connection.send({})


def _directory(request: dict[str, Any]) -> str:
    directory = request["directory"]
    if not isinstance(directory, str) or not _DIRECTORY.fullmatch(directory):
        raise UserError(f"{directory!r:.80} is not the directory of a step; run the same version on all hosts")
    return directory


def _place(request: dict[str, Any]) -> tuple[str, str]:
    """The directory and the name in a request. Raises UserError for what is not a file of a checkpoint."""
    name = request["name"]
    if not is_file_name(name):
        raise UserError(f"{name!r:.80} is not a file of a checkpoint; run the same version on all hosts")
    return _directory(request), name


def _to_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"error": "os", "errno": error.errno, "text": (error.strerror or str(error))[:4000]}
    return {"error": "corrupt" if isinstance(error, CorruptError) else "user", "text": str(error)[:4000]}


def _raise_from(reply: dict[str, Any], host: str) -> None:
    match reply.get("error"):
        case "os":
            raise OSError(reply["errno"], f"{reply['text']} (on host {host})")
        case "corrupt":
            raise CorruptError(reply["text"])
        case "user":
            raise UserError(reply["text"])


class RemoteFiles:
    """The files of a checkpoint in another host's directory. A host that cannot be reached has none: CorruptError."""

    def __init__(self, store: RemoteStore, directory: str):
        self.where = f"{store.where}/{directory}"
        self._store, self._directory = store, directory

    def _ask(self, op: str, name: str, into: memoryview | None = None, **fields: Any) -> tuple[dict[str, Any], bytes]:
        directory, name = resolved(self._directory, name)
        try:
            return self._store.request(op, into=into, directory=directory, name=name, **fields)
        except UnreachableError as e:
            raise CorruptError(
                f"file {self._store.where}/{directory}/{name}: {e.strerror}; use another checkpoint"
            ) from e

    def read(self, name: str) -> bytes:
        return self._ask("read", name, offset=0, count=None)[1]

    def size(self, name: str) -> int:
        return self._ask("size", name)[0]["size"]

    def written(self, name: str) -> float | None:
        return None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._ask("read", name, buffer.cast("B"), offset=offset, count=buffer.nbytes)


class RemoteStore:
    """The store that another process serves (``Server``) on ``host``, whose ``root`` it is.

    What cannot be done because the host does not answer raises UnreachableError, after ``seconds`` of silence at the
    latest; a connection that broke is made anew once. For as long after that the host counts as gone and is not asked.
    What fails there fails here with the same error.
    """

    file_bytes: int | None = None
    near = cached = False

    def __init__(self, root: str, host: str, addresses: Sequence[str], port: int, secret: bytes, seconds: float):
        self.where = root
        self._host, self._addresses, self._port = host, addresses, port
        self._secret, self._seconds = secret, seconds
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._gone: tuple[float, str] = (0.0, "")  # until when, and why

    def request(
        self, op: str, data: Any = b"", *, into: memoryview | None = None, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """The header and the bytes of the answer; the bytes go to ``into``, if that is given, which they must fill."""
        connection, reply, answer = self._exchange(op, data, into, fields)
        self._give_back(connection)
        _raise_from(reply, self._host)
        return reply, answer

    def _exchange(
        self, op: str, data: Any, into: memoryview | None, fields: dict[str, Any]
    ) -> tuple[Connection, dict[str, Any], bytes]:
        again = True
        while True:
            connection: Connection | None = None
            try:
                connection = self._take()
                connection.send({"op": op, **fields}, data)
                reply = connection.receive()
                if into is None or "error" in reply:
                    return connection, reply, connection.receive_data(reply)
                if reply["nbytes"] != len(into):
                    raise DisconnectedError(f"{reply['nbytes']} bytes came, {len(into)} were asked for")
                connection.receive_into(into)
                return connection, reply, b""
            except DisconnectedError as e:
                if connection is not None:
                    connection.close()
                self._close_idle()
                if e.silent or not again:
                    raise self._unreachable(e) from e
                again = False
            except BaseException:
                if connection is not None:
                    connection.close()  # what it is in the middle of nobody would take
                raise

    def _take(self) -> Connection:
        """A connection that is idle, or a new one."""
        with self._lock:
            until, why = self._gone
            if self._idle:
                return self._idle.pop()
        if time.monotonic() < until:
            raise UnreachableError(self._host, why)
        deadline, failed = time.monotonic() + self._seconds, []
        for number, address in enumerate(self._addresses):
            share = (deadline - time.monotonic()) / (len(self._addresses) - number)
            try:
                return connect(address, self._port, self._secret, self._host, self._seconds, share)
            except DisconnectedError as e:
                failed.append((f"{address} port {self._port}: {e.why}", e.silent))
        raise DisconnectedError(", ".join(why for why, _ in failed), any(silent for _, silent in failed))

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            self._idle.append(connection)

    def _unreachable(self, error: DisconnectedError) -> UnreachableError:
        with self._lock:
            self._gone = time.monotonic() + self._seconds, error.why
        found = UnreachableError(self._host, error.why)
        logger.warning("checkpoints in %s: %s", self.where, found.strerror)
        return found

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        self._close_idle()

    # -- Store

    def acquire(self, mark: str = "") -> None:
        self.request("acquire", mark=mark)

    def mark(self) -> str | None:
        return self.request("mark")[0]["mark"]

    def release(self) -> None:
        self.request("release")

    def names(self) -> dict[str, set[str]]:
        return {directory: set(files) for directory, files in json.loads(self.request("names")[1]).items()}

    def open(self, directory: str) -> RemoteFiles:
        return RemoteFiles(self, directory)

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[BinaryIO]:
        connection, reply, _ = self._exchange("create", b"", None, {"directory": directory, "name": name})
        if "error" in reply:
            self._give_back(connection)
            _raise_from(reply, self._host)
        file = _RemoteFile(connection, self._host)
        try:
            try:
                yield cast(BinaryIO, file)
            except DisconnectedError:
                raise
            except Exception:
                with contextlib.suppress(OSError):
                    file.end()  # so that what was written can be read
                raise
            file.end()
        except DisconnectedError as e:
            raise self._unreachable(e) from e
        finally:
            if file.ended:
                self._give_back(connection)
            else:
                connection.close()

    def put(self, directory: str, name: str, data: bytes) -> None:
        self.request("put", data, directory=directory, name=name)

    def patch(self, directory: str, name: str, offset: int, data: bytes) -> None:
        directory, name = resolved(directory, name)
        self.request("patch", data, directory=directory, name=name, offset=offset)

    def delete(self, directory: str, names: Iterable[str]) -> None:
        self.request("delete", json.dumps(list(names)).encode(), directory=directory)


class _RemoteFile(io.RawIOBase):
    """A file that a server writes: what fails there is raised by one of the next writes, or ``end``.

    ended: nothing is under way any more.
    """

    def __init__(self, connection: Connection, host: str):
        self._connection, self._host = connection, host
        self._unanswered, self.ended = 0, False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view):
            self._connection.send({"op": "write"}, view)
            self._unanswered += 1
            self._take_answers(_UNANSWERED)
        return len(view)

    def end(self) -> None:
        """On return what was written is on stable storage."""
        self._connection.send({"op": "end"})
        self._unanswered += 1
        self._take_answers(0)

    def _take_answers(self, left: int) -> None:
        answers = []
        while self._unanswered > left:
            answers.append(self._connection.receive())
            self._unanswered -= 1
        self.ended = left == 0
        for answer in answers:
            _raise_from(answer, self._host)
