"""What a run reports: metrics.jsonl for programs, aligned lines for people, TensorBoard if wanted.

A line of metrics.jsonl is one JSON object. A training step has exactly the keys in `FIELDS`, an
evaluation `step`, `eval_loss` and what else was scored. A number that is not known, or not
finite (JSON has no NaN), is null.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

from common.errors import UserError, writing
from common.memory import readable_bytes
from common.ranks import is_main

FIELDS = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds",
          "peak_memory_bytes", "mfu")
HEADER = ("step", "loss", "lr", "grad norm", "tokens/s", "memory", "MFU", "time left")
WIDTHS = (13, 9, 10, 10, 10, 11, 6, 11)  # 80 columns


class Metrics:
    """The reports of one run, into `run_folder` and onto the screen.

    With `start_step` (a resume) lines of later steps go from metrics.jsonl first, so that there is
    no gap and no repeat; so write what belongs to a step before saving that step's checkpoint. An
    evaluation that comes after it and is there already is not written twice.
    Only the main rank reports: on the others every method does nothing. Raises UserError where
    TensorBoard is asked for and missing, or the folder cannot be written.
    """

    def __init__(self, run_folder, total_steps, tensorboard=False, log_every=10, start_step=0):
        self.path = Path(run_folder) / "metrics.jsonl"
        self.total_steps, self.log_every, self.quiet = total_steps, log_every, not is_main()
        self.first = None  # (step, clock) of the first step seen: it compiles and does not count
        self.board = self.file = None
        self.evaluated = set()  # the keys of each line that the last checkpoint's step has already
        if self.quiet:
            return
        if tensorboard:
            self.board = _summary_writer(Path(run_folder) / "tensorboard", start_step)
        with writing(self.path):
            if self.path.exists():
                if not self.path.is_file():
                    raise UserError(f"{self.path}: not a regular file")
                self.evaluated = _cut(self.path, start_step)
            self.file = open(self.path, "a", encoding="ascii")

    def log_step(self, step, loss, lr, grad_norm, tokens, step_seconds, peak_memory_bytes=None,
                 mfu=None):
        """Report one optimizer step: `tokens` are those of this step, `mfu` is a fraction of 1.

        Every call writes a line to metrics.jsonl; each `log_every`th step, the first and the last
        go to the screen.
        """
        if self.quiet:
            return
        speed = tokens / step_seconds if step_seconds > 0 else None
        values = (step, loss, lr, grad_norm, tokens, speed, step_seconds, peak_memory_bytes, mfu)
        line = self._write(dict(zip(FIELDS, values)), "train")
        left = self._seconds_left(step, step_seconds)
        if line["step"] % self.log_every == 0 or self.first[0] == step or step == self.total_steps:
            if self.first[0] == step:
                print(_row(HEADER), flush=True)
            print(_row((
                f"{step}/{self.total_steps}", _number(line["loss"], ".4f"),
                _number(line["lr"], ".2e"), _number(line["grad_norm"], ".3f"),
                _number(line["tokens_per_second"], ",.0f"),
                readable_bytes(line["peak_memory_bytes"]), _number(line["mfu"], ".1%"),
                readable_time(left))), flush=True)

    def log_eval(self, step, **scores):
        """Report an evaluation, say log_eval(200, eval_loss=1.2, exact_match=0.9)."""
        if self.quiet:
            return
        line = {"step": step, **scores}
        line = self._write(line, "eval", again=(step, *sorted(line)) in self.evaluated)
        shown = ", ".join(f"{name} {_number(line[name], '.4f')}" for name, score in scores.items()
                          if score is not None)
        print(_row((f"{step}/{self.total_steps}",)) + f"  {shown}", flush=True)

    def sync(self):
        """Have all lines on the disk itself; before a checkpoint that a resume would start from."""
        if self.file is not None:
            with writing(self.path):
                os.fsync(self.file.fileno())

    def close(self):
        """Close the files; more calls do nothing."""
        for file in (self.file, self.board):
            if file is not None:
                file.close()
        self.file = self.board = None
        self.quiet = True

    def _write(self, line, kind, again=False):
        line = {name: _plain(value) for name, value in line.items()}
        if again:
            return line
        with writing(self.path):
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, line["step"])
        return line

    def _seconds_left(self, step, step_seconds):
        """By the clock since the first step, so evaluation and checkpoints count as well."""
        now = time.perf_counter()
        if self.first is None:
            self.first = (step, now)
        done = step - self.first[0]
        pace = (now - self.first[1]) / done if done > 0 else step_seconds
        return pace * (self.total_steps - step)


def readable_time(seconds):
    """3723 -> "1:02:03", 83 -> "1:23"."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _row(cells):
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS))


def _number(value, form):
    return "-" if value is None else format(value, form)


def _plain(value):
    """A number (or one-element tensor) as JSON has it; None for what is unknown or not finite."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path, start_step):
    """Drop the lines after `start_step` from metrics.jsonl, and, saying so, unreadable ones.

    Gives (step, *keys) of the lines of `start_step` itself, which stay.
    """
    kept, last = [], set()
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            content = json.loads(line)
            step = content["step"]
            whole = line.endswith(b"\n") and type(step) is int
        except (ValueError, RecursionError, KeyError, TypeError):
            whole = False
        if not whole:
            print(f"{path}:{number}: not a whole line (a write was cut short): dropped",
                  file=sys.stderr)
        elif step <= start_step:
            kept.append(line)
            if step == start_step:
                last.add((step, *sorted(content)))
    new = path.with_name(path.name + ".tmp")
    with open(new, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    return last


def _summary_writer(folder, start_step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
