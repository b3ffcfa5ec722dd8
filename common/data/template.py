"""A checkpoint's chat template: Jinja, rendered as transformers renders it. It is a program that
came with a download: jinja2's sandbox keeps it from reaching Python and changing its arguments."""

import datetime
import json

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import UserError, one_line

LONGEST = 2**25  # characters that a template may write; a long conversation has a million
OPENED, CLOSED = "\U0010fff0", "\U0010fff1"  # put around what {% generation %} marks


class Refused(UserError):
    """One example that cannot be used, while others can: skipped and counted in `encode`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's own words, put between marks."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return OPENED + caller() + CLOSED


def compiled(source, where):
    """A function that gives the text for the variables of a chat template, a dict, or raises
    Refused if that fails or objects (an unknown role, say). UserError if it does not compile."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = (  # unlike jinja2's own, with no HTML escapes
        lambda value, ensure_ascii=False, indent=None, **more: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, **more))
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    del environment.globals["lipsum"]  # random text
    try:
        template = environment.from_string(source)
    except Exception as error:  # Python's compiler has its own, say for a thousand brackets
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{where}: chat template{line}: {one_line(error)}") from None
    template.globals = dict(environment.globals)  # jinja2's ChainMap is slow to copy

    def write(variables):
        text = ""
        try:
            for piece in template.generate(variables):
                text += piece
                if len(text) > LONGEST:
                    raise UserError(f"{where}: chat template stopped: it writes more than "
                                    f"{LONGEST:,} characters")
        except UserError:
            raise
        except Exception as error:  # a template can raise anything that Python's operators can
            raise Refused(f"{where}: chat template failed: {one_line(error)}") from None
        return text

    return write
