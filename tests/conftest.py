"""Make `import common` and `from helpers import load` work from every test file."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a defect
collect_ignore = ["long", "bench", "goldens"]
