"""The READMEs cannot go stale: what they run, name, quote, link and count is held to the code.

Conventions, so that a reader's page can be checked by a program:

    ```bash        is run, line by line, from the repository's root; training runs are cut short
    ```text        is not run; but a command in it must exist, with each of its flags
    ```python      is an excerpt of a file of this repository; or a >>> session, or a program
                   that begins with an import: these two are run, and what the program prints
                   is the ```text right below it
    <!-- checked by: test_x, test_y -->     stands right below an equation
    <!-- from: path.json -->                stands right above a table of results, whose numbers
                                            are those of the JSON (readme_parts.check_table)
    <!-- file: x -->                        stands right above the block that a reader saves as x

In the section "Coming from" the left column of a table is about other programs.
"""

import contextlib
import difflib
import doctest
import functools
import io
import json
import re
import shlex
import sys
import textwrap

import pytest
import torch
from helpers import ROOT, load, run_script
from readme_parts import (PYTHON, TESTS, anchors, blocks, check_table, commands, equations, prose,
                          quotes, read, spans, words_of_the_code)
from test_copies import check
from torch.distributed.run import get_args_parser

from common import prepare

READMES = [path.relative_to(ROOT).as_posix() for pages in (
    "README.md", "chapter-*/**/README.md", "common/**/README.md", "tests/**/README.md")
    for path in sorted(ROOT.glob(pages))]

SHORT = {"train.py": "--device cpu --dtype float32 --steps 2 --batch-tokens 256 --eval-every 0",
         **dict.fromkeys(("train_dpo.py", "train_grpo.py", "train_distill.py"),
                         "--device cpu --dtype float32 --steps 2 --eval-every 0"),
         "generate.py": "--device cpu --max-new-tokens 4"}
WORDS = words_of_the_code()
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

every_readme = pytest.mark.parametrize("readme", READMES)


@functools.cache
def flags_of(script):
    """The flags in what `python script --help` prints, run in this process."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", [script, "--help"])
        module = load(script)
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
    assert not end.value.code, script
    return set(FLAG.findall(text.getvalue()))


@functools.cache
def all_flags():
    scripts = [name for name, text in PYTHON.items()
               if name.startswith("chapter-") and "\ndef main(" in text]
    return set().union(get_args_parser()._option_string_actions, *map(flags_of, scripts))


# --- commands ---

@every_readme
@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bash_blocks_run(readme, fresh, tmp_path, monkeypatch):
    """Each command in a `fresh` Python; or, asking fewer questions of fewer documents, in a fork."""
    monkeypatch.setattr(prepare, "SCORED", 5)
    monkeypatch.setattr(prepare, "TINY_DOCUMENTS", 500)
    for path in ("chapter-01", "chapter-02", "chapter-03", "common", "tests"):
        (tmp_path / path).symlink_to(ROOT / path)
    for name, text in re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```", read(readme),
                                 re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for words in (words for block in blocks(read(readme), "bash") for words in commands(block)):
        if words[:3] == ["pip", "install", "-r"]:
            assert (ROOT / words[3]).is_file()
            continue
        assert words[0] == "python", f"{words}: only python commands stand in a bash block"
        words += SHORT.get(words[1].rpartition("/")[2], "").split()
        done = run_script(tmp_path / words[1] if fresh else words[1], *words[2:], cwd=tmp_path,
                          environment={"COLUMNS": "80"}, fresh=fresh)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


@every_readme
def test_commands_name_scripts_and_flags_that_exist(readme):
    for block in blocks(read(readme), "text", "bash"):
        for words in commands(block):
            place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if place is None:  # `patch -p1 < file`, `python -m pytest`
                assert all((ROOT / word).exists() for word in words if "/" in word), words
                continue
            script, launcher = words[place], FLAG.findall(" ".join(words[:place]))
            assert (ROOT / script).is_file(), script
            assert set(launcher) <= set(get_args_parser()._option_string_actions), launcher
            if script.startswith("chapter-"):
                used = set(FLAG.findall(" ".join(words[place:])))
                assert used <= flags_of(script), (script, used - flags_of(script))
        for path in re.findall(r"(?:chapter-0\d|common|tests)/[\w/-]+\.(?:py|diff|json)\b", block):
            assert (ROOT / path).is_file(), path


def is_known(span, folder):
    """Whether what stands in backticks exists: a flag, a test, a file, or a name of the code.
    What looks like none of these (a formula, a line of output) is not judged."""
    if span.startswith("--"):
        return set(FLAG.findall(span)) <= all_flags()
    if re.fullmatch(r"test_\w+", span):
        return span in TESTS
    path = span.split()[0].rstrip("/")
    if path.endswith((".py", ".svg", ".diff")):
        places = sum(name.endswith(f"/{path}") for name in PYTHON)
        # In a chapter's page a name without a folder is that chapter's file, or the only one.
        in_code = places == 1 if "chapter-" in str(folder) else places
        flags = FLAG.findall(span)
        near = any((place / path).exists() for place in (folder, folder.parent, ROOT))
        return (near or in_code) and (
            not flags or set(flags) <= all_flags())
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)*", path) and " " not in span:
        exists = (folder / path).exists() or (ROOT / path).exists() or path.startswith("runs/")
        return exists or set(re.findall(r"[A-Za-z_][\w-]*", re.sub(r"-\d+$", "", path))) <= WORDS
    if re.fullmatch(r"[A-Za-z_]\w+\(.*\)", span):
        return span.partition("(")[0] in WORDS
    return True


@every_readme
def test_names_in_backticks_exist(readme):
    folder = (ROOT / readme).parent
    assert [span for span in spans(read(readme)) if not is_known(span, folder)] == []


# --- excerpts and equations ---

@every_readme
def test_python_blocks_are_excerpts_or_run(readme, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(ROOT)
    prints = dict(re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", read(readme),
                             re.MULTILINE | re.DOTALL))
    for block in blocks(read(readme), "python"):
        if block.startswith(">>>"):
            session = doctest.DocTestParser().get_doctest(block, {"torch": torch}, readme, None, 0)
            complaints = []
            doctest.DocTestRunner().run(session, out=complaints.append)
            assert not complaints, "".join(complaints)
        elif re.match(r"(from|import) ", block):
            exec(compile(block, readme, "exec"), {})
            assert capsys.readouterr().out == prints[block]
        else:
            lines = textwrap.dedent(block).splitlines()
            assert any(quotes(text.splitlines(), lines) for text in PYTHON.values()), block


@every_readme
def test_every_equation_names_the_test_that_checks_it(readme):
    for equation, tests in equations(read(readme)):
        assert tests, f"no `<!-- checked by: ... -->` right below {equation}"
    named = " ".join(re.findall(r"<!-- checked by: (.*?) -->", read(readme), re.DOTALL))
    assert set(re.findall(r"\w+", named)) <= TESTS


@every_readme
def test_every_fence_has_a_known_language(readme):
    opened = re.findall(r"^```(.*)$", read(readme), re.MULTILINE)[::2]
    assert set(opened) <= {"bash", "text", "python", "json"}


# --- links, results, copies ---

@every_readme
def test_links_and_pictures_resolve(readme):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(read(readme))):
        assert label.strip(), f"{target}: no text for those who do not see it"
        path, _, anchor = target.partition("#")
        file = (ROOT / readme).parent / path if path else ROOT / readme
        assert re.match("https?://", target) or file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@every_readme
def test_results_equal_their_json(readme):
    marked = re.findall(r"<!-- from: (\S+) -->\s*\n((?:\|.*\n)*)", read(readme))
    for path, table in marked:
        assert table, f"no table below <!-- from: {path} -->"
        assert list(check_table(table, json.loads(read(path)))) == [], path


def test_the_reading_path_is_as_long_as_it_says():
    """The front page's table: whole files, or what a chapter's file adds to the one before it."""
    rows = re.findall(r"^\| \d+ \| (what )?\[.*?\]\((.*?)\).* \| (\d+) \| \d+ \|$", read("README.md"),
                      re.MULTILINE)
    before = {"chapter-02/train.py": "chapter-01/train.py",
              "chapter-02/modeling_llama.py": "chapter-01/modeling_qwen3.py"}
    assert len(rows) == 13
    for difference, path, said in rows:
        old = read(before[path]).splitlines() if difference else []
        new = sum(line[0] == "+" for line in difflib.ndiff(old, read(path).splitlines()))
        assert abs(new - int(said)) <= max(10, 0.1 * new), (path, new, said)
    assert sum(int(said) for _, _, said in rows) <= 2000


def test_a_changed_number_is_seen():
    table = "| method | speed | loss |\n|---|---|---|\n| `lora` | 1,235 | 0.50 ± 0.01 |\n"
    data = [{"method": "lora", "speed": 1234.6, "loss": [0.5, 0.0099]}, {"method": "x", "y": 7}]
    assert not list(check_table(table, data)) + list(check_table(table, {"lora": data[0]["loss"] + [
        data[0]["speed"]]}))
    for old, new in (("1,235", "1,236"), ("0.50", "0.51"), ("lora", "dora"), ("1,235", "7")):
        assert list(check_table(table.replace(old, new), data)), new


def test_the_copies_are_copies():
    assert check(ROOT)[0] == []
