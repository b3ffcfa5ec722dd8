"""What rewards and teachers make of the tiny model: two tables of chapter-03/post_training.

    python tests/bench/rewards_learning.py grpo --out rewards.json      about 15 minutes, one core
    python tests/bench/rewards_learning.py distill --out distill.json   about 15 minutes, one core
    python tests/bench/rewards_learning.py grpo --only "" " --scale-rewards" --seeds 0

Each row is train_grpo.py or train_distill.py as a user runs it, with three seeds: what share of
questions is answered exactly, before and after, and the means of the first and last ten steps. The
row "new skills, cold" asks for what the model has never seen, with a reward that it never gets.
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
sys.path.insert(0, str(ROOT))
from common.tiny import skills

COLD = "new skills, cold"
ROWS = {
    "grpo": ("", "--scale-rewards", "--baseline others", "--divisor constant", "--divisor answers",
             "--updates 4 --epsilon-high 0.28", "--kl 0.05",
             "--ratio sequence --updates 4 --epsilon 3e-4 --epsilon-high 4e-4", COLD),
    "distill": ("--on-policy 0", "", "--beta 0", "--beta 0.5")}
EVALUATED = {"exact_match_add": "add", "exact_match_new": "new",
             "exact_match_base": "base"}  # shares; shown in per cent
STEPS = {"reward": "reward", "degenerate": "degenerate", "entropy": "entropy",
         "grad_norm": "gradient norm", "answer_tokens": "tokens an answer",
         "divergence": "divergence"}
ENDS = 10  # steps at the beginning and at the end, of which the mean is taken


def run(kind, flags, seed):
    """{name: value, or (before, after)} of a row's run with this seed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = ["--data", "tiny", *flags.split()]
        if flags == COLD:
            data = Path(folder) / "new.jsonl"
            data.write_text("".join(json.dumps(one) + "\n"
                                    for one in skills.records("new", "train", 600, seed)))
            arguments = ["--data", data, "--reward", "exact", "--max-new-tokens", "24",
                         "--steps", "4"]
        script = ROOT / "chapter-03" / "post_training" / f"train_{kind}.py"
        subprocess.run([sys.executable, script, "--model", "tiny", "--device", "cpu", "--seed",
                        str(seed), "--eval-every", "0", "--save-every", "0", "--out", out,
                        *arguments], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    found = {}
    for name, title in EVALUATED.items():
        values = [100 * line[name] for line in lines if line.get(name) is not None]
        if values:
            found |= {f"{title} before": values[0], f"{title} after": values[-1]}
    steps = [line for line in lines if "step_seconds" in line]
    for name, title in STEPS.items():
        values = [line[name] for line in steps if line.get(name) is not None]
        if not values:
            continue
        ends = {"first": values[:ENDS], "last": values[-ENDS:]}
        found |= {f"{title} {when}": statistics.mean(some) for when, some in ends.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=ROWS)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="flags, instead of the usual rows;"
                        " what begins with a dash needs a space before it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="a JSON file for the result")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for name in options.only or ROWS[options.kind]:
        seeds = [run(options.kind, name, seed) for seed in options.seeds]
        row = {"flags": name.strip() or "default", "seeds": options.seeds}
        for key in seeds[0]:
            row[key] = [round(one[key], 4) for one in seeds]
            row[f"{key}, mean"] = round(statistics.mean(row[key]), 4)
        rows.append(row)
        print(f"{name or 'default':<32}" + "".join(
            f"  {key} {value:.3g}" for key, value in row.items() if key.endswith(", mean")
        ).replace(", mean", ""), flush=True)
        if options.out:
            about = {"python": platform.python_version(), "rows": rows}
            lines = json.dumps(about).replace('{"flags"', '\n{"flags"')
            Path(options.out).write_text(lines + "\n")


if __name__ == "__main__":
    main()
