"""Instruction data as people have it: .json, .jsonl and .txt, told apart by their keys.

    OpenAI             {"messages": [{"role", "content", ...}], "tools"?}
    ShareGPT           {"conversations": [{"from": "human" | "gpt" | "system" | ..., "value"}]}
    Alpaca             {"instruction", "input"?, "output"}
    prompt/completion  {"prompt", "completion"}
    text               {"text"}: all of it is trained; a .txt file is one such document

A record with the keys of two formats is read as the first of them in this order (Alpaca's own file
has a "text" as well). Further keys are ignored, except "system" and "tools"; other names are
mapped with `--columns`. Whatever the format, a record comes out as {"messages": [...]} or
{"text": ...}, with the place that it came from: {"where": "my.jsonl:7"}.
"""

import itertools
import json
import os
from pathlib import Path

from common.errors import UserError
from common.readers import READERS, check, nearest, parse, plain_text
from common.template import one_line

FORMATS = {"messages": ("messages",), "conversations": ("conversations",),
           "Alpaca": ("instruction", "output"), "prompt": ("prompt", "completion"),
           "text": ("text",)}
OPTIONAL = ("input", "system", "tools")
NAMES = tuple(key for keys in FORMATS.values() for key in keys) + OPTIONAL
KNOWN = "; ".join(" + ".join(keys) for keys in FORMATS.values())
ROLES = {  # what data sets call the speakers -> what chat templates call them
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool",
}


def parse_columns(text):
    """--columns prompt=question,completion=answer as {"prompt": "question", ...}."""
    columns = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and column):
            raise UserError(f"--columns {text}: {part.strip()!r} is not NAME=COLUMN, as in "
                            "--columns prompt=question,completion=answer")
        if name not in NAMES:
            hint = f"; did you mean {column}={name}?" if column in NAMES else nearest(name, NAMES)
            raise UserError(f"--columns {text}: {name!r} is none of {', '.join(NAMES)}{hint}")
        if name in columns:
            raise UserError(f"--columns {text}: {name!r} is given twice")
        columns[name] = column
    if not any(set(keys) <= set(columns) for keys in FORMATS.values()):
        raise UserError(f"--columns {text}: it must name all keys of one format: {KNOWN}")
    return columns


def read_records(paths, columns=None):
    """Iterate over the records of data files, in order, one at a time.

    `columns` renames keys: {"prompt": "question"} reads "question" as the prompt. Paths are
    checked at once, contents as they are read; what is wrong is a UserError with file and line.
    """
    return Records(paths, columns)


class Records:
    """The iterator that `read_records` gives: `size` and `done` (bytes) tell how far it is."""

    def __init__(self, paths, columns=None):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self.paths, self.columns = [Path(path) for path in paths], columns
        self._sizes = [check(path) for path in self.paths]
        self.size, self.done = sum(self._sizes), 0
        self._records = self._read()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._records)

    def _read(self):
        for path, size in zip(self.paths, self._sizes):
            before, nothing = self.done, True
            read = READERS[path.suffix.lower()]
            columns = None if read is plain_text else self.columns
            for where, value, done in read(path):
                nothing, self.done = False, before + done
                yield {**_convert(value, where, columns), "where": where}
            if nothing:
                raise UserError(f"{path}: empty, no example in it")
            self.done = before + size


def _convert(value, where, columns):
    """{"messages"} or {"text"} of a value from a file."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: an example must be a JSON object, not {_kind(value)}")
    if columns:
        for name, column in columns.items():
            if column not in value and name not in OPTIONAL:
                raise UserError(f"{where}: no key {one_line(repr(column))} (--columns "
                                f"{name}={one_line(column)}); its keys are {_keys(value)}")
        value = {name: value[column] for name, column in columns.items() if column in value}
    format = next((name for name, keys in FORMATS.items() if all(k in value for k in keys)), None)
    if format is None:
        advice = "map them, as in --columns prompt=question,completion=answer"
        if "chosen" in value and "rejected" in value:
            advice = "--columns prompt=prompt,completion=chosen trains on the preferred answers"
        raise UserError(f"{where}: the keys {_keys(value)} fit no known format ({KNOWN}); {advice}")
    if format == "text":
        return {"text": _string(value, "text", where)}
    if format in ("messages", "conversations"):
        turns = value[format]
        if not isinstance(turns, list):
            raise UserError(f"{where}: {format} must be a list, not {_kind(turns)}")
        messages = [_message(turn, where) for turn in turns]
    elif format == "Alpaca":
        more = _string(value, "input", where)
        question = _string(value, "instruction", where) + ("\n\n" + more if more.strip() else "")
        messages = [{"role": "user", "content": question},
                    {"role": "assistant", "content": _string(value, "output", where)}]
    else:
        messages = [{"role": "user", "content": _string(value, "prompt", where)},
                    {"role": "assistant", "content": _string(value, "completion", where)}]
    system = _string(value, "system", where)
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    tools = value.get("tools")
    if isinstance(tools, str):  # some data sets keep it as JSON within JSON
        tools = parse(json.loads, where, 1, tools) if tools.strip() else None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _message(turn, where):
    """A turn in either spelling, {"role", "content", ...} or {"from", "value"}, as the former."""
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a turn must be an object, not {_kind(turn)}")
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    name = turn.get("role", turn.get("from"))
    message["role"] = ROLES.get(name.lower()) if isinstance(name, str) else None
    if message["role"] is None:
        raise UserError(f"{where}: role {one_line(repr(name), 40)} is none of {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type")) for part in content} - {"text"}
        if kinds:
            raise UserError(f"{where}: content of type {one_line(sorted(kinds))}; only text is "
                            "trained on")
        content = "".join(_string(part, "text", where) for part in content)
    message["content"] = content
    if content is not None:
        _string(message, "content", where)
    return message


def _string(value, key, where):
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{where}: {key!r} must be text, not {_kind(found)}")
    return found or ""


def _kind(value):
    return {list: "a list", dict: "an object", str: "text", bool: "a truth value", int: "a number",
            float: "a number", type(None): "null"}[type(value)]


def _keys(value):
    names = [one_line(repr(key), 40) for key in itertools.islice(value, 8)]
    return ", ".join(names + ["…"] * (len(value) > 8)) or "(none)"
