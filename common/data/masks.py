"""Which characters of a rendered conversation, and which tokens, the model must learn to write.

That is what the assistant writes: everything from the end of its turn's header, where a prompt
ends, through the end-of-turn token.
"""

import bisect
import re
from itertools import pairwise

import numpy as np

from common.data.parts import OWN
from common.data.template import Refused

_TAGS = re.compile(r"</?think>(\s|</?think>)*\Z")  # before the first part of a content


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

    A tokenizer may trim white space off its offsets: a token with no characters left counts as the
    character before its end.
    """
    if not spans or not offsets:
        return np.zeros(len(offsets), dtype=bool)
    start, end = np.array(offsets, dtype=np.int64).T
    opens, closes = np.array(spans, dtype=np.int64).T
    nearest = np.searchsorted(opens, end) - 1  # the last span that begins before the token's end
    closing = closes[np.maximum(nearest, 0)]
    return (nearest >= 0) & np.where(start == end, end <= closing, start < closing)


def regions(where, found, text, turns):
    """[(start, end, message, ended)] of what the assistant writes in `text`, the plain rendering;
    `ended` says whether it ends with an end-of-turn token.

    `where` are the places of the parts `found`, `turns` the template's `Turns`. A region begins
    after the header, so what the template inserts before the words (Qwen3's empty think block)
    is part of it; without a header it begins with the first of the words. Raises Refused if it is
    not clear what to train on.
    """
    spans = []
    for (_, floor, _), (start, end, k) in pairwise([(0, 0, None), *where]):
        message, kind, words = found[k]
        if kind not in OWN:
            continue
        lead = len(words) - len(words.lstrip())
        kept = text.startswith(words, start - lead)  # with the white space at its edges
        end = start - lead + len(words) if kept else end
        if spans and spans[-1][2] == message:
            spans[-1][1] = end
            continue
        headers = [*turns.header.finditer(text, floor, start)]
        if headers:
            start = headers[-1].end()
        elif kind == "call":
            raise Refused("the chat template does not show where the turn of a tool call begins; "
                          "mark it in the template with {% generation %}")
        else:
            tags = _TAGS.search(text, floor, start - kept * lead)
            start = tags.start() if tags else start - kept * lead
            if spans and floor <= spans[-1][1] and not text[floor:start].strip():
                start = spans[-1][1]  # two messages in one turn
        spans.append([start, end, message])
    calls = {part.message for part in found if part.kind == "call"}
    begins = [start for start, _, _ in where] + [len(text)]
    ended = []
    for start, end, message in spans:
        after = begins[min(bisect.bisect_left(begins, end), len(where))]
        special = turns.special.search(text, end, after)
        stop = turns.end(text, end, after)  # the model writes all before it: </think>, a call's end
        if not stop and special and (message in calls or not text[end:special.start()].strip()):
            stop = special.end()
        elif not stop and message in calls and after < len(text):
            raise Refused("the chat template does not show where the turn of a tool call ends; "
                          "mark it in the template with {% generation %}")
        elif not stop and (message in calls or not text[end:].replace("</think>", "").strip()):
            end = len(text)
        ended.append((start, stop or end, message, bool(stop)))
    if any(before[1] > after[0] for before, after in zip(ended, ended[1:])):
        raise Refused("the chat template changes the order of the messages")
    return ended
