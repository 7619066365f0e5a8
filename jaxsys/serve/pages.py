"""Which pages of the KV pool are whose, and what in them can be used again. Plain Python: no array is seen here.

A page that is full never changes, so requests with the same beginning share it (PagedAttention, Kwon et al. 2023). It
is found again by a chained digest: of the digest of all before it and its own tokens, beginning with a root that says
whose keys and values these are (the version of the weights). What no request uses stays until its page is needed, the
least recently used first, and then moves to the host's memory if there is room (Pensieve, Yu et al. 2023). A page that
only begins alike is copied, as whoever wants it is about to write to it.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from jaxsys.serve.request import Request

# Entries after the same tokens that are compared with a request's; more would be searched at each admission.
BRANCHES = 8


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """Keys and values that can be used again: of ``tokens``, after all that ``parent`` is the digest of.

    page: where they lie in the pool, slot: where in host memory; None where they do not.
    """

    root: bytes
    parent: bytes
    digest: bytes
    tokens: tuple[int, ...]
    page: int | None
    slot: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Of a page's keys and values: ``copy`` from page to page, ``out`` from page to slot, ``in`` from slot to page.

    Moves are carried out in order, before the batch they come with.
    """

    kind: Literal["copy", "out", "in"]
    source: int
    target: int


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What is there of a request's tokens.

    full: its first pages. tail, alike: then an entry of which so many tokens are alike.
    computing: a running request that is about to have the next page.
    """

    full: list[Entry]
    tail: Entry | None = None
    alike: int = 0
    computing: Request | None = None

    def reach(self, page_size: int) -> int:
        """Tokens that need not be computed."""
        return len(self.full) * page_size + self.alike


class Pages:
    """Pages 1 to ``count`` - 1 of a pool of ``count``; page 0 is where unused rows write, and nobody's.

    page_size: positions a page holds. slots: pages that host memory has room for.
    moves: what is to be done before the next batch; whoever does it empties the list.
    """

    def __init__(self, count: int, page_size: int, slots: int = 0):
        if count < 2 or page_size < 1 or slots < 0:
            raise ValueError(f"a pool of {count} pages of {page_size} positions holds nothing")
        self.count, self.page_size = count, page_size
        self.moves: list[Move] = []
        self._free = list(range(count - 1, 0, -1))
        self._users = [0] * count
        self._entries: dict[bytes, dict[bytes, Entry]] = {}  # by root, by digest
        self._children: dict[bytes, dict[bytes, Entry]] = {}  # by parent, by digest; the newest last
        self._entry_of: dict[int, Entry] = {}
        self._idle: OrderedDict[Entry, None] = OrderedDict()  # of pages that nobody uses, longest unused first
        self._in_host: OrderedDict[Entry, None] = OrderedDict()
        self._free_slots = list(range(slots - 1, -1, -1))
        self._computing: dict[bytes, Request] = {}
        self._wanted: set[Entry] = set()  # by the request that begins now: they keep their slots

    @property
    def free(self) -> int:
        """Pages that can be had, those that hold something reusable included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages of running requests."""
        return self.count - 1 - self.free

    @property
    def cached(self) -> int:
        """Pages that can be had and hold something reusable."""
        return len(self._idle)

    @property
    def hosted(self) -> int:
        """Pages in host memory."""
        return len(self._in_host)

    def needed(self, positions: int) -> int:
        """Pages that hold ``positions`` positions."""
        return -(-positions // self.page_size)

    # ---------------------------------------------------------------------------------------------------- requests

    def match(self, request: Request, root: bytes) -> Match:
        """What is there of the request's tokens but the last, which must be computed to have something come of it.

        Where the prompt's log-probabilities are wanted nothing: each of its tokens is to be computed.
        """
        if request.sampling.prompt_logprobs:
            return Match([])
        entries, size, limit = self._entries.get(root, {}), self.page_size, request.goal - 1
        full: list[Entry] = []
        parent = root
        for digest in self._digests(request, root, limit // size):
            entry = entries.get(digest)
            if entry is None:
                if (other := self._computing.get(digest)) is not None:
                    return Match(full, computing=other)
                break
            full.append(entry)
            parent = digest
        rest = request.tokens[len(full) * size : min((len(full) + 1) * size, limit)]
        tail, alike = None, 0
        for child in list(reversed(self._children.get(parent, {}).values()))[:BRANCHES]:
            if (same := _alike(child.tokens, rest)) > alike:
                tail, alike = child, same
        return Match(full, tail, alike)

    def fits(self, match: Match, pages: int, spare: int = 0) -> bool:
        """Whether ``begin`` would find so many pages, those of ``match`` among them, and leave ``spare`` over."""
        idle = sum(entry in self._idle for entry in match.full)
        here = sum(entry.page is not None for entry in match.full)
        return self.free - idle - (pages - here) >= spare

    def begin(self, request: Request, root: bytes, match: Match, wanted: int, spare: int = 0) -> bool:
        """Gives a request pages, those of ``match`` first; False if there are not so many, and ``spare`` more."""
        if not self.fits(match, wanted, spare):
            return False
        here = [entry for entry in match.full if entry.page is not None]
        tail = match.tail
        if tail is not None and tail in self._idle and not self.fits(match, wanted, spare + 1):
            tail = None  # it cannot be kept while it is copied
        held = [*here, *([tail] if tail is not None and tail.page is not None else [])]
        for entry in held:
            self._use(entry)
        self._wanted = {*match.full, *([tail] if tail is not None else [])}
        pages = []
        for entry in match.full:
            if entry.page is None:
                entry.page = self._load(entry)
                self._entry_of[entry.page] = entry
            pages.append(entry.page)
        request.computed = len(pages) * self.page_size
        first = len(pages)
        if tail is not None:
            request.computed += match.alike
            if tail.page is None:
                pages.append(self._load(tail))
            else:
                pages.append(self._take())
                self.moves.append(Move("copy", tail.page, pages[-1]))
                self._leave(tail.page)
        pages += [self._take() for _ in range(wanted - len(pages))]
        self._wanted = set()
        request.pages = pages
        if not request.sampling.prompt_logprobs:
            for digest in self._digests(request, root, request.goal // self.page_size)[first:]:
                self._computing.setdefault(digest, request)
        return True

    def extend(self, request: Request, positions: int) -> bool:
        """More pages for a request, so that it has room for so many positions; False if there are not so many."""
        more = self.needed(positions) - len(request.pages)
        if more > self.free:
            return False
        request.pages += [self._take() for _ in range(more)]
        return True

    def computed(self, request: Request, root: bytes, before: int) -> None:
        """The request's keys and values reach from ``before`` to ``request.computed`` now: full pages can be shared."""
        size = self.page_size
        for i in range(before // size, request.computed // size):
            digest = self._digests(request, root, i + 1)[i]
            self._computing.pop(digest, None)
            self._index(request, root, i, digest)
        # The prompt's last page is not full, but siblings wait for it.
        if before < request.prompt_tokens <= request.computed and request.prompt_tokens % size:
            self._index_tail(request, root, request.prompt_tokens)

    def end(self, request: Request, root: bytes | None) -> None:
        """Takes a request's pages back. root: whose keys and values they hold, None if nobody can use them again."""
        self._not_computing(request)
        if root is not None and request.computed % self.page_size:
            self._index_tail(request, root, request.computed)
        # The last page first: what is unused longest is taken first, and a page is of no use without those before it.
        for page in reversed(request.pages):
            self._leave(page)
        request.pages, request.computed = [], 0

    def forget(self, root: bytes) -> None:
        """Nothing that was computed under a root will be asked for again."""
        for entry in self._entries.pop(root, {}).values():
            siblings = self._children[entry.parent]
            del siblings[entry.digest]
            if not siblings:
                del self._children[entry.parent]
            if entry.page is not None:
                del self._entry_of[entry.page]
                if entry in self._idle:
                    del self._idle[entry]
                    self._free.append(entry.page)
            self._drop_slot(entry)

    # ----------------------------------------------------------------------------------------------------- entries

    def _digests(self, request: Request, root: bytes, pages: int) -> list[bytes]:
        """Of the first full pages of a request; kept with it, as long as the root is the same."""
        known, size = request.digests, self.page_size
        if request.root != root:
            self._not_computing(request)
            request.root = root
            known.clear()
        for i in range(len(known), pages):
            known.append(_digest(known[-1] if known else root, request.tokens[i * size : (i + 1) * size]))
        return known[:pages]

    def _not_computing(self, request: Request) -> None:
        for digest in request.digests:
            if self._computing.get(digest) is request:
                del self._computing[digest]

    def _index_tail(self, request: Request, root: bytes, stop: int) -> None:
        """The page with the last of the first ``stop`` tokens, which is not full, can be found from now on."""
        full = stop // self.page_size
        parent = self._digests(request, root, full)[-1] if full else root
        tokens = request.tokens[full * self.page_size : stop]
        self._index(request, root, full, _digest(parent, tokens), stop)

    def _index(self, request: Request, root: bytes, i: int, digest: bytes, stop: int | None = None) -> None:
        """The i-th page of a request can be found from now on, if no other holds the same."""
        entries, page, size = self._entries.setdefault(root, {}), request.pages[i], self.page_size
        if digest in entries:
            return
        if (shorter := self._entry_of.get(page)) is not None:  # less of the same page
            self._drop_slot(shorter)
            self._drop(shorter)
        parent = self._digests(request, root, i)[i - 1] if i else root
        tokens = tuple(request.tokens[i * size : stop or (i + 1) * size])
        entry = entries[digest] = Entry(root, parent, digest, tokens, page)
        self._children.setdefault(parent, {})[digest] = entry
        self._entry_of[page] = entry

    def _use(self, entry: Entry) -> None:
        assert entry.page is not None
        self._users[entry.page] += 1
        self._idle.pop(entry, None)
        self._touch(entry)

    def _touch(self, entry: Entry) -> None:
        if entry in self._in_host:
            self._in_host.move_to_end(entry)

    def _leave(self, page: int) -> None:
        if self._users[page] < 1:
            raise ValueError(f"page {page} is released but not in use")
        self._users[page] -= 1
        if self._users[page] == 0:
            if (entry := self._entry_of.get(page)) is not None:
                self._idle[entry] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        """A page for one user; there must be one."""
        if self._free:
            page = self._free.pop()
        else:
            entry, _ = self._idle.popitem(last=False)
            page = self._give_up(entry)
        self._users[page] = 1
        return page

    def _give_up(self, entry: Entry) -> int:
        """The page of an entry, which goes to host memory if there is room, or else away."""
        page, entry.page = entry.page, None
        assert page is not None
        del self._entry_of[page]
        if entry.slot is None and (slot := self._slot()) is not None:
            entry.slot = slot
            self._in_host[entry] = None
            self.moves.append(Move("out", page, slot))
        if entry.slot is None:
            self._drop(entry)
        return page

    def _load(self, entry: Entry) -> int:
        """A page with what an entry has in host memory."""
        assert entry.slot is not None
        self._touch(entry)
        page = self._take()
        self.moves.append(Move("in", entry.slot, page))
        return page

    def _slot(self) -> int | None:
        """A slot of host memory, that of the longest unused if all are in use; None if there is none to be had."""
        if self._free_slots:
            return self._free_slots.pop()
        oldest = next((entry for entry in self._in_host if entry not in self._wanted), None)
        if oldest is None:
            return None
        self._drop_slot(oldest)
        if oldest.page is None:
            self._drop(oldest)
        return self._free_slots.pop()

    def _drop_slot(self, entry: Entry) -> None:
        if entry.slot is not None:
            self._free_slots.append(entry.slot)
            del self._in_host[entry]
            entry.slot = None

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.root][entry.digest]
        siblings = self._children[entry.parent]
        del siblings[entry.digest]
        if not siblings:
            del self._children[entry.parent]


def root_of(version: int) -> bytes:
    """Where digests begin: keys and values of one version of the weights."""
    return blake2b(b"version %d" % version, digest_size=16).digest()


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens from the beginning are the same."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
