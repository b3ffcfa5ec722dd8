"""What an answer is worth, found by a program: no model judges here.

A reward is a function of the problem's record and the answer's text, and gives a number; one of 1
or more counts as solved. An answer without an end (no stop token) gets 0 unasked. `record` is the
example as the data file has it, and record["expected"] its answer there, "" if it has none.
"""

import importlib.util
import math
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from common.errors import UserError, nearest, one_line

NUMBER = r"-?\$?-?(?:\d[\d,]*\.?\d*|\.\d+)"


def exact(record, answer):
    """1 if the answer is the expected text, but for space around it."""
    return float(answer.strip() == record["expected"].strip())


def letters(record, answer):
    """The share of characters that are right and in their place: a shaped reward, which pays for
    being near."""
    answer, expected = answer.strip(), record["expected"].strip()
    return sum(map(str.__eq__, answer, expected)) / max(len(answer), len(expected), 1)


def marked_number(text):
    """The number behind the last "####", as a Decimal, or None."""
    return _number(re.findall(rf"####\s*({NUMBER})", text))


def last_number(text):
    """The last number of a text, as a Decimal, or None."""
    return _number(re.findall(NUMBER, text))


def _number(found):
    """1,000 and $1000.00 are the same number; compared as decimals, never evaluated."""
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None
    except InvalidOperation:
        return None


def gsm8k(record, answer):
    """1 if the number behind the answer's last "####" is the expected one (GSM8K, 2110.14168)."""
    number = marked_number(answer)
    return float(number is not None and number == marked_number(record["expected"]))


def gsm8k_lenient(record, answer):
    """1 if the answer's last number is the expected one, marked or not."""
    return float(last_number(answer) == marked_number(record["expected"]))


def has_mark(record, answer):
    """1 if there is a number behind "####", whichever."""
    return float(marked_number(answer) is not None)


REWARDS = {"exact": exact, "letters": letters, "gsm8k": gsm8k}
# What an evaluation counts beside them: what a shaped or strict reward does not show.
BESIDE = {"letters": {"exact": exact}, "gsm8k": {"last_number": gsm8k_lenient, "marked": has_mark}}


def check_answers(name, problems):
    """Raise UserError if a built-in reward has nothing to compare an answer with."""
    if name in REWARDS:
        for one in problems:
            expected = one.record["expected"]
            if not expected.strip() or name == "gsm8k" and marked_number(expected) is None:
                raise UserError(f"{one.where}: --reward {name} needs an expected answer" + (
                    ' with "#### " and a number' if name == "gsm8k" else "") + ", but it is "
                    f"{one_line(expected) or 'missing'}; one's own needs none")


def load_reward(name):
    """(the reward called `name`, {name: what to count beside it}): of REWARDS, or a function of
    one's own, FILE.py:function, which is run. UserError if it is not there."""
    if name in REWARDS:
        return REWARDS[name], BESIDE.get(name, {})
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"--reward {name}: neither FILE.py:function nor one of "
                        f"{', '.join(REWARDS)}{nearest(name, REWARDS)}")
    if not Path(file).is_file():
        raise UserError(f"--reward {name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("own_reward", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward {file}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward {name}: {file} has no function {function!r}")
    return getattr(module, function), {}


def judge(reward, problem, answer, chat):
    """The reward of a rollout's Answer to a Problem. UserError, naming the problem, if the function
    fails or gives no finite number."""
    if not answer.finished:
        return 0.0
    try:
        value = reward(dict(problem.record), chat.decode(answer.ids))
        number = math.nan if value is None else float(value)
    except Exception as error:
        raise UserError(f"{problem.where}: the reward function failed: {type(error).__name__}: "
                        f"{one_line(error)}") from error
    if not math.isfinite(number):
        raise UserError(f"{problem.where}: the reward function gave {value!r}: it must be a number")
    return number
