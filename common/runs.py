"""What a run does outside its loop: its folder, saving a step, writing the result, stopping."""

import math
import os
import shlex
import signal
import sys
from pathlib import Path

from common import weights
from common.files.checkpoint import MARK, commit, latest, new_run_folder, prune, step_folder
from common.files.state import load_state, save_state
from common.metrics import Metrics
from common.options import save_options
from common.ranks import is_main, say, stop_ranks


def open_run(chapter, options, model, optimizer, data, total_steps, names=None, **more):
    """A new run's folder, or that of --resume; the loop's state, with `more` than the usual in it;
    the last whole checkpoint, or None; Metrics. `names` as for `save_step`. Collective."""
    state = {"step": 0, "next_pack": 0, "tokens": 0, "best_loss": None, "best_step": None,
             "eval_loss": None, **more}
    run = Path(options.resume or new_run_folder(f"chapter-{chapter}", options.out))
    saved = latest(run)
    if saved is not None:
        state = load_state(saved, model, optimizer, names)
    if options.resume:
        say(f"resuming {run} after step {state['step']}")
    save_options(options, chapter, run, data)
    metrics = Metrics(run, total_steps, options.tensorboard, options.log_every, state["step"])
    return run, state, saved, metrics


def note_loss(state, step, loss):
    """Note an evaluation's loss, or what else is better the lower, and whether it is the best."""
    state["eval_loss"] = loss if math.isfinite(loss) else None  # JSON has no NaN
    if loss < (math.inf if state["best_loss"] is None else state["best_loss"]):
        state["best_loss"], state["best_step"] = loss, step


def save_step(run, model, optimizer, state, options, metrics, names=None):
    """Commit `step-N/`, N being state["step"], with everything that --resume needs; prune older
    ones. `names` are the parameters to save (default: all). Gives the folder. Collective."""
    metrics.sync()
    saved = [p for n, p in model.named_parameters() if names is None or n in names]
    needed = sum(p.numel() * (12 if p.requires_grad else 4) for p in saved)  # with two moments
    folder = step_folder(run, state["step"])
    commit(folder, lambda temporary: save_state(temporary, model, optimizer, state, names),
           {"step": state["step"]}, needed)
    prune(run, options.keep, state["best_step"] if options.keep_best else None)
    return folder


def save_model(folder, model, config, data, dtype):
    """Commit `folder` as a Hugging Face model folder, tokenizer included (see `save_files`)."""
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    save_files(folder, lambda temporary: weights.save_weights(
        model, config, temporary, dtype, metadata=MARK), data, size)


def save_files(folder, write_files, data, size=0):
    """Commit `folder`: what `write_files(temporary folder)` writes, and the tokenizer's files."""
    def write(temporary):
        write_files(temporary)
        if is_main():
            weights.copy_tokenizer(data.source, temporary)
            if data.chat is not None:
                data.chat.save(temporary)

    commit(folder, write, bytes_needed=size)


def wrote(kind, folder, can_answer=True, script="generate.py"):
    """What is said of the finished "model" or "adapter", with the command that asks it."""
    words = [os.path.normpath(Path(sys.argv[0]).parent / script), f"--{kind}", str(folder)]
    asking = f'\nask it:\npython {shlex.join(words)} --prompt "..."'
    return f"wrote {folder}: a Hugging Face {kind} folder" + asking * can_answer


def stopped(run, state, signals):
    """Say how to go on after a signal, and return the exit code (128 + the signal's number)."""
    name = signals.requested or "a signal on another rank"
    say(f"\nstopped by {name} after step {state['step']}, which is saved. Go on with:\n"
        f"  python {shlex.join(sys.argv[:1])} --resume {shlex.quote(str(run))}")
    stop_ranks()
    return 128 + signal.Signals[signals.requested or "SIGTERM"]
