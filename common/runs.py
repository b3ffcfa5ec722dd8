"""A run's own steps that are not the loop: saving a step, leaving the result, stopping early."""

import contextlib
import hashlib
import json
import shlex
import signal
import sys
from dataclasses import asdict, fields

import torch

from common import checkpoint, distributed, guard, weights
from common.errors import UserError
from common.manifest import MARK


def config_hash(options):
    """SHA-256 of the options that determine the result: the same hash, the same weights."""
    values = asdict(options)
    names = [field.name for field in fields(options) if field.metadata["result"]]
    return hashlib.sha256(json.dumps([(n, values[n]) for n in names]).encode()).hexdigest()


def save_step(run, model, optimizer, state, options, names=None):
    """Commit `step-N/` with everything that --resume needs, then prune older ones.

    `names` are the parameters to save (default: all). N is state["step"]. Collective.
    """
    parameters = [p for n, p in model.named_parameters() if names is None or n in names]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    needed = 4 * sum(p.numel() for p in parameters) + 8 * trained  # masters and two moments
    checkpoint.commit(
        checkpoint.step_folder(run, state["step"]),
        lambda folder: checkpoint.save_state(folder, model, optimizer, state, names),
        extra={"step": state["step"], "config_hash": config_hash(options)}, bytes_needed=needed)
    best = state["best_step"] if options.keep_best else None
    checkpoint.prune(run, options.keep, best and checkpoint.step_folder(run, best))


def save_model(folder, model, config, source, dtype, ranks):
    """Commit `folder` as a Hugging Face model folder, with the tokenizer files of `source`."""
    def write(temporary):
        weights.save_weights(model, config, temporary, dtype, metadata=MARK)
        if ranks.main:
            weights.copy_tokenizer(source, temporary)

    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    checkpoint.commit(folder, write, bytes_needed=needed)


def save_adapter(folder, source, ranks, write_adapter):
    """Commit `folder` with what `write_adapter(folder)` writes and the tokenizer files of `source`."""
    def write(temporary):
        write_adapter(temporary)
        if ranks.main:
            weights.copy_tokenizer(source, temporary)

    checkpoint.commit(folder, write)


def stopped(run, state, signals, ranks):
    """Say how to go on after a signal, and give the exit code (128 + the signal's number)."""
    name = signals.requested or "a signal on another rank"
    if ranks.main:
        print(f"\nstopped by {name} after step {state['step']}, which is saved. Go on with:\n"
              f"  python {shlex.join(sys.argv[:1])} --resume {shlex.quote(str(run))}", flush=True)
    distributed.stop()
    return 128 + (signal.Signals[signals.requested] if signals.requested else signal.SIGTERM)


@contextlib.contextmanager
def memory_advice(options, predicted):
    """Turn running out of memory into a UserError with the prediction and the next flags to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(guard.out_of_memory_advice(error, options, predicted)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how PyTorch's CPU allocator says it
            raise
        raise UserError(guard.out_of_memory_advice(error, options, predicted)) from error
