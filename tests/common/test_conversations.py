"""Nothing that a conversation says vanishes: random conversations, templates of every bad habit.

The goldens (tests/goldens/make_conversations.py) hold 24 conversations, each as people spell it
(`raw`) and in the form that transformers takes (`plain`), and what transformers makes of it with
14 chat templates that drop, merge, move, rewrite or refuse parts of it. Every part carries a word
of its own, so that it can be told where it went.
"""

import json
import random
import re

import pytest
from helpers import GOLDENS

from common.data import formats
from common.data.chat import Chat
from common.data.template import Refused

GOLDEN = json.loads((GOLDENS / "conversations.json").read_text(encoding="utf-8"))
CONVERSATIONS, TEMPLATES = GOLDEN["conversations"], list(GOLDEN["templates"])
# What is named when the template leaves it out -> the kinds of parts that this speaks of.
NAMED = {"the system message": "system", "the user message": "user", "a tool's answer": "tool",
         "the words beside a tool call": "words", "words of the assistant": "words",
         "the reasoning of the last turn": "thoughts", "the tools": "tools"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder, chats = tmp_path_factory.mktemp("templates"), {}
    for name, source in GOLDEN["templates"].items():
        (folder / f"{name}.jinja").write_text(source, encoding="utf-8")
        chats[name] = Chat.load(GOLDENS / "chat" / "qwen3", folder / f"{name}.jinja")
    return chats


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_each_spelling_comes_out_in_the_form_that_templates_take(number):
    one = CONVERSATIONS[number]
    record = formats.convert(one["raw"], "f:1", {})
    messages = [{key: value for key, value in message.items() if key != "train"}
                for message in record["messages"]]
    assert messages == one["plain"]["messages"]
    assert record.get("tools") == one["plain"].get("tools")
    untrained = {part["message"] for part in one["parts"]
                 if not part["trained"] and part["what"] in ("words", "thoughts", "call")}
    assert untrained == {n for n, message in enumerate(record["messages"])
                         if message.get("train") is False}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_tokens_equal_transformers(chats, name):
    refused = 0
    for one in CONVERSATIONS:
        record, golden = formats.convert(one["raw"], "f:1", {}), one["rendered"][name]
        if "error" in golden:
            refused += 1
            with pytest.raises(Refused):
                chats[name].layout(record)
            continue
        messages, tools = record["messages"], record.get("tools")
        more = {"tools": tools} if tools else {}
        assert chats[name].render(messages, **more) == golden["text"]
        try:
            assert chats[name].encode_messages(messages, **more)[0][:len(golden["ids"])] == (
                golden["ids"])
        except Refused as error:  # what may not be trained on is rendered alike all the same
            assert re.search("leaves out|does not show", str(error))
        if "prompt" in golden:
            n, rest = golden["prompt"]
            last = max(n for n, one in enumerate(messages) if one["role"] == "assistant")
            assert chats[name].render(messages[:last], True, **more) == golden["text"][:n] + rest
    assert refused == sum("error" in one["rendered"][name] for one in CONVERSATIONS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_part_is_trained_context_or_named(chats, name):
    """The words of one part in the text of another (a tool's name) count as the last of them."""
    chat, seen = chats[name], set()
    for one in CONVERSATIONS:
        record, golden = formats.convert(one["raw"], "f:1", {}), one["rendered"][name]
        if "error" in golden:
            continue
        try:
            layout = chat.layout(record)
        except Refused as error:
            seen.add(str(error))
            continue
        asked = max(n for n, message in enumerate(record["messages"])
                    if message["role"] == "user")
        named = {NAMED[what] for what in layout.left_out}
        inside = [any(start <= at < end for start, end in layout.spans)
                  for at in range(len(layout.text))]
        dropped = set()
        for part in one["parts"]:
            at = layout.text.rfind(part["word"])
            if part["what"] == "tools":
                at = layout.text.find(part["word"])
            own = part["what"] in ("words", "thoughts", "call", "arguments")
            if at < 0:
                if part["what"] != "thoughts" or part["message"] > asked:
                    dropped.add(part["what"])
            else:
                assert inside[at] == (own and part["trained"]), (name, part, layout)
        assert dropped == named, (name, one["raw"])
        seen |= named
    assert seen == DROPS[name]


CALLS = "the chat template leaves out a tool call"
CALLS_END = ("the chat template does not show where the turn of a tool call ends; mark it in the "
             "template with {% generation %}")
DROPS = {  # by template: what it is written to leave out, and for which examples are refused
    "chatml": {"thoughts", CALLS}, "qwen3": set(), "strict": {"thoughts"},
    "system_in_user": {"tools"}, "llama31": {"thoughts", "words"},
    "no_tool_answers": {"thoughts", "tool", "tools", "system"},
    "last_exchange": {"thoughts", "user", "words", "tools", "system", CALLS},
    "system_last": {"tools"}, "no_thoughts": {"thoughts", "tools"}, "think_prompt": {"tools"},
    "plain_names": {"thoughts", CALLS_END}, "merged": {"thoughts", "tools"},
    "marked": {"thoughts", CALLS.replace("a tool", "the arguments of a tool")},
    "base_eos": {"thoughts", "tools"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_a_prefix_of_what_is_trained(chats, name):
    """And all behind it is trained, to an end-of-turn token: so it is answered, and it stops."""
    chat, checked, otherwise = chats[name], 0, set()
    for one in CONVERSATIONS:
        record = formats.convert(one["raw"], "f:1", {})
        messages, tools = record["messages"], record.get("tools")
        more = {"tools": tools} if tools else {}
        last = max((n for n, message in enumerate(messages)
                    if message["role"] == "assistant" and "train" not in message), default=0)
        try:
            prompt = chat.encode_prompt(messages[:last], **more)
            ids, trained = chat.encode_messages(messages[:last + 1], **more)
        except Refused:
            continue
        checked += 1
        if ids[:len(prompt)] != prompt:
            otherwise.add(name)
            continue
        rest = trained[len(prompt):]
        count = rest.index(False) if False in rest else len(rest)
        assert count and not any(rest[count:]) and not any(trained[len(prompt) - 1:len(prompt)])
        assert ids[len(prompt) + count - 1] in chat.stop_ids
    assert checked >= 6 and otherwise == ({name} & {"think_prompt"})


def random_conversation(rng):
    """Words that are like the template's, blank, or think; tools, calls, reasoning, weights."""
    words = ["a", "Yes.", "user", "assistant\n", "weather", "{}", '"q"', "tool", "im", "  x ", "f",
             "</think>", "<think>\nhm\n</think>\n\n", "é日本", "", "null", "\n", "Be brief"]

    def text(**more):
        chosen = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(0, 3)))
        return {"content": chosen, **more}

    def say(role, **more):
        said = text(role=role, **more)
        if role == "user":
            said["content"] = re.sub("</?think>", "", said["content"])
        elif role == "assistant" and rng.random() < 0.3:
            said["reasoning_content"] = text()["content"]
        return said

    def call():
        given = [{"q": text()["content"]}, {"q": 3}, {}, {"q": [text()["content"], {"z": "w"}]}]
        return {"type": "function", "function": {
            "name": rng.choice(["f", "look"]), "arguments": rng.choice(given)}}

    messages = [say("system")] * (rng.random() < 0.3)
    for _ in range(rng.randint(1, 3)):
        messages.append(say("user"))
        for _ in range(rng.randint(1, 2) * (rng.random() < 0.6)):
            calls = [call() for _ in range(rng.randint(1, 2))]
            messages += [say("assistant", tool_calls=calls), say("tool")]
        messages.append(say("assistant", **({"train": False} if rng.random() < 0.2 else {})))
    tools = [{"type": "function", "function": {"name": rng.choice(["f", "look", "weather"])}}
             for _ in range(rng.randint(0, 2))]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def test_conversations_made_to_confuse_are_trained_turn_by_turn_or_refused(chats):
    """In the plain rendering, in order, never across a header; no untrained turn among them."""
    rng, used = random.Random(0), 0
    for _ in range(150):
        record = random_conversation(rng)
        own = [one for one in record["messages"] if one["role"] == "assistant"]
        for name, chat in chats.items():
            try:
                layout = chat.layout(record)
            except Refused:
                continue
            used += 1
            more = {"tools": record["tools"]} if "tools" in record else {}
            assert layout.text == chat.render(record["messages"], **more)
            edges = [edge for span in layout.spans for edge in span]
            assert edges == sorted(edges) and edges[-1:] <= [len(layout.text)]
            if name != "marked":  # its marks can be anywhere
                pieces = [layout.text[start:end] for start, end in layout.spans]
                assert not any("<|im_start|>" in piece for piece in pieces), (name, record)
                assert len(pieces) <= sum(one.get("train", True) for one in own), (name, record)
    assert used > 500
