"""The decode engine: one loop over plan, pack, launch, read. It compiles at the start and never after."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graphs
from jaxsys.kernels.alike import LEAST_SUMMED
from jaxsys.kernels.attention import Pool
from jaxsys.live import Live
from jaxsys.models.state import Model
from jaxsys.serve.batch import empty_batch, pack
from jaxsys.serve.forward import Form, Numerics, Output, make_forward
from jaxsys.serve.invariance import difference
from jaxsys.serve.moves import Mover
from jaxsys.serve.pages import Pages
from jaxsys.serve.pool import least_bytes, make_pool, page_bytes, pool_dtype
from jaxsys.serve.request import Made, Request, Top
from jaxsys.serve.sampling import Sampling, token_ids, whole
from jaxsys.serve.scheduler import Chunk, NewWeights, Plan, Scheduler, Size
from parallelism.errors import UserError, unknown_name
from parallelism.sharding import platform

# A pool of so many times what its sequences can use at once keeps enough of what was said before.
SPARE = 4
# In the order in which a start wants them: for a short prompt, for what continues it, for longer ones.
FAST = (Size(16, 16), Size(1, 1), Size(4, 4), Size(128, 16, queries=16), Size(512, 16, queries=128))
ALIKE = (Size(8, 8), Size(16, 16), Size(128, 16, queries=16), Size(512, 16, queries=16))
ONE = (Size(64, 16),)


# Of narrower heads XLA:CPU computes attention's products in several ways, and norms of heads too.
LEAST_HEAD_DIM = 64


def sizes_of(config: EngineConfig, model: Model, mesh: Mesh | None) -> list[tuple[Size, ...]]:
    """The shapes that suit the numerics here, those to try first first.

    Under ``invariant`` one of 64 rows is the last resort: with it everything goes through the same program. On one
    CPU device programs of several sizes agree with one another too, where nothing that is summed is too small.
    """
    if config.sizes:
        return [config.sizes]
    if config.numerics == "fast":
        return [FAST]
    c = model.config
    of_a_row = min(c.d_model, c.vocab_size, c.n_heads * config.page_size)
    wide = c.head_dim >= LEAST_HEAD_DIM and ALIKE[0].rows * of_a_row >= LEAST_SUMMED
    several = wide and c.qk_norm is None and c.experts is None
    alone = platform() == "cpu" and (mesh is None or mesh.size == 1)
    return [ALIKE, ONE] if several and alone else [ONE]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """max_context: tokens of one sequence, prompt included; None is as many as the model and the pool allow.

    kv_bytes: the most that the pool may take, over all devices; it takes no more than ``SPARE`` times what its
    sequences can use at once, the rest being for what can be used again. host_kv_bytes: host memory for more of that.
    page_size: positions a page; what attention reads at once. max_steps: tokens a sequence makes between two looks of
    the host. numerics: see ``jaxsys.serve.forward.Numerics``. sizes: the shapes that are compiled; None is those that
    suit the numerics (``sizes_of``). new_weights: what running requests do when weights are published, see
    ``jaxsys.serve.scheduler.NewWeights``.
    Raises UserError for a number that is not whole and positive, and for names that there are not.
    """

    max_context: int | None = None
    kv_bytes: int = 512 << 20
    host_kv_bytes: int = 0
    page_size: int = 64
    max_steps: int = 16
    numerics: Numerics = "fast"
    sizes: tuple[Size, ...] | None = None
    new_weights: NewWeights = "switch"

    def __post_init__(self) -> None:
        for name in ("max_context", "kv_bytes", "page_size", "max_steps"):
            if name != "max_context" or self.max_context is not None:
                whole(name, getattr(self, name), 1)
        whole("host_kv_bytes", self.host_kv_bytes, 0)
        if str(self.numerics) not in get_args(Numerics):
            raise unknown_name("numerics", str(self.numerics), get_args(Numerics))
        if str(self.new_weights) not in get_args(NewWeights):
            raise unknown_name("new_weights", str(self.new_weights), get_args(NewWeights))


class NonFiniteLogits(UserError):
    """The weights give NaN or infinite logits."""


@dataclasses.dataclass(frozen=True)
class Launched:
    """A batch on its way."""

    plan: Plan
    output: Output


class Engine:
    """Serves the parameters in ``live`` through graphs of its own in ``graphs``. For one thread.

    model: with the layout of those parameters; view: the name of a view of ``live`` to serve instead of them.
    name: of the model, in errors.
    The constructor compiles every graph and makes the pool; freeze ``graphs`` after it.
    Raises UserError if the pool's bytes do not hold one sequence of ``max_context``, and where ``invariant`` numerics
    do not hold, which is tried.
    """

    def __init__(
        self,
        model: Model,
        live: Live,
        graphs: Graphs,
        config: EngineConfig | None = None,
        *,
        view: str | None = None,
        name: str = "the model",
    ):
        self.config = config = config or EngineConfig()
        self.model, self.live, self.graphs, self.view, self.name = model, live, graphs, view, name
        params = live.like(view)
        dtype = pool_dtype(params)
        self._replicas = replicas_of(graphs)
        self.max_context, self._pages = pool_size(model, config, dtype, self._replicas)
        self._width = -(-self.max_context // config.page_size)
        self._slots = config.host_kv_bytes // page_bytes(model, config.page_size, dtype) // self._replicas
        room = self._replicas, self._pages, config.page_size, dtype
        self._make_pool = graphs.compile("kv_pool", make_pool(model, *room), made_of=(model.made_of, room))
        self.pool: Pool | None = None
        self._cold: list[Size] = []
        self._holding: frozenset[int] = frozenset()
        for sizes in sizes_of(config, model, graphs.mesh):
            self._build(sizes)
            wrong = difference(self, sizes) if config.numerics == "invariant" else None
            if wrong is None:
                return
            graphs.discard(self._forward.values())
        raise UserError(f"numerics 'invariant' does not hold here: {wrong}: use 'fast'")

    def _build(self, sizes: Sequence[Size]) -> None:
        """Everything that depends on the sizes, and the pool if there is none yet."""
        config, model, graphs, replicas = self.config, self.model, self.graphs, self._replicas
        form: Form = "fast" if config.numerics == "fast" else "alike" if len(sizes) > 1 else "one"
        self._of_batches = self._width, config.page_size, model.config.vocab_size, form != "one"
        params, pool = self.live.like(self.view), self._make_pool.outputs
        everywhere = None if graphs.mesh is None else NamedSharding(graphs.mesh, PartitionSpec())
        shardings = None if everywhere is None else (everywhere, jax.tree.map(lambda a: a.sharding, pool))
        self._forward = {}
        with graphs.at_once():
            for size in sizes:
                batch = jax.tree.map(
                    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
                    empty_batch(size, replicas, *self._of_batches),
                )
                forward = make_forward(model, size, config.max_steps, form)
                name = f"forward[{size.rows}x{size.sequences}]"
                made_of = model.made_of, size, config.max_steps, form
                self._forward[size] = graphs.compile(
                    name, forward, params, pool, batch, donate=(1,), out_shardings=shardings, made_of=made_of
                )
            self._mover = Mover(graphs, pool, self._slots)
        if self.pool is None:
            self.pool = self._make_pool()
        self._cold = list(sizes)
        self.schedule_over(sizes)

    def schedule_over(self, sizes: Sequence[Size]) -> None:
        """Begins anew, with nobody served and nothing known, over some of the sizes that are compiled."""
        pages = [Pages(self._pages, self.config.page_size, self._slots) for _ in range(self._replicas)]
        self.scheduler = Scheduler(pages, sizes, self.config.max_steps, new_weights=self.config.new_weights)

    # -------------------------------------------------------------------------------------------------- requests

    def add_request(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        """Makes a request and queues it."""
        request = self.make_request(prompt, sampling)
        self.add(request)
        return request

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def make_request(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        """The request for a prompt of token ids, not queued yet. max_tokens is cut to what the context has room for.

        Raises UserError for what is no list of token ids, an empty prompt, a token that is not in the vocabulary, and
        a prompt too long.
        """
        sampling, tokens = sampling or Sampling(), token_ids("prompt", prompt)
        vocabulary = self.model.config.vocab_size
        if not tokens:
            raise UserError("prompt: found no token, expected at least one: give a longer text")
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UserError(f"prompt: token {wrong[0]} is not in the vocabulary, expected 0 to {vocabulary - 1}")
        setting, largest = sampling.largest_token()
        if largest >= vocabulary:
            raise UserError(f"{setting}: token {largest} is not in the vocabulary, expected 0 to {vocabulary - 1}")
        # The last token of a score needs no position.
        room, wanted = self.max_context - len(tokens), min(sampling.max_tokens, 1) or -1
        if room < wanted:
            raise UserError(
                f"prompt of {len(tokens)} tokens, expected at most {self.max_context - wanted} in a context of "
                f"{self.max_context}: give a shorter prompt, or raise max_context if the model "
                f"({self.model.config.max_seq_len}) and the KV pool allow"
            )
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, max(room, 0)))
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        return Request(len(tokens), tokens, sampling, seed)

    def cancel(self, request: Request) -> None:
        """Drops a request and frees its pages."""
        self.scheduler.cancel(request)
        self._hold()

    @property
    def room(self) -> str:
        """The context and the pool, in words, and why the context is shorter than the model's where nobody asked."""
        asked, most = self.config.max_context, self.model.config.max_seq_len
        cut = f" of the model's {most}: kv_bytes={self.config.kv_bytes} holds no more"
        pages = sum(each.count - 1 for each in self.scheduler.pages)
        context = f"context {self.max_context}{cut if asked is None and self.max_context < most else ''}"
        return f"{context}; {pages} pages of {self.config.page_size}"

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The shapes of its graphs, in rising order."""
        return tuple(sorted(self._forward))

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.busy

    # ------------------------------------------------------------------------------------------------------ loop

    def step(self, max_steps: int | None = None) -> list[Request]:
        """Runs the next packed batch; returns the requests that finished with it.

        max_steps: tokens a sequence at most, where fewer than the configured number are wanted at once.
        Raises NonFiniteLogits if what the weights give is not finite.
        """
        launched = self.launch(max_steps)
        return [] if launched is None else self.finish(launched)

    def launch(self, max_steps: int | None = None) -> Launched | None:
        """The first half of ``step``, which does not wait for the devices; None if there is nothing to do.

        It is planned and launched in one piece of the dispatcher's work, so that weights do not change between.
        """

        def work() -> Launched | None:
            self.scheduler.publish(self.live.version)
            plan = self.scheduler.schedule(max_steps)
            self._hold()
            if plan is None:
                return None
            batch = pack(plan, *self._of_batches)
            lease = self.live.lease(self.view, plan.version)
            pool = self._make_pool() if self.pool is None else self.pool
            pool = self._mover.launch(pool, plan.moves)
            output, self.pool = self._forward[plan.size](dict(lease.params), pool, batch)
            self._cold = [size for size in self._cold if size != plan.size]
            return Launched(plan, output)

        return dispatcher().call(work)

    @property
    def cold(self) -> bool:
        """Whether some program has not run yet: the first time takes longer by up to seconds, as XLA:CPU prepares each
        product when it first comes to it."""
        return bool(self._cold)

    def warm(self) -> None:
        """Runs one of the programs that did not run yet, for nobody: its sequences lie in page 0, which is no one's."""

        def work() -> Output:
            size = self._cold[0]
            longest = max(min(size.rows - 1, self.max_context - 1), 1)
            counts = (longest, 1)[: min(size.sequences, size.rows)]
            asked = Sampling(2, temperature=0.0, prompt_logprobs=True)
            chunks = tuple(
                Chunk(Request(count, [0] * count, asked, 0, pages=[0] * self._width), 0, count, True)
                for count in counts
            )
            batch = pack(Plan(size, (chunks,) * self._replicas, 1), *self._of_batches)
            pool = self._make_pool() if self.pool is None else self.pool
            output, self.pool = self._forward[size](dict(self.live.lease(self.view).params), pool, batch)
            return output

        jax.block_until_ready(dispatcher().call(work))
        del self._cold[0]

    def finish(self, launched: Launched) -> list[Request]:
        """The second half of ``step``: waits for a batch; before the next is launched."""
        plan = launched.plan
        host = jax.device_get(launched.output)
        self._mover.settle()
        ran = int(host.steps)
        sampled = [(r, n) for r, chunks in enumerate(plan.chunks) for n, chunk in enumerate(chunks) if chunk.samples]
        logprobs = host.logprobs[:ran, [r for r, _ in sampled], [n for _, n in sampled]]
        if not all(np.isfinite(a).all() for a in (logprobs, host.target_logprobs)):
            raise NonFiniteLogits(
                f"{self.name}: its logits are not finite, so no token can be chosen or scored: its weights hold NaN or "
                "infinite values, or overflow their dtype; check the file, or take an earlier checkpoint"
            )
        for r, chunks in enumerate(plan.chunks):
            self._take_scores(host, r, chunks)
        made = [
            [
                [_made(host, (step, r, n), chunk) for n, chunk in enumerate(chunks)]
                for r, chunks in enumerate(plan.chunks)
            ]
            for step in range(ran)
        ]
        finished = self.scheduler.advance(plan, made)
        self._hold()
        return finished

    def _hold(self) -> None:
        """Says which weights requests are bound to."""
        if self.scheduler.versions != self._holding:
            self._holding = self.scheduler.versions
            dispatcher().call(self.live.hold, self, self.view, self._holding)

    def give_back(self) -> int:
        """Frees the memory of the pool and of the view that is served, until the next batch; returns the pool's bytes.

        Requests that run go on then, after their keys and values are computed again. Between batches.
        """

        def free() -> int:
            freed = sum(a.nbytes for a in jax.tree.leaves(self.pool))
            self.pool = None
            self.live.release(self.view)
            return freed

        self.scheduler.evict()
        return dispatcher().call(free)

    def _take_scores(self, host: Any, replica: int, chunks: Sequence[Chunk]) -> None:
        """Log-probabilities of the prompts' own tokens."""
        row = 0
        for chunk in chunks:
            request = chunk.request
            if request.sampling.prompt_logprobs:
                here = replica, slice(row, row + max(min(chunk.count, request.prompt_tokens - 1 - chunk.start), 0))
                # In place: a request that had to leave the pool may compute its prompt twice.
                at = slice(chunk.start, chunk.start + chunk.count)
                request.prompt_logprobs[at] = host.target_logprobs[here].tolist()
                if wanted := request.sampling.logprobs:
                    of_rows = host.target_top_tokens[here], host.target_top_logprobs[here]
                    request.prompt_top[at] = [_top(*of_row, wanted) for of_row in zip(*of_rows, strict=True)]
            row += chunk.count

    def run(self, requests: Iterable[Request], tick: Callable[[], object] = lambda: None) -> None:
        """Steps until these requests are finished, others with them. What is interrupted is cancelled.

        tick: called after each step.
        """
        requests = list(requests)
        try:
            while any(request.finish_reason is None for request in requests):
                self.step()
                tick()
        finally:
            for request in requests:
                self.cancel(request)

    def stream(self, request: Request, max_steps: int | None = None) -> Iterator[int]:
        """The tokens of a request as they are made, others running with it. Closed early, it cancels the request."""
        given = 0
        try:
            while True:
                yield from request.tokens[request.prompt_tokens + given :]
                given = request.made
                if request.finish_reason is not None:
                    return
                self.step(max_steps)
        finally:
            self.cancel(request)


def _made(host: Any, at: tuple[int, int, int], chunk: Chunk) -> Made:
    """What a chunk made; at: step, replica and number."""
    asked = chunk.request.sampling
    return Made(
        int(host.tokens[at]),
        float(host.logprobs[at]),
        float(host.processed[at]) if asked.processed_logprobs else None,
        _top(host.top_tokens[at], host.top_logprobs[at], asked.logprobs) if asked.logprobs else None,
    )


def _top(tokens: np.ndarray, logprobs: np.ndarray, wanted: int) -> Top:
    """The first so many of the most likely tokens that there are."""
    return [(int(t), float(p)) for t, p in zip(tokens[:wanted], logprobs[:wanted], strict=True) if p > -np.inf]


def replicas_of(graphs: Graphs) -> int:
    """How many replicas of an engine there are: the groups of devices that split a batch."""
    if graphs.mesh is None:
        return 1
    return math.prod(graphs.mesh.shape[axis] for axis in graphs.rules["replica"].mesh_axes)


def pool_size(model: Model, config: EngineConfig, dtype: np.dtype, replicas: int) -> tuple[int, int]:
    """Positions of the longest sequence, and pages of each replica. Raises UserError where the model or the pool's
    bytes do not hold one."""
    size = config.page_size
    affordable = config.kv_bytes // page_bytes(model, size, dtype) // replicas
    if affordable < 2:  # page 0 belongs to no sequence
        least = least_bytes(model, replicas, 1, size, dtype)
        raise UserError(f"kv_bytes={config.kv_bytes}, expected at least {least}: the smallest pool of this model")
    longest = min(model.config.max_seq_len, (affordable - 1) * size)
    wanted = longest if config.max_context is None else config.max_context
    if wanted > (most := model.config.max_seq_len):
        raise UserError(f"max_context {wanted}: expected 1 to {most}: the model was trained with {most} positions")
    if wanted > longest:
        need = least_bytes(model, replicas, wanted, size, dtype)
        raise UserError(
            f"max_context {wanted}: expected 1 to {longest}: a KV pool of {config.kv_bytes} bytes holds no more "
            f"({need} bytes hold the {wanted})"
        )
    sequences = max(s.sequences for s in config.sizes or FAST)
    return wanted, min(affordable, SPARE * sequences * -(-wanted // size) + 1)
