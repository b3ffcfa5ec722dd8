"""Windows, linear and yarn scaling, biases in chapter 3: all that holds for a family, for each."""

import family_checks
import pytest

NAMES = ["mistral_window", "qwen2_window", "qwen3_window", "llama_yarn", "llama_linear"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", family_checks.ALL, ids=lambda check: check.__name__)
def test_what_holds_for_every_family(check, name, tmp_path):
    check(name, tmp_path)
