"""The worked changes that add a family of models: each applied to a copy and checked there.

What is checked is in tests/extensions/check_<family>.py and family_checks.py. It begins with the
first test, on the core that the others leave idle: see `family_runs` in conftest.py.
"""

import re

import pytest
from family_runs import EXTENSIONS, NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_family_holds(name, family_runs):
    code, said = family_runs(name)
    assert code == 0, said[-5000:]
    assert re.search(r"\d+ passed", said) and "skipped" not in said


def test_each_family_has_its_diff():
    assert [f"{name}.diff" for name in NAMES if not (EXTENSIONS / f"{name}.diff").exists()] == []
