"""Which characters of a rendered conversation the model must learn to write.

For a template that marks them (`{% generation %}`) see `take_marks`. For any other, `regions` puts
marks, private-use characters, around the assistant's words, renders, and accepts the result only
if removing the marks gives the plain rendering. Comparing renderings of growing prefixes, the
obvious way, fails: Qwen3's template drops the thinking of earlier turns.
"""

import re

import numpy as np

from common.sandbox import CLOSED, OPENED
from common.template import Refused

PRIVATE_USE = re.compile("[\U00100000-\U0010ffff]")  # plane 16; text must not hold any
_MARK = re.compile("[\U00100000-\U0010ffef]")  # piece k lies between marks 2k and 2k + 1
_MOST_PIECES = 30_000
_THINK = re.compile("(</?think>)")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


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


def inside(offsets, spans):
    """Which tokens lie in the spans, at least in part: bool array (T,).

    `offsets` are the tokens' (start, end) in characters; `spans` are in order and do not overlap.
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


def regions(messages, plain, render, special, stops, header):
    """[(start, end)] of the assistant's words in `plain`, each with its end-of-turn token.

    messages  the conversation; render(messages) gives its text, `plain`
    special   regular expression of the tokenizer's special tokens; stops: of those that end a turn
    header    what the generation prompt adds, say "<|im_start|>assistant\\n"

    A region begins with the first of the message's words that the template kept, or behind the
    header if these are thoughts or a tool call, whose wrapping the model writes too. So an empty
    think block that the template inserts before an answer is not trained on, and a full one is.
    Raises Refused if the template changes the words, so that no mask can be trusted.
    """
    for strip in (False, True):  # some templates trim contents: then the marks go within the trim
        marked, owners = _mark(messages, strip)
        if not owners:
            return []
        pieces = _pieces(render(marked), plain, owners)
        if pieces is not None:
            break
    else:
        raise Refused("the chat template rewrites the assistant's words, so it cannot be told "
                      "what to train on; mark them in the template with {% generation %}")
    if sum(piece[3] == "call" for piece in pieces) < sum(kind == "call" for _, kind in owners):
        raise Refused("the chat template leaves out a tool call")
    spans = []
    for start, end, index, kind in pieces:
        if spans and spans[-1][2] == index:
            spans[-1][1] = end
        else:
            floor = spans[-1][1] if spans else 0
            begin = plain.rfind(header, floor, start) + len(header) if header else -1
            if kind != "words" and begin >= max(floor, len(header), 1):
                empty = _EMPTY_THINK.match(plain, begin, start) if kind == "call" else None
                start = empty.end() if empty else begin
            elif kind == "call":
                raise Refused("the chat template does not show where the turn of a tool call "
                              "begins; mark it in the template with {% generation %}")
            spans.append([start, end, index])
    for span in spans:
        calls = messages[span[2]].get("tool_calls")  # may end with special tokens of their own
        stop = calls and stops.search(plain, span[1]) or special.search(plain, span[1])
        if stop and (calls or not plain[span[1]:stop.start()].strip()):
            span[1] = stop.end()
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:])):
        raise Refused("the chat template changes the order of the messages")
    return [(start, end) for start, end, _ in spans]


def _mark(messages, strip):
    """Copies of the messages with marks around the assistant's words, and whose each piece is.

    The words are those of the content before, between and after <think> and </think> (which a
    template may look for), of the reasoning, and the name of the first tool called.
    """
    owners, marked = [], []

    def around(text, kind):
        words = text.strip()
        if not words:
            return text
        words = words if strip else text
        begin = text.index(words)
        first = 0x100000 + 2 * len(owners)
        owners.append((index, kind))
        if len(owners) > _MOST_PIECES:
            raise Refused(f"a conversation of more than {_MOST_PIECES:,} assistant turns")
        end = begin + len(words)
        return text[:begin] + chr(first) + words + chr(first + 1) + text[end:]

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            message = dict(message)
            if isinstance(message.get("reasoning_content"), str):
                message["reasoning_content"] = around(message["reasoning_content"], "thoughts")
                message["thinking"] = message["reasoning_content"]
            parts = _THINK.split(message.get("content", ""))
            answer = len(parts) - parts[::-1].index("</think>") if "</think>" in parts else 0
            for i in range(0, len(parts), 2):  # the odd ones are the tags
                parts[i] = around(parts[i], "words" if i >= answer else "thoughts")
            if "content" in message:
                message["content"] = "".join(parts)
            calls = message.get("tool_calls")
            if isinstance(calls, list) and calls and isinstance(calls[0], dict):
                call = calls[0]
                inner = call["function"] if isinstance(call.get("function"), dict) else call
                if isinstance(inner.get("name"), str):
                    inner = {**inner, "name": around(inner["name"], "call")}
                    call = {**call, "function": inner} if "function" in call else inner
                    message["tool_calls"] = [call, *calls[1:]]
        marked.append(message)
    return marked, owners


def _pieces(marked, plain, owners):
    """[(start, end, message index, kind)] in order of place, or None if the marks disturb."""
    found, length, cursor, text = {}, 0, 0, []
    for mark in _MARK.finditer(marked):
        text.append(marked[cursor:mark.start()])
        length += mark.start() - cursor
        cursor = mark.end()
        if found.setdefault(ord(mark.group()) - 0x100000, length) != length:
            return None  # the template writes the words twice
    text.append(marked[cursor:])
    if "".join(text) != plain:
        return None
    pieces = []
    for k, owner in enumerate(owners):
        start, end = found.get(2 * k), found.get(2 * k + 1)
        if (start is None) != (end is None) or start is not None and start >= end:
            return None
        if start is not None:
            pieces.append((start, end, *owner))
    return sorted(pieces)
