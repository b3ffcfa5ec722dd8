"""The runs of peers.py in one file, from which the READMEs' tables are taken. Development only.

    python tests/bench/summary.py dense1.json dense2.json lora.json --out tests/bench/results.json
    python tests/bench/summary.py --gpu first.json second.json --out tests/bench/gpu.json

A row of ours stands beside the strongest form of the peer that does the same work, and in dense
training beside padded batches too; every list has a value for each run, in the order given. With
--gpu the runs are those of gpu.py, each of other parts.
"""

import argparse
import json
import sys

PEERS = {"dense": ("transformers, packed", "transformers, padded"),
         "lora": ("PEFT, packed", "PEFT, padded"),
         "qlora": ("bitsandbytes and PEFT, packed",)}
LABELS = {"dense": "dense", "lora": "LoRA", "qlora": "QLoRA"}


def rows_of(runs):
    """One dict for each row of ours and its peer, from what peers.py wrote in each run."""
    found = {}
    for kind, row, peer, run in ((kind, row, peer, run) for run in runs
                                 for kind, rows in run["figures"].items()
                                 for peer in PEERS[kind] for row in rows):
        if not row.startswith("chapter") or peer not in run["figures"][kind]:
            continue
        figures = run["figures"][kind][row]
        over = figures["over"][peer]
        name = f"{LABELS[kind]}, {row.replace(', eager', '').replace(', NF4', '')}"
        name += " / padded" * peer.endswith("padded")
        one = found.setdefault(name, {"row": name, "peer": peer, "tokens_per_second": [],
                                      "speed": [], "memory": [], "live_MB": [], "spread": []})
        one["tokens_per_second"].append(round(figures["tokens_per_second"]))
        one["speed"].append(round(over["tokens_per_second"], 3))
        one["memory"].append(round(over["live_bytes"], 3))
        one["live_MB"].append(round(figures["live_bytes"] / 1e6))
        one["spread"].append(round(100 * figures["spread"]))
        if "predicted_bytes" in figures:
            one.setdefault("predicted_MB", []).append(round(figures["predicted_bytes"] / 1e6))
    return list(found.values())


GPU = {"chapter 1": "dense, chapter 1", "dense": "dense, chapter 3, compiled",
       "lora": "LoRA, chapter 3, compiled", "qlora": "QLoRA, chapter 3, compiled",
       "8B QLoRA, one sequence": "Qwen3-8B, QLoRA, one document"}
GPU_PEERS = {"chapter 1": "transformers", "dense": "transformers", "lora": "PEFT"}


def gpu_rows(figures):
    """One dict for each way to train that gpu.py has measured, beside every form of its peer; then
    one for each profile that ended, and for the rest."""
    for kind in (kind for kind in GPU if kind in figures):
        own = figures[kind]
        row = {"row": GPU[kind], "tokens_per_second": round(own["tokens_per_second"]),
               "mfu": [round(share, 4) for share in own["mfu"] or ()],
               **{name: own[name] for name in ("peak_bytes", "predicted_bytes")}}
        for name, peer in figures.items():
            who, _, how = name.partition(", ")
            if who != GPU_PEERS.get(kind):
                continue
            row[how] = {"peer": who, "tokens": peer["tokens"],
                        "tokens_per_second": round(peer["tokens_per_second"]),
                        "speed": round(own["tokens_per_second"] / peer["tokens_per_second"], 3)}
            if peer["tokens"] == own["tokens"]:  # else it did not fit
                row[how]["memory"] = round(own["peak_bytes"] / peer["peak_bytes"], 3)
        yield row
    for name in (name for name in figures if name.startswith("profile")):
        found = figures[name]["files"].get("profile.json")
        if found is None:  # out of time
            continue
        yield {"row": name, "seconds": round(found["seconds"], 4),
               "explained": round(found["explained"], 3),
               **{part: [round(1e3 * each, 1) for each in (*found["predicted"][part], measured)]
                  for part, measured in found["measured"].items()}}
    for name in ("loss", "loading", "shapes", "pieces"):
        yield {"row": name, **figures.get(name, {})}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="files that --out has written")
    parser.add_argument("--gpu", action="store_true", help="they are runs of gpu.py")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(argv)
    runs = []
    for path in options.runs:
        with open(path, encoding="utf-8") as file:
            runs.append(json.load(file))
    last = runs[-1]
    if any((run["machine"], run["versions"]) != (last["machine"], last["versions"])
           for run in runs):
        parser.error("the runs are of different machines or versions: they cannot share a table")
    commands = [f"{run['date']}  {run['command'].partition(' --out ')[0]}" for run in runs]
    head = {"machine": last["machine"], "versions": last["versions"], "runs": commands}
    rows = rows_of(runs) if not options.gpu else gpu_rows(
        {name: value for run in runs for name, value in run["figures"].items()})
    top, rows = json.dumps(head, indent=1), ",\n  ".join(map(json.dumps, rows))
    with open(options.out, "w", encoding="utf-8") as file:  # a line for each row
        file.write(top.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
