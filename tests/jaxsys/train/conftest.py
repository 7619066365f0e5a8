"""Most of what tests here cost is compiling programs that run for milliseconds."""

import pytest
from tiny_models import quickly_compiled


@pytest.fixture(scope="module", autouse=True)
def cheap_machine_code():
    with quickly_compiled():
        yield
