"""A checkpoint's chat template: Jinja, rendered as transformers renders it, within bounds.

A template is a program that came with a download. It runs in `common/data/sandbox.py`; its output is
streamed under a limit, and on Linux the process may not grow by more than MEMORY meanwhile. All
that can go wrong in it is one line of a UserError.
"""

import contextlib
import os

import jinja2

from common.data.sandbox import Exceeded, Sandbox
from common.errors import UserError, one_line

MEMORY = 256 * 2**20      # bytes by which a rendering may enlarge the process
LONGEST_TEMPLATE = 2**18  # characters; real templates have a few thousand


class Refused(UserError):
    """One example that cannot be used, while others can: skipped and counted in `encode`."""


class Template:
    """A chat template, compiled. `where` names its file in messages.

    Raises UserError for one that does not compile.
    """

    def __init__(self, source, where):
        self.where = where
        if len(source) > LONGEST_TEMPLATE:
            raise UserError(f"{where}: a chat template of {len(source):,} characters, the limit "
                            f"is {LONGEST_TEMPLATE:,}; check that the file is the right one")
        self.sandbox = Sandbox()
        self.compiled = self._guarded(self._compile, source)

    def _compile(self, source):
        self.sandbox.start(LONGEST_TEMPLATE)
        return self.sandbox.template(source)

    def render(self, variables, size):
        """The text for `variables`, a dict that holds about `size` characters of user text.

        What `{% generation %}` marks stands between OPENED and CLOSED. Raises Refused for what the
        template itself objects to (`raise_exception`, a role or a key that it does not know), and
        UserError for a template that exceeds a bound.
        """
        return self._guarded(self._render, variables, 1_000_000 + 8 * size)

    def _render(self, variables, longest):
        self.sandbox.start(longest)
        pieces, length = [], 0
        for piece in self.compiled.generate(variables):
            self.sandbox.watch()
            pieces.append(piece)
            length += len(piece)
            if length > longest:
                raise Exceeded(f"it writes more than {longest:,} characters")
        self.sandbox.sizes = {}
        return "".join(pieces)

    def _guarded(self, work, *arguments):
        """Run `work` under the memory limit, every failure turned into one clear line."""
        try:
            with bounded_memory():
                return work(*arguments)
        except Exceeded as error:
            raise UserError(f"{self.where}: chat template stopped: {error}") from None
        except (MemoryError, RecursionError) as error:
            why = "needs too much memory" if isinstance(error, MemoryError) else "nests too deeply"
            raise UserError(f"{self.where}: chat template stopped: it {why}") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.where}: chat template, line {error.lineno}: "
                            f"{one_line(error)}") from None
        except Exception as error:  # a template can raise anything that Python's operators can
            kind = UserError if work == self._compile else Refused
            raise kind(f"{self.where}: chat template failed: {one_line(error)}") from None


_STATM = "/proc/self/statm"  # the first of its numbers is the size of this process, in pages
_enforced = os.path.exists(_STATM)
_bounded = 0  # how many `bounded_memory` are open


@contextlib.contextmanager
def bounded_memory(extra=MEMORY):
    """While inside, the process cannot grow by more than `extra` bytes: MemoryError beyond.

    By RLIMIT_AS, which Linux alone enforces; elsewhere only the other bounds hold. To enter it
    costs about 10 microseconds, so a batch of renderings shares one.
    """
    global _bounded
    if not _enforced or _bounded:
        yield
        return
    import resource  # not on every system, but where there is /proc

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open(_STATM) as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    _bounded += 1
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _bounded -= 1
