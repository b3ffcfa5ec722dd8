"""Where the parts of a conversation stand in its rendered text, and which of it is trained.

A part is a piece of text that a record says: a message's words, the assistant's thoughts, the name
and the arguments of a tool call, the name of a tool. Marks, private-use characters, are put around
each, the template renders them, and the result counts only if removing the marks gives the plain
rendering. So every part is found in its place, or known to be left out by the template. Comparing
renderings of growing prefixes, the obvious way, fails: Qwen3's template drops the thoughts of
earlier turns.

Trained is what the assistant has to write: all from behind the header of its turn (what a prompt
ends with), to the end-of-turn token. For a template that says so itself ({% generation %}) see
`take_marks`.
"""

import bisect
import json
import re
from typing import NamedTuple

import numpy as np

from common.sandbox import CLOSED, OPENED
from common.template import Refused

PRIVATE_USE = re.compile("[\U00100000-\U0010ffff]")  # plane 16; text must not hold any
OWN = ("words", "thoughts", "call", "arguments")  # kinds of parts that the assistant writes
_FIRST = 0x100000
_MARK = re.compile("([\U00100000-\U0010ffef])")  # part k lies between marks 2k and 2k + 1
_MOST_PARTS = 30_000
_THINK = re.compile("(</?think>)")


class Part(NamedTuple):
    message: int | None  # its place in the conversation; None: it is a tool's name
    kind: str            # one of OWN, "tools", or the message's role
    text: str


class Turns(NamedTuple):
    """How a template begins and ends what the assistant writes."""

    headers: list        # what a generation prompt adds, say "<|im_start|>assistant\n"
    ending: str          # from behind the words to the end-of-turn token, say "<|im_end|>"; or ""
    stops: re.Pattern    # the tokens that end a turn
    special: re.Pattern  # all special tokens


def take_marks(text):
    """(text without OPENED and CLOSED, [(start, end)] of what stood between them)."""
    plain, spans, length, open_at = [], [], 0, []
    for piece in re.split(f"([{OPENED}{CLOSED}])", text):
        if piece == OPENED:
            open_at.append(length)
        elif piece == CLOSED and open_at:
            start = open_at.pop()
            if not open_at and length > start:
                spans.append((start, length))
        elif piece != CLOSED:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), spans


def inside(encoding, spans):
    """Which tokens of a `tokenizers.Encoding` lie in the spans, at least in part: bool array (T,).

    The spans, (start, end) in characters, are in order and do not overlap.
    """
    trained = np.zeros(len(encoding), dtype=bool)
    for start, end in spans:
        first, after = encoding.char_to_token(start), encoding.char_to_token(end)
        if first is None or after is None:  # no token has this character: look at all of them
            return _inside(encoding.offsets, spans)
        trained[first:after + (encoding.token_to_chars(after)[0] < end)] = True
    return trained


def _inside(offsets, spans):
    """`inside` for the tokens' (start, end) in characters.

    A tokenizer may trim white space off its offsets: a token left with none of its characters
    counts as the character before its end.
    """
    if not spans or not offsets:
        return np.zeros(len(offsets), dtype=bool)
    start, end = np.array(offsets, dtype=np.int64).T
    opens, closes = np.array(spans, dtype=np.int64).T
    nearest = np.searchsorted(opens, end) - 1  # the last span that begins before the token's end
    closing = closes[np.maximum(nearest, 0)]
    return (nearest >= 0) & np.where(start == end, end <= closing, start < closing)


# --- parts ---

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
            message["thinking"] = message["reasoning"] = message["reasoning_content"]
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


def find(messages, tools, text, render, shapes):
    """(parts, their places in `text` or None, whether all kinds of parts were looked for).

    text    the rendering of the conversation; render(messages, tools) makes others
    shapes  a dict of this template's, in which is kept what it writes between the parts. What is
            learned from one conversation is tried on the next of its shape: where that and its
            parts make the same text, nothing needs to be rendered a second time.
    """
    found = parts(messages, tools)
    plain = not tools and not any(kind == "call" for _, kind, _ in found)
    key = tuple((kind, words == words.strip(), not words.strip()) for _, kind, words in found)
    if plain and key in shapes:
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
            if kinds is None and plain:
                if len(shapes) > 1000:
                    shapes.clear()
                shapes[key] = strip, pieces
            return found, places(pieces), kinds is None
    return found, None, False


def _joined(pieces):
    return "".join(piece for i, piece in enumerate(pieces) if i % 3 != 1)


def left_out(messages, found, where, text, all_marked):
    """What the record says and its rendering does not, in words for people; `find` gave the last
    four. Thoughts of earlier turns, which templates drop by design, do not count. Raises Refused
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
            raise Refused(f"the chat template leaves out {what}")
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
                raise Refused("the chat template leaves out the arguments of a tool call")
    return tuple(dict.fromkeys(names))


def regions(where, found, text, turns):
    """[(start, end, message)] of what the assistant writes in `text`, the plain rendering.

    `where` are the places of the parts `found`, `turns` the template's `Turns`. A region begins
    behind the header, so what the template inserts before the words (Qwen3's empty think block)
    is part of it; without a header it begins with the first of the words. Raises Refused where it
    cannot be told what to train on.
    """
    spans, floor, last = [], 0, 0  # where what stands before this part ends
    for start, end, k in where:
        message, kind, words = found[k]
        floor, last = last, end
        if kind not in OWN:
            continue
        if spans and spans[-1][2] == message:
            spans[-1][1] = end
            continue
        header, at = "", -1
        for header in turns.headers:
            edge = len(words) - len(words.lstrip())  # a header may end in the words' white space
            if (at := text.rfind(header, floor, min(start + edge, end))) >= 0:
                break
        if at >= 0:
            start = at + len(header)
        elif kind == "call":
            raise Refused("the chat template does not show where the turn of a tool call begins; "
                          "mark it in the template with {% generation %}")
        elif spans and floor == spans[-1][1] and not text[floor:start].strip():
            start = floor  # two messages in one turn
        spans.append([start, end, message])
    calls = {part.message for part in found if part.kind == "call"}
    begins = [start for start, _, _ in where] + [len(text)]
    for span in spans:
        after = begins[min(bisect.bisect_left(begins, span[1]), len(where))]
        stop = turns.stops.search(text, span[1], after)
        special = turns.special.search(text, span[1], after)
        if stop:  # all before it is the model's to write: a </think>, the end of a call
            rest = turns.ending.partition(stop.group())[2]  # a second token, right behind it
            span[1] = stop.end() + len(rest) * text.startswith(rest, stop.end())
        elif special and (span[2] in calls or not text[span[1]:special.start()].strip()):
            span[1] = special.end()
        elif span[2] in calls and after < len(text):
            raise Refused("the chat template does not show where the turn of a tool call ends; "
                          "mark it in the template with {% generation %}")
        elif span[2] in calls:
            span[1] = after
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:])):
        raise Refused("the chat template changes the order of the messages")
    return [tuple(span) for span in spans]


def without(spans, dropped, marked):
    """The spans but for those that overlap one of `dropped`, whose places count the marks of
    {% generation %} in `marked`."""
    marks = [mark.start() for mark in re.finditer(f"[{OPENED}{CLOSED}]", marked)]
    dropped = [(start - bisect.bisect_left(marks, start), end - bisect.bisect_left(marks, end))
               for start, end in dropped]
    return [(start, end) for start, end in spans
            if not any(start < last and first < end for first, last in dropped)]
