"""Text to token ids and back: one Tokenizer, from a Hugging Face directory or from GGUF metadata.

Encoding is the ``tokenizers`` library's. Decoding is by bytes: each token stands for a byte string, the text is
their concatenation read as UTF-8, so that a stream of tokens and the whole give the same text.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import xxhash
from tokenizers import processors

from checkpoint.formats.gguf import GGUFFile
from jaxsys.chat import render
from jaxsys.gguf_tokenizer import backend_from_gguf, turn_ends
from jaxsys.hub import ModelSource
from parallelism.errors import UserError


class Tokenizer:
    """A tokenizer with its special ids and chat template.

    backend: the ``tokenizers.Tokenizer`` with vocabulary, pre-tokenizer and post-processor.
    bos_id, eos_ids, pad_id: ids that begin a text, end a generation (the first is the usual one), and fill.
    chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        self.backend = backend
        self.bos_id, self.eos_ids, self.pad_id = bos_id, tuple(dict.fromkeys(eos_ids)), pad_id
        self.chat_template = chat_template
        # Ids may have gaps, so that the number of tokens is less.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for what, token in (("bos", bos_id), ("pad", pad_id), *(("eos", token) for token in self.eos_ids)):
            if token is not None and backend.id_to_token(token) is None:
                raise UserError(f"tokenizer: the {what} id {token} is not in the vocabulary of {self.vocab_size}")
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._to_bytes, self._strip_first_space = _byte_reader(backend)
        self._bytes: dict[int, bytes] = {}

    @property
    def eos_id(self) -> int | None:
        return self.eos_ids[0] if self.eos_ids else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides the ids of a text and of its end."""
        state = f"{self.backend.to_str()}{self.bos_id}{self.eos_ids}"
        return xxhash.xxh3_128_hexdigest(state.encode())

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of ``text``. Special tokens written in the text become their ids.

        add_bos: True or False to begin with ``bos_id`` or not; None does what the model was trained with. The text of
        a chat template carries its own, so encode that with False.
        """
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """Token ids of each text, computed on all cores."""
        if add_bos and self.bos_id is None:
            raise UserError("tokenizer: add_bos is asked for, but this tokenizer has no bos token")
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)
        except TypeError as error:
            raise UserError("tokenizer: the text is not valid Unicode (it holds a lone surrogate)") from error
        prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
        return [prefix + encoding.ids for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; none for an id outside the vocabulary."""
        if token not in self._bytes:
            text = self.backend.id_to_token(token)
            self._bytes[token] = b"" if text is None else self._to_bytes(text)
        return self._bytes[token]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. skip_special leaves special tokens out."""
        stream = self.stream(skip_special)
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def stream(self, skip_special: bool = False) -> TextStream:
        """An incremental ``decode``."""
        return TextStream(self, skip_special)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation: ``messages`` of role and content, then the head of the answer if wanted.

        Raises UserError if the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise UserError("this model's tokenizer has no chat template; give a plain prompt instead of messages")
        special = {
            name: str(self.backend.id_to_token(token))
            for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id))
            if token is not None
        }
        return render(self.chat_template, messages, add_generation_prompt, special)

    def encode_message(self, text: str) -> list[int]:
        """Token ids of a conversation that one message of a user begins, up to where the answer goes on."""
        return self.encode(self.apply_chat_template([{"role": "user", "content": text}]), add_bos=False)

    @classmethod
    def of(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer that comes with a model: in its directory, its GGUF file, or beside its checkpoints."""
        if source.kind == "gguf":
            return cls.from_gguf(GGUFFile(source.path).metadata)
        if source.kind == "hf":
            return cls.from_hf(source.path)
        named = [place / "tokenizer" for place in source.places]
        found = [d for d in named if d.is_dir()]
        if source.kind != "native":  # the files of a Hugging Face directory, with other weights
            found += [d for d in source.places if (d / "tokenizer.json").is_file()]
        if not found:
            raise UserError(
                f"{source.path}: no tokenizer beside the checkpoint, expected {source.path / 'tokenizer'}: copy the "
                "model's there"
            )
        return cls.from_hf(found[0])

    @classmethod
    def from_hf(cls, directory: str | Path) -> Tokenizer:
        """From ``tokenizer.json`` and its companions in a Hugging Face directory.

        Special tokens are those of tokenizer_config.json, else special_tokens_map.json; generation_config.json may add
        ids that end a generation; the template is chat_template.jinja, else the configuration's. Raises UserError.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            hint = " (a tokenizer.model alone is not read: save it with transformers first)"
            raise UserError(f"{path}: no such file{hint if (directory / 'tokenizer.model').is_file() else ''}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare type
            raise UserError(f"{path}: not a tokenizer ({error}); fetch the file again") from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        named = {**_read_json(directory / "special_tokens_map.json"), **{k: v for k, v in config.items() if v}}
        generation = _read_json(directory / "generation_config.json")

        def special_id(name: str) -> int | None:
            token = named.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            return backend.token_to_id(token) if token else generation.get(f"{name}_token_id")

        more = generation.get("eos_token_id", [])
        eos = [special_id("eos"), *more] if isinstance(more, list) else [special_id("eos"), more]
        template = directory / "chat_template.jinja"
        return cls(
            backend,
            bos_id=special_id("bos"),
            eos_ids=[token for token in eos if token is not None],
            pad_id=special_id("pad"),
            chat_template=template.read_text("utf-8") if template.is_file() else _default_template(config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file. Raises UserError for a tokenizer or pre-tokenizer not supported."""
        backend, add_bos = backend_from_gguf(metadata)

        def special_id(name: str) -> int | None:
            return metadata.get(f"tokenizer.ggml.{name}_token_id")

        bos = special_id("bos")
        if add_bos and bos is not None:
            head = f"{backend.id_to_token(bos)}:0"
            backend.post_processor = processors.TemplateProcessing(
                single=f"{head} $A:0",
                pair=f"{head} $A:0 $B:0",
                special_tokens=[(backend.id_to_token(bos), bos)],
            )
        return cls(
            backend,
            bos_id=bos,
            eos_ids=[t for t in (special_id("eos"), special_id("eot"), special_id("eom")) if t is not None]
            + turn_ends(metadata),
            pad_id=special_id("padding"),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def save(self, directory: str | Path) -> None:
        """Write the files by which ``from_hf`` and transformers' AutoTokenizer give the same ids.

        tokenizer.json, tokenizer_config.json, generation_config.json (the special ids) and, with a template,
        chat_template.jinja; files of these names are replaced.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        specials = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        # Any class name that is a model's own would have transformers rebuild the pipeline from the vocabulary.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{k}_token": self.backend.id_to_token(v) for k, v in specials.items() if v is not None}
        ids: dict[str, Any] = {f"{k}_token_id": v for k, v in specials.items() if v is not None}
        if len(self.eos_ids) > 1:
            ids["eos_token_id"] = list(self.eos_ids)
        for name, content in (("tokenizer_config.json", config), ("generation_config.json", ids)):
            (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        template = directory / "chat_template.jinja"
        if self.chat_template is not None:
            template.write_text(self.chat_template, "utf-8")
        else:
            template.unlink(missing_ok=True)


class TextStream:
    """Turns tokens into text as they come; what ``push`` and one ``finish`` return adds up to ``decode``."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer._special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._strip_first_space

    def push(self, token: int) -> str:
        """The text that ``token`` completes: possibly none, never a part of a character."""
        raw = b"" if token in self._skip else self._tokenizer.token_bytes(token)
        if self._strip and raw:
            raw, self._strip = raw.removeprefix(b" "), False
        return self._utf8.decode(raw)

    def finish(self) -> str:
        """U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_reader(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """What gives a token's bytes from its spelling, and whether decoding drops the first space of a text."""
    decoder: Any = backend.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    if state["type"] == "ByteLevel":
        alphabet = _byte_level_alphabet()

        def byte_level(token: str) -> bytes:
            # As the library does: a spelling with a character outside the alphabet stands for itself.
            return bytes(map(alphabet.__getitem__, token)) if all(c in alphabet for c in token) else token.encode()

        return byte_level, False
    steps: dict[str, Any] = {step["type"]: step for step in state.get("decoders", [])}
    replace, strip = steps.get("Replace", {}), steps.get("Strip", {"content": " ", "start": 0, "stop": 0})
    if (
        steps.keys() | {"Strip"} == {"Replace", "ByteFallback", "Fuse", "Strip"}
        and (replace["pattern"], replace["content"]) == ({"String": "▁"}, " ")
        and (strip["content"], strip["stop"]) == (" ", 0)
        and strip["start"] in (0, 1)
    ):

        def byte_fallback(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace("▁", " ").encode()

        return byte_fallback, strip["start"] == 1
    kinds = [step["type"] for step in state.get("decoders", [])] or state["type"]
    raise UserError(
        f"tokenizer: decoder {kinds} is not supported; ByteLevel and SentencePiece's sequence of Replace, "
        "ByteFallback, Fuse and Strip are"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); fetch the file again") from error


def _default_template(config: Mapping[str, Any]) -> str | None:
    """The template in tokenizer_config.json: one, or a list of named ones of which ``default`` is taken."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
