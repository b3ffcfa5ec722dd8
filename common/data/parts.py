"""What a conversation says, part by part, and where each part is in its rendered text: it is put
between marks, private-use characters, and rendered, which counts only if removing the marks gives
the plain text. (Rendering growing prefixes fails: Qwen3's template drops earlier thoughts.)"""

import json
import re
from typing import NamedTuple

from common.data.template import OPENED, Refused

_MARK = re.compile("[\U00100000-\U0010ffff]")  # plane 16 is for private use; refused in texts
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what templates call them
OWN = ("words", "thoughts", "call", "arguments")  # kinds of parts that the assistant writes
ROLES = ("system", "developer", "user", "assistant", "tool")
_FIRST = 0x100000  # part k lies between the marks _FIRST + 2k and _FIRST + 2k + 1
GENERATED = (ord(OPENED) - _FIRST) // 2  # the part that {% generation %}'s marks stand for
_THINK = re.compile("(</?think>)")
_NAMES = {"words": "words of the assistant", "thoughts": "the reasoning of the last turn",
          "tool": "a tool's answer", "tools": "the tools"}


class LeftOut(Refused):
    """An example from which the chat template leaves out something essential."""


class Part(NamedTuple):
    message: int | None  # its place in the conversation; None: it is a tool's name
    kind: str            # one of OWN, "keys", "tools" (a name), or the message's role
    text: str


def marked(messages, tools, kinds):
    """(the `Part`s of a conversation, messages, tools), these two with marks around all parts of
    these kinds but their white space. An assistant's content is cut at <think> and </think>."""
    found = []

    def mark(value, message, kind):  # a text, or all texts in the arguments of a call
        if isinstance(value, dict):  # its keys are only looked for: templates sort by them
            return {mark(key, message, "keys"): mark(one, message, kind)
                    for key, one in value.items()}
        if isinstance(value, list):
            return [mark(one, message, kind) for one in value]
        if not isinstance(value, str):
            return value
        k, words = len(found), value.strip()
        found.append(Part(message, kind, value))
        if not words or kind not in kinds:
            return value
        return value.replace(words, f"{chr(_FIRST + 2 * k)}{words}{chr(_FIRST + 2 * k + 1)}", 1)

    def mark_function(one, message, **kinds):  # a call or a tool; `kinds` by key
        inner = one.get("function")
        if isinstance(inner, dict):
            inner = {key: mark(value, message, kinds[key]) if key in kinds else value
                     for key, value in inner.items()}
        return {**one, "function": inner} if inner else one

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
        if "tool_calls" in message:
            message["tool_calls"] = [mark_function(call, n, name="call", arguments="arguments")
                                     for call in message["tool_calls"]]
    if tools:
        tools = [mark_function(tool, None, name="tools") for tool in tools]
    if len(found) > GENERATED:
        raise Refused(f"a conversation of more than {GENERATED:,} parts")
    return found, copies, tools


def take_marks(text):
    """(text without marks, [(start, end, k)] between part k's, or None if marks are missing)."""
    found, opened = [], []
    for n, mark in enumerate(_MARK.finditer(text)):
        k, closing = divmod(ord(mark.group()) - _FIRST, 2)
        place = mark.start() - n  # without the marks before it
        if closing and opened and opened[-1][0] == k:
            found.append((opened.pop()[1], place, k))
        else:  # a closing mark that closes nothing stays, too
            opened.append((None if closing else k, place))
    return _MARK.sub("", text), None if opened else found


def find(messages, tools, text, render):
    """([(start, end, Part)], the parts in their places, or None if the assistant's are not written
    as they are; [Part], those that are not written). `text` is render(messages, tools)."""
    for kinds in ((*OWN, *ROLES, "tools"), OWN):
        found, *copies = marked(messages, tools, kinds)
        try:
            plain, where = take_marks(render(*copies))
        except Refused:  # by the template, which the marks disturb
            continue
        if where is None or plain != text:
            continue
        where = [place for place in where if place[2] != GENERATED]
        own = [k for _, _, k in where if found[k].kind in OWN]
        if len(own) == len(set(own)):  # else it writes the words twice: which are the answer?
            break
    else:
        where, kinds = None, ()
    placed = {k for _, _, k in where or ()}

    def written(k, part):  # what was not marked may stand there as JSON writes it
        words = part.text.strip()
        return k in placed if part.kind in kinds else (
            words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text)

    missing = [part for k, part in enumerate(found) if part.text.strip() and not written(k, part)]
    return where and [(start, end, found[k]) for start, end, k in where], missing


def left_out(messages, missing):
    """What the record says and its rendering does not (`missing`, from `find`), in words; not
    thoughts of earlier turns, dropped by design. LeftOut for a tool call: the rest misleads."""
    asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    names = []
    for message, kind, _ in missing:
        if kind in ("call", "arguments", "keys"):
            what = "a tool call" if kind == "call" else "the arguments of a tool call"
            raise LeftOut(f"the chat template leaves out {what}")
        if kind == "words" and messages[message].get("tool_calls"):
            names.append("the words beside a tool call")
        elif kind != "thoughts" or message > asked:
            names.append(_NAMES.get(kind, f"the {kind} message"))
    return tuple(dict.fromkeys(names))
