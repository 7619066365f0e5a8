"""The tables of rules: how they are changed and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelism import ACTIVATIONS, AXES, PARAMETERS, Rule, Rules, UserError


def test_defaults_are_fsdp_and_megatron():
    assert PARAMETERS["embed"].mesh_axes == ("fsdp", "expert")
    assert all(PARAMETERS[a].mesh_axes == ("tensor",) for a in ("vocab", "heads", "kv_heads", "mlp"))
    assert all(PARAMETERS[a].mesh_axes == () for a in ("head_dim", "norm", "layers"))
    assert (PARAMETERS["experts"].mesh_axes, PARAMETERS["expert_embed"].mesh_axes) == (("expert",), ("fsdp",))
    assert ACTIVATIONS["batch"].mesh_axes == ACTIVATIONS["replica"].mesh_axes == ("data", "fsdp", "expert")
    assert all(ACTIVATIONS[a].mesh_axes == ("tensor",) for a in ("act_heads", "act_kv_heads", "act_mlp", "act_vocab"))


@st.composite
def overrides(draw) -> Rules:
    rules = dict(PARAMETERS)
    for axis in draw(st.sets(st.sampled_from(sorted(set(rules) - {"heads", "kv_heads"})))):
        actions = ["error", "replicate"] + ["pad"] * (axis in PARAMETERS.paddable)
        mesh_axes = tuple(draw(st.lists(st.sampled_from(AXES), unique=True, max_size=3)))
        rules[axis] = Rule(mesh_axes, draw(st.sampled_from(actions)))
    return Rules("parameters", rules, PARAMETERS.paddable)


@given(overrides())
def test_string_of_a_table_gives_the_table(rules):
    assert PARAMETERS.override(str(rules)) == rules


def test_replace_changes_only_what_is_written():
    rules = PARAMETERS.replace(vocab="tensor+context", mlp=":error", embed="none")
    assert rules["vocab"] == Rule(("tensor", "context"), "pad")
    assert rules["mlp"] == Rule(("tensor",), "error")
    assert rules["embed"] == Rule((), "error")
    assert rules["heads"] == PARAMETERS["heads"]


def test_replace_leaves_the_original_alone():
    PARAMETERS.replace(vocab="none")
    assert PARAMETERS["vocab"] == Rule(("tensor",), "pad")


def test_override_reads_a_command_line():
    rules = PARAMETERS.override("heads=tensor:replicate, kv_heads=tensor:replicate")
    assert rules["heads"] == rules["kv_heads"] == Rule(("tensor",), "replicate")
    assert PARAMETERS.override("") == PARAMETERS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("haeds=tensor", "unknown logical axis in the parameters rules: 'haeds': did you mean 'heads'"),
        ("vocab=tensro", "unknown mesh axis in the parameters rule for 'vocab': 'tensro': did you mean 'tensor'?"),
        (
            "vocab=tensor:drop",
            "unknown action in the parameters rule for 'vocab': 'drop': known: error, pad, replicate",
        ),
        ("vocab=tensor+tensor", "a mesh axis is named twice"),
        ("vocab=tensor,vocab=fsdp", "vocab is given twice"),
        ("vocab", "found 'vocab', expected LOGICAL=MESH_AXIS:ACTION"),
        ("vocab=", "expected mesh axes and an action"),
        ("vocab=a b:c:d", "expected mesh axes and an action"),
        ("embed=fsdp:pad", "padding 'embed' would change results"),
        ("heads=:replicate", "must be the same where either is padded: give both"),
    ],
)
def test_bad_override_is_one_line_that_says_what_is_wrong(text, message):
    with pytest.raises(UserError) as error:
        PARAMETERS.override(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_activations_cannot_be_padded():
    with pytest.raises(UserError, match=r"padding 'act_mlp' would change results \(can be padded: none\)"):
        ACTIVATIONS.replace(act_mlp=":pad")


def test_table_cannot_be_changed_in_place():
    with pytest.raises(TypeError):
        PARAMETERS["vocab"] = Rule()


def test_table_with_axes_of_its_own():
    rules = Rules(
        "parameters",
        {**PARAMETERS, "state": Rule(("tensor",), "pad")},
        paddable=[*PARAMETERS.paddable, "state"],
    )
    assert rules.rules_of("a", ("embed", "state"))[1] == Rule(("tensor",), "pad")


def test_unknown_logical_axis_names_the_array():
    with pytest.raises(
        UserError, match=r"unknown logical axis of mlp\.up in the parameters rules: 'embd': did you mean 'embed'"
    ):
        PARAMETERS.rules_of("mlp.up", ("embd", "mlp"))


def test_two_dimensions_on_one_mesh_axis_name_the_array():
    with pytest.raises(UserError, match=r"mlp\.up .* split both 'heads' and 'mlp' over the mesh axis 'tensor'"):
        PARAMETERS.rules_of("mlp.up", ("heads", "mlp"))
