"""tokenizer.json and the checkpoint's own chat template: text to token ids, and which to train on.

Trained are the assistant's words and the end-of-turn token, that is, what the model must write
itself; `common/masks.py` finds them in the rendered text, and the tokenizer's offsets carry them
over to tokens. Text that spells a control token is refused: it would become one.
"""

import datetime
import re
from typing import NamedTuple

import numpy as np

from common import masks
from common.sandbox import CLOSED, OPENED
from common.template import Refused, Template, one_line
from common.tokenizer_files import call, read_tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")


class Layout(NamedTuple):
    """One example before tokenisation."""

    text: str
    spans: list | None    # trained (start, end) in characters, in order; None: all of it
    whole: bool           # the tokenizer adds what it adds to a document of its own (BOS)
    eos: bool | None      # append eos: trained or not; None: append nothing


class Chat:
    """A tokenizer with its chat template. Made by `Chat.load(folder)`.

    Its fields are those of `tokenizer_files.Files`: tokenizer, template, special_tokens, stop_ids,
    eos_id, vocab_size, fingerprint.
    """

    @classmethod
    def load(cls, folder):
        """Read the tokenizer files of `folder`. UserError for whatever is wrong with them."""
        self = cls()
        vars(self).update(read_tokenizer(folder)._asdict())
        template = self.template or ""
        self._compiled = None if self.template is None else Template(template, self.template_file)
        self._marks_generation = bool(re.search(r"{%[-+]?\s*generation\b", template))
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        named = [token.content for token in added  # say <think>, to which the template gives sense
                 if token.content.strip() and token.content in template]
        self._special = _any_of(special)
        self._special_or_named = _any_of(special + named)
        self._stops = _any_of(map(self.tokenizer.id_to_token, self.stop_ids))
        normal = any(token.special and token.normalized for token in added)
        self._normalizer = self.tokenizer.normalizer if normal else None
        self._header = self._assistant_header()
        return self

    def render(self, messages, add_generation_prompt=False, **variables):
        """The conversation as text, equal to transformers' `apply_chat_template(tokenize=False)`.

        `messages` is a list of {"role", "content", ...}; `variables` go to the template (tools,
        enable_thinking...). Without a template the contents are joined. Raises Refused for a
        conversation that the template does not take.
        """
        text = self._render(_plain(messages), add_generation_prompt, **variables)
        return text.replace(OPENED, "").replace(CLOSED, "") if self._marks_generation else text

    def encode_messages(self, messages, **variables):
        """(ids, trained) of a conversation: lists of int and of bool, of equal length.

        Raises Refused if it cannot be used (control tokens in its text, no trustworthy mask).
        """
        return self._encode({**variables, "messages": messages})

    def encode_text(self, text):
        """(ids, trained) of a document: all trained, eos appended, BOS if the tokenizer adds it."""
        return self._encode({"text": text})

    def encode_prompt(self, prompt, **variables):
        """Ids to generate from: of messages with the generation prompt, or of a plain text."""
        if not isinstance(prompt, str):
            self._check(_plain(prompt))
            text = self.render(prompt, True, **variables)
            if self._compiled is not None:
                return self.tokenise([text])[0].ids
            prompt = text
        self._refuse_control_tokens(prompt)
        ids = self.tokenise([prompt], whole=True)[0].ids
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def decode(self, ids, skip_special=True):
        """The text of token ids; control tokens are left out unless `skip_special` is False."""
        return call("the tokenizer cannot decode", self.tokenizer.decode, list(map(int, ids)),
                     skip_special_tokens=skip_special)

    def tokenise(self, texts, whole=False):
        """A `tokenizers.Encoding` per text. `whole` adds what the tokenizer adds to a document;
        a rendered conversation has its BOS from the template, and must not get a second."""
        return call("the tokenizer failed", self.tokenizer.encode_batch, texts,
                     add_special_tokens=whole)

    def layout(self, record):
        """The Layout of a record: {"text"} or {"messages"} with what else the template takes.

        Raises Refused. The date that a template can ask for is a fixed one (Llama 3.2 writes the
        day into the system prompt), so that the same data give the same tokens tomorrow.
        """
        if "text" in record:
            if not record["text"].strip():
                raise Refused("empty")
            self._refuse_control_tokens(record["text"])
            return Layout(record["text"], None, True, True)
        messages = _plain(record["messages"])
        variables = {key: value for key, value in record.items()
                     if key not in ("messages", "where")}
        self._check(messages, variables)
        if self._compiled is None:
            text, spans = "", []
            for message in messages:
                begin, text = len(text), text + message.get("content", "")
                if message["role"] == "assistant":
                    spans.append((begin, len(text)))
            self._refuse_control_tokens(text)  # one may span two contents
            return Layout(text, spans, True, messages[-1]["role"] == "assistant")
        variables["strftime_now"] = _fixed_date
        text = self._render(messages, **variables)
        if self._marks_generation:
            return Layout(*masks.take_marks(text), False, None)
        for message in messages:
            if message["role"] in ("system", "developer", "user") and (
                    message.get("content", "").strip() not in text):
                raise Refused(f"the chat template leaves out the {message['role']} message")
        spans = masks.regions(messages, text, lambda marked: self._render(marked, **variables),
                              self._special, self._stops, self._header)
        if spans and messages[-1]["role"] == "assistant" and not text[spans[-1][1]:].strip():
            ends = [token.end() for token in self._special.finditer(text, *spans[-1])]
            if ends[-1:] != [spans[-1][1]]:  # no end-of-turn token: with eos it learns to stop
                spans[-1] = spans[-1][0], len(text)
                return Layout(text, spans, False, True)
        return Layout(text, spans, False, None)

    def finish(self, layout, ids, offsets):
        """(ids int32, trained bool), arrays, of a Layout and the ids and offsets of its text."""
        ids = np.array(ids, dtype=np.int32)
        trained = np.ones(len(ids), dtype=bool)
        if layout.spans is not None:
            trained = masks.inside(offsets, layout.spans)
        if layout.eos is not None and self.eos_id is not None:
            if not (len(ids) and ids[-1] == self.eos_id):
                ids, trained = np.append(ids, np.int32(self.eos_id)), np.append(trained, False)
            trained[-1] = layout.eos
        return ids, trained

    def _encode(self, record):
        layout = self.layout(record)
        encoding = self.tokenise([layout.text], layout.whole)[0]
        ids, trained = self.finish(layout, encoding.ids, encoding.offsets)
        return ids.tolist(), trained.tolist()

    def _render(self, messages, add_generation_prompt=False, **variables):
        if self._compiled is None:
            return "".join(message.get("content", "") for message in messages)
        size = sum(map(len, _strings([messages, variables])))
        return self._compiled.render({
            "messages": messages, "tools": None, "documents": None,
            "add_generation_prompt": add_generation_prompt, **self.special_tokens, **variables,
        }, size)

    def _assistant_header(self):
        """What a generation prompt adds to a conversation, or "" where that cannot be told."""
        probe = [{"role": "user", "content": "?"}]
        try:
            before, after = self.render(probe), self.render(probe, True)
        except Refused:  # say, a template that insists on a system message
            return ""
        return after[len(before):] if after.startswith(before) else ""

    def _check(self, messages, variables=()):
        """Refuse what is no conversation, or holds control tokens or private-use characters."""
        if not any(value for one in messages for name, value in one.items() if name != "role"):
            raise Refused("empty")
        for message in messages:
            if message.get("role") not in ROLES:
                raise Refused(f"role {one_line(repr(message.get('role')))} is not one of "
                              + ", ".join(ROLES))
            if not isinstance(message.get("content", ""), str):
                raise Refused(f"the content of a {message['role']} message is not text")
            for text in _strings(message):
                self._refuse_control_tokens(text, message["role"] == "user", chat=True)
        for text in _strings(variables):
            self._refuse_control_tokens(text, chat=True)

    def _refuse_control_tokens(self, text, named=False, chat=False):
        """Special tokens are control tokens. So are, in a user's text, those added tokens that the
        template names: an assistant may write <think>, a user must not."""
        pattern = self._special_or_named if named else self._special
        found = pattern.search(text)
        if not found and self._normalizer is not None:
            found = pattern.search(self._normalizer.normalize_str(text))
        if found:
            raise Refused(f"its text spells the control token {one_line(found.group())}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Refused("its text holds half of a surrogate pair (\\ud800 to "
                              "\\udfff)") from None
            if chat and masks.PRIVATE_USE.search(text):
                raise Refused("its text holds private-use characters (U+100000 and beyond)")


def _plain(messages):
    """The messages without None values, thoughts under both names that templates read."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise Refused("a conversation must be a list of {\"role\", \"content\"}")
    plain = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        thoughts = [message[name] for name in ("reasoning_content", "thinking", "reasoning")
                    if name in message]
        if thoughts:
            message = {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]}
        plain.append(message)
    return plain


def _strings(value):
    """Every string in nested lists and dicts, keys included."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            rest.extend(value)
            rest.extend(value.values())
        elif isinstance(value, (list, tuple)):
            rest.extend(value)


def _fixed_date(format):
    return datetime.date(2024, 7, 26).strftime(format)


def _any_of(texts):
    """A pattern that matches any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
                      or "(?!)")
