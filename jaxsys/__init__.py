"""Train and serve one sharded JAX model: ``jaxsys.load`` gives a model to generate with. See docs/generation.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsys.asynchronous import AsyncLLM
    from jaxsys.llm import LLM, load

__all__ = ["LLM", "AsyncLLM", "load"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the model and the engine are not needed by everything that imports jaxsys.
    if name in __all__:
        from jaxsys import asynchronous, llm

        return getattr(asynchronous if name == "AsyncLLM" else llm, name)
    raise AttributeError(f"module 'jaxsys' has no attribute {name!r}")
