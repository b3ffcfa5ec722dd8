"""Compare the methods honestly: the same budget, and each at its own best learning rate.

    python chapter-02/compare.py                                  all methods on the embedded task
    python chapter-02/compare.py --methods lora dora --out mine -- --data my.jsonl --model DIR

Every method runs at several rates and seeds; the rate with the lowest mean loss on held-out data
counts. Each run has its own folder, so an interrupted comparison goes on where it stopped. Writes
results.md, results.json and, with matplotlib, pictures. What follows `--` goes to every run."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from common.errors import UserError, run_main
from common.files.tensors import tensor_headers
from common.memory import readable_bytes
from common.options import Parser
from lora import METHODS

TRAIN = Path(__file__).with_name("train.py")
# The rate that --factors multiply; 5e-3 for the other methods.
CENTRE = {"full": 1e-3, "vera": 9e-2, "lora+": 1e-3, "lora-fa": 1.5e-2}


def run_one(folder, method, rate, seed, extra):
    """Train once into `folder`, or go on with it; returns at once if it is finished."""
    if (folder / "final").is_dir():
        return
    options = ["--resume", folder] if (folder / "train_config.json").is_file() else [
        "--out", folder, "--method", method, "--lr", f"{rate:g}", "--seed", str(seed), *extra]
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, TRAIN, *options], stdout=file, stderr=file)
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{method} at rate {rate:g}: {last} (all of it: {log})")


def read_run(folder):
    """What one finished run measured, from its own files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def column(name):
        return [line[name] for line in lines if line.get(name) is not None]

    checkpoint = max(folder.glob("step-??????"), default=None)
    if not column("eval_loss") or checkpoint is None:
        raise UserError(f"{folder}: no evaluation, or no checkpoint to count parameters in; leave"
                        " --eval-every and --save-every on")
    sizes = {name: math.prod(shape)
             for name, (shape, _, _) in tensor_headers(checkpoint, "optimizer").items()}
    run = {"loss": column("eval_loss")[-1],
           "curve": [(line["step"], line["loss"]) for line in lines if "loss" in line],
           "trainable": sum(n for name, n in sizes.items() if name.endswith(".exp_avg")),
           "optimizer_bytes": 4 * sum(sizes.values()),
           "memory": max(column("peak_memory_bytes"), default=0),
           "speed": statistics.median(column("tokens_per_second"))}
    for name in {name: None for line in lines for name in line if name.startswith("exact_match")}:
        run[f"{name}_before"], run[f"{name}_after"] = column(name)[0], column(name)[-1]
    return run


def summarise(method, runs):
    """One row of the table, from {rate: [run, ...]}; also the loss of every rate."""
    means = {rate: statistics.mean(run["loss"] for run in group) for rate, group in runs.items()}
    best = min(means, key=means.get)
    group = runs[best]
    row = {"method": method, "rate": best, "seeds": len(group), "loss_by_rate": means,
           "edge_of_grid": best in (min(means), max(means)) and len(means) > 1,
           "curve": group[0]["curve"], "speed": statistics.median(run["speed"] for run in group)}
    for name in ("trainable", "optimizer_bytes", "memory"):
        row[name] = max(run[name] for run in group)
    for name in ("loss", *(name for name in group[0] if name.startswith("exact_match"))):
        values = [run[name] for run in group]
        row[name] = statistics.mean(values)
        row[f"{name}_spread"] = (max(values) - min(values)) / 2
    return row


def table(rows):
    """The rows as a Markdown table."""
    def score(row, name):
        mean, half = (row.get(f"exact_match_{name}_after{end}") for end in ("", "_spread"))
        return "-" if mean is None else f"{100 * mean:.0f} ± {100 * half:.0f} %"

    return "\n".join((
        "| method | best rate | trainable | optimizer state | peak memory | tokens/s "
        "| held-out loss | new skills | old skills |", "|" + "---|" * 9,
        *(f"| {row['method']} | {row['rate']:g}{' (edge)' * row['edge_of_grid']} "
          f"| {row['trainable']:,} | {readable_bytes(row['optimizer_bytes'])} "
          f"| {readable_bytes(row['memory'])} | {row['speed']:,.0f} "
          f"| {row['loss']:.3f} ± {row['loss_spread']:.3f} | {score(row, 'new')} "
          f"| {score(row, 'base')} |" for row in rows)))


def draw(rows, out):
    """Two pictures beside the table, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: pip install matplotlib for loss curves and the learning-rate sweep")
        return
    for file, points, marker, title, label, scale in (
            ("curves.svg", "curve", None, "training loss at the best rate", "step", "linear"),
            ("rates.svg", "loss_by_rate", "o", "held-out loss", "learning rate", "log")):
        axes = Figure(figsize=(8, 5)).subplots()
        for row in rows:
            axes.plot(*zip(*sorted(dict(row[points]).items())), label=row["method"], marker=marker)
        axes.set(title=title, xlabel=label, ylabel="loss", xscale=scale, yscale="log")
        axes.legend()
        axes.figure.savefig(out / file)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS),
                        metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs per learning rate (default: 3)")
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 1.0, 3.0],
                        help="learning rates, as multiples of each method's usual one "
                        "(default: 1/3 1 3)")
    parser.add_argument("--out", default="runs/compare", help="default: runs/compare")
    parser.add_argument("extra", nargs="*", metavar="-- OPTIONS",
                        help="what stands after -- goes to train.py: -- --steps 160")
    options = parser.parse_args(argv)
    if options.extra and "--" not in (sys.argv if argv is None else argv):
        parser.error(f"unrecognized arguments: {' '.join(options.extra)}")
    if options.seeds < 1 or min(options.factors) <= 0:
        raise UserError("--seeds must be 1 or more, and --factors above 0")
    plan = [(method, float(f"{CENTRE.get(method, 5e-3) * factor:.2g}"), seed)
            for method in options.methods for factor in options.factors
            for seed in range(options.seeds)]
    out = Path(options.out)
    plan_file = out / "plan.json"
    if plan_file.is_file() and json.loads(plan_file.read_text()) != options.extra:
        raise UserError(f"{out}: holds a comparison with other options after `--`; choose --out")
    out.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps(options.extra))
    results = {method: {} for method in options.methods}
    for method, rate, seed in tqdm(plan, unit="run"):
        folder = out / f"{method}-lr{rate:g}-seed{seed}"
        run_one(folder, method, rate, seed, options.extra)
        results[method].setdefault(rate, []).append(read_run(folder))
    rows = [summarise(method, runs) for method, runs in results.items()]
    (out / "results.md").write_text(table(rows) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))
    draw(rows, out)


if __name__ == "__main__":
    run_main(main)
