import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxsys.tokenizer import Tokenizer


def byte_tokenizer(eos: bool = True, vocab_size: int = 257) -> Tokenizer:
    """One token a byte, and an eos token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "<eos>", *(f"<unused{i}>" for i in range(vocab_size - 257))]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=[256] if eos else [])


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()
