"""What a run does when things go wrong: signals, non-finite steps, memory."""

import contextlib
import math
import os
import signal
import time
from types import SimpleNamespace

from common.errors import UserError, listed, one_line, out_of_memory
from common.memory import readable_bytes
from common.ranks import say


@contextlib.contextmanager
def caught_signals():
    """Within `with caught_signals() as signals:` SIGTERM and Ctrl-C only set `signals.requested`,
    None before, to their name. The loop looks at it after each step (by `any_rank`: one rank may
    get it first), saves and ends. A second Ctrl-C raises KeyboardInterrupt. Main thread only."""
    signals = SimpleNamespace(requested=None, interrupted=None)  # when the first Ctrl-C came
    # torchrun gets the terminal's Ctrl-C too, and passes it on to every rank a second time.
    echo_seconds = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number, frame):
        # This may run between any two bytecodes, even inside print: so only flags and a bare write.
        signals.requested = signals.requested or signal.Signals(number).name
        if number == signal.SIGINT and signals.interrupted is None:
            signals.interrupted = time.monotonic()
            with contextlib.suppress(OSError):  # a closed terminal is no reason not to save
                os.write(2, b"\nCtrl-C: saving at the next step; once more to stop at once\n")
        elif number == signal.SIGINT and time.monotonic() - signals.interrupted >= echo_seconds:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class NonFinite:
    """Counts steps that are not finite, for the loop to skip; `limit` in a row are a UserError."""

    def __init__(self, limit=5):
        self.limit = limit
        self.skipped = self.in_a_row = 0

    def check(self, loss, grad_norm, step, documents, checkpoint=None):
        """False if the loop must skip this step. Give loss and norm over all ranks, so that all
        decide alike; for messages the step's packs (lists of ids) and the last good checkpoint."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        message = (f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}; documents: "
                   + listed(one for pack in documents for one in pack))
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} steps in a row were not finite, the last one {message}; the last"
                f" good checkpoint: {checkpoint or 'none yet'}; try a lower --lr or --clip, a"
                " longer --warmup, or --dtype float32")
        say(f"{message}: skipped ({self.in_a_row} in a row, {self.skipped} in all)")
        return False


@contextlib.contextmanager
def memory_advice(options, predicted):
    """Out of memory becomes a UserError: what was `predicted` (bytes by category), what to try."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        largest = sorted(predicted.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {readable_bytes(size)}" for name, size in largest if size)
        smaller = options.batch_tokens // 2
        cut = f"; documents over {smaller} tokens are too long" * (options.max_seq_len > smaller)
        advice = (f"try --batch-tokens {smaller} --grad-accum {2 * options.grad_accum} (as many"
                  f" tokens in a step){cut}" if smaller >= 128 else
                  "--batch-tokens is small already: take a smaller model, or chapter 3 with"
                  " --quantize nf4 and --activation-checkpointing")
        # PyTorch's message goes on for a paragraph about its allocator.
        raise UserError(f"out of memory: {one_line(error).split('. GPU')[0]}; predicted peak "
                        f"{readable_bytes(sum(predicted.values()))} ({parts}); {advice}") from error
