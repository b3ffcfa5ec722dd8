"""Questions that the model answers itself, from files or from the tiny skills.

All formats of common/README.md that have turns, and beside them

    prompt alone        {"prompt"}, a text or messages that end with the user's turn
    GSM8K               {"question", "answer"}; if the answer ends in "#### 72", the question is
                        followed by the request to end like that

The answer, if there is one, is not trained on: it is what a reward can compare with.
"""

from random import Random
from typing import NamedTuple

from tqdm import tqdm

from common.data.chat import fixed_date
from common.data.formats import FORMATS, convert
from common.data.readers import Records
from common.data.template import Refused
from common.errors import UserError
from common.ranks import say
from common.tiny import skills

SKILL = "add"  # of --data tiny
NO_ANSWER = "-"  # stands for an answer that the data do not have
END = '\n\nEnd with a line that has only "#### " and the number.'


class Problem(NamedTuple):
    """A question, and all that is known of it."""

    prompt: list  # token ids, as generate.py would ask
    text: str  # for people: the last thing that was said
    record: dict  # the example as the file has it, and "expected": its answer's text, or ""
    where: str  # the file and line


class Problems(Records):
    """The records of files of questions: the last turn is the answer, all before it the prompt."""

    formats = (*FORMATS[:-1], ("question", "answer"), ("prompt",))
    code = __file__

    @staticmethod
    def convert(value, where, ignored, rendered=False):
        """{"messages", "tools"?, "example": the value itself}; raises Refused, UserError."""
        if rendered:
            raise UserError("--rendered: a rendered text does not say where its answer begins")
        example = value
        if isinstance(value, dict) and not any(value.keys() >= {*keys} for keys in FORMATS):
            if isinstance(value.get("question"), str):
                end = END if "####" in str(value.get("answer")) else ""
                value = {"prompt": value["question"] + end, "completion": value.get("answer")}
            if value.get("completion") is None:
                value = {**value, "completion": NO_ANSWER}
        record = convert(value, where, {})  # a reward may read every key: none is unused
        if "messages" not in record:
            raise UserError(f"{where}: a text is no question; give a prompt, or messages")
        messages = record["messages"]
        if messages and messages[-1]["role"] in ("user", "tool"):
            messages.append({"role": "assistant", "content": NO_ANSWER})
        for message in messages[:-1]:
            if message["role"] == "assistant":
                message["train"] = False
        return {**record, "example": example}


def problems(chat, documents, records, limit, **variables):
    """The Problem of each of `documents` (an `Encoded`), made from `records`, of which the last
    trained turn is the answer. `variables` go to the chat template. What the template refuses, what
    has no turns, and prompts of more than `limit` tokens are left out and counted; UserError if
    none is left."""
    numbers, found, refused = {*documents.documents["record"].tolist()}, [], 0
    for number, record in enumerate(tqdm(records, "prompts", delay=2, leave=False)):
        if number not in numbers:
            continue
        messages = record.get("messages", ())
        turns = [n for n, one in enumerate(messages)
                 if one["role"] == "assistant" and one.get("train") is not False]
        more = {name: value for name, value in record.items()
                if name not in ("messages", "where", "example")}
        try:
            if not turns:
                raise Refused("no turn to write")
            prompt = chat.encode_prompt(messages[:turns[-1]], strftime_now=fixed_date, **more,
                                        **variables)
        except Refused:
            prompt = []
        if 0 < len(prompt) <= limit:
            answer = messages[turns[-1]].get("content") or ""
            found.append(Problem(prompt, messages[turns[-1] - 1].get("content") or "", {
                **record.get("example", record),
                "expected": "" if answer == NO_ANSWER else answer}, record.get("where", "")))
        else:
            refused += 1
    if refused:
        say(f"left out: {refused:,} prompts that the chat template refuses, that have no turn to "
            f"answer, or more than {limit} tokens (--max-seq-len less --max-new-tokens)")
    if not found:
        raise UserError("no prompt is left to answer")
    return found


def tiny_problems(seed, chat):
    """--data tiny for `prepare.load`: questions of SKILL, held out too; and all base skills."""
    random = Random(f"{SKILL} {seed}")
    train, held_out = ([skills.record(SKILL, split, random) for _ in range(count)]
                       for split, count in (("train", 2000), ("eval", 200)))
    return train, {SKILL: held_out, "base": skills.records("base", "eval", 200, seed)}
