"""common/prepare.py: what is asked of the model, and what is said where it learns another thing."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDENS, ROOT

from common import hub, prepare
from common.data import encode
from common.data.chat import Chat
from common.errors import UserError
from common.files.config import read_config
from common.options import TrainOptions

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(folder, rows, template=None, **options):
    """The Data of a run of the tiny model on `rows`, all of them held out as well."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    if template is not None:
        (folder / "t.jinja").write_text(template)
        options["chat_template"] = str(folder / "t.jinja")
    source = options.pop("source", ROOT / "common" / "tiny")
    config = type("Config", (), read_config(ROOT / "common" / "tiny"))
    return prepare.load(TrainOptions(**{"data": [str(data)], "eval_data": str(data),
                                       "batch_tokens": 512, **options}), source, config, "new")


def row(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": one}
                         for i, one in enumerate(contents)]}


def texts(data, ids):
    return data.chat.decode(ids, skip_special=False)


# --- questions ---

def test_the_last_answer_is_asked_with_the_prompt_of_generate(tmp_path):
    data = load(tmp_path, [row("a", "b", "c", "d"), {**row("e", "f"), "tools": []}])
    (first, second) = data.quizzes["held-out"]
    assert first.prompt == data.chat.encode_prompt(row("a", "b", "c")["messages"])
    assert (first.text, texts(data, first.expected)) == ("c", "d")
    assert (second.text, texts(data, second.expected)) == ("e", "f")
    skipped = row("a", "b", "c", "d")
    skipped["messages"][3]["weight"] = 0
    (only,) = load(tmp_path, [skipped]).quizzes["held-out"]
    assert (only.text, texts(data, only.expected)) == ("a", "b")


def test_a_text_is_asked_to_go_on(tmp_path):
    text = "The sky is blue and the grass is green, as everybody in the village knows. " * 3
    data = load(tmp_path, [{"text": text}, {"text": "Short."}])
    first, second = data.quizzes["held-out"]
    assert text.startswith(first.text) and first.prompt == data.chat.encode_prompt(first.text)
    assert first.text + texts(data, first.expected) == text
    assert "Short.".startswith(second.text) and second.prompt


def test_the_questions_are_of_the_documents_that_are_held_out(tmp_path):
    rows = [row(f"question {i}", f"answer {i}") for i in range(300)]
    rows[4]["messages"][1]["content"] = ""  # skipped: documents and records are not counted alike
    data = load(tmp_path, rows, eval_data=None)
    quiz = data.quizzes["held-out"]
    assert len(quiz) == 4 and len(data.held_out) == 5
    for question, i in zip(quiz, range(4)):
        ids, labels = data.held_out[i]
        assert texts(data, ids.tolist()).startswith(texts(data, question.prompt))
        assert texts(data, question.expected) == question.text.replace("question", "answer")


def test_rendered_conversations_teach_what_messages_teach(tmp_path):
    rows = [row("a", "b", "c", "d"), row("e", "f")]
    plain = load(tmp_path, rows)
    rendered = [{"text": plain.chat.render(one["messages"])} for one in rows]
    with pytest.raises(UserError, match="already rendered, give it as messages, or say --rendered"):
        load(tmp_path, rendered)
    data = load(tmp_path, rendered, rendered=True)
    assert (data.train.tokens == plain.train.tokens).all()
    first = data.quizzes["held-out"][0]
    assert first.prompt == data.chat.encode_prompt(rows[0]["messages"][:1])


def test_of_rendered_texts_without_a_header_all_is_trained_and_that_is_said(tmp_path, capsys):
    data = load(tmp_path, [{"text": "user: a\nassistant: b<|im_end|>\n"}], rendered=True)
    assert data.train.tokens["trained"].all()
    assert "1 without the header of an assistant's turn: trained whole" in capsys.readouterr().out


def test_an_untrained_or_empty_last_turn_is_not_asked(tmp_path, capsys):
    new = "{{ '(new) ' if loop.last and m.role == 'assistant' }}"
    template = CHATML.replace("{{ m.content }}", new + "{{ m.content }}")
    rows = [row("a", "b", "c", "d"), row("a", "b", "c", " ")]
    rows[0]["messages"][3]["train"] = False
    for question in load(tmp_path, rows, template).quizzes["held-out"]:
        assert question.text == "a" and question.prompt
    out = capsys.readouterr().out
    assert "warning" not in out and "1 with an empty answer, which is not trained" in out


def asked(data, generate, step, *eval_loss):
    """What `prepare.ask` logs."""
    logged = []
    metrics = SimpleNamespace(log_eval=lambda *step, **scores: logged.append((step, scores)))
    prepare.ask(data, torch.nn.Linear(1, 1), generate, metrics, step, *eval_loss)
    return logged


def test_an_answer_that_goes_on_is_not_the_right_one(tmp_path):
    data = load(tmp_path, [row("a", "b")])
    (question,) = data.quizzes["held-out"]
    scored = prepare.Data(data.source, data.train, data.held_out, data.chat, data.quizzes, True)

    def generate(model, prompts, longest, stops):  # one that never stops
        return [(question.expected * longest)[:longest]]

    assert asked(scored, generate, 0) == [((0,), {"eval_loss": None, "exact_match_held-out": 0})]


def test_answers_are_shown_whole_on_lines_of_their_own_and_cut_on_the_right(tmp_path, capsys):
    rows = [row("first " + "word " * 40 + "\nlast", "yes\nand no"), row("b", "c")]
    data = load(tmp_path, rows)
    answers = [data.quizzes["held-out"][0].expected, data.chat.encode_prompt("x")]

    def generate(model, prompts, longest, stops):
        assert longest == 64 and stops == data.chat.stop_ids and len(prompts) == 2
        return answers

    capsys.readouterr()
    assert asked(data, generate, 0) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "held-out, before training"]
    assert lines[2].startswith("    first word word") and lines[2].endswith("…")
    assert lines[3:] == ["      yes and no", "    b", "      x", "      (expected: c)"]
    assert max(map(len, lines)) <= 100


def test_answers_that_are_scored_are_marked(tmp_path, capsys):
    data = load(tmp_path, [row("a", "yes"), row("b", "c")])
    scored = prepare.Data(data.source, data.train, data.held_out, data.chat, data.quizzes, True)
    answers = [data.quizzes["held-out"][0].expected, data.chat.encode_prompt("x")]
    capsys.readouterr()
    assert asked(scored, lambda *given: answers, 7, 1.5) == [
        ((7,), {"eval_loss": 1.5, "exact_match_held-out": 0.5})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "held-out skills, after training: exact match 50% of 2"
    assert [line[:4] for line in lines[2:]] == ["  + ", "    ", "  - ", "    ", "    "]


# --- what is asked is what is trained ---

@pytest.mark.parametrize("template, said", [
    (CHATML, None),
    (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
     r"a prompt ends in '.*assistant\\n<think>\\n', .* follows '.*assistant\\n'"),
    (CHATML.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}{% generation %}"
                    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
                    "<|im_end|>"), "no end-of-turn token is trained, so the model will not learn"),
    (CHATML.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}note: "
                    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
                    "{% else %}{{ m.content }}<|im_end|>{% endif %}"),
     r"a prompt ends in '.*assistant\\n', .* follows '.*assistant\\nnote: ?'"),
])
def test_a_template_that_asks_otherwise_than_it_trains_is_named(tmp_path, capsys, template, said):
    load(tmp_path, [row("a", "b")], template)
    out = capsys.readouterr().out
    if said is None:
        assert "warning" not in out
    else:
        assert re.search("^warning: .*" + said, out, re.MULTILINE) and out.count("warning") == 1


def test_a_model_without_a_template(tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "common" / "tiny", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    data = load(tmp_path, [row("ab", "c")], source=folder)
    assert "warning: this model has no chat template" in capsys.readouterr().out
    assert data.quizzes["held-out"][0].prompt == data.chat.encode_prompt("ab")
    with pytest.raises(UserError, match="1 skipped, several turns.* --chat-template FILE"):
        load(tmp_path, [row("a", "b", "c", "d")], source=folder)
    data = load(tmp_path, [row("a", "b", "c", "d")], CHATML, source=folder)
    assert data.chat.template == CHATML
    with pytest.raises(UserError, match="none.jinja: no such file"):
        load(tmp_path, [row("a", "b")], source=folder, chat_template=str(tmp_path / "none.jinja"))


def test_what_the_template_leaves_out_is_counted_or_refused(tmp_path, capsys):
    source = CHATML.replace("in messages", "in messages if m.role != 'system'")
    system = {"role": "system", "content": "Be brief."}
    rows = [row("a", "b"), {"messages": [system, *row("c", "d")["messages"]], "id": 3, "tools": [
        {"name": "f"}]}, {"messages": [system, *row("e", "f")["messages"]]}]
    load(tmp_path, rows, source)
    out = capsys.readouterr().out
    assert "data: 2 without the system message: the chat template leaves that out (first: " in out
    assert "data: 1 without the tools: the chat template leaves that out" in out
    assert "data: not used: the key 'id' (first: " in out and "data.jsonl:2)" in out
    with pytest.raises(UserError, match=r"data.jsonl:2: without the system message: the chat "
                                        r"template leaves that out \(--strict-template\)"):
        load(tmp_path, rows, source, strict_template=True)
    load(tmp_path, rows[:1], source, strict_template=True)
    call = {"messages": [row("a")["messages"][0], {"role": "assistant", "tool_calls": [
        {"name": "f", "arguments": {}}]}]}
    load(tmp_path, [*rows, call], source)
    assert "1 skipped, the chat template leaves out a tool call" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"l:2: skipped, .* leaves out a tool call \(--strict"):
        load(tmp_path, [rows[0], call], source, strict_template=True)


def test_what_differs_is_seen_in_the_training_data_whatever_is_held_out(tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text('{"text": "once upon a time"}')
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    load(tmp_path, [{"text": "a"}, row("a", "b")], template,
         eval_data=str(tmp_path / "held_out.jsonl"))
    assert capsys.readouterr().out.count("warning: what is asked is not what is trained") == 1
    space = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}assistant: {% endif %}")
    load(tmp_path, [row("a", "bo")], space)
    out = capsys.readouterr().out
    assert "warning" not in out or "what is asked is not what is trained: a prompt ends in" in out


def test_flags_that_have_no_meaning_are_refused(tmp_path):
    for more in ({"rendered": True}, {"strict_template": True}, {"chat_template": "none"},
                 {"columns": "text=a"}):
        with pytest.raises(UserError, match="virtual cannot be combined with --"):
            load(tmp_path, [], data=["virtual"], eval_data=None, **more)


# --- held-out documents ---

def test_equal_documents_are_never_on_both_sides(tmp_path, capsys):
    chat = Chat.load(GOLDENS / "chat" / "qwen3")
    rows = [row(f"q {i % 40}", "a") for i in range(60)]  # 20 occur twice, 20 once
    encoded = encode.encode(rows, chat, 100)
    capsys.readouterr()
    for seed in range(20):
        train, held = encode.split(encoded, seed)
        sides = [{tuple(part[i][0].tolist()) for i in range(len(part))} for part in (train, held)]
        assert not sides[0] & sides[1] and len(train) + len(held) == 60 and len(held) == 1
    assert "held out: 40 documents occur more than once" in capsys.readouterr().out
    train, held = encode.split(encode.encode(rows[:20] * 2, chat, 100), 0)
    assert (len(train), len(held)) == (38, 2)  # no other way than both of two copies
    with pytest.raises(UserError, match=r"all documents \(2\) are the same"):
        encode.split(encode.encode(rows[:1] * 2, chat, 100), 0)


def test_documents_of_the_training_data_in_a_held_out_file_are_counted(tmp_path, capsys):
    load(tmp_path, [row("a", "b"), row("c", "d")])
    assert "held out: 2 of these documents are in the training data too" in capsys.readouterr().out


def test_data_names_of_every_kind_are_resolved_for_both_sides(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row(name, "b")) + "\n"
                                              + json.dumps(row(name + " two", "b")))
    (folder / "dataset_info.json").write_text("{}")
    data = load(tmp_path, [row("a", "b")], data=[str(folder)], eval_data=f"{folder}:test")
    assert len(data.train) == len(data.held_out) == 2
    assert "train, 1 of 1 file (also there: test)" in capsys.readouterr().out
    assert hub.resolve_data(str(folder)) == [folder / "train.jsonl"]
