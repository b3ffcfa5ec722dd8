"""How long chat data take to prepare, beside rendering the template once and `encode_batch`.

    python tests/bench/preparation.py --tokenizer FOLDER --data FILE [--columns ...] [--repeat 7]

Both run in turn in one process, on one thread, and the medians are compared. What ours does beyond
the other: it finds what is trained, checks that nothing vanishes, refuses control tokens, writes.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # read by the tokenizers library when it starts
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.data import encode, readers
from common.data.chat import Chat


def least(chat, records):
    """Render each conversation once, tokenise all."""
    texts = [chat.render(record["messages"], **{key: record[key] for key in ("tools",)
                                                if key in record}) for record in records]
    for start in range(0, len(texts), encode.BATCH):
        chat.tokenise(texts[start:start + encode.BATCH])


def ours(chat, records):
    with contextlib.redirect_stdout(io.StringIO()):
        encode.encode(iter(records), chat, 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer and template")
    parser.add_argument("--data", required=True)
    parser.add_argument("--columns", type=readers.parse_columns)
    parser.add_argument("--count", type=int, default=2000, help="examples")
    parser.add_argument("--turns", type=int, default=1, help="examples joined to one conversation")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    chat = Chat.load(options.tokenizer)
    records = list(islice(readers.Records(options.data, options.columns), options.count))
    groups = [records[i:i + options.turns] for i in range(0, len(records), options.turns)]
    records = [{**group[0], "messages": sum((one["messages"] for one in group), [])}
               for group in groups]
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    seconds = {least: [], ours: []}
    for _ in range(options.repeat + 1):
        for function, taken in seconds.items():
            started = time.perf_counter()
            function(chat, records)
            taken.append(time.perf_counter() - started)
    pairs = [b / a for a, b in zip(*seconds.values())][1:]  # the first is a warm-up
    for function, taken in seconds.items():
        print(f"{function.__name__:<6} {len(records) / statistics.median(taken[1:]):8,.0f} "
              "conversations/s")
    print(f"ratio of the times: median {statistics.median(pairs):.3f}, "
          f"{min(pairs):.3f} to {max(pairs):.3f}")


if __name__ == "__main__":
    main()
