"""A checkpoint's chat template: Jinja, rendered as transformers renders it, within bounds.

A template is a program that came with a download. jinja2's sandbox keeps it away from Python, but
not from the machine: `{{ 'x' * 10**9 }}` passes it. So here every loop step, call and filter
watches a clock, the operators that make large values are checked beforehand, the output is
streamed under a limit, and on Linux the process may not grow by more than MEMORY meanwhile.
"""

import contextlib
import datetime
import json
import sys
import time

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from common.errors import UserError

SECONDS = 2.0             # processor time for one rendering; a real one takes a millisecond
MEMORY = 256 * 2**20      # bytes by which a rendering may enlarge the process
LONGEST_TEMPLATE = 2**18  # characters; real templates have a few thousand
OPENED, CLOSED = "\U0010fff0", "\U0010fff1"  # stand around what {% generation %} marks


class Refused(UserError):
    """One example that cannot be used, while others can: skipped and counted in `encode`."""


class _Exceeded(Exception):
    """A template went beyond a bound."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's own words, put between marks."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return OPENED + caller() + CLOSED


class _Loop:
    """An iterable of a template's `for`, with a look at the clock at every step."""

    def __init__(self, iterable, watch):
        self.iterable, self.watch = iterable, watch

    def __iter__(self):
        for item in self.iterable:
            self.watch()
            yield item

    def __len__(self):
        return len(self.iterable)


@jinja2.pass_context  # (also keeps jinja2 from computing the value at compile time)
def _watch_loop(context, iterable):
    return _Loop(iterable, context.environment.watch)


@jinja2.pass_context
def _watch_value(context, value):
    return context.environment.watch(value)


class _Watch(NodeTransformer):
    """Rewrites a template's syntax tree: loops, and all that makes a value, go through `watch`."""

    def wrap(self, node, name):
        wrapped = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        wrapped.environment = node.environment
        return wrapped

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.iter = self.wrap(node.iter, "_watch_loop")
        return node

    def visit_Filter(self, node):
        return self.wrap(self.generic_visit(node), "_watch_value")

    visit_Concat = visit_List = visit_Dict = visit_Filter

    def visit_Tuple(self, node):  # as a target, `for key, value in ...`, it makes nothing
        return self.visit_Filter(node) if node.ctx == "load" else node


class _Namespace(Namespace):
    """`namespace()` of a template; printing one would print all that it holds."""

    def __repr__(self):
        return "<namespace>"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def start(self, longest):
        """A new rendering begins: no value may be longer than `longest`."""
        self.longest = longest
        self.sizes = {}  # id -> (size, value) of the lists and dicts seen; keeps them alive
        self.cpu = time.thread_time()
        self.until = time.monotonic() + SECONDS

    def watch(self, value=None):
        if time.monotonic() > self.until:  # the cheap clock; it also runs while a process waits
            left = SECONDS - (time.thread_time() - self.cpu)
            if left <= 0:
                raise _Exceeded(f"it runs longer than {SECONDS:.0f} s")
            self.until = time.monotonic() + left
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, _CONTAINERS):
            size = self.measure(value)
        else:
            return value
        if size > self.longest:
            raise _Exceeded(f"it builds a value longer than {self.longest:,}")
        return value

    def measure(self, value):
        """Items of a list or dict and of all within it, as often as they occur: thirty times
        `x = [x, x]` is small in memory, but not to print or to compare."""
        if id(value) in self.sizes:
            return self.sizes[id(value)][0]
        size = len(value)
        if size <= self.longest:
            for part in (value, value.values()) if isinstance(value, dict) else (value,):
                for item in part:
                    if isinstance(item, _CONTAINERS):
                        size += self.measure(item)
        self.sizes[id(value)] = size, value
        return size

    def call_binop(self, context, operator, left, right):
        sizes = [_bits(left), _bits(right)]
        if operator == "**" and None not in sizes and sizes[0] * abs(right) > 4096:
            raise _Exceeded("it computes a huge power")
        if operator == "*":
            if None not in sizes and sum(sizes) > 4096:
                raise _Exceeded("it computes a huge number")
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                    if len(value) * times > self.longest:
                        raise _Exceeded(f"it repeats a value beyond {self.longest:,}")
        return self.watch(super().call_binop(context, operator, left, right))

    def call(self, context, function, /, *arguments, **keywords):
        self.watch()
        return self.watch(super().call(context, function, *arguments, **keywords))


_CONTAINERS = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))


def _bits(value):
    return value.bit_length() if isinstance(value, int) else None


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format):
    return datetime.datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


class Template:
    """A chat template, compiled. `where` names its file in messages.

    The environment is the one of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks,
    loop controls, `{% generation %}`, `tojson` without HTML escapes, `raise_exception`,
    `strftime_now`). Raises UserError for a template that does not compile.
    """

    def __init__(self, source, where):
        self.where = where
        if len(source) > LONGEST_TEMPLATE:
            raise UserError(f"{where}: a chat template of {len(source):,} characters, the limit "
                            f"is {LONGEST_TEMPLATE:,}; check that the file is the right one")
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False,
                           extensions=[_Generation, "jinja2.ext.loopcontrols"])
        sandbox.filters.update(tojson=_tojson, _watch_loop=_watch_loop, _watch_value=_watch_value)
        sandbox.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now,
                               namespace=_Namespace)
        del sandbox.globals["lipsum"]  # random text, as much of it as one asks for
        self.sandbox = sandbox
        self.compiled = self._guarded(self._compile, source)

    def _compile(self, source):
        self.sandbox.start(LONGEST_TEMPLATE)
        code = self.sandbox.compile(_Watch().visit(self.sandbox.parse(source)))
        return jinja2.Template.from_code(self.sandbox, code, self.sandbox.make_globals(None))

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
                raise _Exceeded(f"it writes more than {longest:,} characters")
        self.sandbox.sizes = {}
        return "".join(pieces)

    def _guarded(self, work, *arguments):
        """Run `work` under the memory limit, every failure turned into one clear line."""
        try:
            with bounded_memory():
                return work(*arguments)
        except _Exceeded as error:
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


def one_line(error, limit=200):
    """An exception, or any value, as one printable line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


_bounded = 0  # how many `bounded_memory` are open


@contextlib.contextmanager
def bounded_memory(extra=MEMORY):
    """While inside, the process cannot grow by more than `extra` bytes: MemoryError beyond.

    By RLIMIT_AS, which Linux alone enforces; elsewhere only the other bounds hold. To enter it
    costs about 10 microseconds, so a batch of renderings shares one.
    """
    global _bounded
    if sys.platform != "linux" or _bounded:
        yield
        return
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
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
