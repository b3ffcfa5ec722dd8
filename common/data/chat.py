"""tokenizer.json and the checkpoint's own chat template: text to token ids, and which to train on
(`trained_spans`). Text that spells a control token is refused: it would become one."""

import datetime
import json
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from common.data import parts
from common.data.template import Refused, compiled
from common.data.tokenizer import as_list, call, read_tokenizer
from common.data.trained_spans import USER, any_of, learn, regions, tokens_in
from common.errors import UserError, one_line, writing
from common.files.json_files import read_json

TURN_KEYS = {"role", "content", "tool_calls", "tool_call_id", *parts.THOUGHTS}
HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs: not characters
HALVES_AND_MARKS = re.compile("[\ud800-\udfff\U00100000-\U0010ffff]")
NOT_ASKED = "messages", "where", "example"  # keys of a record that no template gets
JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}"  # without a template


class Layout(NamedTuple):
    """One example before tokenisation."""

    text: str
    spans: list | None    # trained (start, end) in characters, in order; None: all of it
    whole: bool           # the tokenizer adds its special tokens (BOS), as to any document
    eos: bool             # append eos, trained
    left_out: tuple = ()  # the parts of the record that the chat template does not write
    notes: tuple = ()     # other remarks on such examples


class Chat:
    """A tokenizer with its chat template; `tokenizer.read_tokenizer` gives its public fields."""

    @classmethod
    def load(cls, folder, template=None):
        """Read the tokenizer files of `folder`, as `read_tokenizer` does. Raises UserError."""
        self = cls()
        vars(self).update(read_tokenizer(folder, template))
        self._given = template is not None
        source = JOINED if self.template is None else self.template
        self._write = compiled(source, self.template_file)
        self._marks_generation = bool(re.search(r"{%[-+]?\s*generation\b", source))
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        named = [token.content for token in added  # say <think>, which means something to it
                 if token.content.strip() and token.content in source]
        self._special, self._special_or_named = any_of(special), any_of(special + named)
        normal = any(token.special and token.normalized for token in added)
        self._normalizer = self.tokenizer.normalizer if normal else None
        self._header, ends = learn(self.render, self._special, self._special_or_named)
        self.stop_ids = self.stop_ids | {self.tokenizer.token_to_id(token) for token in ends}
        stops = any_of(map(self.tokenizer.id_to_token, self.stop_ids))
        self._stops = re.compile(f"(?:{stops.pattern})+")
        return self

    def save(self, folder):
        """Add to the copies of the tokenizer's files in `folder`, a Path, what they lack: the chat
        template that was given, and the tokens at which other programs must stop."""
        file, config = folder / "generation_config.json", folder / "config.json"
        settings = read_json(file) if file.exists() else {}
        if not file.exists() and config.exists():  # what transformers would take in its absence
            settings = {name: id for name, id in read_json(config).items() if id is not None
                        and name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        stops = as_list(settings.get("eos_token_id"))
        missing = sorted(self.stop_ids.difference(stops))
        with writing(folder):
            if self._given:
                (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
            if missing:
                settings["eos_token_id"] = [*stops, *missing]
                file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def render(self, messages, add_generation_prompt=False, **variables):
        """The conversation as text, equal to transformers' `apply_chat_template(tokenize=False)`.
        `variables` go to the template (tools, enable_thinking...). Raises Refused."""
        return parts.take_marks(self._render(
            _plain(messages), add_generation_prompt=add_generation_prompt, **variables))[0]

    def encode_messages(self, messages, **variables):
        """(ids, trained) of a conversation: lists of int and of bool. Raises Refused."""
        layout = self.layout({**variables, "messages": messages})
        ids, trained = self.finish(layout, self.tokenise([layout.text], layout.whole)[0])
        return ids.tolist(), trained.tolist()

    def encode_prompt(self, prompt, **variables):
        """Ids to generate from: of messages with the generation prompt, or of a plain text."""
        plain = isinstance(prompt, str) or self.template is None
        if not isinstance(prompt, str):
            self._check(_plain(prompt), {})
            prompt = self.render(prompt, True, **variables)
        if plain:
            self._refuse_control_tokens(prompt)
        ids = self.tokenise([prompt], plain)[0].ids
        return ids[:-1] if plain and ids and ids[-1] == self.eos_id else ids

    def no_thinking(self):
        """The variables with which the template switches thinking off; UserError if it cannot."""
        on, off = (self.render([USER], True, enable_thinking=one) for one in (True, False))
        if on == off:
            raise UserError("--no-thinking: this model's chat template cannot switch it off (it "
                            "does not know enable_thinking)")
        return {"enable_thinking": False}

    def decode(self, ids, skip_special=True):
        """The text of token ids; control tokens are left out unless `skip_special` is False."""
        return call("the tokenizer cannot decode", self.tokenizer.decode, list(map(int, ids)),
                    skip_special_tokens=skip_special)

    def tokenise(self, texts, whole=False):
        """A `tokenizers.Encoding` per text. `whole` adds what the tokenizer adds to a document; a
        rendered conversation has its BOS from the template, and must not get a second."""
        return call("the tokenizer failed", self.tokenizer.encode_batch, texts,
                    add_special_tokens=whole)

    def layout(self, record):
        """The Layout of a record, {"text"} or {"messages"} and more. Raises Refused."""
        if "text" in record:
            return self._text(record["text"], record.get("rendered"))
        messages = _plain(record["messages"])
        untrained = {n for n, one in enumerate(record["messages"]) if one.get("train") is False}
        variables = {key: record[key] for key in record if key not in NOT_ASKED}
        self._check(messages, variables)
        tools = variables.pop("tools", None)
        render = partial(self._render, **variables, strftime_now=fixed_date)
        text, generated = parts.take_marks(render(messages, tools))
        where, missing = parts.find(messages, tools, text, render)
        left_out = parts.left_out(messages, missing)

        own = []
        if untrained or not self._marks_generation:
            if where is None:
                raise Refused("the chat template rewrites the assistant's words, so it is not "
                              "clear what to train on; mark them in the template with "
                              "{% generation %}")
            own = regions(where, text, self._header, self._stops, self._special)
        on = [one for one in own if one[2] not in untrained]
        spans = [(start, end) for start, end, *_ in on]
        eos = any(end == len(text) and not ended for _, end, _, ended in on)  # teaches it to stop
        if self._marks_generation:
            off = [one for one in own if one[2] in untrained]
            if len(off) < len(untrained):
                raise Refused("a turn with the weight 0 in which the template writes nothing")
            eos, spans = False, [(start, end) for start, end, _ in generated or () if not any(
                start < last and first < end for first, last, *_ in off)]
        if self.template is None:
            self._refuse_control_tokens(text)  # one may span two contents
        return Layout(text, spans, self.template is None, eos, left_out, self._notes(messages))

    def finish(self, layout, encoding):
        """Arrays (ids int32, trained bool) of a Layout and its Encoding, or just ids if all is."""
        ids = np.array(getattr(encoding, "ids", encoding), dtype=np.int32)
        trained = (np.ones(len(ids), dtype=bool) if layout.spans is None else
                   tokens_in(layout.spans, encoding.offsets))
        if layout.eos and self.eos_id is not None:
            if self.eos_id not in ids[-1:]:
                ids, trained = np.append(ids, np.int32(self.eos_id)), np.append(trained, True)
            trained[-1] = True
        return ids, trained

    def _render(self, messages, tools=None, **variables):
        return self._write({"messages": messages, "tools": tools, "documents": None,
                            "add_generation_prompt": False, **self.special_tokens, **variables})

    def _text(self, text, rendered):
        """A text's Layout; in a `rendered` conversation the assistant's turns are trained."""
        if not text.strip():
            raise Refused("empty")
        if not rendered:
            self._refuse_control_tokens(text, advice="; if the text is a conversation already "
                                        "rendered, give it as messages, or say --rendered")
            return Layout(text, None, True, True)
        turn = rf"(?:{self._header.pattern})((?s:.*?)(?:{self._stops.pattern}|\Z))"
        spans = [match.span(1) for match in re.finditer(turn, text)]
        bos = self.special_tokens.get("bos_token")
        notes = () if spans else ("without the header of an assistant's turn: trained whole",)
        return Layout(text, spans or None, not (bos and text.startswith(bos)), False, (), notes)

    def _notes(self, messages):
        keys = {key for one in messages for key in one if (one["role"], key) != ("tool", "name")}
        notes = [f"with a key {one_line(repr(key), 40)} in their turns, which the chat template "
                 "does not use" for key in sorted(keys - TURN_KEYS)
                 if not re.search(rf"\b{re.escape(key)}\b", self.template or "")]
        if messages[0]["role"] == "assistant":
            notes.append("in which the assistant speaks first")
        if not self._marks_generation and any(one["role"] == "assistant" and not (
                one.get("content", "").strip() or one.get("tool_calls")
                or one.get("reasoning_content")) for one in messages):
            notes.append("with an empty answer, which is not trained")
        return tuple(notes)

    def _check(self, messages, variables):
        """Refuse what says nothing, needs a template, or holds what no text may hold."""
        if not any(value for one in messages for name, value in one.items() if name != "role"):
            raise Refused("empty")
        roles = [message["role"] for message in messages]
        if self.template is None and (max(roles.count("user"), roles.count("assistant")) > 1
                                      or any(one.get("tool_calls") for one in messages)):
            raise Refused("several turns, or a tool call, and this model has no chat template to "
                          "tell them apart: give one with --chat-template FILE")
        try:
            for value in (*messages, variables):
                for text in _strings(value):
                    self._refuse_control_tokens(text, value.get("role") == "user",
                                                odd=HALVES_AND_MARKS)
        except RecursionError:
            raise Refused("its values are nested too deeply") from None

    def _refuse_control_tokens(self, text, named=False, advice="", odd=HALVES):
        """Special tokens are control tokens. In a user's text (`named`), so are the added tokens
        that the template names: an assistant may write <think>, a user must not."""
        pattern = self._special_or_named if named else self._special
        found = pattern.search(text)
        if not found and self._normalizer is not None:
            found = pattern.search(self._normalizer.normalize_str(text))
        if found:
            raise Refused(f"its text spells the control token {one_line(found.group())}{advice}")
        found = odd.search(text)
        if found:
            raise Refused(f"its text holds {ascii(found.group())}, half of a surrogate pair or a "
                          "private-use character")


def _plain(messages):
    """The messages without None and our "train"; thoughts under every name that templates use."""
    plain = [{key: value for key, value in message.items() if value is not None and key != "train"}
             for message in messages]
    for n, message in enumerate(plain):
        thoughts = next((message[name] for name in parts.THOUGHTS if name in message), None)
        if thoughts is not None:
            plain[n] = {"thinking": thoughts, **message, "reasoning_content": thoughts}
    return plain


def _strings(value):
    """Every string in nested lists and dicts, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


def fixed_date(format):
    """`strftime_now` in training, so that the same data give the same tokens tomorrow."""
    return datetime.date(2024, 7, 26).strftime(format)
