"""The worked changes that add a family of models: each applied to a copy and checked there."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from test_extensions import apply_diff

CHECKS = sorted((ROOT / "tests" / "extensions").glob("check_*.py"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_a_family_holds(check, tmp_path):
    """In a process of its own, whose `common` is the changed one."""
    name, copy = check.stem.removeprefix("check_"), tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__", ".git", "runs", "long", ".ci", "*.svg")
    shutil.copytree(ROOT, copy, ignore=ignore)
    diff = ROOT / "tests" / "extensions" / f"{name}.diff"
    apply_diff(diff.read_text(encoding="utf-8"), copy)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         copy / "tests" / "extensions" / check.name],
        cwd=copy, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
