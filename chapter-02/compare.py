"""Compare the methods honestly: the same budget, and each at its own best learning rate.

    python chapter-02/compare.py                                  all methods on the embedded task
    python chapter-02/compare.py --methods lora dora --out mine -- --data my.jsonl --model DIR

Every method runs at several rates and seeds; the rate with the lowest mean loss on held-out data
counts. If that is the highest or lowest one, the next is tried too. What is finished is kept, so an
interrupted comparison goes on. Writes results.json. What follows `--` goes to every run."""

import contextlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from common import hub
from common.errors import UserError, run_main
from common.files.tensors import tensor_headers
from common.memory import readable_bytes
from common.options import Parser, parse, settle
from common.weights import read_config
from lora import METHODS
import train


def run_one(folder, method, rate, seed, extra):
    """Train once into `folder`, or go on with it; returns at once if it is finished."""
    if (folder / "final").is_dir():
        return
    options = ["--resume", folder] if (folder / "train_config.json").is_file() else [
        *extra, "--out", folder, "--method", method, "--lr", f"{rate:g}", "--seed", str(seed)]
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, train.__file__, *options], stdout=file, stderr=file)
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
        raise UserError(f"{folder}: no evaluation or checkpoint: see --eval-every, --save-every")
    states = tensor_headers(checkpoint, "optimizer").items()
    run = {"loss": column("eval_loss")[-1],
           "curve": [(line["step"], line["loss"]) for line in lines if "loss" in line],
           "trainable": sum(math.prod(one[0]) for name, one in states if name.endswith(".exp_avg")),
           "memory": max(column("peak_memory_bytes"), default=0),
           "speed": statistics.median(column("tokens_per_second"))}
    for name in {name: None for line in lines for name in line if name.startswith("exact_match")}:
        run[f"{name}_before"], run[f"{name}_after"] = column(name)[0], column(name)[-1]
    return run


def rates_of(method, options):
    """The learning rates to begin with: multiples of the one that train.py takes."""
    with contextlib.redirect_stdout(None):
        usual = parse(train.Options, train.CHAPTER, "", train.TINY, train.REAL,
                      ["--method", method, *options.extra])
        settle(usual, train.LlamaConfig.from_dict(read_config(hub.resolve(usual.model))), 0)
    return [float(f"{usual.lr * factor:.2g}") for factor in options.factors]


def sweep(method, rates, out, options, bar):
    """{rate: [run, ...]} of `method`, the best rate not at an end; and the mean loss by rate."""
    runs, means = {}, {}
    while rates:
        rate = rates.pop(0)
        folders = [out / f"{method}-lr{rate:g}-seed{seed}" for seed in range(options.seeds)]
        for seed, folder in enumerate(folders):
            run_one(folder, method, rate, seed, options.extra)
            bar.update()
        runs[rate] = [*map(read_run, folders)]
        means[rate] = statistics.mean(run["loss"] for run in runs[rate])
        best = min(means, key=means.get)
        if not rates and len(means) > 1 and best in (min(means), max(means)):
            rates = [float(f"{best * 3 if best == max(means) else best / 3:.2g}")]
            bar.total += options.seeds
    return runs, means


def summarise(method, runs, means):
    """One row of the table, from what `sweep` gives."""
    best = min(means, key=means.get)
    group = runs[best]
    row = {"method": method, "rate": best, "seeds": len(group), "loss_by_rate": means,
           "curve": group[0]["curve"], "speed": statistics.median(run["speed"] for run in group),
           "trainable": group[0]["trainable"], "memory": max(run["memory"] for run in group)}
    for name in ("loss", *(name for name in group[0] if name.startswith("exact_match"))):
        values = [run[name] for run in group]
        row[name] = statistics.mean(values)
        row[f"{name}_spread"] = (max(values) - min(values)) / 2
    return row


def table(rows):
    """The rows as a Markdown table."""
    scores = [name for name in rows[0] if name.endswith("_after")]
    lines = [["method", "best rate", "trainable", "peak memory", "tokens/s", "held-out loss",
              *(f"{name.split('_')[2]} skills" for name in scores)]]
    lines += [[row["method"], f"{row['rate']:g}", f"{row['trainable']:,}",
               readable_bytes(row["memory"]), f"{row['speed']:,.0f}",
               f"{row['loss']:.3f} ± {row['loss_spread']:.3f}",
               *(f"{100 * row[name]:.0f} ± {100 * row[f'{name}_spread']:.0f} %" for name in scores)]
              for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS),
                        metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs per learning rate (default: 3)")
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 1.0, 3.0],
                        help="learning rates over train.py's own to begin with (default: 1/3 1 3)")
    parser.add_argument("--out", default="runs/compare", help="default: runs/compare")
    parser.add_argument("extra", nargs="*", metavar="-- OPTIONS",
                        help="what stands after -- goes to train.py: -- --steps 160")
    options = parser.parse_args(argv)
    if options.extra and "--" not in (sys.argv if argv is None else argv):
        parser.error(f"unrecognized arguments: {' '.join(options.extra)}")
    if options.seeds < 1 or min(options.factors) <= 0:
        raise UserError("--seeds must be 1 or more, and --factors above 0")
    if {"--dry-run", "--resume"} & {word.partition("=")[0] for word in options.extra}:
        raise UserError("after `--`: compare.py needs whole runs, so no --dry-run or --resume")
    rates = {method: rates_of(method, options) for method in options.methods}
    out = Path(options.out)
    plan_file = out / "plan.json"
    if plan_file.is_file() and json.loads(plan_file.read_text()) != options.extra:
        raise UserError(f"{out}: holds a comparison with other options after `--`; choose --out")
    out.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps(options.extra))
    count = len(rates) * len(options.factors) * options.seeds
    with tqdm(total=count, unit="run") as bar:
        rows = [summarise(method, *sweep(method, rates[method], out, options, bar))
                for method in rates]
    (out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
