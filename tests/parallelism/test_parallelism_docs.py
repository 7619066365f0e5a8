"""The worked examples of docs/parallelism.md print what it says."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "parallelism.md"


def test_examples_print_what_the_page_says():
    namespace: dict = {}
    examples = re.findall(r"```python\n(.*?)```(?:.*?)```text\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 3
    for code, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        assert printed.getvalue() == expected
