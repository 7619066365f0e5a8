"""Recipes: functions that return a training configuration, to be run as they are, changed with --set, or copied."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxsys.models.config import ModelConfig
from jaxsys.optim import AdamW, Cosine, OptimConfig
from jaxsys.train.config import CheckpointConfig, DataConfig, TrainConfig
from parallelism.errors import UserError, unknown_name


def smollm2_finetune() -> TrainConfig:
    """SmolLM2-135M-Instruct on the Python standard library, on a laptop CPU."""
    return TrainConfig(
        run="runs/smollm2-finetune",
        init_from="smollm2-135m-instruct",
        data=DataConfig(source="stdlib", batch_size=8, seq_len=128),
        optim=OptimConfig(AdamW(weight_decay=0.0), Cosine(warmup_steps=5), learning_rate=2e-4),
        checkpoint=CheckpointConfig(every=20),
        steps=40,
        eval_every=20,
    )


def llama_25m() -> TrainConfig:
    """A 25M-parameter Llama from scratch: what ``scripts/bench/train_step.py`` measures, on real text."""
    return TrainConfig(
        run="runs/llama-25m",
        model=ModelConfig(
            "llama", vocab_size=49152, d_model=384, n_layers=8, n_heads=6, n_kv_heads=6, head_dim=64, d_ff=1536,
            max_seq_len=256, tie_embeddings=True,
        ),
        data=DataConfig(source="stdlib", tokenizer="smollm2-135m-instruct", batch_size=8, seq_len=256),
        optim=OptimConfig(schedule=Cosine(warmup_steps=100), learning_rate=1e-3),
        steps=2000,
        eval_every=200,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], TrainConfig]] = {f.__name__: f for f in (smollm2_finetune, llama_25m)}


def find(name: str) -> TrainConfig:
    """The configuration of a recipe: one named here, or ``path/to/file.py:function``."""
    path, colon, function = name.rpartition(":")
    if not colon:
        if name not in RECIPES:
            raise unknown_name("recipe", name, [*RECIPES, "path/to/file.py:function"])
        return RECIPES[name]()
    if not Path(path).is_file():
        raise UserError(f"recipe {name!r}: there is no file {path}; give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe {name!r}: {path} is not a .py file; give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    with _faults_of(path):
        spec.loader.exec_module(module)
    recipes = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == spec.name}
    if function not in recipes:
        raise unknown_name(f"recipe in {path}", function, recipes)
    with _faults_of(path):
        config = recipes[function]()
    if not isinstance(config, TrainConfig):
        raise UserError(f"recipe {name!r} returned {type(config).__name__}, expected a TrainConfig")
    return config


@contextlib.contextmanager
def _faults_of(path: str) -> Iterator[None]:
    """What the code of a recipe file raises is its writer's to mend: one line with the place in that file."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        if (
            isinstance(error, SyntaxError)
            and error.filename
            and os.path.abspath(error.filename) == os.path.abspath(path)
        ):
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else path
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"recipe {where}: {' '.join(what.split())}") from error
