"""Ask a model or an adapter something, on a four-bit base or an ordinary one.

    python chapter-03/generate.py --adapter runs/chapter-03/001/final --prompt "Reverse: cat"
    python chapter-03/generate.py --adapter runs/chapter-03/001/final --compare --prompt "..." "..."
    python chapter-03/generate.py --model meta-llama/Llama-3.2-1B-Instruct --chat

As in chapter 2, but an adapter that was fitted to a four-bit base, rounding errors included, gets
the same base here: its file says which."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.asking import terminal
from common.errors import run_main
import lora
from quantized_model import load_model


def main(argv=None):
    terminal.run(__doc__, argv, load_model, lora)


if __name__ == "__main__":
    run_main(main)
