"""Questions that the model answers itself, from files or from the tiny skills.

    turns           all such formats of common/README.md; the last turn is the answer, which is not
                    trained on: a reward can compare with it
    GSM8K           {"question", "answer"}; if the answer has a "####", the question asks for one
    prompt alone    {"prompt"}, or a conversation that ends with the user's turn"""

from contextlib import suppress
from random import Random
from typing import NamedTuple

from tqdm import tqdm

from common.data.chat import NOT_ASKED, fixed_date
from common.data.formats import FORMATS, convert, present
from common.data.readers import Records
from common.data.template import Refused
from common.errors import UserError
from common.ranks import say
from common.tiny import skills

SKILL = "add"  # of --data tiny
NO_ANSWER = "(none)"  # stands for one that the data do not have
MARK = '\n\nEnd with a line that has only "#### " and the number.'


class Problem(NamedTuple):
    """A question, and all that is known of it."""
    prompt: list  # token ids, as generate.py would ask
    text: str  # for people: the last thing that was said
    record: dict  # the example as the file has it, and "expected": its answer's text, or ""
    where: str  # the file and line


class Problems(Records):
    """The records of files of questions; each has the "example" that it was made of."""

    formats = (*FORMATS[:-1], ("question", "answer"), ("prompt",))
    code = __file__

    @staticmethod
    def convert(value, where, ignored, rendered=False):
        """As `formats.convert`; a text and a rendered conversation are refused."""
        example, value = value, present(value, "an example", where)
        if not any(value.keys() >= {*keys} for keys in FORMATS):
            if isinstance(value.get("question"), str):
                answer = str(value.get("answer", NO_ANSWER))
                value = {"prompt": value["question"] + MARK * ("####" in answer),
                         "completion": answer}
            if "prompt" in value:
                value = {"completion": NO_ANSWER, **value}
        record = convert(value, where, {})  # a reward may read any key, so that none is unused
        if "messages" not in record or rendered:
            raise UserError(f"{where}: a text has no question: give a prompt, or messages")
        messages = record["messages"]
        if messages[-1:] and messages[-1]["role"] in ("user", "tool"):
            messages.append({"role": "assistant", "content": NO_ANSWER})
        for message in messages[:-1]:
            if message["role"] == "assistant":
                message["train"] = False
        return {**record, "example": example}


def problems(chat, documents, records, limit, **variables):
    """The Problem of each of `documents` (an `Encoded`; None: of all), made from its record, whose
    last trained turn is the answer. `variables` go to the chat template. Prompts that this refuses,
    or over `limit` tokens, are left out and counted."""
    if chat is None:
        raise UserError("--data virtual: random tokens are no questions")
    if limit < 1:
        raise UserError("--max-new-tokens leaves no room for a prompt within --max-seq-len, "
                        "--batch-tokens and the model's positions")
    numbers = None if documents is None else {*documents.documents["record"].tolist()}
    found, left_out = [], 0
    for number, record in enumerate(tqdm(records, "prompts", delay=2, leave=False, disable=None)):
        if numbers is not None and number not in numbers:
            continue
        messages, prompt = record.get("messages", []), []
        turns = [n for n, one in enumerate(messages)
                 if one["role"] == "assistant" and one.get("train") is not False]
        more = {name: value for name, value in record.items() if name not in NOT_ASKED}
        with suppress(Refused):  # counted below
            if turns:
                prompt = chat.encode_prompt(messages[:turns[-1]], strftime_now=fixed_date,
                                            **more, **variables)
        if not 0 < len(prompt) <= limit:
            left_out += 1
            continue
        text, answer = (messages[turns[-1] - n].get("content") or "" for n in (1, 0))
        expected = {"expected": "" if answer == NO_ANSWER else answer}
        found.append(Problem(prompt, text, {**record.get("example", record), **expected},
                             record.get("where", "")))
    if left_out:
        say(f"left out: {left_out:,} without a prompt, or with one of more than {limit} tokens "
            "(--max-seq-len less --max-new-tokens)")
    if not found:
        raise UserError("no prompt is left to answer, in the data or in what is held out")
    return found


def tiny_problems(seed, chat):
    """--data tiny for `prepare.load`: questions of SKILL, also held out; and of all base skills."""
    random = Random(f"{SKILL} {seed}")
    train, held_out = ([skills.record(SKILL, split, random) for _ in range(count)]
                       for split, count in (("train", 2000), ("eval", 200)))
    return train, {SKILL: held_out, "base": skills.records("base", "eval", 200, seed)}
