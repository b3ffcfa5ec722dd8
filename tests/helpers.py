"""What the tests share: chapter files as isolated modules, and scripts as a user runs them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def load(relative_path):
    """Import the file of a chapter, say `chapter-02/lora.py`, as a module of its own.

    Chapters repeat file names (`packing`, `train`), and their files import one another by bare
    name. So a chapter's own files come from its own folder here, each loaded once, and the bare
    names are removed from `sys.modules` afterwards, for the next chapter.
    """
    path = ROOT / relative_path
    folder = ROOT / Path(relative_path).parts[0]
    siblings = [file.stem for file in folder.rglob("*.py")]
    cache = _loaded.setdefault(folder, {})
    outside = {name: sys.modules.pop(name) for name in siblings if name in sys.modules}
    sys.modules.update(cache)
    before = list(sys.path)
    sys.path[:0] = [str(path.parent), str(folder)]
    try:
        module = importlib.import_module(path.stem)
    finally:
        sys.path[:] = before
        for name in siblings:
            if name in sys.modules:
                cache[name] = sys.modules.pop(name)
        sys.modules.update(outside)
    return module


_loaded = {}


def run_script(script, *arguments, cwd, timeout=300, environment=None):
    """Run `python script arguments...` in folder `cwd`; gives the finished process, text captured."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "NO_COLOR": "1", **(environment or {})},
    )


def encode_text(chat, text):
    """(ids, trained) of a document, as lists: all trained, eos appended."""
    layout = chat.layout({"text": text})
    ids, trained = chat.finish(layout, chat.tokenise([layout.text], layout.whole)[0])
    return ids.tolist(), trained.tolist()
