"""What an answer is worth, found by a program: no model judges here.

A reward is a function of a record, the example as the data file has it, and of the answer's text;
1 or more counts as solved. record["expected"] is the answer in the file, "" if it has none. An
answer without an end (no stop token) gets 0 unasked."""

import copy
import importlib.util
import math
import re
import sys
from decimal import Decimal
from pathlib import Path

from common.errors import UserError, nearest, one_line

NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def exact(record, answer):
    """1 if the answer is the expected text, but for space around it."""
    return float(answer.strip() == record["expected"].strip())


def letters(record, answer):
    """The share of characters that are right and in place: a shaped reward."""
    answer, expected = answer.strip(), record["expected"].strip()
    return sum(map(str.__eq__, answer, expected)) / max(len(answer), len(expected), 1)


def number(text, mark=""):
    """The last number of a text, or that behind the last mark, as a Decimal, or None."""
    found = re.findall(rf"{mark}(?:\s*({NUMBER}))?" if mark else f"({NUMBER})", text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found and found[-1] else None


def gsm8k(record, answer):
    """1 if the number behind the answer's last "####" is the expected one (GSM8K, 2110.14168)."""
    return float(number(answer, "####") == number(record["expected"], "####"))


def last_number(record, answer):
    """1 if the answer's last number, marked or not, is the expected one."""
    return float(number(answer) == number(record["expected"], "####"))


def marked(record, answer):
    """1 if the answer has a number behind "####", whichever."""
    return float(number(answer, "####") is not None)


REWARDS = {"exact": exact, "letters": letters, "gsm8k": gsm8k}
# What an evaluation counts too: what a shaped reward hides, and what a strict one does not show.
BESIDE = {"letters": {"exact": exact}, "gsm8k": {"last_number": last_number, "marked": marked}}


def load_reward(name):
    """(reward, {name: what to count too}) for a name of REWARDS or FILE.py:function, which runs."""
    if name in REWARDS:
        return REWARDS[name], BESIDE.get(name, {})
    file, _, function = name.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError(f"--reward {name}: neither {', '.join(REWARDS)} nor FILE.py:function of a "
                        f"file that is there{nearest(name, REWARDS)}")
    spec = importlib.util.spec_from_file_location("own_reward", file)
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports
    module = sys.modules["own_reward"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function), {}
    except Exception as error:
        raise UserError(f"--reward {name}: {type(error).__name__}: {one_line(error)}") from error


def check_answers(name, problems):
    """Raise UserError if a built-in reward has nothing to compare an answer with."""
    for one in problems if name in REWARDS else ():
        expected = one.record["expected"]
        if not expected.strip() or name == "gsm8k" and number(expected, "####") is None:
            mark = ' with "####" and a number' * (name == "gsm8k")
            raise UserError(f"{one.where}: --reward {name} needs an expected answer{mark}, but it "
                            f"is {one_line(repr(expected))}; one of your own needs none")


def judge(reward, problem, answer, chat):
    """The reward of an Answer to a Problem; UserError, naming it, if that is no finite number."""
    try:
        value = float(reward(copy.deepcopy(problem.record), chat.decode(answer.ids))
                      if answer.finished else 0)
    except Exception as error:
        raise UserError(f"{problem.where}: the reward function failed: {type(error).__name__}: "
                        f"{one_line(error)}") from error
    if not math.isfinite(value):
        raise UserError(f"{problem.where}: the reward must be a finite number, not {value}")
    return value
