"""Applying a worked change of tests/extensions/ to a copy of the product."""

import re


def apply_diff(text, root):
    """Apply a unified diff to the files under `root`; gives the paths that it changes.

    By its text: what a hunk removes must be there exactly once. So it holds when lines move, and
    fails when the code that it changes has changed.
    """
    changed = []
    for part in re.split(r"^--- .*\n(?=\+\+\+ )", text, flags=re.MULTILINE)[1:]:
        path = root / re.match(r"\+\+\+ b/(\S+)", part)[1]
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        for head, hunk in re.findall(r"^@@ (.*?) @@.*\n((?:[-+ ].*\n)+)", part, re.MULTILINE):
            before, after = ("".join(line[1:] for line in hunk.splitlines(keepends=True)
                                     if line[0] in " " + sign) for sign in "-+")
            sizes = [int(size or 1) for size in re.findall(r"\d+(?:,(\d+))?", head)]
            assert sizes == [before.count("\n"), after.count("\n")], f"{path.name}: wrong {head}"
            assert content.count(before) == 1 or not content, f"{path.name}: {head} does not apply"
            content = content.replace(before, after, 1) if content else after
        path.write_text(content, encoding="utf-8")
        changed.append(path)
    return changed
