"""The tokenizer inside GGUF metadata, as a ``tokenizers`` pipeline.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section Tokenizer. What each name of a pre-tokenizer
means is defined by llama.cpp (``src/llama-vocab.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from parallelism.errors import UserError

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# A chat model's files often list only the end of a text; these end a turn.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name -> patterns, each cutting the pieces that the ones before left.
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def backend_from_gguf(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """The pipeline, without post-processor, and whether a text begins with the bos token.

    Supports the models "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE). Raises UserError for others, for an
    unknown pre-tokenizer, and for a vocabulary that is missing or inconsistent.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens, types = _column(metadata, "tokens"), _column(metadata, "token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise UserError(
            f"GGUF tokenizer: {len(tokens)} tokens, {len(vocab)} different, {len(types)} types; "
            "expected the same number"
        )
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, vocab)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata, vocab, types), True
    else:
        raise UserError(f"GGUF tokenizer: model {model!r} is not supported, 'gpt2' and 'llama' are")
    control = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    user = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in user])
    return backend, bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))


def turn_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of control tokens that by their name end a turn of a conversation."""
    control = zip(_column(metadata, "tokens"), _column(metadata, "token_type"), strict=True)
    return [i for i, (token, kind) in enumerate(control) if kind == CONTROL and token in _TURN_ENDS]


def _column(metadata: Mapping[str, Any], name: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list):
        raise UserError(f"GGUF tokenizer: the metadata has no tokenizer.ggml.{name}; the file carries no tokenizer")
    return values


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UserError(f"GGUF tokenizer: pre-tokenizer {pre!r} is not supported, {', '.join(SPLITS)} are")
    merges = []
    for line in _column(metadata, "merges"):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    try:
        # Llama 3 takes a piece that is a token as it is, whatever the merges say.
        bpe = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises the bare type
        raise UserError(f"GGUF tokenizer: damaged merges ({error}); fetch the file again") from error
    backend = tokenizers.Tokenizer(bpe)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, pre == "llama-bpe"


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    scores = _column(metadata, "scores")
    # SentencePiece joins the neighbours whose union has the best score: the same as a BPE merge for each way to cut
    # a piece in two, ranked by the piece's score.
    pieces = {token: i for token, i in vocab.items() if types[i] == NORMAL}
    merges = [
        (-scores[i], i, piece[:cut], piece[cut:])
        for piece, i in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[:2])
    unknown = next((token for token, i in vocab.items() if types[i] == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [m[2:] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend
