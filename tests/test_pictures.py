"""The READMEs' pictures are what their script draws now; `python tests/pictures/draw.py` mends it."""

import sys
from xml.etree import ElementTree

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "tests" / "pictures"))
import draw  # noqa: E402
import figures  # noqa: E402


def test_committed_pictures_equal_what_the_code_draws():
    assert list(draw.different()) == []


@pytest.mark.parametrize("path", draw.FROM_CODE)
def test_every_word_lies_within_its_picture(path):
    """Widths are estimated: 0.62 of the font size for a letter is a wide font's average."""
    root = ElementTree.parse(ROOT / path).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    for item in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = (float(item.get(name)) for name in ("x", "y", "font-size"))
        length = 0.62 * size * len(item.text)
        begin = x - {"start": 0, "middle": length / 2, "end": length}[item.get("text-anchor")]
        if "transform" not in item.attrib:
            assert 0 <= begin and begin + length <= width and 0 < y < height, item.text


def test_pictures_of_results():
    rows = [{"method": name, "curve": [[step, 4 / step + n] for step in range(1, 41)]}
            for n, name in enumerate(("lora", "dora", "vera"), 1)]
    svg = figures.curves(rows)
    assert all(f">{row['method']}<" in svg for row in rows)
    assert svg.count("<polyline") == 2 + 2 * len(rows)  # axes, lines, and a stroke to each name
    rows = [{"name": "naive", "tokens_per_second": 1234.4, "peak_memory_bytes": 3 << 30},
            {"name": "packed", "tokens_per_second": 2468.8, "peak_memory_bytes": 2 << 30}]
    svg = figures.ladder(rows)
    assert all(f">{shown}<" in svg for shown in ("naive", "1,234", "2,469", "3.0 GiB", "2.0 GiB"))
