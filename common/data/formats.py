"""One example, in whichever format people have it, as {"messages"} or {"text"}.

    OpenAI             {"messages": [{"role", "content", ...}], "tools"? or "functions"?}
    ShareGPT           {"conversations": [{"from": "human" | "gpt" | "system" | ..., "value"}]}
    Alpaca             {"instruction", "input"?, "output", "history"?}
    prompt/completion  {"prompt", "completion"}, each a text or a list of messages
    text               {"text"}: all of it is trained

An example with the keys of two formats is read as the first of them in this order (Alpaca's own
file has a "text" as well). Null counts as absent. "system" and "tools" go with all but text. What
has a meaning is honoured or refused: turns with the weight 0, calls in their older forms, null
keys that Arrow has filled in, pairs of a chosen and a rejected answer. Other keys are noted.
"""

import itertools
import json

from common.data.template import Refused
from common.errors import UserError, one_line

FORMATS = {"messages": ("messages",), "conversations": ("conversations",),
           "Alpaca": ("instruction", "output"), "prompt": ("prompt", "completion"),
           "text": ("text",)}
BESIDE = ("system", "tools", "functions", "history")
OPTIONAL = (*BESIDE, "input")
NAMES = tuple(key for keys in FORMATS.values() for key in keys) + OPTIONAL
WEIGHTS = ("weight", "train", "loss")  # of a turn or of an example: whether it is trained on
MEANT = (*BESIDE, *WEIGHTS, "label")  # read under their own names, whatever --columns says
PREFERENCES = ("chosen", "rejected")
KNOWN = "; ".join(" + ".join(keys) for keys in FORMATS.values())
CALLER = "caller"  # an assistant who calls a tool, in formats in which that is a role of its own
ROLES = {  # what data sets call the speakers -> what chat templates call them
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": CALLER, "tool_call": CALLER,
}


def columns_to_read(names):
    """Those columns of a file with the columns `names` that an example can be made of."""
    whole = any(set(keys) <= set(names) for keys in FORMATS.values())
    wanted = {*NAMES, *MEANT} | (set() if whole else set(PREFERENCES))
    return [name for name in names if name in wanted]


def convert(value, where, ignored, rendered=False):
    """{"messages": [...], "tools"?} or {"text"} of an example, a dict as it stands in a file.

    Each message is {"role", "content", ...} as OpenAI has it, calls in "tool_calls" with objects
    as arguments, and with "train": False if it is not to be trained on. `ignored` is a dict in
    which keys are noted that have no part in it, with the first place. `rendered` says that texts
    are whole conversations. Raises Refused for an example that can be left out, and UserError,
    with the place, for a file that is not what it should be.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: an example must be a JSON object, not {_kind(value)}")
    value = {key: one for key, one in value.items() if one is not None and one == one}  # no NaN
    kind = next((name for name, keys in FORMATS.items() if all(k in value for k in keys)), None)
    if kind is None:
        raise UserError(f"{where}: {_no_format(value)}")
    used = {*FORMATS[kind], *(key for key in WEIGHTS if _truth(value.get(key)) is not None)}
    if not _trains(value, where, "an example"):
        raise Refused("its weight is 0")
    if kind != "text" and _truth(value.get("label")) is not None and "'label'" not in ignored:
        raise UserError(f"{where}: 'label' says which answers are good (KTO's format), and all "
                        f"would be trained on; {_POST_TRAINING}. If it means something else, "
                        "rename or remove it")
    if kind == "text":
        record = {"text": _string(value, "text", where)}
        if rendered:
            record["rendered"] = True
    else:
        turns = kind in ("messages", "conversations")
        used |= {*OPTIONAL} - ({"input"} if turns else set())
        if turns and value.get("history"):
            raise UserError(f"{where}: earlier turns in 'history' beside {kind!r}: put them into "
                            "the list itself")
        messages = _MESSAGES[kind](value, where, ignored)
        system = _string(value, "system", where)
        if system.strip() and messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() != system.strip():
                raise Refused('its "system" and its system message are different texts')
        elif system.strip():
            messages.insert(0, {"role": "system", "content": system})
        if value.get("tools") and value.get("functions"):
            used.remove("functions")
        tools = _tools(value, where)
        record = {"messages": messages, "tools": tools} if tools else {"messages": messages}
        _prune_calls(messages, tools)
    for key in value.keys() - used:
        ignored.setdefault(one_line(repr(key), 40), where)
    return record


_POST_TRAINING = ("learning from preferences is post-training (DPO and its kin), which this script "
                  "does not do")


def _no_format(value):
    if "chosen" in value and "rejected" in value:
        columns = "prompt=prompt,completion=chosen" if "prompt" in value else "messages=chosen"
        return (f"'chosen' and 'rejected' are a pair of answers; {_POST_TRAINING}. --columns "
                f"{columns} trains on the chosen answers alone")
    names = [one_line(repr(key), 40) for key in itertools.islice(value, 8)]
    keys = ", ".join(names + ["…"] * (len(value) > 8)) or "(none)"
    spelled = {key.strip().lower(): key for key in value}
    columns = next((",".join(f"{key}={spelled[key]}" for key in keys) for keys in FORMATS.values()
                    if spelled.keys() >= {*keys}), "prompt=question,completion=answer")
    return f"the keys {keys} fit no known format ({KNOWN}); map them, as in --columns {columns}"


def _trains(value, where, what):
    """False if a turn or an example says that it is not to be trained on."""
    trains = True
    for key in WEIGHTS:
        given = value.get(key)
        said = _truth(given)
        if said is None and given not in (None, "") and (key != "loss" or what == "a turn"):
            raise UserError(f"{where}: {key} {one_line(repr(given), 40)} of {what}: it can be 0 "
                            "or 1, false or true; if it means something else, rename it")
        trains = trains and said is not False
    return trains


def _truth(value):
    """True or False for what says so, in a table as text; None for all else."""
    if isinstance(value, str):
        value = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(
            value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


# --- formats ---

def _conversation(turns, where, ignored, name):
    """The messages of a list of turns, in either spelling; a call is its speaker's."""
    turns = _parsed(turns, where, name)
    if not isinstance(turns, list):
        raise UserError(f"{where}: {name} must be a list, not {_kind(turns)}")
    messages = []
    for turn in turns:
        message = _message(turn, where, ignored)
        before = messages[-1] if messages else {"role": None}
        if message["role"] == CALLER:
            message["role"] = "assistant"
            if before["role"] == "assistant" and before.get("train") == message.get("train"):
                # Words, or another call, beside it.
                before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
                continue
        messages.append(message)
    return messages


def _alpaca(value, where, ignored):
    more = _string(value, "input", where)
    question = _string(value, "instruction", where) + ("\n\n" + more if more.strip() else "")
    return _history(value, where) + [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(value, "output", where)}]


def _prompt(value, where, ignored):
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list):
        before = _conversation(prompt, where, ignored, "prompt")
    else:
        more = _string(value, "input", where)
        before = [{"role": "user", "content": _string(value, "prompt", where)
                   + ("\n\n" + more if more.strip() else "")}]
    if isinstance(completion, list):
        after = _conversation(completion, where, ignored, "completion")
    else:
        after = [{"role": "assistant", "content": _string(value, "completion", where)}]
    system, before = _led(before)
    other, after = _led(after)
    if system and other and system != other:
        raise Refused("its prompt and its completion have different system messages")
    if len(after) > len(before) and after[:len(before)] == before:
        after = after[len(before):]  # it was the whole conversation, as chosen answers are
    before = [{**one, "train": False} if one["role"] == "assistant" else one for one in before]
    return (system or other) + _history(value, where) + before + after


def _led(messages):
    """([the system message that they begin with] or [], the others)."""
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def _history(value, where):
    """Earlier turns, [[question, answer], ...], as messages."""
    turns = _parsed(value.get("history") or [], where, "history")
    pairs = isinstance(turns, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in turns)
    if not pairs:
        raise UserError(f"{where}: history must be a list of [question, answer] pairs of texts")
    return [{"role": role, "content": text} for pair in turns
            for role, text in zip(("user", "assistant"), pair)]


_MESSAGES = {
    "messages": lambda value, *more: _conversation(value["messages"], *more, "messages"),
    "conversations": lambda value, *more: _conversation(value["conversations"], *more,
                                                        "conversations"),
    "Alpaca": _alpaca, "prompt": _prompt}


# --- turns, calls and tools ---

def _message(turn, where, ignored):
    """A turn in either spelling, {"role", "content", ...} or {"from", "value"}, as the former."""
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a turn must be an object, not {_kind(turn)}")
    turn = {key: one for key, one in turn.items() if one is not None and one == one}
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: role {one_line(repr(name), 40)} is none of {', '.join(ROLES)}")
    taken = ("from", "value", "tool_calls", "function_call", *WEIGHTS)
    message = {"role": role, "content": _content(turn, where),
               **{key: one for key, one in turn.items() if key not in (*taken, "role", "content")}}
    calls = _parsed(turn.get("tool_calls") or [], where, "tool_calls") or []
    legacy = _parsed(turn.get("function_call") or None, where, "function_call")
    if not isinstance(calls, list) or (calls or legacy) and role not in (CALLER, "assistant"):
        raise UserError(f"{where}: tool_calls must be a list, in a turn of the assistant")
    if role == CALLER:
        calls, message["content"] = _parsed_call(message["content"]), ""
    elif legacy is not None:
        calls = [*calls, legacy]
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    if not _trains(turn, where, "a turn"):
        message["train"] = False
    elif role not in (CALLER, "assistant"):
        for key in turn.keys() & set(WEIGHTS):  # others' words are never trained on
            ignored.setdefault(f"{key!r} of a {role}'s turn", where)
    return message


def _content(turn, where):
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type") or "text") for part in content} - {"text"}
        if kinds:
            raise UserError(f"{where}: content of type {one_line(sorted(kinds))}; only text is "
                            "trained on")
        return "".join(_string(part, "text", where) for part in content)
    return _string({"content": content}, "content", where)


def _call(call):
    """A call as {"type": "function", "function": {"name", "arguments": object}, "id"?}."""
    call = {key: one for key, one in call.items() if one is not None} if (
        isinstance(call, dict)) else {}
    inner = call.get("function", {key: one for key, one in call.items() if key in (
        "name", "arguments", "parameters")})
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Refused("a tool call without the name of a function")
    arguments = inner.get("arguments", inner.get("parameters"))
    text = isinstance(arguments, str)
    if text and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Refused("the arguments of a tool call are not JSON") from None
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise Refused("the arguments of a tool call are no JSON object")
    arguments = arguments if text else _Filled(arguments)
    function = {**inner, "arguments": arguments} if "arguments" in inner else {
        "name": inner["name"], "arguments": arguments}
    if "function" not in call:
        return {"type": "function", **{k: v for k, v in call.items() if k not in (
            "type", "name", "arguments", "parameters")}, "function": function}
    return {**({} if "type" in call else {"type": "function"}), **call, "function": function}


class _Filled(dict):
    """Arguments that were an object in the file: Arrow may have filled in null keys."""


def _parsed_call(text):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("a turn that calls a function and is not JSON") from None
    return found if isinstance(found, list) else [found]


def _tools(value, where):
    """The tools of an example, each {"type": "function", "function": {...}}; None for none."""
    tools = _parsed(value.get("tools") or value.get("functions"), where, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools must be a list of objects")
    tools = [_without_nulls(tool, {}) for tool in tools]
    return [tool if "function" in tool or "name" not in tool else
            {"type": "function", "function": tool} for tool in tools]


def _prune_calls(messages, tools):
    """Remove null arguments that no schema of their tool names."""
    schemas = {}
    for tool in tools or ():
        inner = tool.get("function", tool)
        if isinstance(inner, dict):
            schemas[str(inner.get("name"))] = inner.get("parameters")
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], _Filled):
                function["arguments"] = _without_nulls(
                    function["arguments"], schemas.get(function["name"]))


def _without_nulls(value, schema):
    """`value` without keys that are null, but for those that a JSON schema names."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        named = schema.get("properties")
        named = named if isinstance(named, dict) else {}
        return {key: _without_nulls(one, named.get(key)) for key, one in value.items()
                if one is not None or key in named}
    if isinstance(value, list):
        return [_without_nulls(one, schema.get("items")) for one in value]
    return value


# --- values ---

def _parsed(value, where, name):
    """A value, or what it says if it is JSON within JSON, as some data sets have it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} is text, and that is not valid JSON "
                        f"({one_line(error)}); json.dumps writes it as it must be") from None


def _string(value, key, where):
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{where}: {key!r} must be text, not {_kind(found)}")
    return found or ""


def _kind(value):
    return {list: "a list", dict: "an object", str: "text", bool: "a truth value", int: "a number",
            float: "a number", type(None): "null"}.get(type(value), type(value).__name__)
