"""Compare the methods honestly: the same budget, and each at its own best learning rate.

    python chapter-02/compare.py                                  all methods on the embedded task
    python chapter-02/compare.py --methods lora dora --out mine -- --data my.jsonl --model DIR

Most published wins of one method over another vanish once the learning rate is tuned for both. So
every method is run at several learning rates with several seeds; the rate with the lowest mean loss
on held-out data counts. Each run is one call of train.py in a folder of its own under --out, so an
interrupted comparison goes on where it stopped. Writes results.md and results.json there, and
pictures if matplotlib is installed. What follows `--` goes to every run.
"""

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
# Where each grid is centred; its other rates are factors of three away.
CENTRE = {"full": 1e-3, "vera": 9e-2, "lora+": 1e-3, "lora-fa": 1.5e-2}
OTHERS = 5e-3


def run_one(folder, method, rate, seed, extra):
    """Train once into `folder`, or go on with it; returns at once if it is finished."""
    if (folder / "final").is_dir():
        return
    options = ["--out", folder, "--method", method, "--lr", f"{rate:g}", "--seed", str(seed),
               *extra]
    if (folder / "train_config.json").is_file():
        options = ["--resume", folder]
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, TRAIN, *options], stdout=file, stderr=file)
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{method} at rate {rate:g}: {last} (all of it: {log})")


def read_run(folder):
    """What one finished run measured, from its own files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    checkpoint = max(folder.glob("step-??????"), default=None)
    if not losses or checkpoint is None:
        raise UserError(f"{folder}: no evaluation, or no checkpoint to count parameters in; leave"
                        " --eval-every and --save-every on")
    headers = tensor_headers(checkpoint, "optimizer")
    sizes = {name: math.prod(shape) for name, (shape, _, _) in headers.items()}
    run = {
        "loss": losses[-1],
        "curve": [(line["step"], line["loss"]) for line in steps],
        "trainable": sum(n for name, n in sizes.items() if name.endswith(".exp_avg")),
        "optimizer_bytes": 4 * sum(sizes.values()),
        "memory": max((line["peak_memory_bytes"] or 0) for line in steps),
        "speed": statistics.median(line["tokens_per_second"] for line in steps),
    }
    scores = [line for line in lines if any(name.startswith("exact_match") for name in line)]
    for when, line in zip(("before", "after"), scores[:1] + scores[-1:]):
        run |= {f"{name}_{when}": share for name, share in line.items()
                if name.startswith("exact_match")}
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

    cells = [["method", "best rate", "trainable", "optimizer state", "peak memory", "tokens/s",
              "held-out loss", "new skills", "old skills"]]
    cells += [[
        row["method"], f"{row['rate']:g}{' (edge)' * row['edge_of_grid']}",
        f"{row['trainable']:,}", readable_bytes(row["optimizer_bytes"]),
        readable_bytes(row["memory"]), f"{row['speed']:,.0f}",
        f"{row['loss']:.3f} ± {row['loss_spread']:.3f}", score(row, "new"), score(row, "base"),
    ] for row in rows]
    head, *lines = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join((head, "|" + "---|" * len(cells[0]), *lines))


def draw(rows, out):
    """Two pictures beside the table, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib for loss curves and the learning-rate sweep")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    for file, title, label, scale in (
            ("curves.svg", "training loss at the best rate", "step", "linear"),
            ("rates.svg", "held-out loss", "learning rate", "log")):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for row in rows:
            points = row["curve"] if file == "curves.svg" else sorted(row["loss_by_rate"].items())
            axes.plot(*zip(*points), label=row["method"], marker=None if "curve" in file else "o")
        axes.set(title=title, xlabel=label, ylabel="loss", xscale=scale, yscale="log")
        axes.legend()
        figure.savefig(out / file)
        pyplot.close(figure)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    extra = argv[end + 1:]
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                        epilog="What stands after -- goes to train.py: -- --steps 160")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS),
                        metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs per learning rate (default: 3)")
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 1.0, 3.0],
                        help="learning rates, as multiples of each method's usual one "
                        "(default: 1/3 1 3)")
    parser.add_argument("--out", default="runs/compare", help="default: runs/compare")
    options = parser.parse_args(argv[:end])
    if options.seeds < 1 or min(options.factors) <= 0:
        raise UserError("--seeds must be 1 or more, and --factors above 0")
    out = Path(options.out)
    plan = [(method, float(f"{CENTRE.get(method, OTHERS) * factor:.2g}"), seed)
            for method in options.methods for factor in options.factors
            for seed in range(options.seeds)]
    plan_file = out / "plan.json"
    if plan_file.is_file() and json.loads(plan_file.read_text()) != extra:
        raise UserError(f"{out}: holds a comparison with other options after `--`; choose --out")
    out.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps(extra))
    results = {method: {} for method in options.methods}
    for method, rate, seed in tqdm(plan, unit="run"):
        folder = out / f"{method}-lr{rate:g}-seed{seed}"
        run_one(folder, method, rate, seed, extra)
        results[method].setdefault(rate, []).append(read_run(folder))
    rows = [summarise(method, runs) for method, runs in results.items()]
    text = table(rows)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(text)
    draw(rows, out)


if __name__ == "__main__":
    run_main(main)
