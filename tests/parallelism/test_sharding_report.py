"""The sharding report: its figures, its reasons, its text."""

import json
import os
from pathlib import Path

from parallelism_arrays import single, smollm2

from parallelism import PARAMETERS, Layout, MeshSpec, plan, report

GOLDEN = Path(__file__).parent / "goldens" / "smollm2_fsdp2_tensor4.txt"


def test_text_is_the_golden_one():
    """Run with REWRITE_GOLDENS=1 in the environment to accept a change."""
    text = str(report(plan(smollm2(), MeshSpec.parse("fsdp=2,tensor=4").build(), units={"heads": 3}))) + "\n"
    if os.environ.get("REWRITE_GOLDENS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_figures_agree_with_the_arrays():
    p = plan(smollm2(1), MeshSpec.parse("fsdp=2,tensor=2").build(), units={"heads": 3})
    row = next(r for r in report(p).rows if r.array == "layers.0.attention.q.kernel")
    assert (row.nbytes, row.nbytes_per_device) == (576 * 12 * 64 * 4, 576 * 12 * 64)
    assert row.padding == 576 * 3 * 64 * 4
    assert report(p).nbytes == sum(s.nbytes for s in p.layout.values())


def test_rows_are_json_and_say_why_an_array_is_replicated():
    rules = PARAMETERS.override("heads=:replicate,kv_heads=:replicate")
    layout = Layout([*smollm2(1).values(), single("count", (), ())])
    rows = {
        r["array"]: r
        for r in json.loads(json.dumps(report(plan(layout, MeshSpec(tensor=4).build(), rules)).as_dicts()))
    }
    assert rows["norm"]["replicated"] and rows["norm"]["why"] == "no rule splits norm"
    assert rows["count"]["why"] == "a scalar"
    q = rows["layers.0.attention.q.kernel"]
    assert q["replicated"] and q["why"] == "heads=9 does not divide over tensor=4: kept whole"
    assert not rows["embed.table"]["replicated"]


def test_array_whose_mesh_axes_have_size_one_says_so():
    rows = report(plan(Layout([single("a", (8, 8), ("embed", "norm"))]), MeshSpec(data=8).build())).rows
    assert rows[0].replicated and rows[0].why == "embed goes over fsdp+expert, of size 1"


def test_nothing_is_replicated_on_one_device():
    text = str(report(plan(smollm2(1), MeshSpec().build())))
    assert text.startswith("mesh one device\n")
    assert "replicated" not in text


def test_arrays_that_differ_between_layers_are_not_collapsed():
    layout = Layout([single(f"layers.{i}.up", (8, n), ("embed", "mlp")) for i, n in enumerate((8, 8, 16))])
    text = str(report(plan(layout, MeshSpec().build())))
    assert "layers.*.up x2" in text and "layers.2.up  " in text
