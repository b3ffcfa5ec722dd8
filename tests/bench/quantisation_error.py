"""Relative error of four-bit formats, on random numbers and on a checkpoint. Development only.

    python tests/bench/quantisation_error.py --model common/tiny --json error.json

The error is ‖Q(w) - w‖ / ‖w‖, over all weights of a kind together. Every format has one float32
scale per block; asymmetric INT4 has a float32 minimum as well. Prints a Markdown table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "chapter-03"), str(ROOT)]
from nf4 import BLOCK, LEVELS, dequantize_nf4, quantize_nf4  # noqa: E402

from common.weights import iter_tensors  # noqa: E402

BLOCKS = (32, 64, 128, 256)
SAMPLES = 2**24  # of each distribution
CHUNK = 2**20


def nearest(levels):
    """A format of fixed levels in [-1, 1], scaled by the absmax of the block."""
    levels = torch.as_tensor(sorted(levels))
    middles = (levels[:-1] + levels[1:]) / 2

    def quantise(blocks):
        absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
        return levels[torch.bucketize(blocks / absmax, middles)] * absmax
    return quantise


def asymmetric(blocks):
    """INT4 between the minimum and the maximum of the block."""
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-38)
    return ((blocks - low) / step).round() * step + low


def both_signs(levels):
    return {sign * level for level in levels for sign in (1, -1)}


FORMATS = {
    "NF4": nearest(LEVELS.tolist()),
    # The first is what bitsandbytes calls FP4, the second is the OCP microscaling format's.
    "FP4, bitsandbytes": nearest(both_signs([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])),
    "FP4, E2M1": nearest(both_signs([x / 6 for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])),
    "INT4, symmetric": nearest([i / 7 for i in range(-7, 8)]),
    "INT4, asymmetric": asymmetric,
}


def gaussian():
    generator = torch.Generator().manual_seed(0)
    for _ in range(SAMPLES // CHUNK):
        yield torch.randn(CHUNK, generator=generator)


def student_t():
    """Five degrees of freedom: heavier tails than a Gaussian's."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(SAMPLES // CHUNK):
        draws = torch.randn(6, CHUNK, generator=generator)
        yield draws[0] / (draws[1:].square().sum(0) / 5).sqrt()


def checkpoint(path):
    """The matrices inside the decoder's layers of a model folder, which is what is quantised."""
    for name, tensor in iter_tensors(path):
        if ".layers." in name and tensor.dim() == 2:
            yield from tensor.float().flatten().split(CHUNK)


def errors(pieces):
    """{format: {block: relative error}} over an iterator of flat float32 tensors."""
    squares = {name: dict.fromkeys(BLOCKS, 0.0) for name in FORMATS}
    norm = 0.0
    for piece in pieces:
        piece = piece[: len(piece) // max(BLOCKS) * max(BLOCKS)]
        norm += piece.double().square().sum().item()
        for name, quantise in FORMATS.items():
            for block in BLOCKS:
                error = quantise(piece.view(-1, block)).view(-1) - piece
                squares[name][block] += error.double().square().sum().item()
        ours = dequantize_nf4(quantize_nf4(piece))
        assert (ours - FORMATS["NF4"](piece.view(-1, BLOCK)).view(-1)).norm() < 1e-3 * piece.norm()
    return {name: {block: (square / norm) ** 0.5 for block, square in by_block.items()}
            for name, by_block in squares.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "common" / "tiny"), help="a model folder")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()

    name = Path(options.model).resolve().name
    figures = {"Gaussian": errors(gaussian()), "Student t, 5": errors(student_t()),
               f"weights of {name}": errors(checkpoint(options.model))}
    print(f"Relative error in %, blocks of {', '.join(map(str, BLOCKS))};"
          f" torch {torch.__version__}\n")
    print("| | " + " | ".join(figures) + " |\n" + "|---" * (1 + len(figures)) + "|")
    for format in FORMATS:
        cells = (" / ".join(f"{100 * error:.2f}" for error in table[format].values())
                 for table in figures.values())
        print(f"| {format} | " + " | ".join(cells) + " |")
    if options.json:
        Path(options.json).write_text(json.dumps(
            {"options": vars(options), "torch": torch.__version__, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
