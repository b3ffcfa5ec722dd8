"""The house rules that a program can check: sizes, imports, and that each planted bug has a place."""

import ast
import importlib.util

from helpers import ROOT

PRODUCT = sorted([*ROOT.glob("chapter-0?/**/*.py"), *ROOT.glob("common/**/*.py")])
WORDS = {"chapter-01": 3000, "chapter-02": 3500, "chapter-03": 3000, "chapter-03/profiling": 3000,
         "chapter-03/post_training": 2500}


def test_sizes():
    for file in PRODUCT:
        limit = 400 if file.name == "lora.py" or file.is_relative_to(ROOT / "common") else 300
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= limit, f"{file.relative_to(ROOT)} has {len(lines)} lines"
        assert max(map(len, lines), default=0) <= 100, f"{file.relative_to(ROOT)}: over 100 columns"


def lines_of(*patterns):
    return sum(len(file.read_text(encoding="utf-8").splitlines())
               for pattern in patterns for file in ROOT.glob(pattern))


def test_the_house_is_small():
    """All of it, copies between chapters counted."""
    after_training = lines_of("chapter-03/post_training/*.py")
    assert lines_of("common/**/*.py") <= 4900
    assert lines_of("chapter-03/*.py") <= 2500
    everything = lines_of("common/**/*.py", "chapter-0?/**/*.py")
    assert everything <= 11_800 and everything - after_training <= 10_000


def test_pages_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
    for folder, words in WORDS.items():
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        assert len(text.split()) <= words, f"{folder}/README.md has {len(text.split())} words"


def imports(file):
    """The modules that a file imports when it is itself imported."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_common_imports_no_chapter_and_runs_in_no_circle():
    chapters = {file.stem for file in PRODUCT if not file.is_relative_to(ROOT / "common")}
    needs = {}
    for file in PRODUCT:
        if file.is_relative_to(ROOT / "common"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            needs[name.removesuffix(".__init__")] = set(imports(file))
    for name, wanted in needs.items():
        assert not wanted & chapters, f"{name} imports {wanted & chapters}"
    while needs:  # take away what needs nothing of what is left
        free = [name for name, wanted in needs.items() if not wanted & (needs.keys() - {name})]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_each_planted_bug_finds_its_place_once():
    spec = importlib.util.spec_from_file_location("planted", ROOT / "tests/long/bugs.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for row, what, changes, *_ in planted.BUGS + planted.DPO + planted.REWARDED:
        for file, old, _ in changes:
            found = (ROOT / file).read_text(encoding="utf-8").count(old)
            assert found == 1, f"row {row}, {what}: {file} has it {found} times"
