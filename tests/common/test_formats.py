"""common/data/formats.py: what a record says is honoured, refused or named, in any spelling."""

import pytest

from common.data.formats import convert
from common.data.template import Refused
from common.errors import UserError

USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
TEXT_CALL = {"id": "c1", "type": "function",
             "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def messages(value, **more):
    return convert(value, "f:1", {}, **more)["messages"]


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


# --- tool calls ---

@pytest.mark.parametrize("call, result", [
    (TEXT_CALL, {**CALL, "id": "c1"}),
    ({**CALL, "id": None}, CALL),
    ({"name": "weather", "arguments": {"town": "Rome"}}, CALL),
    ({"function": {"name": "weather", "arguments": ""}},
     {"type": "function", "function": {"name": "weather", "arguments": {}}}),
])
def test_calls_come_out_as_openai_has_them_with_objects_as_arguments(call, result):
    for content in ({}, {"content": None}, {"content": ""}):
        turn = {"role": "assistant", "tool_calls": [call], **content}
        found = messages({"messages": [USER, turn]})[1]
        assert found == {"role": "assistant", "content": "", "tool_calls": [result]}


def test_calls_of_before_there_were_tools():
    record = convert({
        "messages": [USER, {"role": "assistant", "content": None,
                            "function_call": TEXT_CALL["function"]},
                     {"role": "function", "name": "weather", "content": "21"}, HELLO],
        "functions": [TOOL["function"]]}, "f:1", {})
    assert record == {"tools": [TOOL], "messages": [
        USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "21", "name": "weather"}, HELLO]}


def test_callers_and_observers_of_sharegpt():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "I look."},
             {"from": "function_call",
              "value": '{"name": "weather", "arguments": {"town": "Rome"}}'},
             {"from": "observation", "value": "21"}, {"from": "gpt", "value": "Hello."}]
    record = convert({"conversations": turns, "system": "",
                      "tools": '[{"name": "weather", "parameters": {}}]'}, "f:1", {})
    assert record["messages"] == [
        USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "21"}, HELLO]
    assert record["tools"] == [{"type": "function",
                                "function": {"name": "weather", "parameters": {}}}]
    for role in ("tool", "function", "function_response", "tool_response"):
        turns[3]["from"] = role
        assert messages({"conversations": turns})[2] == {"role": "tool", "content": "21"}
    turns[2]["value"] = "[" + turns[2]["value"] + "]"
    turns[2:2] = [turns[2]]  # two calls at once
    assert messages({"conversations": turns})[1]["tool_calls"] == [CALL, CALL]
    assert len(messages({"conversations": [turns[0], *turns[2:]]})) == 4  # and no words beside
    beside = {**turns[3], "tool_calls": [CALL]}  # a caller's turn may have both
    assert messages({"conversations": [turns[0], beside]})[1]["tool_calls"] == [CALL, CALL]
    turns[1]["weight"] = 0  # then they are a turn of their own
    found = messages({"conversations": turns})
    assert found[1] == {"role": "assistant", "content": "I look.", "train": False}
    assert found[2] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize("call, why", [
    ({"name": "f", "arguments": "{'a': 1}"}, "are not JSON"),
    ({"arguments": {}}, "without the name"),
    ({"name": "f", "arguments": "[1]"}, "no JSON object"), ("f(1)", "without the name"),
    ({"function": {"name": None}}, "without the name"),
])
def test_a_broken_call_is_one_example_less(call, why):
    with pytest.raises(Refused, match=why):
        messages({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    with pytest.raises(Refused, match="calls a function and is not JSON"):
        messages({"conversations": [{"from": "function_call", "value": "weather(Rome)"}]})


def test_null_keys_that_arrow_filled_in_are_dropped_where_no_schema_names_them():
    filled = {"town": "Rome", "amount": None, "where": {"street": None, "zip": None}}
    call = {"function": {"name": "weather", "arguments": filled}}
    properties = {"town": {"type": "string", "enum": None}, "amount": None, "where": {
        "type": "object", "properties": {"street": {"type": "string"}, "zip": None}}}
    tool = {"type": "function", "function": {"name": "weather", "strict": None, "parameters": {
        "type": "object", "properties": properties}}}
    value = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
    record = convert(value, "f:1", {})
    arguments = record["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"town": "Rome", "where": {"street": None}}
    assert record["tools"] == [{"type": "function", "function": {
        "name": "weather", "parameters": {"type": "object", "properties": {
            "town": {"type": "string"},
            "where": {"type": "object", "properties": {"street": {"type": "string"}}}}}}}]
    assert filled["amount"] is None  # the reader's value is left as it was
    call["function"]["arguments"] = '{"town": null}'  # as text it is what somebody wrote
    found = messages({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"town": None}


def test_no_calls_and_no_tools_are_absent():
    for nothing in ([], None, "", "[]"):
        value = {"messages": [USER, {**HELLO, "tool_calls": nothing, "name": None}],
                 "tools": nothing, "functions": None}
        assert convert(value, "f:1", {}) == {"messages": [USER, HELLO]}


# --- keys that carry meaning ---

@pytest.mark.parametrize("key, off, on", [("weight", 0, 1), ("train", False, True),
                                          ("loss", False, True), ("weight", 0.0, 1.0)])
def test_turns_that_are_not_to_be_trained_on(key, off, on):
    found = messages({"messages": [USER, {**HELLO, key: off}, USER, {**HELLO, key: on},
                                   {**USER, key: None}, {**HELLO, key: None}]})
    assert found == [USER, {**HELLO, "train": False}, USER, HELLO, USER, HELLO]
    with pytest.raises(Refused, match="weight is 0"):
        convert({"text": "t", key: off}, "f:1", {})
    ignored = {}
    convert({"messages": [{**USER, key: on}, HELLO]}, "f:1", ignored)
    assert ignored == {f"'{key}' of a user's turn": "f:1"}
    with pytest.raises(UserError, match=f"f:1: {key} 0.5 of a turn: it can be 0 or 1"):
        messages({"messages": [USER, {**HELLO, key: 0.5}]})
    ignored = {}
    if key == "loss":  # of an example, it may be a measurement
        assert convert({"text": "t", key: 0.7}, "f:1", ignored) == {"text": "t"}
        assert ignored == {"'loss'": "f:1"}
    else:
        with pytest.raises(UserError, match=f"{key} 0.7 of an example: .* rename it"):
            convert({"text": "t", key: 0.7}, "f:1", ignored)
    for text in ("0", " False", str(off)):  # as a table has it
        with pytest.raises(Refused, match="weight is 0"):
            convert({"text": "t", key: text}, "f:1", {})
    assert convert({"text": "t", key: str(on)}, "f:1", {}) == {"text": "t"}


def test_history():
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": ""}
    assert messages(row) == said("a", "b", "c", "d")
    assert messages({**row, "history": '[["a", "b"]]', "system": "s"}) == [
        {"role": "system", "content": "s"}, *said("a", "b", "c", "d")]
    assert messages({"prompt": "c", "completion": "d", "history": [["a", "b"]]}) == (
        said("a", "b", "c", "d"))
    for nothing in ([], {}, "", None):
        assert messages({**row, "history": nothing}) == said("c", "d")
    for wrong in (["a"], [["a"]], [["a", 1]], {"a": 1}):
        with pytest.raises(UserError, match="f:1: '?history'? must be a list"):
            messages({**row, "history": wrong})
    with pytest.raises(UserError, match="'history' beside 'messages'"):
        messages({"messages": said("a", "b"), "history": [["a", "b"]]})


def test_prompt_and_completion_as_messages():
    prompt = said("a", "b", "c")
    untrained = [prompt[0], {**prompt[1], "train": False}, prompt[2]]
    whole = [*untrained, {"role": "assistant", "content": "d"}]
    assert messages({"prompt": prompt, "completion": [whole[-1]]}) == whole
    assert messages({"prompt": prompt, "completion": "d"}) == whole
    assert messages({"prompt": "c", "completion": [whole[-1]]}) == said("c", "d")
    assert messages({"prompt": "c", "completion": said("c", "d")}) == said("c", "d")
    assert messages({"prompt": "c", "input": "x", "completion": "d"}) == said("c\n\nx", "d")
    assert messages({"prompt": prompt, "completion": said("a", "b", "c", "d")}) == whole
    system = {"role": "system", "content": "s"}
    for value in ({"prompt": "c", "completion": [system, *said("c", "d")]},
                  {"prompt": [system, *said("c")], "completion": said("c", "d")},
                  {"prompt": [system, *said("c")], "completion": [system, *said("c", "d")]},
                  {"prompt": said("c"), "completion": "d", "system": "s\n"}):
        found = messages(value)
        assert [one["content"].strip() for one in found] == ["s", "c", "d"]
    with pytest.raises(Refused, match="system texts differ"):
        messages({"prompt": [system, USER], "completion": [{**system, "content": "t"}, HELLO]})


@pytest.mark.parametrize("value, message", [
    ({"prompt": "p", "chosen": "c", "rejected": "r"},
     "train_dpo\\.py.* --columns prompt=prompt,completion=chosen"),
    ({"prompt": "p", "chosen": said("p", "c"), "rejected": said("p", "r")},
     "train_dpo\\.py.* --columns prompt=prompt,completion=chosen"),
    ({"chosen": said("p", "c"), "rejected": said("p", "r")},
     "train_dpo\\.py.* --columns messages=chosen"),
    ({"prompt": "p", "completion": "c", "label": True}, "KTO.*nothing here learns"),
    ({"prompt": "p", "completion": "c", "label": "False"}, "KTO.*nothing here learns"),
    ({"messages": said("p", "c"), "label": 0}, "KTO.*nothing here learns"),
])
def test_preferences_are_recognised_and_refused(value, message):
    with pytest.raises(UserError, match=f"f:1: .*{message}"):
        convert(value, "f:1", {})


def test_null_is_absent():
    assert convert({"messages": None, "text": "t"}, "f:1", {}) == {"text": "t"}
    assert messages({"messages": said("a", "b"), "text": None}) == said("a", "b")
    assert messages({"instruction": "a", "input": None, "output": "b", "text": None}) == (
        said("a", "b"))
    assert messages({"messages": [{**USER, "value": None, "from": None}, HELLO]}) == [USER, HELLO]
    with pytest.raises(UserError, match="f:1: 'text' is null; .*fit no known format"):
        convert({"text": None, "prompt": "p"}, "f:1", {})
    nan = float("nan")  # pandas' word for it
    assert messages({"instruction": "a", "input": nan, "output": "b", "id": nan}) == said("a", "b")
    call = {**HELLO, "tool_calls": "null", "function_call": TEXT_CALL["function"], "name": nan}
    assert messages({"messages": [call]}) == [{**HELLO, "tool_calls": [CALL]}]


def test_a_key_that_is_ignored_is_noted_with_its_first_place():
    ignored = {}
    for place in ("f:1", "f:2"):
        convert({"messages": said("a", "b"), "id": 7, "input": "x", "empty": None}, place, ignored)
    assert ignored == {"'id'": "f:1", "'input'": "f:1"}
    convert({"text": "t", "system": "s", "label": 1}, "f:3", ignored)
    assert ignored == {"'id'": "f:1", "'input'": "f:1", "'system'": "f:3", "'label'": "f:3"}


def test_two_system_texts():
    system = {"role": "system", "content": "s"}
    for value in ({"messages": [system, USER, HELLO], "system": "s"},
                  {"messages": [USER, HELLO], "system": "s"}):
        assert messages(value) == [system, USER, HELLO]
    with pytest.raises(Refused, match="system texts differ"):
        messages({"messages": [system, USER, HELLO], "system": "other"})


@pytest.mark.parametrize("value, message", [
    ({"messages": said("a", "b"), "tools": "["}, "f:1: tools is text, and that is not valid JSON"),
    ({"messages": said("a", "b"), "tools": [1]}, "a tool must be a JSON object, not int"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "belong in a turn of the assistant"),
    ({"messages": [{**HELLO, "tool_calls": {"a": 1}}]}, "'tool_calls' must be a list"),
    ({"messages": [{"role": "user", "content": b"a"}]}, "must be text, not bytes"),
    ({"messages": [{**HELLO, "tool_calls": 5, "function_call": {"name": "f"}}]}, "must be a list"),
    ({"messages": [{**USER, "function_call": {"name": "f"}}]}, "belong in a turn of the assistant"),
    ({"Prompt": "a", " Completion": "b"}, "--columns prompt=Prompt,completion= Completion"),
    ({"messages": "[{'role': 'user'}]"}, "json.dumps writes it as it must be"),
])
def test_what_is_wrong_with_a_file_has_its_place(value, message):
    with pytest.raises(UserError, match=message) as caught:
        convert(value, "f:1", {})
    assert str(caught.value).startswith("f:1: ") and not isinstance(caught.value, Refused)
