"""What live weights cost: a model is trained, every step publishes, and requests run meanwhile, under each policy.

    python scripts/bench/swap.py [--model smollm2-135m-instruct] [--versions 200] [--policy switch]

Each step is a forward, a backward and a donating AdamW update of the arrays that the server reads; ``--together``
requests run and are followed by others. A swap is publishing a version and the first lease of it. Bytes are of all
arrays alive on the device: before, and at most from then on, looked at after each update and each batch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import get_args

from jaxsys.malloc import restart_with_tunables

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--versions", type=int, default=200, help="of each policy")
    parser.add_argument("--together", type=int, default=64, help="requests that run at a time")
    parser.add_argument("--tokens", type=int, default=24, help="that a request makes")
    parser.add_argument("--policy", choices=["switch", "recompute", "finish", "restart"], help="only this one")
    options = parser.parse_args()
    restart_with_tunables()

    from measure import machine

    from jaxsys.serve.scheduler import NewWeights

    run = Run(options.model)
    print(f"{options.model}, {machine()}; {options.versions} versions a policy, {options.together} requests at a time")
    print(f"parameters {run.bytes / MIB:,.0f} MiB, with the optimizer's state {3 * run.bytes / MIB:,.0f} MiB\n")
    columns = "policy", "done", "of several versions", "donated", "bytes before", "more at most", "swap, us", "compiles"
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    for policy in [options.policy] if options.policy else get_args(NewWeights):
        print(run.row(policy, options), flush=True)


class Run:
    """A trainer and a server of one model in one process."""

    def __init__(self, model: str):
        import jax
        import jax.numpy as jnp
        import numpy as np

        import jaxsys
        from jaxsys.graphs import Graphs
        from jaxsys.optim import Constant, OptimConfig
        from jaxsys.optim.optimizer import Optimizer
        from jaxsys.train.step import Step
        from parallelism import PARAMETERS, plan
        from parallelism.zero import state_plans

        llm = jaxsys.load(model, max_context=256, kv_bytes=256 << 20)
        self.engine, graphs = llm.engine, Graphs(llm.engine.graphs.mesh)
        built, self.live = self.engine.model, self.engine.live
        params = dict(self.live.like())
        plans = state_plans(plan(built.layout, graphs.mesh, PARAMETERS, built.units), PARAMETERS, PARAMETERS)
        optimizer = Optimizer(OptimConfig(schedule=Constant(), learning_rate=1e-6), built.layout, 10**6)
        step = Step(built, optimizer, jnp.float32, "none", plans.shardings)
        tokens = np.random.default_rng(0).integers(0, llm.config.vocab_size, (1, 1, 64)).astype(np.int32)
        place = np.arange(64, dtype=np.int32)[None, None]
        self.batch = {"tokens": tokens, "targets": tokens, "positions": place, "segments": np.ones_like(tokens)}
        state = graphs.compile("state", optimizer.init, params)(params)
        arguments = params, state, np.int32(0), self.batch
        self.updates = [graphs.compile("step", step.fused, *arguments, donate=d) for d in ((1,), (0, 1))]
        self.params, self.state, self.step = params, state, itertools.count()
        self.bytes = sum(a.nbytes for a in jax.tree.leaves(params))

    def update(self) -> tuple[bool, float]:
        """A step and what publishing it takes, in seconds; whether it donated the weights."""
        import jax
        import numpy as np

        from jaxsys.dispatch import dispatcher

        def work() -> tuple[bool, float]:
            donate = not self.live.held
            self.params, self.state, _ = self.updates[donate](
                self.params, self.state, np.int32(next(self.step)), self.batch
            )
            start = time.perf_counter()
            self.live.publish(self.params)
            self.live.lease()
            return donate, time.perf_counter() - start

        found = dispatcher().call(work)
        jax.block_until_ready(self.params)
        return found

    def row(self, policy: str, options: argparse.Namespace) -> str:
        import jax
        import numpy as np

        from jaxsys.graphs import LateCompileError, no_compiles
        from jaxsys.serve.sampling import Sampling

        engine, draw = self.engine, np.random.default_rng(0)
        engine.scheduler.new_weights = policy
        requests, swaps, donated, compiles = [], [], 0, "0"

        def alive() -> int:
            return sum(a.nbytes for a in jax.live_arrays())

        def add() -> None:
            prompt = draw.integers(0, engine.model.config.vocab_size, draw.integers(4, 60)).tolist()
            requests.append(engine.add_request(prompt, Sampling(options.tokens, temperature=0.0, stop=())))

        before = peak = alive()
        try:
            with no_compiles("updates"):
                while len(swaps) < options.versions:
                    running = sum(request.finish_reason is None for request in requests)
                    # None begins late, so that they end while versions are still published.
                    for _ in range(options.together - running if len(swaps) < options.versions // 2 else 0):
                        add()
                    engine.step(1)
                    peak = max(peak, alive())
                    donate, seconds = self.update()
                    peak = max(peak, alive())
                    swaps.append(seconds)
                    donated += donate
                engine.run(requests)
        except LateCompileError as error:
            compiles = str(error)
        done = sum(request.finish_reason == "length" for request in requests)
        mixed = sum(len(set(request.versions)) > 1 for request in requests)
        return (
            f"| {policy} | {done} of {len(requests)} | {mixed} | {donated} of {len(swaps)} | {before / MIB:,.0f} MiB | "
            f"{(peak - before) / MIB:,.0f} MiB | {statistics.median(swaps) * 1e6:.0f} | {compiles} |"
        )


if __name__ == "__main__":
    main()
