"""The runs of peers.py in one file, from which the READMEs' tables are taken. Development only.

    python tests/bench/summary.py dense1.json dense2.json lora.json --out tests/bench/results.json

A row of ours stands beside the strongest form of the peer that does the same work, and in dense
training beside padded batches too; every list has a value for each run, in the order given.
"""

import argparse
import json
import sys

PEERS = {"dense": ("transformers, packed", "transformers, padded"), "lora": ("PEFT, packed",),
         "qlora": ("bitsandbytes and PEFT, packed",)}
LABELS = {"dense": "dense", "lora": "LoRA", "qlora": "QLoRA"}


def rows_of(runs):
    """One dict for each row of ours and its peer, from what peers.py wrote in each run."""
    found = {}
    for kind, row, peer, run in ((kind, row, peer, run) for run in runs
                                 for kind, rows in run["figures"].items()
                                 for peer in PEERS[kind] for row in rows):
        if not row.startswith("chapter"):
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
    return list(found.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="files that peers.py --out has written")
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
    top, rows = json.dumps(head, indent=1), ",\n  ".join(map(json.dumps, rows_of(runs)))
    with open(options.out, "w", encoding="utf-8") as file:  # a line for each row
        file.write(top.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
