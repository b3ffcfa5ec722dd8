"""What a conversation says, part by part, and where each part is in its rendered text.

A part is a piece of a record's text: a message's words, the assistant's thoughts, the name and the
arguments of a tool call, the name of a tool. Each is put between marks, private-use characters, and
rendered by the template; the result counts only if removing the marks gives the plain rendering. So
every part is found in its place, or known to be left out by the template. Comparing renderings of
growing prefixes, the obvious way, fails: Qwen3's template drops the thoughts of earlier turns.
"""

import bisect
import json
import re
from itertools import chain
from typing import NamedTuple

from common.data.template import OPENED, Refused

PRIVATE_USE = re.compile("([\U00100000-\U0010ffff])")  # plane 16: the marks; refused in texts
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what templates call them
OWN = ("words", "thoughts", "call", "arguments")  # kinds of parts that the assistant writes
_FIRST = 0x100000  # part k lies between the marks _FIRST + 2k and _FIRST + 2k + 1
GENERATED = (ord(OPENED) - _FIRST) // 2  # the part that {% generation %}'s marks stand for
_THINK = re.compile("(</?think>)")


class LeftOut(Refused):
    """An example from which the chat template leaves out something essential."""


class Part(NamedTuple):
    message: int | None  # its place in the conversation; None: it is a tool's name
    kind: str            # one of OWN, "tools", or the message's role
    text: str


def marked(messages, tools, kinds=None):
    """(the `Part`s of a conversation, messages, tools), the last two with marks around all parts of
    these kinds (None: all kinds) that are not blank; white space at the edges stays outside.

    An assistant's content is cut at <think> and </think>, which a template may look for.
    """
    found = []

    def mark(text, message, kind):
        k, words = len(found), text.strip()
        found.append(Part(message, kind, text))
        if not words or kinds is not None and kind not in kinds:
            return text
        before, words, after = text.partition(words)
        return f"{before}{chr(_FIRST + 2 * k)}{words}{chr(_FIRST + 2 * k + 1)}{after}"

    def mark_strings(value, message):  # of the arguments of a call
        if isinstance(value, str):
            return mark(value, message, "arguments")
        if isinstance(value, dict):
            return {key: mark_strings(one, message) for key, one in value.items()}
        return [mark_strings(one, message) for one in value] if isinstance(value, list) else value

    def mark_name(value, message, kind):  # of a call or a tool
        inner = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            return value
        inner = {**inner, "name": mark(inner["name"], message, kind)}
        if kind == "call" and "arguments" in inner:
            inner["arguments"] = mark_strings(inner["arguments"], message)
        return {**value, "function": inner} if "function" in value else inner

    copies = []
    for n, message in enumerate(messages):
        message, content, role = dict(message), message.get("content"), message["role"]
        copies.append(message)
        if role != "assistant":
            if content:
                message["content"] = mark(content, n, role)
            continue
        if isinstance(message.get("reasoning_content"), str):
            message |= dict.fromkeys(THOUGHTS, mark(message["reasoning_content"], n, "thoughts"))
        if content:
            pieces = _THINK.split(content)  # the odd ones are the tags
            answer = len(pieces) - pieces[::-1].index("</think>") if "</think>" in pieces else 0
            for i in range(0, len(pieces), 2):
                pieces[i] = mark(pieces[i], n, "words" if i >= answer else "thoughts")
            message["content"] = "".join(pieces)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [mark_name(call, n, "call") for call in message["tool_calls"]]
    if isinstance(tools, list):
        tools = [mark_name(tool, None, "tools") for tool in tools]
    if len(found) > GENERATED:
        raise Refused(f"a conversation of more than {GENERATED:,} parts")
    return found, copies, tools


def take_marks(text):
    """(the text without marks, [(start, end, k)] of what was between those of part k, or None if
    marks are missing). If marks of one part are nested, the outer ones count."""
    plain, found, opened, length, whole = [], [], [], 0, True
    for n, piece in enumerate(PRIVATE_USE.split(text)):
        if n % 2 == 0:
            plain.append(piece)
            length += len(piece)
            continue
        k, closing = divmod(ord(piece) - _FIRST, 2)
        if not closing:
            opened.append((k, length))
        elif not opened or opened[-1][0] != k:
            whole = False
        else:
            _, start = opened.pop()
            if all(outer != k for outer, _ in opened):
                found.append((start, length, k))
    return "".join(plain), found if whole and not opened else None


def find(messages, tools, text, render, shapes, turns):
    """(parts, their places in `text` or None, whether all kinds of parts were looked for).

    text    the rendering of the conversation; render(messages, tools) makes others
    shapes  a dict for this template, filled here: for the shape of a conversation, the thoughts
            that it drops, if it writes all else; the next of that shape is not rendered twice
    turns   the template's `Turns`
    """
    for kinds in (None, OWN):
        found, *copies = marked(messages, tools, kinds)
        shape = (*((one["role"], "reasoning_content" in one) for one in messages),
                 *dict.fromkeys((*part[:2], bool(part.text.strip())) for part in found))
        if shape in shapes and (where := _search(found, shapes[shape], text, turns)) is not None:
            return found, where, True
        try:
            plain, where = take_marks(render(*copies))
        except Refused:  # by the template, which the marks disturb
            continue
        if where is None or plain != text:
            continue
        where = [place for place in where if place[2] != GENERATED]
        placed = {k for _, _, k in where}
        own = [k for _, _, k in where if found[k].kind in OWN]
        if len(own) > len(set(own)):
            continue  # it writes the words twice: which of them is the answer?
        dropped = {part[:2] for k, part in enumerate(found)
                   if part.text.strip() and k not in placed}
        if kinds is None and {kind for _, kind in dropped} <= {"thoughts"} and not any(
                found[k][:2] in dropped for k in placed):
            if len(shapes) > 1000:
                shapes.clear()
            shapes[shape] = dropped
        return found, where, kinds is None
    return found, None, False


def _search(found, dropped, text, turns):
    """The places of all parts but the `dropped`, {(message, kind)}; None unless they follow one
    another, each in its own turn.

    Turns are recognised by their tokens, which no part can contain: so this needs no marks.
    """
    spans = turns.own(text)
    owners = list(dict.fromkeys(part.message for part in found if part.kind in OWN))
    if len(spans) != len(owners) or not turns.sure:
        return None
    edges = [0, *chain(*spans), len(text)]  # before, in, between... the assistant's turns
    where, at = [], 0
    for k, (message, kind, words) in enumerate(found):
        words = words.strip()
        if not words or (message, kind) in dropped:
            continue
        begin, end = 0, len(text)
        if kind != "tools":
            slot = 2 * bisect.bisect_left(owners, message) + (kind in OWN)
            begin, end = max(at, edges[slot]), edges[slot + 1]
        start = text.find(words, begin, end)
        if start < 0:  # as JSON writes it
            words = json.dumps(words, ensure_ascii=False)[1:-1]
            start = text.find(words, begin, end)
        if start < 0:
            return None
        if kind == "tools":
            where.append((0, 0, k))
        else:
            at = start + len(words)
            where.append((start, at, k))
    return sorted(where)


def left_out(messages, found, where, text, all_marked):
    """What the record says and its rendering does not, in words for people. `found`, `where` and
    `all_marked` are from `find`. Thoughts of earlier turns, which templates drop by design, do not
    count. Raises LeftOut for a tool call: what remains would be misleading."""
    placed = {k for _, _, k in where or ()}
    asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    names = []
    for k, (message, kind, words) in enumerate(found):
        looked_for = all_marked or where is not None and kind in OWN
        if not words.strip() or (k in placed if looked_for else words.strip() in text):
            continue
        if kind in ("call", "arguments"):
            what = "a tool call" if kind == "call" else "the arguments of a tool call"
            raise LeftOut(f"the chat template leaves out {what}")
        if kind == "words" and messages[message].get("tool_calls"):
            names.append("the words beside a tool call")
        elif kind != "thoughts" or message > asked:
            names.append({"thoughts": "the reasoning of the last turn", "tool": "a tool's answer",
                          "words": "words of the assistant", "tools": "the tools"}
                         .get(kind, f"the {kind} message"))
    for message in messages:  # numbers and the like cannot be marked: their keys must be there
        for call in message.get("tool_calls") or ():
            given = (call.get("function") or call).get("arguments")
            if isinstance(given, dict) and not all(
                    key in text or json.dumps(key, ensure_ascii=False)[1:-1] in text
                    for key in given):
                raise LeftOut("the chat template leaves out the arguments of a tool call")
    return tuple(dict.fromkeys(names))
