"""From --data to documents of token ids, and to the questions asked before and after training."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from common import hub
from common.data import encode
from common.data.chat import NOT_ASKED, Chat, fixed_date
from common.data.parts import THOUGHTS
from common.data.readers import Records, parse_columns
from common.data.template import Refused
from common.errors import UserError, one_line
from common.files.json_files import read_json
from common.ranks import say
from common.tiny import skills as tiny

SHOWN = 4  # questions whose answers are printed
TINY_DOCUMENTS = 20_000  # of --data tiny
SCORED = 100  # documents of each set on which exact match is measured (tiny data only)
ANSWER = ("content", "tool_calls", *THOUGHTS)  # keys under which an assistant's turn has its answer


@dataclass(frozen=True)
class Question:
    """What is asked of the model, as `generate.py` would ask it."""
    text: str       # for people: the last thing that was said
    prompt: list    # token ids
    expected: list  # token ids: how the document goes on, up to its end-of-turn token
    before: list    # token ids: what precedes the answer in the document; the prompt, one hopes
    answer: list    # token ids: all that is trained after it, its end-of-turn token included


@dataclass(frozen=True)
class Data:
    """What a run works on. `quizzes` are lists of questions on held-out documents, by name."""
    source: Path  # the model's folder
    train: encode.Encoded
    held_out: encode.Encoded
    chat: Chat | None  # None: random tokens, nothing to ask
    quizzes: dict
    scored: bool  # whether exact match means something for these answers
    records: tuple = (None, None)  # what `train` and `held_out` were made of, and further quizzes

    def digest(self):
        return hashlib.sha256(self.train.documents["digest"].tobytes()).hexdigest()

    def show_example(self):
        if self.chat is not None:
            say(encode.show_example(self.train, self.chat))


def load(options, source, config, skills, reader=Records, finish=lambda encoded: encoded):
    """The `Data` of this run. `skills` are what --data tiny stands for: "base", "new" (how much of
    the base is forgotten is then asked too), or a function that gives (records, {name: held-out
    records}) for a Chat. `finish` makes of an `Encoded` what is trained on. Raises UserError."""
    limit = min(options.max_seq_len, options.batch_tokens, config.max_position_embeddings)
    embedded = {"virtual", "tiny"} & {*options.data}
    own = ("eval_data", "columns", "rendered", "chat_template", "strict_template")
    given = [f"--{name.replace('_', '-')}" for name in own[:5 if "virtual" in embedded else 3]
             if getattr(options, name)]
    if embedded and (given or len(options.data) > 1):
        raise UserError(f"--data {' '.join(embedded)} cannot be combined with "
                        f"{', '.join(given) or 'other files'}")
    if options.data == ["virtual"]:
        train, held_out = (finish(encode.virtual(count, config.vocab_size, limit, seed))
                           for count, seed in ((2000, options.seed), (8, options.seed + 1)))
        return Data(source, train, held_out, None, {}, False)
    chat = Chat.load(source, options.chat_template)
    if embedded:
        read, asked = skills(chat) if callable(skills) else (
            tiny.records(skills, "train", TINY_DOCUMENTS, options.seed),
            {name: tiny.records(name, "eval", 200, options.seed) for name in (skills, "base")})
    else:
        columns = parse_columns(options.columns, reader.formats) if options.columns else None
        flags = {"--data": options.data, "--eval-data": options.eval_data}
        read, *others = (reader(hub.resolve_data(names, flag), columns, options.rendered)
                         for flag, names in flags.items() if names)
        asked = {"held-out": one for one in others}

    def encoded(records, title):
        files = [] if embedded else [*records.paths, records.code]
        return encode.cached(
            lambda file: encode.encode(records, chat, limit, options.too_long, config.vocab_size,
                                       title, options.strict_template, file),
            [records if embedded else [records.columns, records.rendered], limit, options.too_long,
             config.vocab_size, chat.fingerprint, options.strict_template], files, title)

    train = finish(encoded(read, "data"))
    say_what_differs(chat, read)
    titles = "held out", *map("{} skills".format, [*asked][1:])
    held_out = [*map(encoded, asked.values(), titles)]
    held_out[:1] = map(finish, held_out[:1])
    if not asked:
        asked = {"held-out": read}
        train, *held_out = encode.split(train, options.seed)
    shared = np.isin(held_out[0].documents["digest"], train.documents["digest"]).sum()
    if shared:
        say(f"held out: {shared:,} of these {train.unit} are in the training data too, so their "
            "loss says little")
    quizzes = {name: questions(chat, documents, one, SCORED if embedded else SHOWN, limit)
               for documents, (name, one) in zip(held_out, asked.items())}
    data = Data(source, train, held_out[0], chat, quizzes, bool(embedded), (read, *asked.values()))
    if options.resume and not options.allow_changes:
        began = read_json(Path(options.resume) / "train_config.json").get("data")
        if began not in (None, data.digest()):
            raise UserError(f"--resume {options.resume}: the documents are not those that it began "
                            "with (a file, the chat template or what is held out has changed): "
                            "undo that, or say --allow-changes if it is intended")
    return data


def questions(chat, documents, records, count, limit):
    """Questions on the first `count` documents of an `Encoded`, made from `records`; none where
    the template refuses, or the prompt fills `limit`."""
    numbers = documents.documents["record"][:count].tolist()
    wanted = {n: one for n, one in enumerate(islice(records, max(numbers) + 1)) if n in numbers}
    found = []
    for number, (ids, labels) in zip(numbers, documents):
        with suppress(Refused):  # say, a conversation after which the template has no prompt
            found.append(_question(chat, wanted[number], ids.tolist(), (labels >= 0).tolist()))
    return [one for one in found if 0 < len(one.prompt) < limit]


def _question(chat, record, ids=(), trained=()):
    """On a conversation's last trained turn, or a text's first words. Raises Refused."""
    end = None
    if "messages" in record:
        messages = record["messages"]
        more = {name: value for name, value in record.items() if name not in NOT_ASKED}
        turns = [n for n, one in enumerate(messages)
                 if one["role"] == "assistant" and one.get("train") is not False
                 and any(str(one.get(key) or "").strip() for key in ANSWER)]
        ids, trained = chat.encode_messages(messages, **more)  # whole: the document may be cut
        if not turns or not any(trained):
            raise Refused("nothing to ask")
        before = messages[:turns[-1]]
        text = next(filter(None, (one.get("content") for one in before[::-1])), "")
        prompt = chat.encode_prompt(before, strftime_now=fixed_date, **more)
        end = len(trained) - trained[::-1].index(True)
        start = end - (trained[:end][::-1] + [False]).index(False)
    elif record.get("rendered"):  # the prompt is in the text
        start = trained.index(True) or 1
        text, prompt = chat.decode(ids[:start]), ids[:start]
    else:
        text = chat.decode(ids[:min(16, len(ids) - 1)]).rstrip("\ufffd \n")
        prompt = chat.encode_prompt(text)
        start = len(prompt)
    answer = ids[start:end]
    expected = [*takewhile(lambda one: one not in chat.stop_ids, answer)]
    return Question(text, prompt, expected, ids[:start], answer)


def say_what_differs(chat, records):
    """Warn if what is asked is not what is trained, checked on the first few conversations."""
    for record in [one for one in islice(records, 200) if "messages" in one][:SHOWN]:
        try:
            one = _question(chat, record)
        except Refused:
            continue
        if chat.template is None:
            doubt = ("this model has no chat template, so a question and its answer are joined as "
                     "they are; --chat-template FILE gives it one")
        elif one.before != one.prompt:
            asked, written = (repr(chat.decode(ids[-12:], skip_special=False))
                              for ids in (one.prompt, one.before))
            doubt = (f"what is asked is not what is trained: a prompt ends in {asked}, and what is "
                     f"trained follows {written}. Another template (--chat-template FILE), "
                     "one whose {% generation %} begins where its prompt ends, or documents with "
                     "<think> where the prompt has that, would help")
        elif one.answer[-1] not in chat.stop_ids:
            doubt = ("no end-of-turn token is trained, so the model will not learn to stop: "
                     f"answers end in {chat.decode(one.answer[-3:], False)!r}; the template's "
                     "{% generation %} should include it")
        else:
            continue
        say(f"warning: {doubt}")
        return


def ask(data, model, generate, metrics, step, eval_loss=None):
    """Print the model's greedy answers to the first questions of each quiz, before training (step
    0) or after it. If they are scored, `metrics` gets `eval_loss` and, as exact_match_<quiz>, the
    share of all that are the expected tokens, and stop where these do."""
    scores = {}
    for name, quiz in data.quizzes.items():
        longest = 1 + max(len(one.expected) for one in quiz) if data.scored else 64
        answers = generate(model, [one.prompt for one in quiz], longest, data.chat.stop_ids)
        right = [one.expected == answer for one, answer in zip(quiz, answers)]
        score = ""
        if data.scored:
            scores[f"exact_match_{name}"] = share = sum(right) / len(right)
            score = f": exact match {share:.0%} of {len(right)}"
        say(f"\n{name}{' skills' * data.scored}, {'after' if step else 'before'} training{score}")
        for question, answer, fits in list(zip(quiz, answers, right))[:SHOWN]:
            mark = " " if not data.scored else "+" if fits else "-"
            say(f"  {mark} {_line(question.text)}\n      {_line(data.chat.decode(answer))}")
            if not fits:
                say(f"      (expected: {_line(data.chat.decode(question.expected))})")
    if scores:
        metrics.log_eval(step, eval_loss=eval_loss, **scores)


def _line(text):
    return one_line(text.strip() or "(nothing)", limit=76)
