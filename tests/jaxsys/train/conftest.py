"""Most of what tests here cost is compiling programs that run for milliseconds."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_cheaply_compiled(cheap_machine_code):
    pass
