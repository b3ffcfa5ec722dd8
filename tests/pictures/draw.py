"""Draw the pictures of the READMEs: SVG, with nothing but Python and this repository's own code.

    python tests/pictures/draw.py            write them all
    python tests/pictures/draw.py --check    only list those that differ from what would be drawn
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), *map(str, Path(__file__).resolve().parents[1:3])]

import concepts  # noqa: E402
import figures  # noqa: E402
from helpers import ROOT  # noqa: E402

# What follows from the code; and what is drawn from measurements, once those are there.
FROM_CODE = {
    "chapter-01/packing.svg": concepts.packing,
    "chapter-01/decoder.svg": concepts.decoder,
    "chapter-02/family.svg": concepts.family,
    "chapter-03/nf4.svg": figures.nf4,
    "chapter-03/memory.svg": figures.memory,
}
FROM_RESULTS = {
    "chapter-02/curves.svg": ("chapter-02/results.json", figures.curves),
    "chapter-03/profiling/ladder.svg": ("chapter-03/profiling/ladder.json", figures.ladder),
    "chapter-03/post_training/preferences.svg": (
        "chapter-03/post_training/preferences.json", figures.preferences),
}


def pictures():
    """Iterate over (path relative to the repository, SVG as text)."""
    for path, draw in FROM_CODE.items():
        yield path, draw()
    for path, (source, draw) in FROM_RESULTS.items():
        if (ROOT / source).is_file():
            yield path, draw(json.loads((ROOT / source).read_text(encoding="utf-8")))


def different():
    """Paths of the pictures whose file is not what is drawn now, and those texts."""
    return {path: svg for path, svg in pictures()
            if not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != svg}


if __name__ == "__main__":
    stale = different()
    for path, svg in stale.items():
        if "--check" not in sys.argv[1:]:
            (ROOT / path).write_text(svg, encoding="utf-8")
        print(path)
    sys.exit("--check" in sys.argv[1:] and bool(stale))
