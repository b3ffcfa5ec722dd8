"""Where the assistant's turns begin and end: learned from the chat template, found in a text."""

import os
import re
from typing import NamedTuple

from common.data.template import Refused

USER, WORD = {"role": "user", "content": "?"}, "Yes."
CALL = {"role": "assistant", "content": "", "tool_calls": [{
    "id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": WORD}}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": {
    "type": "object", "properties": {"x": {"type": "string"}}}}}


def any_of(texts):
    """A pattern that matches any of the texts, the longest first; with no texts, nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
                      or "(?!)")


class Turns(NamedTuple):
    """How a template begins and ends what the assistant writes."""

    header: re.Pattern   # what a generation prompt adds, say "<|im_start|>assistant\n"
    sure: bool           # the header has a special token, which no text can contain
    ending: str          # from the end of the words through the end-of-turn token, or ""
    stops: re.Pattern    # the tokens that end a turn
    special: re.Pattern  # all special tokens

    def end(self, text, start, until=None):
        """Where the token (or two) that ends the turn ends; None if there is none."""
        stop = self.stops.search(text, start, len(text) if until is None else until)
        second = self.ending.partition(stop.group())[2] if stop else ""
        return stop and stop.end() + len(second) * text.startswith(second, stop.end())

    def own(self, text):
        """[(start, end)] of all that follows a header, to the end of the turn."""
        found = []
        while begin := self.header.search(text, found[-1][1] if found else 0):
            found.append((begin.end(), self.end(text, begin.end()) or len(text)))
        return found


def learn(render, special, named):
    """(header and ending of `Turns`, the tokens that end a turn), from three small conversations.

    `render` is that of a Chat, `special` a pattern of the tokenizer's special tokens, `named` of
    these and of the added tokens that the template mentions. What the template refuses or does not
    show is left empty.
    """
    def behind(messages, **variables):
        """What follows WORD, and the tokens in it."""
        _, word, tail = render(messages, **variables).rpartition(WORD)
        tail = tail if word else ""
        return tail, [*special.finditer(tail)] or [*named.finditer(tail)][-1:]

    header, ending, ends = "", "", []
    for first in ([], [{"role": "system", "content": "?"}]):  # some insist on a system message
        try:
            before, after = render([*first, USER]), render([*first, USER], True)
            same = len(os.path.commonprefix([before, after]))
            header = after[max((token.start() for token in special.finditer(after)
                                if token.start() < same < token.end()), default=same):]
            tail, tokens = behind([*first, USER, {"role": "assistant", "content": WORD}])
            ending, ends = "", []
            for token in tokens:
                if not ends or token.start() == len(ending):  # a second one may follow directly
                    ending = tail[:token.end()]
                    ends.append(token.group())
            tail, tokens = behind([*first, USER, CALL], tools=[TOOL])
            if tokens and not (ends and ends[0] in tail) and not tail[tokens[-1].end():].strip():
                ends.append(tokens[-1].group())  # a call ends differently: with the last token
        except Refused:
            pass
        if header:
            break
    return header, ending, ends
