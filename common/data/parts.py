"""What a conversation says, part by part, and where each part stands in its rendered text.

A part is a piece of text that a record says: a message's words, the assistant's thoughts, the name
and the arguments of a tool call, the name of a tool. Marks, private-use characters, are put around
each, the template renders them, and the result counts only if removing the marks gives the plain
rendering. So every part is found in its place, or known to be left out by the template. Comparing
renderings of growing prefixes, the obvious way, fails: Qwen3's template drops the thoughts of
earlier turns.
"""

import bisect
import json
import re
from itertools import groupby
from typing import NamedTuple

from common.data.template import Refused

PRIVATE_USE = re.compile("[\U00100000-\U0010ffff]")  # plane 16; text must not hold any
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what templates call them
OWN = ("words", "thoughts", "call", "arguments")  # kinds of parts that the assistant writes
_FIRST = 0x100000
_MARK = re.compile("([\U00100000-\U0010ffef])")  # part k lies between marks 2k and 2k + 1
_MOST_PARTS = 30_000
_THINK = re.compile("(</?think>)")


class LeftOut(Refused):
    """An example of which the chat template leaves out what must not be missing."""


class Part(NamedTuple):
    message: int | None  # its place in the conversation; None: it is a tool's name
    kind: str            # one of OWN, "tools", or the message's role
    text: str


def parts(messages, tools):
    """The `Part`s of a conversation, in the order of `_walk`."""
    found = []

    def note(text, message, kind):
        found.append(Part(message, kind, text))
        return text

    _walk(messages, tools, note)
    return found


def marked(messages, tools, kinds, strip):
    """(messages, tools) with marks around their parts of these kinds, those that are not blank.

    `strip` leaves the white space at the edges outside the marks, for templates that trim it.
    """
    count = 0

    def around(text, message, kind):
        nonlocal count
        k, count = count, count + 1
        words = text.strip()
        if not words or kinds is not None and kind not in kinds:
            return text
        if count > _MOST_PARTS:
            raise Refused(f"a conversation of more than {_MOST_PARTS:,} parts")
        words = words if strip else text
        begin = text.index(words)
        end = begin + len(words)
        opening, closing = chr(_FIRST + 2 * k), chr(_FIRST + 2 * k + 1)
        return text[:begin] + opening + words + closing + text[end:]

    return _walk(messages, tools, around)


def _walk(messages, tools, visit):
    """Copies of messages and tools with `visit(text, message number, kind)` for each part's text.

    An assistant's content is cut at <think> and </think>, which a template may look for.
    """
    copies = []
    for n, message in enumerate(messages):
        message, content = dict(message), message.get("content")
        if message["role"] != "assistant":
            if content:
                message["content"] = visit(content, n, message["role"])
            copies.append(message)
            continue
        if isinstance(message.get("reasoning_content"), str):
            message["reasoning_content"] = visit(message["reasoning_content"], n, "thoughts")
            message |= dict.fromkeys(THOUGHTS, message["reasoning_content"])
        if content and "think>" in content:
            pieces = _THINK.split(content)
            answer = len(pieces) - pieces[::-1].index("</think>") if "</think>" in pieces else 0
            for i in range(0, len(pieces), 2):  # the odd ones are the tags
                pieces[i] = visit(pieces[i], n, "words" if i >= answer else "thoughts")
            message["content"] = "".join(pieces)
        elif content:
            message["content"] = visit(content, n, "words")
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_walk_call(call, n, visit) for call in message["tool_calls"]]
        copies.append(message)
    if isinstance(tools, list):
        tools = [_named(tool, lambda inner: {
            **inner, "name": visit(inner["name"], None, "tools")}) for tool in tools]
    return copies, tools


def _walk_call(call, n, visit):
    def of(inner):
        inner = {**inner, "name": visit(inner["name"], n, "call")}
        if "arguments" in inner:
            inner["arguments"] = _leaves(inner["arguments"],
                                         lambda text: visit(text, n, "arguments"))
        return inner

    return _named(call, of)


def _named(value, change):
    """A call or a tool, `change(inner)` in the place of the dict with its name, if it has one."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return value
    return {**value, "function": change(inner)} if "function" in value else change(inner)


def _leaves(value, visit):
    """A copy of nested lists and dicts, `visit(text)` in the place of each string."""
    if isinstance(value, str):
        return visit(value)
    if isinstance(value, dict):
        return {key: _leaves(one, visit) for key, one in value.items()}
    return [_leaves(one, visit) for one in value] if isinstance(value, list) else value


# --- their places ---

def split_at_marks(text):
    """[template's text, k, part k's, template's, k', ..., template's]; None for broken marks."""
    pieces = _MARK.split(text)
    found = pieces[:1]
    for i in range(1, len(pieces), 4):
        k, closing = divmod(ord(pieces[i]) - _FIRST, 2)
        if closing or i + 2 >= len(pieces) or ord(pieces[i + 2]) != ord(pieces[i]) + 1:
            return None
        found += [k, pieces[i + 1], pieces[i + 3]]
    return found


def places(pieces):
    """[(start, end, k)] of the parts in the text that `split_at_marks` took apart."""
    found, length = [], 0
    for text, k, words in zip(pieces[::3], pieces[1::3], pieces[2::3]):
        start = length + len(text)
        length = start + len(words)
        found.append((start, length, k))
    return found


def find(messages, tools, text, render, shapes, turns):
    """(parts, their places in `text` or None, whether all kinds of parts were looked for).

    text    the rendering of the conversation; render(messages, tools) makes others
    shapes  a dict of this template's, in which is kept what was learned from a conversation, so
            that the next of its shape needs no second rendering: what the template writes between
            the parts, or, with tools, which may differ, what it leaves out
    turns   the template's `Turns`
    """
    found = parts(messages, tools)
    varies = tools or any(kind == "call" for _, kind, _ in found)
    groups = [[*group] for _, group in groupby(range(len(found)), lambda k: found[k][:2])]
    key = tuple((kind, words == words.strip(), not words.strip()) for _, kind, words in found)
    if varies:
        key = (*((one["role"], "reasoning_content" in one) for one in messages), *(
            (*found[ks[0]][:2], *_blanks(found, ks)) for ks in groups))
    if key in shapes and varies:
        written = [ks for ks, there in zip(groups, shapes[key]) if there]
        where = _search(found, written, text, turns)
        if where is not None:
            return found, where, True
    elif key in shapes:
        strip, pieces = shapes[key]
        pieces = list(pieces)
        words = [part.text.strip() if strip else part.text for part in found]
        pieces[2::3] = [words[k] for k in pieces[1::3]]
        if text == _joined(pieces):
            return found, places(pieces), True
    for kinds in (None, OWN):
        for strip in (False, True):  # some templates trim contents: the marks go within then
            try:
                pieces = split_at_marks(render(*marked(messages, tools, kinds, strip)))
            except Refused:  # by the template: the marks disturb it
                continue
            if pieces is None or text != _joined(pieces):
                continue
            own = [k for k in pieces[1::3] if found[k].kind in OWN]
            if len(own) > len(set(own)):
                continue  # it writes the words twice: which of them is the answer?
            if len(shapes) > 1000:
                shapes.clear()
            there = [[k in pieces[1::3] for k in ks if found[k].text.strip()] for ks in groups]
            if kinds is None and not varies:
                shapes[key] = strip, pieces
            elif kinds is None and all(len(set(one)) <= 1 for one in there):  # all of it, or none
                shapes[key] = [any(one) for one in there]
            return found, places(pieces), kinds is None
    return found, None, False


def _blanks(found, ks):
    """Which of the parts `ks` hold anything; of those whose number varies, whether any does."""
    said = [bool(found[k].text.strip()) for k in ks]
    return [any(said)] if found[ks[0]].kind in ("arguments", "tools") else said


def _search(found, written, text, turns):
    """The places of the parts in `written`, groups of them that the template is known to write in
    such a conversation; None unless they stand one behind the other, each in its own turn.

    Turns are told by their tokens, which no part can hold: so this needs no marks.
    """
    if not (turns.headers and turns.special.search(turns.headers[0])):
        return None
    heads = [*re.finditer(re.escape(turns.headers[0]), text)]
    owners = list(dict.fromkeys(part.message for part in found if part.kind in OWN))
    if len(heads) != len(owners):
        return None
    stops = [turns.stops.search(text, head.end()) for head in heads]
    ends = [stop.end() if stop else len(text) for stop in stops]
    where, at = [], 0
    for ks in written:
        message, kind, _ = found[ks[0]]
        turn = bisect.bisect_left(owners, message or 0)  # the assistant's next, or this one
        begin, end = 0, len(text)
        if kind in OWN:
            begin, end = heads[turn].end(), stops[turn].start() if stops[turn] else len(text)
        elif kind != "tools":
            begin = ends[turn - 1] if turn else 0
            end = heads[turn].start() if turn < len(heads) else len(text)
        at = max(at, begin) if kind != "tools" else 0
        for k in ks:
            words = found[k].text.strip()
            if not words:
                continue
            start = text.find(words, at, end)
            if start < 0:  # as JSON writes it
                words = json.dumps(words, ensure_ascii=False)[1:-1]
                start = text.find(words, at, end)
            if start < 0:
                return None
            at = start + len(words)
            where.append((start, at, k) if kind != "tools" else (0, 0, k))
    return sorted(where)


def _joined(pieces):
    return "".join(piece for i, piece in enumerate(pieces) if i % 3 != 1)


def left_out(messages, found, where, text, all_marked):
    """What the record says and its rendering does not, in words for people; `find` gave the last
    four. Thoughts of earlier turns, which templates drop by design, do not count. Raises LeftOut
    for a tool call: no harmless rest of it would be left."""
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
