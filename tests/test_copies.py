"""Chapters repeat one another on purpose, and nothing that is repeated may drift apart.

    python tests/test_copies.py          list what has drifted
    python tests/test_copies.py --fix    write the copies anew from their sources

A comment guards each copy. Directly above a class or function (or its decorator):

    # Copied from chapter-01/modeling_qwen3.py      has the same name and syntax tree there
    # Changed from chapter-01: why                  differs, on purpose

On the banner of a section inside a function, which runs to the next banner or the function's end:

    # --- accumulate --- Copied from chapter-01/train.py      (`Changed from` likewise)

And `# Copied from chapter-02/lora.py (whole file)` as the first line of a file that is otherwise
byte for byte the same. Comments and layout are not compared, but in whole files; docstrings are.
Top-level definitions and sections of four lines or more that two folders share must be guarded. A
folder within a chapter comes after it, and copies from it in the same way.
"""

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = re.compile(r"Copied from (chapter-\d\d/[\w/]+\.py)(?: \(whole file\))?")
CHANGED = re.compile(r"Changed from chapter-\d\d: \S.*")
BANNER = re.compile(r"# --- (.+?) ---(?: (.*))?")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclass(frozen=True)
class Unit:
    """What can be copied: a definition, a section, or a whole file (kind "def", "section", "file").

    `first` and `last` are its lines, counted from 1, without the marker; `content` is what is
    compared; `rows` is how many lines of code it has, 0 if an unguarded twin is no mistake.
    """
    file: str
    kind: str
    name: str
    first: int
    last: int
    marker: str
    content: str
    rows: int

    def __str__(self):
        return f"{self.file}:{self.first} {self.kind} {self.name}"


def units_of(file, text):
    """All units of a chapter's file, and complaints about comments that guard nothing."""
    lines = text.splitlines(keepends=True)
    comments = {token.start[0]: token for token in tokens(text) if token.type == tokenize.COMMENT}
    first = comments[1].string[2:] if 1 in comments else ""
    if first.endswith("(whole file)"):
        return [Unit(file, "file", "whole file", 2, len(lines), first, "".join(lines[1:]), 0)], []
    units, claimed = [Unit(file, "file", "whole file", 1, len(lines), "", text, 0)], set()

    def visit(parent, prefix, top):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, DEFINITIONS):
                begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                marker, line = "", begin - 1
                while line and not marker and lines[line - 1].lstrip().startswith("#"):
                    if comments[line].string.startswith(("# Copied", "# Changed")):
                        marker = comments[line].string[2:]
                        claimed.add(line)
                    line -= 1
                rows = node.end_lineno - begin + 1 if top else 0
                units.append(Unit(file, "def", prefix + node.name, begin, node.end_lineno, marker,
                                  ast.dump(node), rows))
                visit(node, f"{prefix}{node.name}.", False)
            else:
                visit(node, prefix, top)

    visit(ast.parse(text), "", True)
    banners = {line: BANNER.fullmatch(comment.string) for line, comment in comments.items()
               if comment.start[1] > 0 and BANNER.fullmatch(comment.string)}
    for line, match in banners.items():
        around = [unit for unit in units if unit.kind == "def" and unit.first < line <= unit.last]
        last = min([b - 1 for b in banners if b > line] + [u.last for u in around] + [len(lines)])
        code = [t for t in tokens(text) if line < t.start[0] <= last and t.type not in LAYOUT]
        guarded = any(COPIED.fullmatch(unit.marker) for unit in around)
        rows = 0 if guarded else len({token.start[0] for token in code})
        units.append(Unit(file, "section", match[1], line + 1, last, match[2] or "",
                          " ".join(token.string for token in code), rows))
        claimed.add(line)
    stray = [f"{file}:{line} {comment.string!r} stands above no definition and guards nothing"
             for line, comment in comments.items() if line not in claimed
             and re.match("# (--- .* --- )?(Copied|Changed) from", comment.string)]
    return units, stray


def tokens(text):
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def check(root):
    """(complaints, drifted): lines of text, and pairs (copy, source) that --fix can mend."""
    units, complaints, drifted = [], [], []
    for path in sorted(root.glob("chapter-*/**/*.py"), key=lambda path: (folder(path), path)):
        found, stray = units_of(path.relative_to(root).as_posix(), path.read_text("utf-8"))
        units += found
        complaints += stray
    named = {}
    for unit in units:
        named.setdefault((unit.file, unit.kind, unit.name), []).append(unit)
    for unit in (unit for unit in units if unit.marker and not CHANGED.fullmatch(unit.marker)):
        match = COPIED.fullmatch(unit.marker)
        sources = named.get((match[1], unit.kind, unit.name), []) if match else []
        if not match or folder(match[1]) >= folder(unit.file):
            complaints.append(f"{unit}: {unit.marker!r} names no file of an earlier chapter")
        elif len(sources) != 1:
            complaints.append(f"{unit}: {match[1]} has {len(sources)} of that name, not one")
        elif sources[0].content != unit.content:
            complaints.append(f"{unit}: differs from {match[1]}; --fix copies it anew, or "
                              f"mark it `Changed from {match[1][:10]}: why`")
            drifted.append((unit, sources[0]))
    twins = {}
    for unit in (unit for unit in units if unit.rows >= 4):
        twins.setdefault((unit.kind, unit.content), []).append(unit)
    for first, *others in twins.values():  # sorted by file, so the earliest chapter comes first
        complaints += [f"{unit}: is {first} again, but has no `Copied from` marker"
                       for unit in others
                       if folder(unit.file) != folder(first.file)
                       and not COPIED.match(unit.marker)]
    return complaints, drifted


def folder(file):
    return str(Path(file).parent)


def fix(root):
    """Write every drifted copy anew from its source; earlier chapters first, as copies chain."""
    while drifted := check(root)[1]:
        copy, source = min(drifted, key=lambda pair: (
            folder(pair[0].file), pair[0].file, pair[0].first))
        text = (root / source.file).read_text("utf-8").splitlines(keepends=True)
        text = text[source.first - 1:source.last]
        lines = (root / copy.file).read_text("utf-8").splitlines(keepends=True)
        if copy.kind != "file":  # the same depth as the copy has now
            depth = indent(lines[copy.first - 1:copy.last])
            text = [line.strip() and " " * depth + line[indent(text):] or "\n" for line in text]
        lines[copy.first - 1:copy.last] = text
        (root / copy.file).write_text("".join(lines), "utf-8")
        print(f"{copy}: copied from {source.file}")


def indent(lines):
    return min(len(line) - len(line.lstrip()) for line in lines if line.strip())


# --- the tests ---

def test_no_copy_has_drifted():
    assert check(ROOT)[0] == []


SOURCE = '''"""One."""


def add(a, b):
    """Sum."""
    # why
    return (a +
            b)


@frozen
class Box:
    def get(self):
        return 1


def main():
    # --- read ---
    x = 1  # one
    y = [x,
         2]
    for i in y:
        # --- deep ---
        print(i)
        x += i
        y = [i]
        z = 0
    # --- write ---
    print(x)
'''
COPY = (SOURCE.replace("def add", "# Copied from chapter-01/a.py\n# (a remark)\ndef add")
        .replace("@frozen", "# Copied from chapter-01/a.py\n@frozen")
        .replace("--- deep ---", "--- deep --- Copied from chapter-01/a.py")
        .replace("def main", "# Changed from chapter-01: x\ndef main")
        .replace("x = 1  # one", "x = 3"))
WHOLE = "# Copied from chapter-01/a.py (whole file)\n" + SOURCE
BAD = {  # what is done to COPY (or WHOLE): what the complaint says
    ("return (a +", "return (b +"): "def add: differs",
    ('"""Sum."""', '"""Difference."""'): "def add: differs",
    ("return 1", "return 2"): "def Box: differs",
    ("y = [i]", "y = [x]"): "section deep: differs",
    ("def add", "def plus"): "0 of that name",
    ("# Copied from chapter-01/a.py\n", ""): "def add again",
    ("# Copied from chapter-01/a.py\n", "# Changed from chapter-01: no\n"): "def add again",
    (" Copied from chapter-01/a.py\n        print", "\n        print"): "section deep again",
    ("# Copied from chapter-01/a.py\n@", "# Copied from chapter-02/a.py\n@"): "no file of an earl",
    ("# Copied from chapter-01/a.py\n@", "# Copied from there\n@"): "no file of an earlier",
    ("# Copied from chapter-01/a.py\n@", "# Copied from chapter-01/a.py\n\n@"): "guards nothing",
    ("# Changed from chapter-01: x", "# Changed from chapter-01"): "no file of an earlier",
}


def house(tmp_path, *files):
    """Chapters 1, 2, ... in a folder, each with the one file a.py."""
    for number, text in enumerate(files, start=1):
        (tmp_path / f"chapter-0{number}").mkdir()
        (tmp_path / f"chapter-0{number}" / "a.py").write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize("edit, complaint", BAD.items())
def test_drift_is_seen(tmp_path, edit, complaint):
    assert edit[0] in COPY
    root = house(tmp_path, SOURCE, COPY.replace(*edit, 1))
    assert any(complaint in line for line in check(root)[0]), check(root)[0]


@pytest.mark.parametrize("copy", [COPY, WHOLE, COPY.replace("# why\n", "# because\n")])
def test_a_faithful_copy_is_not_a_complaint(tmp_path, copy):
    assert check(house(tmp_path, SOURCE, copy))[0] == []


def test_fix_mends_a_chain_and_keeps_the_markers(tmp_path):
    third = COPY.replace("from chapter-01/a.py", "from chapter-02/a.py").replace("x = 3", "x = 4")
    first = SOURCE.replace("a +", "a -").replace("= 0", "= 9").replace("return 1", "return 7")
    root = house(tmp_path, first, COPY, third, WHOLE + "\n# more\n")
    assert len(check(root)[1]) == 4  # chapter 3 still equals chapter 2
    fix(root)
    assert check(root)[0] == []
    for number in "234":
        text = (root / f"chapter-0{number}" / "a.py").read_text("utf-8")
        assert text.count("Copied from") == {"2": 3, "3": 3, "4": 1}[number]
        assert "(a -\n" in text and "        z = 9\n" in text and "return 7" in text


if __name__ == "__main__":
    if "--fix" in sys.argv[1:]:
        fix(ROOT)
    sys.exit("\n".join(check(ROOT)[0]) or 0)
