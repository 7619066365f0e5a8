"""Tokenizers said in GGUF metadata, and read back from it."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import needs_smollm2, smollm2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxsys.gguf_tokenizer import SPLITS
from jaxsys.gguf_vocabulary import tokenizer_to_gguf
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError

TEXT = [
    "The quick brown fox, 12345 times, jumped over 'lazy' dogs; it's what they'll DO.",
    "def f(x):\n    return x ** 2  # ½\n\n",
    "naïve café 漢字 🙂 Привет  two  spaces",
] * 3  # fmt: skip
SPECIAL = ["<s>", "</s>", "<pad>"]


def byte_level(splits, ignore_merges=False):
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    return backend


def sentencepiece(prefix=True, every=True):
    """As transformers converts Llama 2's and Gemma's: there is a merge for every way to cut a token in two."""
    tokens = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"thequickbrownfx12"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("q", "u"), ("▁", "qu"), ("▁", "t"), ("1", "2"), ("▁t", "h")]
    merges = [*merges, *[("▁", "th")] * every, ("▁th", "e")]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *("".join(m) for m in merges)]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<unk>", *SPECIAL]])
    backend.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")] * prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def make(backend, bos=False, **special):
    if bos:
        i = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", i)])
    ids = {"bos_id": "<s>", "pad_id": "<pad>"}
    return Tokenizer(
        backend,
        eos_ids=[backend.token_to_id("</s>")],
        **{key: backend.token_to_id(token) for key, token in ids.items()},
        **special,
    )


CASES = {
    **{name: lambda name=name: byte_level(SPLITS[name], name == "llama-bpe") for name in SPLITS},
    "sentencepiece": sentencepiece,
    "sentencepiece without a first space": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_read_back(case, bos):
    tokenizer = make(CASES[case](), bos=bos, chat_template="{{ messages }}")
    back = Tokenizer.from_gguf(tokenizer_to_gguf(tokenizer, tokenizer.vocab_size + 5))
    assert back.vocab_size == tokenizer.vocab_size + 5
    assert (back.bos_id, back.eos_ids, back.pad_id) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
    assert back.chat_template == "{{ messages }}"
    for text in [*TEXT, "the quick</s> brown<s>", "the qthe the12 ü"]:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.fixture(scope="module")
def both():
    made = [make(byte_level(SPLITS["smollm"])), make(sentencepiece(), bos=True)]
    return [(one, Tokenizer.from_gguf(tokenizer_to_gguf(one, one.vocab_size))) for one in made]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="thequickbrownfx 12\n'é漢.ABC", max_size=40))
def test_any_text_is_encoded_the_same(both, text):
    for tokenizer, back in both:
        assert back.encode(text) == tokenizer.encode(text)


@needs_smollm2
def test_smollm2_is_said_as_its_file_says_it():
    from test_tokenizer import smollm2_path

    from checkpoint.formats.gguf import GGUFFile

    theirs, ours = GGUFFile(smollm2_path()).metadata, tokenizer_to_gguf(smollm2(), 49152)
    assert {key: theirs[key] for key in ours} == {**ours, "tokenizer.ggml.add_bos_token": False}


def test_what_transformers_makes_of_digits_and_bytes_is_known():
    backend = byte_level([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert tokenizer_to_gguf(make(backend), 500)["tokenizer.ggml.pre"] == "smollm"


def unknown_pattern():
    return make(byte_level([r"\d\d"]))


def unknown_step():
    backend = byte_level([])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return make(backend)


def normalised():
    backend = byte_level(SPLITS["gpt-2"])
    backend.normalizer = normalizers.Lowercase()
    return make(backend)


def a_way_to_cut_is_missing():
    return make(sentencepiece(every=False))


def a_way_to_cut_is_missing_behind_what_joins():
    """No text shows it in which a space comes first: that joins the "a"."""
    tokens = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc"]
    merges = [("▁", "a"), ("a", "b"), ("b", "c"), ("a", "bc")]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(m) for m in merges)])}
    backend = sentencepiece()
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return make(backend)


def words():
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    backend.decoder = decoders.ByteLevel()
    return make(backend)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (unknown_pattern, "its pre-tokenizer's patterns; those of gpt-2, smollm"),
        (unknown_step, "its pre-tokenizer's step 'Whitespace'"),
        (normalised, "how it encodes .Hello, world"),
        (a_way_to_cut_is_missing, "how it encodes ' th'"),
        (a_way_to_cut_is_missing_behind_what_joins, r"how it encodes '\\x00abc'"),
        (words, "its model 'WordLevel'; BPE is there"),
    ],
)
def test_what_cannot_be_said_is_refused(case, message):
    with pytest.raises(UserError, match=f"cannot say this tokenizer: {message}"):
        tokenizer_to_gguf(case(), 500)


def test_more_tokens_than_the_model_has_are_refused():
    tokenizer = make(sentencepiece())
    with pytest.raises(UserError, match=f"the tokenizer has {tokenizer.vocab_size} tokens, the model 3"):
        tokenizer_to_gguf(tokenizer, 3)
