"""Apply each worked change that adds a family to a copy of this tree, and run its check there.

    python tests/family_runs.py [gemma3 ...]    all of tests/extensions/check_*.py, or these

Prints a JSON line for each: name, exit code, what pytest said. tests/test_families.py reads them.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from diffs import apply_diff  # noqa: E402

EXTENSIONS = ROOT / "tests" / "extensions"
NAMES = [file.stem.removeprefix("check_") for file in sorted(EXTENSIONS.glob("check_*.py"))]
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "runs", "long", "bench", "*.svg")


def run(name, folder):
    """The finished `pytest tests/extensions/check_<name>.py` in a copy with <name>.diff applied."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    apply_diff((EXTENSIONS / f"{name}.diff").read_text(encoding="utf-8"), folder)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         f"tests/extensions/check_{name}.py"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(names):
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            done = run(name, Path(folder) / "copy")
        print(json.dumps({"name": name, "code": done.returncode, "said": done.stdout}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
