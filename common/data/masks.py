"""Which characters of a rendered conversation, and which tokens, the model must learn to write.

Trained is what the assistant has to write: all from behind the header of its turn (what a prompt
ends with), to the end-of-turn token. For a template that says so itself ({% generation %}) see
`take_marks`.
"""

import bisect
import re

import numpy as np

from common.data.parts import OWN
from common.data.template import CLOSED, OPENED, Refused


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
