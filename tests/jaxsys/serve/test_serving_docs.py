"""docs/serving.md says what the server does: its example runs, its tables have what there is and nothing else."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxsys.serve.protocol import CHAT, COMPLETION
from jaxsys.serve.sampling import Sampling

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    lines = PAGE.split(f"\n## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_the_example_runs(server, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = example.replace("http://127.0.0.1:8000", server.address).replace("smollm2-135m-instruct", "tiny")
    assert code.count("tiny") == 2
    exec(code, {})
    assert len(capsys.readouterr().out) > 40


def test_every_field_is_in_the_table_and_no_other():
    found = set().union(*(names(row[0]) for row in table("How a token is chosen")))
    assert found == {*CHAT["properties"], *COMPLETION["properties"]}
    settings = set().union(
        *(names(row[0]) if row[1].startswith("the same") else names(row[1]) for row in table("How a token is chosen"))
    )
    assert {field.name for field in dataclasses.fields(Sampling)} <= settings


def test_every_metric_is_in_the_table_and_no_other(server, http):
    server.front.metrics.called("/health", 200)
    there = {line.split()[2] for line in http.get("/metrics").text.splitlines() if line.startswith("# TYPE")}
    found = set().union(*(names(row[0]) for row in table("Metrics")))
    found = {
        name for name in found if not name.endswith("*")
    }  # of a run that trains, see tests/jaxsys/train/test_saves.py
    assert found == {name for name in there if not name.endswith("_created")}


@pytest.mark.parametrize("heading", ["Endpoints", "Errors"])
def test_every_endpoint_and_status_is_in_its_table_and_no_other(server, http, heading):
    document = http.get("/openapi.json").json()
    if heading == "Endpoints":
        there = {f"{m.upper()} {path}" for path, methods in document["paths"].items() for m in methods}
        assert set().union(*(names(row[0]) for row in table(heading))) == there | {"GET /openapi.json"}
    else:
        responses = [method["responses"] for methods in document["paths"].values() for method in methods.values()]
        assert {row[0] for row in table(heading)} == {*set().union(*responses), "405"} - {"200"}
