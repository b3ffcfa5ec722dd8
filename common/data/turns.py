"""How a chat template begins and ends what the assistant writes, learned by asking it."""

import os
import re
from typing import NamedTuple

from common.data.template import Refused

USER, WORD = {"role": "user", "content": "?"}, "Yes."
CALL = {"role": "assistant", "content": "", "tool_calls": [{
    "id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": WORD}}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": {
    "type": "object", "properties": {"x": {"type": "string"}}}}}


class Turns(NamedTuple):
    """How a template begins and ends what the assistant writes."""

    headers: list        # what a generation prompt adds, say "<|im_start|>assistant\n"
    ending: str          # from behind the words to the end-of-turn token, say "<|im_end|>"; or ""
    stops: re.Pattern    # the tokens that end a turn
    special: re.Pattern  # all special tokens


def learn(render, special, named):
    """(headers and ending of `Turns`, the tokens that end a turn), from three small conversations.

    `render` is that of a Chat, `special` a pattern of the tokenizer's special tokens, `named` of
    these and of the added tokens that the template speaks of. What the template refuses, or what
    cannot be told, is left empty.
    """
    header = ending = ""
    tokens = []
    for first in ([], [{"role": "system", "content": "?"}]):  # some insist on the second
        try:
            before, after = render([*first, USER]), render([*first, USER], True)
            same = len(os.path.commonprefix([before, after]))
            cut = [token.start() for token in special.finditer(after)
                   if token.start() < same < token.end()]
            header = after[(cut or [same])[0]:]
            text = render([*first, USER, {"role": "assistant", "content": WORD}])
            ending, tokens = _end(text, special, named)
            text = render([*first, USER, CALL], tools=[TOOL])
            tokens = tokens + _end(text, special, named, tokens)[1]
        except Refused:
            pass
        if header:
            break
    headers = [header, header.partition("<think>")[0]] if "<think>" in header else [header]
    return [one for one in headers if one], ending, tokens


def _end(text, special, named, usual=()):
    """What follows WORD, up to the end-of-turn token, and that token, in a list: there may be two,
    with nothing between. `usual` are those that end other turns. ("", []) if there is none."""
    tail = text.rpartition(WORD)[2] if WORD in text else ""
    found = [token for token in named.finditer(tail) if token.group() in usual[:1]]
    found = found or [*special.finditer(tail)] or [*named.finditer(tail)][-1:]
    if not found:
        return "", []
    token = found[0]
    if usual and token.group() != usual[0]:  # a call ends otherwise: with what comes last
        token = found[-1]
        if tail[token.end():].strip():
            return "", []
    tokens, end = [], token.start()
    while token and token.start() == end:
        tokens.append(token.group())
        end = token.end()
        token = special.search(tail, end)
    return tail[:end], tokens
