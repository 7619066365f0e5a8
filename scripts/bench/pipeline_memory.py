"""What a pipelined step of an 8B model takes on v5p, as the TPU compiler says: no TPU is needed, libtpu is (extra tpu).

    python scripts/bench/pipeline_memory.py [--layers 32] [STAGES/SCHEDULE/MICROBATCHES[/SLOTS] ...]

One line a case: slots of residuals on device and host, GB of temporaries on a device and on its host, seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time

os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}

from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from jaxsys.models.config import ModelConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, PipelineConfig, TrainConfig
from pipelines.buffers import allocate
from pipelines.schedule import Table

MODEL = ModelConfig(
    "llama", vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336,
    max_seq_len=4096,
)  # fmt: skip
TOPOLOGY = {4: "v5p:2x2x1", 8: "v5p:2x2x2"}
CASES = (
    "8/1f1b/8", "8/1f1b/32", "8/1f1b/32/4", "8/1f1b/32/2", "8/1f1b/32/1", "8/gpipe/8", "8/gpipe/12", "8/gpipe/32",
    "8/gpipe/16/1", "8/eager/32/2", "8/interleaved/32", "8/interleaved/32/3", "8/zb-h1/32", "8/zb-v/32", "4/1f1b/8",
    "4/1f1b/32", "4/1f1b/32/1", "4/gpipe/32", "4/interleaved/32", "4/zb-h1/32", "4/zb-v/32",
)  # fmt: skip


def line(case: str, layers: int) -> str:
    model = dataclasses.replace(MODEL, n_layers=layers)
    stages, schedule, microbatches, *slots = case.split("/")
    config = TrainConfig(
        run="none", model=model, mesh=f"stage={stages}", accumulate=int(microbatches),
        data=DataConfig(batch_size=int(microbatches), seq_len=model.max_seq_len),
        pipeline=PipelineConfig(schedule, device_slots=int(slots[0]) if slots else None),
    )  # fmt: skip
    begin = time.perf_counter()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[int(stages)])
    run = AbstractRun(config, model, topology.devices)
    table = getattr(run.step, "table", None)
    assert isinstance(table, Table)
    buffers = allocate(table)
    head = f"{case}: {buffers.made.depth} slots, {buffers.host_away.depth} on the host"
    try:
        run.prepare()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"{head}: {str(error).splitlines()[0]}"
    ((graph, _),) = run.launcher.programs
    stats = graph.stats
    device, host = ((n or 0) / 1e9 for n in (stats.temporary_bytes, stats.host_temporary_bytes))
    return f"{head}: {device:.1f} GB, {host:.1f} GB on the host, {time.perf_counter() - begin:.0f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--layers", type=int, default=MODEL.n_layers)
    options = parser.parse_args()
    for each in options.cases:
        print(line(each, options.layers), flush=True)
