"""A tokenizer as GGUF metadata: the inverse of ``jaxsys.gguf_tokenizer``."""

from __future__ import annotations

import json
from typing import Any

from jaxsys.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError

# Words, numbers, signs, spaces, several scripts, emoji, source code, special tokens: what pre-tokenizers treat apart.
_PROBE = (
    "Hello, world! I'll say we've 1234567 reasons — don't I?  \n\n\t tabs   and  spaces  ",
    "naïve café 漢字かな 한국어 Привет עברית 🙂👩\u200d👩 ٣² ½",
    "def f(x):\n    return x ** 2  # $x_1 += y^{10} <= |z|~\r\n",
    " leading, HE'LL AND we'Re 12 345 6",
    "",
)


def tokenizer_to_gguf(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The metadata by which ``Tokenizer.from_gguf``, and llama.cpp, encode as this tokenizer does.

    size: of the model's vocabulary; ids that are no token's are filled. Raises UserError for what GGUF cannot say.
    """
    if tokenizer.vocab_size > size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}; give the model its own")
    state = json.loads(tokenizer.backend.to_str())
    if state["model"].get("type") != "BPE":
        raise _not_said(f"its model {state['model'].get('type')!r}; BPE is there")
    merges = _merges(state)
    ids = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(size)]
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": _types(state, ids, size)}
    if (state["decoder"] or {}).get("type") == "ByteLevel":
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre_tokenizer(state)}
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    else:
        rank: dict[str, int] = {}
        for i, merge in enumerate(merges):
            rank.setdefault("".join(merge), i)
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        metadata["tokenizer.ggml.scores"] = [-float(rank.get(token, len(merges))) for token in tokens]
        metadata["tokenizer.ggml.add_space_prefix"] = '"Prepend"' in json.dumps(state["normalizer"])
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.encode("a")[:1] == [tokenizer.bos_id]
    unknown = tokenizer.backend.token_to_id(state["model"].get("unk_token") or "")
    special = {"bos": tokenizer.bos_id, "padding": tokenizer.pad_id, "unknown": unknown}
    special |= dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in special.items() if i is not None}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    back = Tokenizer.from_gguf(metadata)
    # By scores any two neighbours that make a token are joined, by merges only those that are listed.
    pairs = {"".join(pair).replace("▁", " ") for pair in {*merges} ^ {*_merges(json.loads(back.backend.to_str()))}}
    # At the beginning of a text, and after what joins nothing.
    texts = [begin + pair for pair in sorted(pairs | {pair.lstrip() for pair in pairs}) for begin in ("", "\0")]
    _check(tokenizer, back, [*_PROBE, *texts])
    return metadata


def _merges(state: dict[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]]


def _types(state: dict[str, Any], ids: dict[int, str], size: int) -> list[int]:
    """The type of each token."""
    types = [NORMAL if i in ids else UNUSED for i in range(size)]
    for i, token in ids.items():
        if state["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for added in state["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if (unknown := state["model"].get("unk_token")) is not None:
        types = [UNKNOWN if ids.get(i) == unknown else kind for i, kind in enumerate(types)]
    return types


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """The name in GGUF of the pattern that pieces are cut by."""
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = []
    for step in steps:
        if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns += step["pattern"].values()
        elif step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] * step["use_regex"]
        else:
            raise _not_said(f"its pre-tokenizer's step {step.get('type')!r}")
    found = next((name for name, own in SPLITS.items() if own == patterns), None)
    if found is None:
        raise _not_said(f"its pre-tokenizer's patterns; those of {', '.join(SPLITS)} are there")
    return found


def _check(tokenizer: Tokenizer, back: Tokenizer, texts: list[str]) -> None:
    """Raises UserError unless what is read back does as the tokenizer that was to be said."""
    for text in texts:
        if back.encode(text) != tokenizer.encode(text):
            raise _not_said(f"how it encodes {text[:20]!r}")
    if (back.bos_id, back.pad_id) != (tokenizer.bos_id, tokenizer.pad_id) or not {*tokenizer.eos_ids} <= {
        *back.eos_ids
    }:
        raise _not_said(f"the tokens {[*tokenizer.eos_ids]} that end a text")


def _not_said(what: str) -> UserError:
    return UserError(f"a GGUF file cannot say this tokenizer: {what}; write hf or native")
