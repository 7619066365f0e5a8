"""Checkpoints in the memory of the hosts of a job: ``HostsStore``, one store made of a directory on each.

Every host has a directory of its own, ``<root>/<host>`` on its tmpfs, which one process of that host serves to the
others (``checkpoint.remote``) for as long as it lives; one that is started again serves what the host still has. There
is nothing else that runs. A process writes its files

- to its own host (a level that a process's death does not touch), or
- to the peer of its host (``peers_of``), in another failure domain: what the death of a host does not touch.

A manifest goes to every host, so a step is committed while any host is there. A file is looked for on all of them: it
does not matter which process wrote it, where, and in a job of how many.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from checkpoint.header import is_file_name
from checkpoint.manifest import MANIFEST, CorruptError, Manifest, check_digest, resolved
from checkpoint.remote import SECRET_BYTES, RemoteStore, Server, UnreachableError, listen
from checkpoint.storage import Files, LocalStore, Store
from checkpoint.writer import writer_of
from parallelism.coordinator import Coordinator, default_coordinator, together
from parallelism.errors import UserError
from parallelism.multihost import coordinator_address

logger = logging.getLogger(__name__)

HOST, DOMAIN, ADDRESS = "JAXSYS_HOST", "JAXSYS_DOMAIN", "JAXSYS_ADDRESS"

T = TypeVar("T")


def peers_of(domains: Mapping[str, str]) -> dict[str, str]:
    """The peer of each host, which keeps its files; domains: of each host, what can fail as a whole (rack, power).

    Each host is the peer of one. In order of domain and name it is the one half of the way round: so half of the hosts
    may go, any whole domain among them, or one of each two that are half of the way apart, and nothing is lost.
    Raises UserError if there is no such order.
    """
    order = sorted(domains, key=lambda host: (domains[host], host))
    half = len(order) // 2
    if not half:
        raise UserError(f"a job on one host ({order[0]}) has no peer to keep checkpoints; leave out the level of peers")
    domain, most = Counter(domains.values()).most_common(1)[0]
    if most > half:
        raise UserError(
            f"failure domain {domain!r} has {most} of the {len(order)} hosts, expected at most {half}, so that each "
            f"has a peer in another one; spread the job, or name finer domains ({DOMAIN})"
        )
    return {host: order[(i + half) % len(order)] for i, host in enumerate(order)}


class HostsFiles:
    """The files of one checkpoint, each on the host that has it: looked for once, and what is nowhere not again."""

    def __init__(self, store: HostsStore, directory: str):
        self.where = f"{store.where}/{directory}"
        self._store, self._directory = store, directory
        self._found: dict[str, Store | str] = {}  # or why not

    def read(self, name: str) -> bytes:
        """Of a manifest the copy on the first host, in the order of names, where it is whole: in all processes the same
        one, although a save that failed may have replaced some."""
        if name != MANIFEST:
            files, file = self._at(name)
            return files.read(file)
        damage: CorruptError | None = None
        for store in self._store.stores.values():
            try:
                data = store.open(self._directory).read(name)
                check_digest(data, f"{store.where}/{self._directory}/{name}")
                return data
            except CorruptError as e:
                damage = damage or e
        assert damage is not None
        raise damage

    def size(self, name: str) -> int:
        files, file = self._at(name)
        return files.size(file)

    def written(self, name: str) -> float | None:
        files, file = self._at(name)
        return files.written(file)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        files, file = self._at(name)
        files.read_into(file, offset, buffer)

    def _at(self, name: str) -> tuple[Files, str]:
        directory, file = resolved(self._directory, name)
        if name not in self._found:
            try:
                self._found[name] = self._store.find(directory, file)
            except CorruptError as e:
                self._found[name] = str(e)
        store = self._found[name]
        if isinstance(store, str):
            raise CorruptError(store)
        return store.open(directory), file


class HostsStore:
    """A store whose files are on the hosts of a job. All its processes make it, in the same order.

    root: of the directories, the same in all processes; a path in tmpfs. peers: files go to the peer of the host that
    writes them, else to that host.
    host: the name of this one, by default ``JAXSYS_HOST`` or what it calls itself; domain: what fails together with it,
    by default ``JAXSYS_DOMAIN`` or itself alone; address: where the others reach it, and where alone it listens, by
    default ``JAXSYS_ADDRESS`` or all that it has. seconds: of silence, after which a host is taken for gone; what needs
    it then raises CorruptError (reading), so that a reader turns to another level, or OSError (writing).

    Process 0 is the writer. Processes of one host share its directory, and the first of them serves it.
    Raises UserError, in all processes, where hosts and directories do not make sense together.
    """

    file_bytes: int | None = None
    cached = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        peers: bool = False,
        coordinator: Coordinator | None = None,
        host: str | None = None,
        domain: str | None = None,
        address: str | None = None,
        seconds: float = 30.0,
    ):
        self.where, self.near = f"{'peers' if peers else 'hosts'}:{root}", not peers
        coordinator = coordinator or default_coordinator()
        address = address or os.environ.get(ADDRESS)
        own = host or os.environ.get(HOST) or socket.gethostname()
        self._index = coordinator.index
        self._server: Server | None = None
        self.stores: dict[str, Store] = {}

        def introduce() -> dict[str, Any]:
            if not is_file_name(own) or own.startswith("."):
                raise UserError(f"this host is called {own!r}, which cannot be the name of a directory; set {HOST}")
            secret = secrets.token_hex(SECRET_BYTES)
            return {"host": own, "domain": domain or os.environ.get(DOMAIN), "root": str(root), "secret": secret}

        def serve() -> dict[str, Any]:
            local = self.stores[own] = LocalStore(Path(root) / own)
            place = _place(local.root)
            if len(set(hosts)) == 1 or hosts.index(own) != self._index:
                return {"place": place}
            try:
                listener = listen(address)
            except OSError as e:
                raise UserError(
                    f"host {own} cannot listen at {address or 'any address'} ({e.strerror}), where others are to "
                    f"reach its checkpoints; set {ADDRESS} to an address of its own"
                ) from e
            self._server = Server(listener, local, secret, own, seconds)
            return {
                "place": place,
                "addresses": [address] if address else _addresses(),
                "port": listener.getsockname()[1],
            }

        try:
            processes = together(coordinator, "hosts", introduce)
            hosts, secret = [process["host"] for process in processes], bytes.fromhex(processes[0]["secret"])
            self._targets = _targets(processes, peers)
            served = together(coordinator, "hosts", serve)
            _check_places(hosts, [each["place"] for each in served])
            for name, at in zip(hosts, served, strict=True):
                if name not in self.stores:
                    where = f"{root}/{name}"
                    self.stores[name] = RemoteStore(where, name, at["addresses"], at["port"], secret, seconds)
        except BaseException:
            self.close()
            raise
        self._own = own
        self.stores = dict(sorted(self.stores.items()))

    def close(self) -> None:
        """Stop serving this host's directory to the others, and let another writer in there."""
        if self._server is not None:
            self._server.close()
        for store in self.stores.values():
            if isinstance(store, RemoteStore):
                store.close()
            else:
                store.release()

    def find(self, directory: str, name: str) -> Store:
        """The host that has a file. Raises CorruptError if none has that can be reached."""
        missing: list[CorruptError] = []
        # First where it most likely is: here, and where its writer would put it now.
        for host in dict.fromkeys([self._own, self._target(name), *self.stores]):
            try:
                self.stores[host].open(directory).size(name)
                return self.stores[host]
            except CorruptError as e:
                missing.append(e)
        gone = [e for e in missing if isinstance(e.__cause__, UnreachableError)]
        raise CorruptError(f"on no host that can be reached: {(gone or missing)[0]}")

    def _target(self, name: str) -> str:
        return self._targets[writer_of(name) % len(self._targets)]

    def _everywhere(self, do: Callable[[Store], T]) -> dict[str, T | OSError]:
        """``do`` on every host at once; the result, or what failed there, by host."""

        def tried(store: Store) -> T | OSError:
            try:
                return do(store)
            except OSError as e:
                return e

        with ThreadPoolExecutor(min(len(self.stores), 16), thread_name_prefix="checkpoint-hosts") as executor:
            return dict(zip(self.stores, executor.map(tried, self.stores.values()), strict=True))

    def _everywhere_or_fail(self, do: Callable[[Store], None]) -> None:
        failed = [error for error in self._everywhere(do).values() if error is not None]
        if failed:
            raise failed[0]

    # -- Store

    def acquire(self, mark: str = "") -> None:
        """Called in process 0. Locks the directory of every host, in the process that serves it."""
        taken: list[Store] = []
        try:
            for host, store in self.stores.items():
                try:
                    store.acquire(mark)
                except OSError as e:
                    raise UserError(
                        f"checkpoints in {self.where}: host {host} cannot be written ({e.strerror}); check its network "
                        f"and {ADDRESS} there"
                    ) from e
                taken.append(store)
            self._agree()
        except BaseException:
            for store in taken:
                with contextlib.suppress(OSError):
                    store.release()
            raise

    def _agree(self) -> None:
        """Put each manifest on the hosts that have none or another one: they lost it, or were not in the job when that
        step was saved, or saved again. Of several that is the first of which all files are there."""
        names = self.names()
        there = {f"{directory}/{name}" for directory, files in names.items() for name in files}
        for directory in [directory for directory, files in names.items() if MANIFEST in files]:

            def copy(store: Store, directory: str = directory) -> bytes | None:
                return _whole(store, directory)

            copies = list(self._everywhere(copy).values())
            whole = [found for found in copies if isinstance(found, bytes)]
            if len(whole) == len(copies) and len(set(whole)) == 1:
                continue
            complete = [found for found in whole if _complete(found, directory, there)]
            for found in (complete or whole)[:1]:
                try:
                    self.put(directory, MANIFEST, found)
                    logger.warning("the manifest of %s/%s is on all hosts again", self.where, directory)
                except OSError as e:
                    logger.warning("the manifest of %s/%s is not on all hosts: %s", self.where, directory, e.strerror)

    def mark(self) -> str | None:
        """As it is in the directory of this host."""
        return self.stores[self._own].mark()

    def release(self) -> None:
        """Lets another writer in, where this is the process that is one."""
        if self._index == 0:
            self._everywhere(lambda store: store.release())  # a host that is gone has none

    def names(self) -> dict[str, set[str]]:
        """Of all hosts that can be reached."""
        found: dict[str, set[str]] = {}
        for names in self._everywhere(lambda store: store.names()).values():
            if isinstance(names, UnreachableError):
                continue  # it has said so in the log
            if isinstance(names, OSError):
                raise names
            for directory, files in names.items():
                found.setdefault(directory, set()).update(files)
        return found

    def open(self, directory: str) -> HostsFiles:
        return HostsFiles(self, directory)

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[BinaryIO]:
        """On the host that this process writes to."""
        with self.stores[self._targets[self._index]].create(directory, name) as file:
            yield file

    def put(self, directory: str, name: str, data: bytes) -> None:
        """On every host. If one cannot be written the others have it all the same, and this raises what failed."""
        self._everywhere_or_fail(lambda store: store.put(directory, name, data))

    def patch(self, directory: str, name: str, offset: int, data: bytes) -> None:
        """Where the file is or, if that is nowhere, where its writer would put it now."""
        directory, name = resolved(directory, name)
        try:
            store = self.find(directory, name)
        except CorruptError:
            store = self.stores[self._target(name)]
            with contextlib.suppress(FileExistsError), store.create(directory, name):
                pass  # another process that mends the file may have made it
        store.patch(directory, name, offset, data)

    def delete(self, directory: str, names: Iterable[str]) -> None:
        """Where they are. If a host cannot be reached the others are done all the same, and this raises."""
        names = set(names)

        def on(store: Store) -> None:
            there = store.names().get(directory)
            if there is not None and (names & there or not there):
                store.delete(directory, names & there)

        self._everywhere_or_fail(on)


def _whole(store: Store, directory: str) -> bytes | None:
    """The manifest in a directory; None if it is damaged or not there."""
    try:
        data = store.open(directory).read(MANIFEST)
        check_digest(data, directory)
        return data
    except CorruptError:
        return None


def _complete(manifest: bytes, directory: str, there: set[str]) -> bool:
    """Whether all files that a manifest names are among these, which are ``<directory>/<name>``."""
    with contextlib.suppress(UserError):
        arrays = Manifest.decode(manifest, directory).arrays.values()
        return there >= {"/".join(resolved(directory, chunk.file)) for array in arrays for chunk in array.chunks}
    return False


def _targets(processes: list[dict[str, Any]], peers: bool) -> list[str]:
    """The host that each process writes to. Raises UserError if the processes were not told the same."""
    roots = {process["root"] for process in processes}
    if len(roots) > 1:
        raise UserError(f"checkpoints on the hosts are at {sorted(roots)}, expected the same path in all processes")
    domains: dict[str, str] = {}
    for process in processes:
        host, domain = process["host"], process["domain"] or process["host"]
        if domains.setdefault(host, domain) != domain:
            raise UserError(
                f"processes of host {host} are in failure domains {domains[host]!r} and {domain!r}; give all the same "
                f"{DOMAIN}, or machines of one name another {HOST} each"
            )
    peer = peers_of(domains) if peers else {host: host for host in domains}
    return [peer[process["host"]] for process in processes]


def _place(path: Path) -> list[Any]:
    """What tells a directory from those of the same name on other machines, and in other mounts."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    found = path.stat()
    return [boot.read_text().strip() if boot.exists() else "", found.st_dev, found.st_ino]


def _check_places(hosts: list[str], places: list[Any]) -> None:
    """Raises UserError unless processes that name the same host see the same directory there."""
    for host, place in zip(hosts, places, strict=True):
        if place != places[hosts.index(host)]:
            raise UserError(
                f"processes that call their host {host!r} have different directories there: they are on two machines, "
                f"or in containers; give each a name of its own ({HOST})"
            )


def _addresses() -> list[str]:
    """Where other hosts may reach this one, the likeliest first."""
    found = []
    if coordinator := coordinator_address():
        # A datagram socket that is connected sends nothing, but knows from which of its addresses it would.
        host, _, port = coordinator.rpartition(":")
        with contextlib.suppress(OSError):
            family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, socket.gethostname()]))
