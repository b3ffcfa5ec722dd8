"""common/data/chat.py and what it rests on (parts, trained_spans, template, tokenizer).

Goldens: what transformers renders, tokenises and, where the template marks {% generation %},
masks (tests/goldens/make_chat.py). Everything else is worked out by hand below.
"""

import codecs
import functools
import json
import shutil
import sys
import time

import numpy as np
import pytest
from helpers import GOLDENS, encode_text
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors

from common.data import template, tokenizer as tokenizer_files, trained_spans
from common.data.chat import Chat
from common.data.template import Refused, compiled
from common.errors import UserError

FOLDERS = ("qwen3", "llama3")
EXPECTED = {name: json.loads((GOLDENS / "chat" / name / "expected.json").read_text())["examples"]
            for name in FOLDERS}
CASES = [(name, title) for name in FOLDERS for title in EXPECTED[name]]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The goldens' tokenizers; "qwen3 marked" has {% generation %} in its template."""
    found = {}
    for name in FOLDERS:
        found[name] = Chat.load(GOLDENS / "chat" / name)
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(GOLDENS / "chat" / name, folder, dirs_exist_ok=True)
        (folder / "marked.jinja").replace(folder / "chat_template.jinja")
        found[f"{name} marked"] = Chat.load(folder)
    return found


def folder_with(path, template=None, special=("<s>", "</s>"), added=(), normalizer=None, **config):
    """A folder with a tokenizer whose tokens are bytes, and the given template."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.model = models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(t, normalized=normalizer is not None)
                                  for t in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", **config} if "<s>" in special else config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def said(chat, messages, **variables):
    """The pieces of text that are trained, in order."""
    ids, trained = chat.encode_messages(messages, **variables)
    edges = np.flatnonzero(np.diff([0, *trained, 0]))
    return [chat.decode(ids[a:b], skip_special=False) for a, b in edges.reshape(-1, 2)]


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


# --- equal to transformers ---

@pytest.mark.parametrize("name, title", CASES)
def test_rendering_and_tokens_equal_transformers(chats, name, title):
    golden = EXPECTED[name][title]
    for chat in (chats[name], chats[f"{name} marked"]):
        assert chat.render(golden["messages"], **golden["variables"]) == golden["text"]
        assert chat.render(golden["messages"], True, **golden["variables"]) == golden["prompt"]
        assert chat.encode_prompt(golden["messages"], **golden["variables"]) == golden["prompt_ids"]
        assert chat.encode_messages(golden["messages"], **golden["variables"])[0] == golden["ids"]


@pytest.mark.parametrize("name, title", CASES)
def test_masks_with_and_without_generation_marks_equal_transformers(chats, name, title):
    golden = EXPECTED[name][title]
    trained = [bool(one) for one in golden["trained"]]
    for chat in (chats[name], chats[f"{name} marked"]):
        assert chat.encode_messages(golden["messages"], **golden["variables"])[1] == trained


# --- masks by hand ---

EMPTY = "<think>\n\n</think>\n\n"


def test_all_of_the_answer_is_trained_with_inserted_thoughts_and_not_the_header(chats):
    assert said(chats["qwen3"], talk("Hi", "Hello.", "And?", "Bye.")) == [
        "Hello.<|im_end|>", EMPTY + "Bye.<|im_end|>"]
    assert said(chats["llama3"], talk("Hi", " Hello.\n")) == ["Hello.<|eot_id|>"]


def test_thoughts_that_the_template_keeps_are_trained(chats):
    thinking = "<think>\nwhy\n</think>\n\nso"
    assert said(chats["qwen3"], talk("a", thinking)) == [thinking + "<|im_end|>"]
    assert said(chats["qwen3"], talk("a", thinking, "b", thinking)) == [
        "so<|im_end|>", thinking + "<|im_end|>"]
    reasoned = [{"role": "user", "content": "a"},
                {"role": "assistant", "content": "so", "reasoning": "why"}]
    assert said(chats["qwen3"], reasoned) == [thinking + "<|im_end|>"]
    assert said(chats["llama3"], talk("a", thinking)) == [thinking + "<|eot_id|>"]


CHATML = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")


@pytest.mark.parametrize("source, end", [
    (CHATML, "</s>"),
    (CHATML.replace("m.content", "m.content | trim"), "</s>"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "\n</s>"),  # eos added
])
def test_white_space_at_the_edges(tmp_path, source, end):
    chat = Chat.load(folder_with(tmp_path / "t", source))
    kept = "trim" not in source
    for answer in ("yes", " yes", "yes \n", "\n\n yes \t\n"):
        assert said(chat, talk(" q\n", answer)) == [(answer if kept else answer.strip()) + end]
    assert said(chat, talk("q", "one", "q", "two"))[-1] == "two" + end


def test_a_conversation_that_ends_with_a_question_teaches_only_the_answers(tmp_path):
    chat = Chat.load(folder_with(tmp_path / "t", "{% for m in messages %}{{ m.content }}\n"
                                                 "{% endfor %}"))
    assert said(chat, talk("a", "b", "c")) == ["b"]


def test_a_template_that_rewrites_the_answer_is_refused_by_name(tmp_path):
    chat = Chat.load(folder_with(tmp_path / "t", CHATML.replace("m.content", "m.content | upper")))
    chat.encode_messages(talk("A", "B"))
    chat = Chat.load(folder_with(tmp_path / "t", CHATML.replace(
        "m.content", "m.content | replace(' ', '') | list | join(' ')")))
    with pytest.raises(Refused, match="rewrites the assistant's words"):
        chat.encode_messages(talk("a", "some words"))
    chat = Chat.load(folder_with(tmp_path / "t", CHATML + "{{ messages[-1].content }}"))
    with pytest.raises(Refused, match="rewrites"):  # which of the two is the answer?
        chat.encode_messages(talk("a", "b"))


def test_nothing_that_a_template_drops_is_dropped_silently(tmp_path):
    source = ("{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}</s>"
              "{% endif %}{% endfor %}")
    chat = Chat.load(folder_with(tmp_path / "t", source))
    system = {"role": "system", "content": "Rules."}
    assert chat.layout({"messages": [system, *talk("a", "b")]}).left_out == ("the system message",)
    odd = [{**one, "mood": "b"} for one in talk("a", "b")]
    assert chat.layout({"messages": odd}).notes == (
        "with a key 'mood' in their turns, which the chat template does not use",)
    assert "'name'" in chat.layout({"messages": [
        {**talk("a", "b")[0], "name": "Bob"}, talk("a", "b")[1]]}).notes[0]
    call = {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(Refused, match="leaves out a tool call"):
        chat.encode_messages([*talk("a"), call])
    with pytest.raises(Refused, match="empty"):
        chat.encode_messages([])


def test_tokens_at_the_edge_of_a_span_and_trimmed_offsets():
    spans = [(2, 5), (7, 9)]
    offsets = [(0, 2), (1, 3), (3, 5), (5, 5), (5, 7), (6, 8), (8, 9), (9, 9), (9, 10), (0, 0)]
    assert trained_spans.tokens_in(spans, offsets).tolist() == [
        False, True, True, True, False, True, True, True, False, False]
    assert trained_spans.tokens_in([], offsets).tolist() == [False] * 10
    assert trained_spans.tokens_in(spans, []).shape == (0,)


def test_all_to_the_end_of_the_turn_is_trained_even_if_the_words_end_in_a_tag(chats, tmp_path):
    for content in ("<think>\nhm\n</think>\n\n", "Hi</think>", "I like <think>"):
        (piece,) = said(chats["llama3"], talk("a", content))
        assert piece == content.strip() + "<|eot_id|>"
    (piece,) = said(chats["qwen3"], [*talk("a"), {"role": "assistant", "content": "",
                                                  "reasoning_content": "hm"}])
    assert piece == "<think>\nhm\n</think>\n\n<|im_end|>"
    chat = Chat.load(folder_with(tmp_path / "t", CHATML.replace("</s>", "{{ '</a>' if m.role == "
                                                                "'assistant' }}</s>")))
    assert said(chat, talk("a", "b", "c", "d")) == ["b</a></s>", "d</a></s>"]
    two = folder_with(tmp_path / "two", CHATML.replace("</s>", "</s><e>"), ["<s>", "</s>", "<e>"])
    assert said(Chat.load(two), talk("a", "b", "c", "d")) == ["b</s><e>", "d</s><e>"]
    assert stops_of(Chat.load(two)) == {"</s>", "<e>"}
    other = CHATML.replace("</s>", "{{ '<e>' if m.role == 'assistant' and not loop.last else '</s>' }}")
    other = folder_with(tmp_path / "other", other, ["<s>", "</s>", "<e>"])  # earlier turns end so
    assert said(Chat.load(other), talk("a", "b", "c", "d")) == ["b<e>", "d</s>"]


def test_thoughts_in_the_answer_are_trained_from_their_first_tag_on(tmp_path):
    """Where a template has no header, and where there is no template."""
    inst = ("{% for m in messages %}{{ '[' ~ m.content ~ ']' if m.role == 'user' else ' ' ~ "
            "m.content ~ '</s>' }}{% endfor %}")
    chat = Chat.load(folder_with(tmp_path / "t", inst))
    joined = Chat.load(folder_with(tmp_path / "joined"))
    for answer in ("<think>\nhm\n</think>\n\nyes", "<think>\n\n</think>\n\nyes", "</think>yes"):
        assert said(chat, talk("a", answer, "b", answer)) == [answer + "</s>"] * 2
        assert said(joined, talk("a", answer)) == [answer + "</s>"]
    assert said(joined, talk("a", "<think>hm</think>")) == ["<think>hm</think></s>"]


def test_a_header_in_a_users_words_begins_nothing(tmp_path):
    source = ("{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A - ' }}{{ m.content }}\n"
              "{% endfor %}{% if add_generation_prompt %}A: {% endif %}")
    chat = Chat.load(folder_with(tmp_path / "t", source))
    assert said(chat, talk("what is A: in this?", "yes")) == ["yes\n</s>"]


def test_two_answers_in_one_turn_are_one_piece(tmp_path):
    source = ("{% for m in messages %}{% if loop.first or m.role != loop.previtem.role %}<s>"
              "{{ m.role }}\n{% else %}{{ '\n\n' }}{% endif %}{{ m.content }}"
              "{% if loop.last or m.role != loop.nextitem.role %}</s>{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
    chat = Chat.load(folder_with(tmp_path / "t", source))
    turns = [*talk("a", "b"), {"role": "assistant", "content": "c"}]
    assert said(chat, turns) == ["b\n\nc</s>"]
    assert said(chat, [turns[0], {**turns[1], "train": False}, turns[2]]) == ["\n\nc</s>"]


def test_an_empty_answer_is_named_and_not_trained_whatever_came_before(chats):
    for chat in (chats["llama3"], chats["qwen3"]):
        for before in (" x", "x", " "):
            chat.layout({"messages": talk("Q", before)})
            for empty in ("", " ", "\n"):
                assert not chat.layout({"messages": talk("Q", empty)}).spans
                layout = chat.layout({"messages": talk("Q", empty, "R", "yes")})
                assert [layout.text[a:b] for a, b in layout.spans][0].startswith(
                    ("yes", "<think>")) and len(layout.spans) == 1
                assert layout.notes == ("with an empty answer, which is not trained",)
    assert chats["qwen3"].layout({"messages": [talk("", "b")[1]]}).notes == (
        "in which the assistant speaks first",)


def test_calls_whose_arguments_cannot_be_marked(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
        "name": "roll", "arguments": {"sides": 6, 'a "b"': True}}}]}
    (tmp_path / "t").mkdir()
    written = TURNS.replace("END", "</s>")
    chat = Chat.load(folder_with(tmp_path / "t" / "a", written))
    assert said(chat, [*talk("a"), call]) == ['[roll{"sides": 6, "a \\"b\\"": true}]</s>']
    chat = Chat.load(folder_with(tmp_path / "t" / "b", written.replace(
        "{{ c.function.arguments | tojson }}", "")))
    with pytest.raises(Refused, match="leaves out the arguments of a tool call"):
        chat.encode_messages([*talk("a"), call])


def test_arguments_without_end_are_refused(chats, request):
    # PyTorch's compiler doubles Python's limit, for good, in whatever process it works.
    request.addfinalizer(functools.partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)
    for depth, refused in ((100, False), (600, True), (900, True)):
        value = "x"
        for _ in range(depth):
            value = [value]
        call = {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"x": value}}}]}
        if refused:
            with pytest.raises(Refused, match="too deep"):
                chats["qwen3"].layout({"messages": [*talk("a"), call]})
        else:
            assert chats["qwen3"].layout({"messages": [*talk("a"), call]}).spans


def test_words_that_a_template_drops_at_times_are_missed_each_time(tmp_path):
    """That one conversation is written whole does not hide that the next, alike, is not."""
    source = CHATML.replace("{{ m.content }}", "{{ m.content if 'a' in m.content }}")
    chat = Chat.load(folder_with(tmp_path / "t", source))
    for answer, dropped in (("am", ()), ("in", ("words of the assistant",)), ("am", ()),
                            ("i", ("words of the assistant",))):
        assert chat.layout({"messages": talk("a", answer)}).left_out == dropped


def test_what_a_template_adds_to_the_words_is_part_of_the_answer(tmp_path):
    source = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ ' (' ~ m.name ~ ')' if m.name }}")
    chat = Chat.load(folder_with(tmp_path / "t", source))
    for name in ("", "Ann", "", "Bob"):
        turns = talk("a", "b", "a", "c")
        turns[1]["name"] = name
        layout = chat.layout({"messages": turns})
        pieces = [layout.text[start:end] for start, end in layout.spans]
        assert pieces == ["b" + f" ({name})" * bool(name) + "</s>", "c</s>"]


# --- text, BOS and EOS ---

def test_text_is_trained_whole_with_one_bos_and_one_eos(tmp_path):
    chat = Chat.load(folder_with(tmp_path / "t"))
    bos, eos = chat.tokenizer.token_to_id("<s>"), chat.tokenizer.token_to_id("</s>")
    ids, trained = encode_text(chat, "ab")
    assert (ids[0], ids[-1], len(ids)) == (bos, eos, 4) and all(trained)
    ids, trained = chat.encode_messages(talk("ab", "c"))  # no template: joined
    assert chat.decode(ids) == "abc" and (ids.count(bos), ids.count(eos)) == (1, 1)
    assert trained == [False, False, False, True, True]
    with pytest.raises(Refused, match="several turns, .* --chat-template FILE"):
        chat.encode_messages(talk("ab", "c", "d"))
    with pytest.raises(Refused, match="or a tool call, .* --chat-template FILE"):
        chat.encode_messages([*talk("ab"), {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": {}}}]}])
    with pytest.raises(UserError, match="--no-thinking: this model's chat template cannot"):
        chat.no_thinking()
    assert chat.encode_prompt("ab") == [bos, *encode_text(chat, "ab")[0][1:-1]]
    assert chat.encode_prompt(talk("ab")) == chat.encode_prompt("ab")


def test_a_template_with_bos_gets_no_second_one(chats):
    chat = chats["llama3"]
    bos = chat.tokenizer.token_to_id("<|begin_of_text|>")
    for ids in (chat.encode_messages(talk("a", "b"))[0], chat.encode_prompt(talk("a")),
                encode_text(chat, "a")[0], chat.encode_prompt("a")):
        assert ids[0] == bos and ids.count(bos) == 1


def test_a_tokenizer_that_appends_eos_itself(tmp_path):
    folder = folder_with(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    both = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                             special_tokens=both)
    tokenizer.enable_truncation(3)  # what a file stores of someone's pipeline must not act
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = Chat.load(folder)
    ids, trained = encode_text(chat, "a long text")
    assert len(ids) == 13 and ids.count(chat.eos_id) == 1 and trained[-1]
    assert chat.eos_id not in chat.encode_prompt("a")
    assert chat.encode_messages(talk("a", "b"))[1] == [False, False, True, True]


def test_stop_ids_are_those_of_both_files(tmp_path):
    folder = folder_with(tmp_path / "t")
    eos = Chat.load(folder).eos_id
    for stored, stops in (([7, 8], {7, 8, eos}), (9, {9, eos}), (None, {eos})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert Chat.load(folder).stop_ids == stops


def test_the_template_is_the_file_else_the_text_else_the_default_of_a_list(tmp_path):
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert Chat.load(folder_with(tmp_path / "a", chat_template=named)).template == "d"
    assert Chat.load(folder_with(tmp_path / "b", chat_template="t")).template == "t"
    assert Chat.load(folder_with(tmp_path / "c", "file", chat_template="t")).template == "file"
    with pytest.raises(UserError, match="one named 'default'"):
        Chat.load(folder_with(tmp_path / "d", chat_template=named[:1]))


def test_the_date_in_training_data_does_not_change(tmp_path):
    chat = Chat.load(folder_with(tmp_path / "t", "{{ strftime_now('%d %b %Y') }} " + CHATML))
    assert chat.render(talk("a")).startswith(time.strftime("%d %b %Y"))
    assert chat.decode(chat.encode_messages(talk("a", "b"))[0]).startswith("26 Jul 2024")


# --- where an answer ends ---

def stops_of(chat):
    return {chat.tokenizer.id_to_token(token) for token in chat.stop_ids}


TURNS = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
         "{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
         "{{ c.function.arguments | tojson }}]{% endfor %}"
         "END\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}")


@pytest.mark.parametrize("source, special, added, stops", [
    (TURNS.replace("END", "<end>"), ["<s>", "</s>", "<end>"], [], {"</s>", "<end>"}),
    (TURNS.replace("END", "<end>"), ["<s>", "</s>"], ["<end>"], {"</s>", "<end>"}),  # as a word
    (TURNS.replace("END", "</answer><end>\n</s>"), ["<s>", "</s>", "<end>"], [], {"</s>", "<end>"}),
    (TURNS.replace("END", "{{ '<call>' if m.tool_calls else '<end>' }}"),
     ["<s>", "</s>", "<end>", "<call>"], [], {"</s>", "<end>", "<call>"}),
    (TURNS.replace("END", ""), ["<s>", "</s>"], [], {"</s>"}),
    ("{{ raise_exception('no') }}", ["<s>", "</s>", "<end>"], [], {"</s>"}),
    ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
     + TURNS.replace("END", "<end>"), ["<s>", "</s>", "<end>"], [], {"</s>", "<end>"}),
])
def test_what_the_template_ends_a_turn_with_is_a_stop_token(tmp_path, source, special, added,
                                                            stops):
    chat = Chat.load(folder_with(tmp_path / "t", source, special, added))
    assert stops_of(chat) == stops
    if len(stops) > 1:
        first = [{"role": "system", "content": "s"}]
        call = {"role": "assistant", "content": "b", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"f": "x"}}}]}
        for answer in ([talk("a", "b \n")[1]], [call] if "call" in source else []):
            if answer:
                ids, trained = chat.encode_messages([*first, *talk("a"), *answer, *talk("c", "d")])
                ends = [ids[i - 1] for i in range(1, len(ids)) if trained[i - 1] and not trained[i]]
                assert len(ends) == 2 and set(ends) <= chat.stop_ids


def test_folders_say_where_an_answer_ends(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(TURNS.replace("END", "<end>"))
    source = folder_with(tmp_path / "source", None, ["<s>", "</s>", "<end>"])
    chat = Chat.load(source, template)
    eos, end = (chat.tokenizer.token_to_id(token) for token in ("</s>", "<end>"))
    assert chat.stop_ids == {eos, end} and Chat.load(source).stop_ids == {eos}
    assert chat.fingerprint != Chat.load(source).fingerprint
    for name, before, after in (
            ("number", {"eos_token_id": eos, "top_k": 3}, {"eos_token_id": [eos, end], "top_k": 3}),
            ("list", {"eos_token_id": [7, end]}, {"eos_token_id": [7, end, eos]}),
            ("whole", {"eos_token_id": [end, 7, eos]}, {"eos_token_id": [end, 7, eos]}),
            ("nothing", {"top_k": 3}, {"eos_token_id": [eos, end], "top_k": 3}),
            ("missing", None, {"eos_token_id": [5, eos, end], "pad_token_id": 1})):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        file = folder / "generation_config.json"
        (folder / "config.json").write_text('{"eos_token_id": 5, "pad_token_id": 1, "d": 2}')
        if before is not None:
            file.write_text(json.dumps(before))
        chat.save(folder)
        assert json.loads(file.read_text()) == after
        if before == after:
            assert file.read_text() == json.dumps(before)  # not a byte of it is changed
        assert (folder / "chat_template.jinja").read_bytes() == template.read_bytes()
        assert Chat.load(folder).stop_ids >= chat.stop_ids


def test_thinking_is_switched_off_where_the_template_can(chats):
    prompt = chats["qwen3"].encode_prompt(talk("a"), **chats["qwen3"].no_thinking())
    text = chats["qwen3"].decode(prompt, skip_special=False)
    assert text.endswith("<|im_start|>assistant\n" + EMPTY)
    whole, trained = chats["qwen3"].encode_messages(talk("a", "b"))
    assert whole[:len(prompt)] == prompt and trained[len(prompt) - 1]  # what is asked is trained
    with pytest.raises(UserError, match="--no-thinking: this model's chat template cannot"):
        chats["llama3"].no_thinking()


# --- control tokens in text ---

@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_that_spells_a_control_token_is_refused(chats, role):
    messages = talk("a", "b", "c", "d") + [{"role": "system", "content": "s"}]
    for message in messages:
        if message["role"] == role:
            message["content"] = "x <|im_end|>\n<|im_start|>system"
            break
    with pytest.raises(Refused, match=r"spells the control token <\|im_end\|>"):
        chats["qwen3"].encode_messages(messages)
    for prompt in ("a<|im_end|>", talk("a<|im_end|>")):
        with pytest.raises(UserError, match="control token"):
            chats["qwen3"].encode_prompt(prompt)
    with pytest.raises(UserError, match="control token"):
        encode_text(chats["qwen3"], "a<|im_end|>")


def test_an_assistant_may_think_and_a_user_may_not(chats):
    chats["qwen3"].encode_messages(talk("a", "<think>\nb\n</think>\n\nc"))
    with pytest.raises(Refused, match="<think>"):
        chats["qwen3"].encode_messages(talk("a <think>", "b"))
    with pytest.raises(Refused, match="<|im_start|>"):  # in the arguments of a tool call
        chats["qwen3"].encode_messages([*talk("a"), {
            "role": "assistant", "tool_calls": [{"function": {
                "name": "f", "arguments": {"<|im_start|>": [1]}}}]}])
    with pytest.raises(Refused, match="<|im_start|>"):
        chats["qwen3"].encode_messages(talk("a", "b"), tools=[{"name": "<|im_start|>"}])


def test_a_control_token_across_two_contents_and_in_other_spelling(tmp_path):
    with pytest.raises(Refused, match="</s>"):
        Chat.load(folder_with(tmp_path / "a")).encode_messages(talk("x <", "/s> y"))
    lower = folder_with(tmp_path / "b", normalizer=normalizers.Lowercase())
    with pytest.raises(Refused, match="</s>"):
        encode_text(Chat.load(lower), "x </S> y")


def test_text_that_cannot_be_encoded_or_marked_is_refused(chats):
    for text in ("\ud800", "a\udfff"):
        with pytest.raises(Refused, match="surrogate"):
            encode_text(chats["qwen3"], text)
        with pytest.raises(Refused, match="surrogate"):
            chats["qwen3"].encode_messages(talk("a", text))
    for name in ("qwen3", "qwen3 marked"):
        for mark in ("\U00100000", "\U0010fff0", "\U0010fff1"):
            with pytest.raises(Refused, match="private-use"):
                chats[name].encode_messages(talk("a", "b" + mark))
    assert encode_text(chats["qwen3"], "a\U00100000")  # nothing is marked in a plain text
    assert said(chats["qwen3"], talk("a", "\ue000\U000f0001")) == [
        EMPTY + "\ue000\U000f0001<|im_end|>"]


# --- hostile files ---

HOSTILE = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}",
    "{% for a in range(9**5) %}{% for b in range(9**5) %}0123456789{% endfor %}{% endfor %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ 1" + "+1" * 9000 + " }}",
    "{% if x", "{{ x", "{% endfor %}", "{% include 'x' %}{% endgeneration %}", "{% break %}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_ends_with_one_line(tmp_path, source):
    with pytest.raises(UserError) as caught:
        chat = Chat.load(folder_with(tmp_path / "t", source))
        chat.encode_messages(talk("a", "b"))
    assert "\n" not in str(caught.value) and "chat template" in str(caught.value)


def test_what_a_template_writes_is_bounded(monkeypatch):
    write = compiled("{% for i in range(9) %}0123456789{% endfor %}", "t")
    assert len(write({})) == 90
    monkeypatch.setattr(template, "LONGEST", 80)
    with pytest.raises(UserError, match="t: chat template stopped: it writes more than 80 char"):
        write({})


def test_a_panic_of_the_tokenizer_is_an_error_and_ctrl_c_is_not():
    class PanicException(BaseException):  # as pyo3's, no Exception
        pass

    def fail(error):
        raise error

    with pytest.raises(UserError, match="tokenizer.json: byte index 1 is wrong"):
        tokenizer_files.call("tokenizer.json", fail, PanicException("byte index\n1 is wrong"))
    with pytest.raises(KeyboardInterrupt):
        tokenizer_files.call("tokenizer.json", fail, KeyboardInterrupt())


def test_a_template_reaches_nothing_outside(tmp_path):
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
                   "{{ self.__init__.__globals__ }}", "{% import 'os' as os %}",
                   "{{ cycler.__init__.__globals__.os }}", "{{ lipsum() }}"):
        with pytest.raises(Refused):
            Chat.load(folder_with(tmp_path / "t", source)).render(talk("a"))


def test_a_long_conversation_is_no_offence(chats):
    messages = talk(*(f"message {i} " + "ü" * 50 for i in range(1000)))
    assert len(said(chats["qwen3"], messages)) == 500


def test_loop_variables_and_controls():
    source = ("{% for x in range(5) %}{% if x == 3 %}{% break %}{% endif %}{{ loop.index }}/"
              "{{ loop.length }}{{ '' if loop.last else ',' }}{% else %}never{% endfor %}"
              "{% for k, v in {'a': 1}.items() if v %}{{ k ~ v }}{% endfor %}"
              "{% filter upper %}b{% endfilter %}{{ [1, (2, 3)] | tojson }}"
              "{{ dict(a='<') | tojson }}")
    assert compiled(source, "t")({}) == '1/5,2/5,3/5,a1B[1, [2, 3]]{"a": "<"}'


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", None, "no tokenizer.json"), ("tokenizer.json", b"", "not a tokenizer"),
    ("tokenizer.json", b"{}", "not a tokenizer"), ("tokenizer.json", b"\xff\0", "not a tokenizer"),
    ("tokenizer.json", b"[" * 100_000, "not a tokenizer"),
    ("tokenizer_config.json", b"{", "not valid JSON"), ("tokenizer_config.json", b"\xff", "utf-8"),
    ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
    ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
    ("tokenizer_config.json", b'{"eos_token": "<none>"}',
     "tokenizer.json lacks .'<none>'. of .*; save it anew"),
    ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', "chat_template must be text"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 7}]}', "text"),
    ("special_tokens_map.json", b"nope", "not valid JSON"),
    ("chat_template.jinja", b"\xff", "not UTF-8"), ("chat_template.jinja", b"{% x %}", "line 1"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "must be an id"),
    ("generation_config.json", b'{"eos_token_id": [1, -1]}', "must be an id"),
])
def test_bad_files_are_one_line_with_their_name(tmp_path, name, content, message):
    folder = folder_with(tmp_path / "t")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Chat.load(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bytes_in_any_file_give_a_tokenizer_or_one_line(tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(GOLDENS / "chat" / "qwen3", folder)
    rng = np.random.default_rng(0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for place in rng.integers(0, len(broken), rng.integers(1, 4)):
                broken[place] = rng.integers(0, 256)
            (folder / name).write_bytes(broken[:rng.integers(1, len(broken) + 1)]
                                        if rng.random() < 0.3 else broken)
            try:
                Chat.load(folder).encode_messages(talk("What?", "It is so."))
            except UserError as error:
                assert "\n" not in str(error)
        (folder / name).write_bytes(whole)


# --- what the files beside tokenizer.json say of its tokens ---

# What the other files say, and all added tokens as transformers 5.23 then has them: their ids and
# flags (special, lstrip, rstrip, normalized). tokenizer.json has the tokens of `ADDED`, and those
# behind the files of each case, normalized ("n") or not.
ADDED = {"<s>": (256, "s"), "</s>": (257, "s"), "<think>": (258, "")}
LATER = {
    "added_tokens_decoder stands alone, and its flags win": ({
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]",
            "extra_special_tokens": {"audio_token": "<a>"}, "added_tokens_decoder": {
                "261": {"content": "[PAD]", "special": False},
                "260": {"content": "<b b>", "rstrip": True, "normalized": True},
                "259": {"content": "<a>", "lstrip": True, "normalized": False, "special": True},
                "258": {"content": "<think>", "lstrip": True, "normalized": False}}},
        "special_tokens_map.json": {"unk_token": "<not read>"},
        "added_tokens.json": {"<not read>": 7}},
        {"<a>": "", "<b b>": "", "[PAD]": "n"},
        {"<think>": (258, "l"), "<a>": (259, "sl"), "<b b>": (260, "rn"), "[PAD]": (261, "s")},
        [256, 259, 260, 260, 261, 258],
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "audio_token": "<a>"}),
    "added_tokens.json, then special_tokens_map.json, which wins": ({
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<s>"},
        "special_tokens_map.json": {
            "bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "<pad>",
            "unk_token": {"content": "<unk>", "rstrip": True, "normalized": False},
            "additional_special_tokens": ["<x>"]},
        "added_tokens.json": {"<tool>": 260, "<pad>": 259, "<x>": 262, "<unk>": 261}},
        {"<pad>": "", "<tool>": "n", "<unk>": "", "<x>": "n"},
        {"<pad>": (259, "s"), "<tool>": (260, "n"), "<unk>": (261, "s"), "<x>": (262, "n")},
        [256, 258, 259, 260, 261, 262],
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "names alone, of tokens that are there": ({
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": "</s>", "mask_token": {
                "__type": "AddedToken", "content": "{", "rstrip": True, "lstrip": False,
                "normalized": False},
            "additional_special_tokens": ["<think>", "}"]}},
        {},
        {"{": (90, "sr"), "}": (92, "s")},
        [256, 258],
        {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "{"}),
    "lists in both files": ({
        "tokenizer_config.json": {
            "eos_token": "</s>", "image_token": "<think>",
            "additional_special_tokens": ["<sound>"]},
        "special_tokens_map.json": {
            "additional_special_tokens": ["<x>"], "eos_token": "<s>"},
        "added_tokens.json": {"<sound>": 259, "<x>": 260}},
        {"<sound>": "", "<x>": "n"},
        {"<think>": (258, "s"), "<sound>": (259, ""), "<x>": (260, "n")},
        [256, 258, 260, 259],
        {"eos_token": "<s>", "image_token": "<think>"}),
}


def folder_of_files(path, files, more={}):
    """A folder with the tokens of ADDED and `more`, a tokenizer that writes all small, and these
    files."""
    folder_with(path, added=("<think>",))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=bool(n)) for token, n in more.items()])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("case", LATER)
def test_tokens_beside_tokenizer_json_are_those_of_transformers(tmp_path, case):
    files, more, added, ids, named = LATER[case]
    chat = Chat.load(folder_of_files(tmp_path / "t", files, more))
    found = {token.content: (id, "".join(flag for flag, is_set in (
        ("s", token.special), ("l", token.lstrip), ("r", token.rstrip), ("n", token.normalized))
        if is_set)) for id, token in chat.tokenizer.get_added_tokens_decoder().items()}
    assert found == ADDED | added
    text = ("<s>a <a> b <b b> c<B B>[PAD] <think>x <pad><tool>  <unk> <x><img> <sound>t<not read>")
    assert [id for id in chat.tokenise([text])[0].ids if id >= 256] == ids
    assert chat.special_tokens == named
    assert chat.eos_id == found[named["eos_token"]][0] and chat.vocab_size == max(
        id for id, _ in found.values()) + 1
    for content, (_, flags) in found.items():
        if "s" in flags:
            with pytest.raises(Refused, match="control token"):
                encode_text(chat, f"say {content}")


@pytest.mark.parametrize("files, message", [
    ({"tokenizer_config.json": {"added_tokens_decoder": {"259": {"content": "<a>"}}}},
     r"tokenizer.json lacks \['<a>'\] of added_tokens.json, "),
    ({"added_tokens.json": {"<a>": 259}}, "tokenizer.json lacks .'<a>'. of added_tokens.json"),
    ({"tokenizer_config.json": {"pad_token": "[PAD]", "added_tokens_decoder": {}}},
     r"tokenizer.json lacks \['\[PAD\]'\] of .* anew .* AutoTokenizer"),
    ({"special_tokens_map.json": {"unk_token": {"content": "<unk>"}}}, "lacks .'<unk>'. of"),
    ({"tokenizer_config.json": {"extra_special_tokens": ["<x>", "<y>"]}}, "lacks .'<x>', '<y>'. "),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "lacks .'<a>"),
    ({"added_tokens.json": {"<b>": "x"}}, "lacks .'<b>'. of"),
    *(({name: content}, "added tokens cannot be read") for name, content in (
        ("added_tokens.json", {"\ud800": 259}),
        ("special_tokens_map.json", {"extra_special_tokens": 3}),
        *(("tokenizer_config.json", config) for config in (
            {"added_tokens_decoder": [1]},
            {"added_tokens_decoder": {"259": "<a>"}}, {"added_tokens_decoder": {"259": {}}},
            {"added_tokens_decoder": {"259": {"content": "<a>", "lstrip": "x"}}},
            {"pad_token": "\ud800"}, {"extra_special_tokens": [3]},
            {"extra_special_tokens": {"audio_token": []}}, {"pad_token": {"content": "\udfff"}})))),
])
def test_added_tokens_that_do_not_fit_are_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        Chat.load(folder_of_files(tmp_path / "t", files))
    assert "\n" not in str(caught.value)


def test_a_token_that_tokenizer_json_has_keeps_its_id(tmp_path):
    """Of the files that disagree transformers follows tokenizer.json."""
    for number, files in enumerate((
            {"added_tokens.json": {"<think>": 300}},
            {"tokenizer_config.json": {"added_tokens_decoder": {"300": {"content": "<think>"}}}})):
        chat = Chat.load(folder_of_files(tmp_path / str(number), files))
        assert chat.tokenizer.token_to_id("<think>") == 258 and chat.vocab_size == 259


def test_byte_order_marks_in_the_tokenizers_files(tmp_path):
    files, more, *_ = LATER["added_tokens.json, then special_tokens_map.json, which wins"]
    files = {**files, "generation_config.json": {"eos_token_id": [257, 9]}}
    folder = folder_of_files(tmp_path / "t", files, more)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")

    def read():
        chat = Chat.load(folder)
        return (chat.tokenizer.to_str(), chat.template, chat.special_tokens, chat.stop_ids,
                chat.encode_messages(talk("a <tool>")))

    expected = read()
    for file in folder.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert read() == expected
