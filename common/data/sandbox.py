"""A jinja2 sandbox in which a chat template can neither hang nor fill the memory.

jinja2's own sandbox keeps a template away from Python, but not from the machine:
`{{ 'x' * 10**9 }}` passes it. Here every loop step, call, filter and literal looks at a clock and
at the size of what it makes, and the operators that can make large values are checked beforehand.
What makes a large value in one stroke (`replace`, `center`...) is left to
`template.bounded_memory`.
"""

import datetime
import json
import time
import warnings

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 1.0  # of processor time at most for one rendering; a real one takes a millisecond
OPENED, CLOSED = "\U0010fff0", "\U0010fff1"  # stand around what {% generation %} marks


class Exceeded(Exception):
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


class Sandbox(ImmutableSandboxedEnvironment):
    """Configured as in transformers' `apply_chat_template`: trim_blocks, lstrip_blocks, loop
    controls, `{% generation %}`, `tojson` without HTML escapes, `raise_exception`, `strftime_now`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters.update(tojson=_tojson, _watch_loop=_watch_loop, _watch_value=_watch_value)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now,
                            namespace=_Namespace)
        del self.globals["lipsum"]  # random text, as much of it as one asks for

    def template(self, source):
        """The compiled template. Raises whatever jinja2 and Python's compiler raise."""
        with warnings.catch_warnings():  # of Python's compiler, about code that nobody wrote
            warnings.simplefilter("ignore")
            code = self.compile(_Watch().visit(self.parse(source)))
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def getattr(self, obj, attribute):
        if type(obj) is dict and not hasattr(dict, attribute):  # the usual case, without detours
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def start(self, longest):
        """A new rendering begins: no value may be longer than `longest`."""
        self.longest = longest
        self.sizes = {}  # id -> (size, value) of the lists and dicts seen; keeps them alive
        self.cpu = None  # the clock of processor time is dear: it counts for the second half only
        self.until = time.monotonic() + SECONDS / 2

    def watch(self, value=None):
        if time.monotonic() > self.until:  # the cheap clock; it also runs while a process waits
            self.cpu = self.cpu or time.thread_time()
            left = SECONDS / 2 - (time.thread_time() - self.cpu)
            if left <= 0:
                raise Exceeded(f"it runs longer than {SECONDS:.0f} s")
            self.until = time.monotonic() + left
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, _CONTAINERS):
            size = self.measure(value)
        else:
            return value
        if size > self.longest:
            raise Exceeded(f"it builds a value longer than {self.longest:,}")
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
            raise Exceeded("it computes a huge power")
        if operator == "*":
            if None not in sizes and sum(sizes) > 4096:
                raise Exceeded("it computes a huge number")
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                    if len(value) * times > self.longest:
                        raise Exceeded(f"it repeats a value beyond {self.longest:,}")
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
