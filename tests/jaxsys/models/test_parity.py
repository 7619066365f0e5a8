"""The live comparison with transformers (extra ``parity``): ``pytest -m parity``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_models import FAMILIES, GOLDENS

from jaxsys.models.pretrained import Pretrained, expected_weights, export_hf

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def goldens():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from scripts import goldens

    return goldens


def whole(pretrained):
    weights = expected_weights(pretrained.config).items()
    return [(name, pretrained.reader(logical, (slice(None),) * len(logical.shape))) for name, logical in weights]


@pytest.mark.parametrize("storage", ["listed", "stacked"])
@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_give_the_logits_of_transformers(goldens, name, storage, tmp_path, forward):
    model, tokens = goldens.tiny_model(name, seed=100), goldens.prompt(seed=100)
    model.save_pretrained(tmp_path)
    got = forward(Pretrained.open(tmp_path), tokens[None], storage)[0]
    assert np.abs(got - goldens.logits(model, tokens)).max() < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_written_by_transformers_are_read(goldens, name, tmp_path):
    model = goldens.tiny_model(name, seed=101)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    pairs = zip(whole(Pretrained.open(tmp_path / "one")), whole(Pretrained.open(tmp_path / "many")), strict=True)
    for (name_a, a), (name_b, b) in pairs:
        assert name_a == name_b
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_directory_gives_the_same_logits_in_transformers(goldens, name, tmp_path):
    import transformers

    opened, golden = Pretrained.open(GOLDENS / name), np.load(GOLDENS / name / "logits.npz")
    ids = {"bos": 1, "eos": [2, 3]}
    export_hf(tmp_path / "out", opened.config, whole(opened), dtype="float32", token_ids=ids)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.eos_token_id == [2, 3]
    np.testing.assert_allclose(goldens.logits(model.eval(), golden["tokens"]), golden["logits"], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_old_fields_of_an_export_alike(goldens, name, tmp_path):
    """Without the fields that only version 5 knows, the file is what version 4 sees."""
    import transformers

    opened, golden = Pretrained.open(GOLDENS / name), np.load(GOLDENS / name / "logits.npz")
    export_hf(tmp_path / "out", opened.config, whole(opened), dtype="float32", token_ids={})
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("rope_parameters", "dtype")}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_allclose(goldens.logits(model.eval(), golden["tokens"]), golden["logits"], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_is_that_of_transformers_after_an_export(goldens, name, tmp_path):
    import transformers

    opened = Pretrained.open(GOLDENS / name)
    export_hf(tmp_path / "out", opened.config, whole(opened), dtype="bfloat16", token_ids={"bos": 1, "eos": 2})
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    theirs = transformers.AutoConfig.from_pretrained(GOLDENS / name).to_dict()
    differ = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    unsaid = {k for k in ("attention_bias", "head_dim") if theirs.get(k) is None}
    assert differ - unsaid <= {
        "_name_or_path",
        "dtype",
        "hidden_act",
        "initializer_range",
        "pad_token_id",
        "architectures",
    }
