"""What the engine serves together against transformers, one prompt after the other."""

import random

import pytest

import jaxsys
from jaxsys.console import Console
from jaxsys.data import documents
from jaxsys.export import Asked, reshard

pytestmark = pytest.mark.parity

MODEL, TOKENS = "smollm2-135m-instruct", 24


def test_fifty_prompts_of_mixed_lengths_end_as_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reshard(MODEL, tmp_path / "hf", Asked("hf"), Console(shown=False))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    llm = jaxsys.load(MODEL, max_context=256)
    draw, texts = random.Random(0), [document.text for document in documents("stdlib", 60)]
    prompts = [llm.encode(text)[: draw.choice([1, 3, 10, 40, 100, 200])] for text in draw.sample(texts, 50)]
    results = llm.generate(prompts, max_tokens=TOKENS, temperature=0.0, stop=())
    assert llm.engine.scheduler.counts.finished == 50
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )
        assert result.tokens == made[0, len(prompt) :].tolist()
