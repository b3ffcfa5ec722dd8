"""What a run reports: metrics.jsonl for programs, aligned lines for people, perhaps TensorBoard."""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, writing
from common.files.json_files import read_bytes, write_whole
from common.memory import readable_bytes
from common.ranks import is_main, say

FIELDS = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds",
          "peak_memory_bytes", "mfu")
COLUMNS = {  # what the screen shows of a line: (title, width, how it is written); 80 columns
    "step": ("step", 13, str), "loss": ("loss", 9, "{:.4f}".format),
    "lr": ("lr", 10, "{:.2e}".format), "grad_norm": ("grad norm", 10, "{:.3f}".format),
    "tokens_per_second": ("tokens/s", 10, "{:,.0f}".format),
    "peak_memory_bytes": ("memory", 11, readable_bytes), "mfu": ("MFU", 6, "{:.1%}".format),
    "left": ("time left", 11, tqdm.format_interval)}


class Metrics:
    """The main rank's reports of a run, to the file `name` of `run_folder` and to the screen. On a
    resume, lines after `start_step` go first: log a step before saving it. Raises UserError."""

    def __init__(self, run_folder, total_steps, tensorboard=False, log_every=10, start_step=0,
                 name="metrics.jsonl"):
        self.path, self.columns = Path(run_folder) / name, COLUMNS  # or others
        self.total_steps, self.log_every = total_steps, log_every
        self.first = None  # (step, clock) of the first step seen: it compiles and does not count
        self.written = set()  # (step, *keys) of the lines that `start_step` has already
        self.board = None
        if not is_main():
            self.path = Path(os.devnull)
        elif tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs it: pip install tensorboard") from error
            self.board = SummaryWriter(str(self.path.with_name("tensorboard")),
                                       purge_step=start_step + 1)
        with writing(self.path):
            if self.path.exists() and is_main():
                self._cut(start_step)
            self.file = open(self.path, "a", encoding="ascii")

    def log_step(self, step, loss, lr, grad_norm, tokens, step_seconds, peak_memory_bytes=None,
                 mfu=None, **more):
        """Report one optimizer step of `tokens` tokens; `mfu` is a fraction of 1, and `more` goes
        into metrics.jsonl too. The first step, the last and every `log_every`th are printed."""
        speed = tokens / step_seconds if step_seconds > 0 else None
        values = (step, loss, lr, grad_norm, tokens, speed, step_seconds, peak_memory_bytes, mfu)
        line = self.write({**dict(zip(FIELDS, values)), **more}, "train")
        now = time.perf_counter()
        if self.first is None:
            self.first = (step, now)
            say("".join(f"{title:>{width}}" for title, width, _ in self.columns.values()))
        done = step - self.first[0]
        # By the clock since the first step, so evaluation and checkpoints count as well.
        pace = (now - self.first[1]) / done if done else step_seconds
        if step % self.log_every == 0 or done == 0 or step == self.total_steps:
            line |= {"step": f"{step}/{self.total_steps}", "left": pace * (self.total_steps - step)}
            say("".join(f"{'-' if line[name] is None else show(line[name]):>{width}}"
                        for name, (_, width, show) in self.columns.items()))

    def log_eval(self, step, **scores):
        """Report an evaluation, say log_eval(200, eval_loss=1.2, exact_match=0.9)."""
        line = self.write({"step": step, **scores}, "eval")
        shown = ", ".join(f"{name} {'-' if line[name] is None else format(line[name], '.4f')}"
                          for name, score in scores.items() if score is not None)
        say(f"{f'{step}/{self.total_steps}':>13}  {shown}")

    def sync(self):
        """Flush all lines to the disk; call it before saving a checkpoint."""
        if is_main():
            with writing(self.path):
                os.fsync(self.file.fileno())

    def close(self):
        """Close the files; more calls do nothing."""
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, line, kind="more"):
        """Write the line, null where not finite (JSON has no NaN), unless it is there already."""
        line = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in line.items()}
        if (line["step"], *sorted(line)) in self.written:
            return line
        with writing(self.path):
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, line["step"])
        return line

    def _cut(self, start_step):
        """Drop the lines after `start_step` from the file, and unreadable ones with a message."""
        kept = []
        for number, line in enumerate(read_bytes(self.path, sys.maxsize).splitlines(True), 1):
            try:
                content = json.loads(line if line.endswith(b"\n") else "")
                if content["step"] <= start_step:
                    kept.append(line)
                if content["step"] == start_step:
                    self.written.add((start_step, *sorted(content)))
            except (ValueError, RecursionError, KeyError, TypeError):
                print(f"{self.path}:{number}: not a whole line (a write was cut short): dropped",
                      file=sys.stderr)
        write_whole(self.path, b"".join(kept))
