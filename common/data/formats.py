"""One example, in whichever format people have it, as {"messages"} or {"text"}.

    OpenAI             {"messages": [{"role", "content", ...}], "tools"? or "functions"?}
    ShareGPT           {"conversations": [{"from": "human" | "gpt" | "system" | ..., "value"}]}
    Alpaca             {"instruction", "input"?, "output", "history"?}
    prompt/completion  {"prompt", "input"?, "completion"}; both may be a list of messages
    text               {"text"}: all of it is trained

A key with a meaning is honoured or refused; other keys are noted."""

import json

from common.data.template import Refused
from common.errors import UserError, listed, one_line

FORMATS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"),
           ("text",))  # of two that fit, the first counts
BESIDE = ("system", "tools", "functions", "history")
OPTIONAL = (*BESIDE, "input")
WEIGHTS = ("weight", "train", "loss")  # of a turn or of an example: whether it is trained on
MEANT = (*BESIDE, *WEIGHTS, "label")  # read under their own names, whatever --columns says
TRUTH = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
CALLER = "caller"  # an assistant who calls a tool, in formats where that is a role of its own
ROLES = {  # what data sets call the speakers -> what chat templates call them
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": CALLER, "tool_call": CALLER}


def convert(value, where, ignored, rendered=False):
    """{"messages": [...], "tools"?} or {"text"} from an example, a dict as found in a file.
    Messages are as OpenAI has them, but the arguments of calls are objects, and "train": False
    marks what is not to be trained on. Unused keys are added to the dict `ignored`, with the place.
    Raises Refused for an example that can be left out, UserError for what a file must not hold."""
    given, value = value, present(value, "an example", where)  # what is read is taken out
    keys = next((keys for keys in FORMATS if value.keys() >= {*keys}), None)
    if keys is None:
        nulls = "".join(f"{quoted(key)} is null; " for key in given if key not in value)
        raise UserError(f"{where}: {nulls}{_no_format(value)}")
    if not _trains(value, "an example", where):
        raise Refused("its weight is 0")
    if keys == ("text",):
        record = {"text": _take(value, "text", str, where)}
        record.update({"rendered": True} if rendered else {})
    elif _truth(value.get("label")) is not None and "'label'" not in ignored:
        raise UserError(f"{where}: 'label' says which answers are good (KTO's format), from which "
                        "nothing here learns. If it means something else, rename or remove it")
    else:
        messages, tools = _messages(value, keys, where, ignored), _tools(value, where)
        schemas = {str(one.get("name")): one.get("parameters") for tool in tools
                   if isinstance(one := tool.get("function"), dict)}
        for message in messages:
            if "tool_calls" in message:
                message["tool_calls"] = [_call(one, schemas) for one in message["tool_calls"]]
        record = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    for key in value:
        ignored.setdefault(quoted(key), where)
    return record


def quoted(key):
    """A key of the user's data, made fit for a message."""
    return one_line(repr(key), 40)


def _no_format(value):
    if "chosen" in value and "rejected" in value:
        columns = "prompt=prompt,completion=chosen" if "prompt" in value else "messages=chosen"
        return ("'chosen' and 'rejected' are a pair of answers, from which "
                "chapter-03/post_training/train_dpo.py learns; --columns "
                f"{columns} trains on the chosen ones alone")
    spelled = {key.strip().lower(): key for key in value}
    columns = next((",".join(f"{key}={spelled[key]}" for key in keys) for keys in FORMATS
                    if spelled.keys() >= {*keys}), "prompt=question,completion=answer")
    return (f"the keys {listed(map(quoted, value)) or '(none)'} fit no known format "
            f"({'; '.join(map(' + '.join, FORMATS))}); map them, as in --columns {columns}")


def _trains(value, what, where):
    """False if a turn or an example says that it is not to be trained on."""
    trains = True
    for key in WEIGHTS:
        means = _truth(value.get(key))
        if means is None and key == "loss" and what == "an example":  # it may be a measurement
            continue
        given = value.pop(key, "")
        if means is None and given != "":
            raise UserError(f"{where}: {key} {quoted(given)} of {what}: it can be 0 or 1, false or "
                            "true; if it means something else, rename it")
        trains = trains and means is not False
    return trains


def _truth(value):
    """True or False for a value that means it (also as text, in tables); None for any other."""
    return TRUTH.get(str(value).strip().lower())


def _messages(value, keys, where, ignored):
    """The messages of an example: from one list, or from a question and its answer."""
    system = _take(value, "system", str, where)
    parts = [[{"role": "system", "content": system}] if system.strip() else []]
    for key, role in zip(keys, ("user", "assistant")):
        if len(keys) == 1 or isinstance(value[key], list):
            parts.append(_conversation(value, key, where, ignored))
        else:
            more = _take(value, "input", str, where) if role == "user" else ""
            text = _take(value, key, str, where) + ("\n\n" + more if more.strip() else "")
            parts.append([{"role": role, "content": text}])
    systems = [part.pop(0) for part in parts if part and part[0]["role"] == "system"]
    if len({one["content"].strip() for one in systems}) > 1:
        raise Refused("its system texts differ")
    history = _take(value, "history", list, where)
    if not all(isinstance(one, list) and [*map(type, one)] == [str, str] for one in history):
        raise UserError(f"{where}: history must be a list of [question, answer] pairs of texts")
    if len(keys) == 1 and history:
        raise UserError(f"{where}: 'history' beside {keys[0]!r}: put its turns into the list")
    earlier = [{"role": role, "content": text} for pair in history
               for role, text in zip(("user", "assistant"), pair)]
    before, after = sum(parts[1:-1], []), parts[-1]
    if len(after) > len(before) and after[:len(before)] == before:
        after = after[len(before):]  # it was the whole conversation, as chosen answers are
    for message in before:
        if message["role"] == "assistant":
            message["train"] = False
    return systems[-1:] + earlier + before + after


def _conversation(value, key, where, ignored):
    """The messages of a list of turns; a call that is a turn joins the assistant's before it."""
    messages = []
    for turn in _take(value, key, list, where):
        message, before = _message(turn, where, ignored), messages[-1] if messages else {}
        if message["role"] != CALLER:
            messages.append(message)
        elif before.get("role") != "assistant" or before.get("train") != message.get("train"):
            messages.append({**message, "role": "assistant"})
        else:
            before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
    return messages


def _message(turn, where, ignored):
    """A turn in either spelling, {"role", "content", ...} or {"from", "value"}, as the former."""
    turn = present(turn, "a turn", where)
    weights = [key for key in WEIGHTS if key in turn]
    trains = _trains(turn, "a turn", where)
    name = turn.pop("role", turn.pop("from", None))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: role {quoted(name)} is none of {', '.join(ROLES)}")
    content, calls = _content(turn, where), _take(turn, "tool_calls", list, where)
    calls = calls + [call for call in [_take(turn, "function_call", dict, where)] if call]
    if role == CALLER:
        called = _json(content, Refused("a turn that calls a function and is not JSON"))
        calls, content = calls + (called if isinstance(called, list) else [called]), ""
    if calls and role not in (CALLER, "assistant"):
        raise UserError(f"{where}: tool_calls belong in a turn of the assistant")
    message = {"role": role, "content": content, **turn}
    if calls:
        message["tool_calls"] = calls
    if not trains:
        message["train"] = False
    elif role not in (CALLER, "assistant"):
        for key in weights:  # others' words are never trained on
            ignored.setdefault(f"{key!r} of a {role}'s turn", where)
    return message


def _content(turn, where):
    parts = turn.pop("content", turn.pop("value", None))
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return _take({"content": parts}, "content", str, where)
    kinds = {str(part.get("type") or "text") for part in parts} - {"text"}
    if kinds:
        raise UserError(f"{where}: content of type {one_line(sorted(kinds))}; only text is read")
    return "".join(_take(dict(part), "text", str, where) for part in parts)


def _call(call, schemas):
    """A call as {"type": "function", "function": {"name", "arguments": object}, "id"?}, without the
    null keys that Arrow adds to arguments, unless the function's schema names them."""
    call = call if isinstance(call, dict) else {}
    call = {key: one for key, one in call.items() if one is not None}
    if "function" not in call:
        call.pop("type", None)
        inner = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
        call = {**call, "function": inner}
    inner = call["function"]
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Refused("a tool call without the name of a function")
    given = inner.get("arguments", inner.get("parameters"))
    if not isinstance(given, str):
        given = _without_nulls(given, schemas.get(inner["name"]))
    elif given:
        given = _json(given, Refused("the arguments of a tool call are not JSON"))
    if given and not isinstance(given, dict):
        raise Refused("the arguments of a tool call are no JSON object")
    inner = inner if "arguments" in inner else {"name": inner["name"]}
    call = call if "type" in call else {"type": "function", **call}  # the order shows in texts
    return {**call, "function": {**inner, "arguments": given or {}}}


def _tools(value, where):
    """The tools of an example, each {"type": "function", "function": {...}}."""
    tools = _take(value, "tools", list, where) or _take(value, "functions", list, where)
    tools = [_without_nulls(_must_be(dict, tool, "a tool", where), {}) for tool in tools]
    return [tool if "function" in tool or "name" not in tool else
            {"type": "function", "function": tool} for tool in tools]


def _without_nulls(value, schema):
    """`value` without the keys that are null and not named by the JSON `schema`."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        named = schema.get("properties")
        named = named if isinstance(named, dict) else {}
        return {key: _without_nulls(one, named.get(key)) for key, one in value.items()
                if one is not None or key in named}
    if isinstance(value, list):
        return [_without_nulls(one, schema.get("items")) for one in value]
    return value


def _must_be(kind, value, what, where):
    if not isinstance(value, kind):
        names = {dict: "a JSON object", list: "a list", str: "text"}
        raise UserError(f"{where}: {what} must be {names[kind]}, not {type(value).__name__}")
    return value


def present(value, what, where):
    """An object without the keys whose value is null, or NaN, which is pandas' null."""
    return {key: one for key, one in _must_be(dict, value, what, where).items()
            if one is not None and one == one}


def _take(value, key, kind, where):
    """The value of a key, taken out, of a type; lists and objects may also be JSON in a text."""
    found = value.pop(key, None)
    if kind is not str and isinstance(found, str) and found:
        found = _json(found, UserError(f"{where}: {key} is text, and that is not valid JSON; "
                                       "json.dumps writes it as it must be"))
    empty = found in (None, "") or kind is not str and not found  # {} for a list, say
    return kind() if empty else _must_be(kind, found, repr(key), where)


def _json(text, error):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise error from None
