"""The engine's ``forward`` compiled for hardware that is not here, and what its program does with the pool."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.graphs import Graph, Graphs
from jaxsys.kernels.paged import PAGES, Pool
from jaxsys.models.config import ModelConfig
from jaxsys.models.state import build
from jaxsys.serve.batch import empty_batch
from jaxsys.serve.forward import make_forward
from jaxsys.serve.pool import make_pool
from jaxsys.serve.scheduler import Size
from parallelism import ACTIVATIONS, PARAMETERS, MeshSpec, plan, sharding_context
from parallelism.collectives import collectives
from parallelism.hlo import Program
from parallelism.sharding import spec_of
from scripts.aot_report import devices

MODEL = ModelConfig(
    "llama", vocab_size=4096, d_model=512, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1024, max_seq_len=8192
)  # fmt: skip
MOVES = ("copy", "transpose", "gather", "slice", "dynamic-slice", "convert", "select")
PAGE, COUNT, PER_SEQUENCE = 64, 512, 32


@dataclasses.dataclass(frozen=True)
class Served:
    graph: Graph
    pool: Pool
    storage: str
    tables: int

    @functools.cached_property
    def program(self) -> Program:
        return Program(self.graph.text)

    @property
    def layer(self) -> int:
        """Bytes of a layer's keys on one device."""
        k = self.pool.k
        return math.prod(k.sharding.shard_shape(k.shape)) // MODEL.n_layers * k.dtype.itemsize

    def faults(self, kernel: str) -> list[str]:
        """What a step should not do: move as much as a layer of the pool, or go without the kernel in every layer."""
        stats, found = self.graph.stats, []
        if stats.temporary_bytes >= self.layer:
            found.append(f"{stats.temporary_bytes} bytes of temporaries, {self.layer} a layer")
        if stats.aliased_bytes < 2 * MODEL.n_layers * self.layer:
            found.append(f"{stats.aliased_bytes} bytes are written in place")
        kernels = 0
        for _, each, times in self.program.walk():
            if each.opcode == "custom-call" and kernel in each.rest:
                kernels += times
            moves = each.opcode.startswith(
                ("copy", "transpose", "gather", "slice", "dynamic-slice", "convert", "select")
            )
            if moves and each.nbytes >= self.layer:
                found.append(f"{each.opcode} {each.shape}, {self.program.source(each)}")
        if kernels != MODEL.n_layers * self.tables:
            found.append(f"{kernels} kernels in {MODEL.n_layers} layers for {self.tables} tables of items")
        sent = [c for c in collectives(self.graph.text, self.pool.k.sharding.mesh) if c.nbytes >= self.layer // 16]
        return found + [str(each) for each in sent]


def serve(hardware: str, mesh_axes: str, size: Size) -> Served:
    """Bfloat16, on as many of the devices as the mesh has."""
    spec = MeshSpec.parse(mesh_axes)
    mesh = spec.build(devices(hardware)[: 4 if mesh_axes else 1])
    graphs, dtype = Graphs(mesh), np.dtype("bfloat16")
    with sharding_context(mesh, ACTIVATIONS):
        model = build(MODEL, dtype=dtype.name)
    placed = plan(model.layout, mesh, PARAMETERS, model.units)
    model = model.with_layout(placed.layout)
    whole = NamedSharding(mesh, PartitionSpec())

    def abstract(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    with sharding_context(mesh, ACTIVATIONS):
        pool = jax.eval_shape(make_pool(model, 1, COUNT, PAGE, dtype))
        split = NamedSharding(mesh, spec_of(pool.k.shape, PAGES))
    pool = Pool(abstract(pool.k, split), abstract(pool.v, split), abstract(pool.tokens, whole))
    params = {key: abstract(stored, placed.shardings[key]) for key, stored in placed.layout.items()}
    batch = empty_batch(size, 1, PER_SEQUENCE, PAGE, MODEL.vocab_size, True)
    batch = jax.tree.map(lambda a: abstract(a, whole), batch)
    out = whole, jax.tree.map(lambda a: a.sharding, pool)
    forward = make_forward(model, size, 16, "fast")
    graph = graphs.compile("forward", forward, params, pool, batch, donate=(1,), out_shardings=out)
    return Served(graph, pool, model.storage, len(batch.context.items))
