"""What each loss makes of the tiny model's own mistakes: the table of chapter-03/post_training.

    python tests/bench/preferences.py --out preferences.json             about 15 minutes, one core
    python tests/bench/preferences.py --only dpo "dpo --nll 1" --seeds 0

Each row is train_dpo.py as a user runs it, with three seeds: how many held-out pairs are won, how
likely the chosen answers are, and what share of questions is answered exactly, before and after.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "chapter-03" / "post_training" / "train_dpo.py"
ROWS = ("dpo", "dpo --beta 0.5", "dpo --nll 1", "cdpo", "robust", "hinge", "ipo", "dpo-norm",
        "dpo-norm --beta 0.1", "apo-zero", "simpo", "orpo")  # what follows --loss
SHOWN = {"pair_accuracy": "won", "logp_chosen": "log p chosen", "exact_match_add": "add",
         "exact_match_base": "base"}


def run(flags, seed):
    """{name: [(step, value), ...]} of what the evaluations in metrics.jsonl say."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run([sys.executable, SCRIPT, "--model", "tiny", "--data", "tiny", "--device",
                        "cpu", "--seed", str(seed), "--eval-every", "10", "--out", out,
                        "--nll", "0", "--loss", *flags.split()],
                       check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return {name: [(line["step"], line[name]) for line in lines
                   if "eval_loss" in line and name in line] for name in SHOWN}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS, metavar="ROW",
                        help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="a JSON file for the result")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for name in options.only:
        seeds = [run(name, seed) for seed in options.seeds]
        row = {"loss": name, "seeds": options.seeds}
        for key, title in SHOWN.items():
            scale = 100 if key != "logp_chosen" else 1
            for when, place in (("before", 0), ("after", -1)):
                values = [round(scale * one[key][place][1], 4) for one in seeds]
                row[f"{title} {when}"] = values
                row[f"{title} {when}, mean"] = round(statistics.mean(values), 4)
        row["curves"] = {key: [(step, round(value, 4)) for step, value in seeds[0][key]]
                         for key in ("pair_accuracy", "logp_chosen")}
        rows.append(row)
        print(f"{name:<20}" + "".join(
            f"  {title} {row[f'{title} before, mean']:.2f} -> {row[f'{title} after, mean']:.2f}"
            for title in SHOWN.values()), flush=True)
        if options.out:
            about = {"python": platform.python_version(), "rows": rows}
            lines = json.dumps(about).replace('{"loss"', '\n{"loss"')
            Path(options.out).write_text(lines + "\n")


if __name__ == "__main__":
    main()
