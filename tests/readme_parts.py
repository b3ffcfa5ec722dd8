"""A README taken apart, for test_readme.py: its blocks, names, anchors and tables."""

import ast
import re
import shlex
import textwrap

from helpers import ROOT

PYTHON = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
          for folder in ("chapter-01", "chapter-02", "chapter-03", "common", "tests")
          for path in sorted((ROOT / folder).rglob("*.py"))}
TESTS = set(re.findall(r"def (test_\w+)", " ".join(PYTHON.values())))
UNITS = {"%": 100, "k": 1e-3, "M": 1e-6, "G": 1e-9, "ms": 1e3, "KiB": 2**-10, "MiB": 2**-20,
         "GiB": 2**-30, "GB": 1e-9, "MB": 1e-6}
FENCED = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)


def words_of_the_code():
    """Every name in the product's code, and every word of its strings but for docstrings."""
    found = []
    for tree in (ast.parse(text) for name, text in PYTHON.items() if not name.startswith("tests")):
        documented = [node for node in ast.walk(tree) if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)]
        docstrings = {id(node.body[0].value) for node in documented}
        for node in ast.walk(tree):
            found += [getattr(node, field) for field in ("id", "attr", "arg", "name", "module")
                      if isinstance(getattr(node, field, None), str)]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [node.value] * (id(node) not in docstrings)
    found += [path.read_text(encoding="utf-8") for path in ROOT.glob("common/*/**/*.json")]
    return set(re.findall(r"[\w+-]+", " ".join(found)))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, *languages):
    """The contents of the fenced blocks in those languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block):
    """The commands of a block, each as a list of words."""
    lines = re.split(r"\n| && ", block.replace("\\\n", " "))
    return [shlex.split(line, comments=True) for line in lines
            if re.match(r"(python|torchrun|pip|patch) ", line)]


def prose(text):
    """The text without fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.DOTALL)


def spans(text):
    """What stands in backticks, but for the left column of tables under "Coming from"."""
    for section in re.split(r"^(?=## )", prose(text), flags=re.MULTILINE):
        if section.startswith("## Coming from"):
            section = re.sub(r"^\|[^|]*\|", "", section, flags=re.MULTILINE)
        yield from re.findall(r"`([^`\n]+)`", section)


def quotes(source, lines):
    """True if `lines` stand in `source` one after another, all indented alike."""
    places = (i for i, line in enumerate(source) if line.strip() == lines[0].strip())
    return any(textwrap.dedent("\n".join(source[i:i + len(lines)])).splitlines() == lines
               for i in places)


def equations(text):
    """(equation, tests named right below it): an indented or quoted paragraph with = or ← in it."""
    parts = re.split(r"\n{2,}", FENCED.sub("\n", text))
    for part, after in zip(parts, parts[1:] + [""]):
        if re.match(r"( {4}|> )\S", part) and re.search("[=←]", part):
            named = re.match(r"<!-- checked by: (.*?) -->", after, re.DOTALL)
            yield part, re.findall(r"\w+", named[1]) if named else []


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")
            for title in titles}


# --- tables of results ---

def rows_of(value):
    """All dicts within a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from rows_of(child)


def numbers_of(value):
    """All numbers within a JSON value."""
    if isinstance(value, (dict, list)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(child)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def check_table(table, data):
    """Complaints about a Markdown table that is not what the JSON value `data` says.

    The row of `data` is the dict that has the first cell's text among its values, or as its key.
    A number must be one of that dict's, rounded to the digits shown, in the unit in its cell.
    """
    for line in table.strip().splitlines()[2:]:
        first, *cells = (cell.strip(" `*") for cell in line.strip().strip("|").split("|"))
        found = [row for row in rows_of(data) if first in row.values()]
        found += [row[first] for row in rows_of(data) if first in row]
        known = [number for row in found for number in numbers_of(row)]
        if not found:
            yield f"{first}: not in the JSON"
        for cell in cells:
            unit = next((u for u in UNITS if re.search(rf"\d ?{u}(?!\w)", cell)), None)
            for shown in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", cell):
                plain = shown.replace(",", "")
                form = f".{len(plain.partition('e')[0].partition('.')[2])}" + "fe"["e" in plain]
                if not any(float(format(number * UNITS.get(unit, 1), form)) == float(plain)
                           for number in known):
                    yield f"{first}: {shown} in {cell!r}"
