"""Where the assistant's turns begin and end in a text, and which tokens are trained."""

import os
import re
from contextlib import suppress
from itertools import groupby

import numpy as np

from common.data.parts import OWN
from common.data.template import Refused

WORD = "Yes."
USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": WORD}
CALL = {"role": "assistant", "content": "", "tool_calls": [{
    "id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": WORD}}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": {
    "type": "object", "properties": {"x": {"type": "string"}}}}}
_UNCLEAR = ("the chat template does not show where the turn of a tool call {}; mark it in the "
           "template with {{% generation %}}")
_TAGS = re.compile(r"</?think>(\s|</?think>)*\Z")  # before the first part of a content


def any_of(texts):
    """A pattern that matches any of the texts, the longest first; with no texts, nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
                      or "(?!)")


def learn(render, special, named):
    """(a pattern of what a generation prompt adds, say "<|im_start|>assistant\\n", the tokens that
    end a turn), learned from three small conversations that the Chat's `render` writes; what it
    refuses or does not show is left empty. `special` and `named` are patterns of tokens."""
    def tokens(text):
        return special.findall(text) or named.findall(text)[-1:]

    header, ends, atoms = "", [], re.compile(f"{special.pattern}|(?s:.)")
    for first in ([], [{"role": "system", "content": "?"}]):  # some insist on a system message
        with suppress(Refused):
            before, after = (atoms.findall(render([*first, USER], prompt))
                             for prompt in (False, True))
            header = "".join(after[len(os.path.commonprefix([before, after])):])
            text = render([*first, USER, ANSWER]).partition(WORD)[2]
            run = re.search(f"(?:{special.pattern})+", text)  # a second one may follow directly
            ends = tokens(run.group() if run else text)
            text = render([*first, USER, CALL], tools=[TOOL]).partition(WORD)[2]
            last = tokens(text)[-1:]
            if last and not (ends and ends[0] in text) and text.rstrip().endswith(last[0]):
                ends += last  # a call ends differently: with the last token
        if header:
            break
    return any_of({header, header.partition("<think>")[0]}), ends


def regions(where, text, header, stops, special):
    """[(start, end, message, ended)] of what the assistant writes in `text`, a rendering with the
    conversation's parts at `where` (see `parts.find`); `ended`: with one of the `stops`. A region
    begins after the `header`: what the template inserts there (Qwen3's empty think block) is part
    of it; without one, with the first of the words. Raises Refused if that is unclear."""
    groups = [(owner, [*places]) for owner, places in groupby(where, lambda place: (
        place[2].message if place[2].kind in OWN else None))]
    floors = [0, *(places[-1][1] for _, places in groups)]
    begins = [*(places[0][0] for _, places in groups), len(text)]
    spans, directly = [], re.compile(rf"\s*(?:{special.pattern})").match  # another end than stops
    for (message, places), floor, after in zip(groups, floors, begins[1:]):
        if message is None:
            continue
        (start, _, first), (_, end, _) = places[0], places[-1]
        calls = any(part.kind == "call" for *_, part in places)
        headers = [*header.finditer(text, floor, start)]
        if headers:
            start = headers[-1].end()
        elif first.kind == "call":
            raise Refused(_UNCLEAR.format("begins"))
        else:
            lead = len(first.text) - len(first.text.lstrip())  # white space belongs to it
            start -= lead * text.endswith(first.text[:lead], floor, start)
            tags = _TAGS.search(text, floor, start)
            start = tags.start() if tags else start
            if spans and floor <= spans[-1][1] and not text[floor:start].strip():
                start = spans[-1][1]  # two messages in one turn
        # The model writes all before the end: </think>, what closes a call.
        stop = stops.search(text, end, after) or (special.search if calls else directly)(
            text, end, after)
        if stop:
            end = stop.end()
        elif calls and after < len(text):
            raise Refused(_UNCLEAR.format("ends"))
        elif calls or not text[end:].replace("</think>", "").strip():
            end = len(text)
        spans.append((start, end, message, bool(stop)))
    return spans


def tokens_in(spans, offsets):
    """Which tokens lie in the spans, (start, end) in characters, at least in part: bool array (T,).
    `offsets` are the tokens' own; an empty one (trimmed white space) is of the character before."""
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(end.max(initial=0) + 1, dtype=np.int64)
    for first, last in spans:
        inside[first + 1:last + 1] = 1
    before = inside.cumsum()  # how many of the characters before each place are in a span
    return before[end] > before[np.where(start == end, np.maximum(end - 1, 0), start)]
