"""Pairs of answers, from files or from the model's own mistakes, to pairs of documents.

    explicit        {"prompt", "chosen", "rejected"}, each a text or a list of messages
    ShareGPT        {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}
    Alpaca          {"instruction", "input"?, "output": [better, worse]}, or chosen and rejected
    implicit        {"chosen", "rejected"}, both the whole conversation, as messages or as a text
                    with turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:" (HH-RLHF)

Told apart by keys and types, in this order. The response is the last turn, the assistant's; all
before it is the prompt, the same for both. `system`, `tools` and others: as in common/README.md."""

import hashlib
import json
import re
from contextlib import suppress
from random import Random

import numpy as np
import torch
from torch.distributed import ReduceOp

from common.asking.generation import generate
from common.data.encode import DOCUMENT, Encoded, show_example
from common.data.formats import FORMATS, convert, present, quoted
from common.data.readers import Records
from common.data.template import Refused
from common.errors import UserError, listed, printable
from common.ranks import all_sum, say
from common.tiny import skills
from quantized_model import base_kind, load_model

ROW = np.dtype([*DOCUMENT.descr, ("border", np.int64)])  # tokens of the chosen answer's document
SPEAK_FIRST = "user", "human", "system"
TURN = re.compile(r"\n\n(Human|Assistant):")
ASKED = "prompt", "conversations", "messages", "instruction"  # keys of what comes before an answer
SKILL, PROMPTS = "add", 500  # of --data tiny
TRIES = 8  # answers that are sampled for each prompt, to find a mistake among them
TOGETHER = 64 * TRIES  # of them at a time: the KV cache of a large model has room for no more


class PairRecords(Records):
    """The records of files of pairs: of each pair two, the chosen conversation and the rejected."""

    formats = (("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected"),
               ("messages", "chosen", "rejected"), ("instruction", "chosen", "rejected"),
               ("instruction", "output"), ("chosen", "rejected"))
    code = __file__

    @staticmethod
    def convert(value, where, ignored, rendered=False):
        """{"pair": [record, record]} of an example, or {"refused": why it is left out}."""
        if rendered:
            raise UserError("--rendered: a pair of rendered texts does not say where its answers "
                            "begin; give messages")
        return {"pair": members(value, where, ignored)}

    def __iter__(self):
        for record in super().__iter__():
            for one in record.get("pair", [record, record]):  # one refused counts as two as well
                yield {**one, "where": record["where"]}


def members(value, where, ignored):
    """The two records of a pair, chosen first: {"messages": [...], "tools"?}, of which only the
    last turn is trained. Refused for a pair that can be left out, UserError for no pair."""
    value = present(value, "a pair", where) if isinstance(value, dict) else {}
    answers = [value.get(name) for name in ("chosen", "rejected")]
    if answers == [None, None] and "instruction" in value and isinstance(value.get("output"), list):
        answers = value["output"]
    kinds = [type(one).__name__ for one in answers if not isinstance(one, (str, list, dict))]
    if None in answers or len(answers) != 2:
        raise UserError(
            f"{where}: no pair of answers: it needs 'chosen' and 'rejected', and has "
            f"{listed(map(quoted, value)) or 'no keys'}; map others, as in --columns "
            "prompt=question,chosen=response_j,rejected=response_k (single answers with a 'label', "
            "KTO's format, are not read)")
    if kinds:
        raise UserError(f"{where}: an answer must be a text or messages, not {kinds[0]}")
    records = [convert(side(value, unpacked(answer), where, ignored), where, ignored)
               for answer in answers]
    prompts = [record["messages"][:-1] for record in records]
    for record, prompt in zip(records, prompts):
        if not prompt or record["messages"][-1]["role"] != "assistant":
            raise Refused("a pair without a prompt, or whose last turn is not the assistant's")
        if prompt[-1]["role"] == "assistant":
            raise Refused("a pair whose prompt ends with a turn of the assistant's")
        for message in prompt:
            message.pop("train", None)
            if message["role"] == "assistant":
                message["train"] = False
    if prompts[0] != prompts[1]:
        raise Refused("a pair whose prompts differ, or whose answers are several turns")
    return records


def side(value, answer, where, ignored):
    """What `formats.convert` reads: a pair's other keys with one of its answers, a text or a list
    of turns. Keys of a second format are left out and noted: UltraFeedback has its prompt twice."""
    name = next((one for one in ASKED if one in value), None)
    question, beside = unpacked(value.get(name, "")), dict(value)
    if (name in ("conversations", "messages") or isinstance(question, str)) and (
            is_turns(answer) and answer[0].get("role", answer[0].get("from")) in SPEAK_FIRST):
        name = None  # the answer is the whole conversation
    elif name == "prompt" and isinstance(question, str) and question.endswith("\n\nAssistant:"):
        question = turns(question)[:-1]
    for key in dict.fromkeys(sum(FORMATS + PairRecords.formats, ())):
        if key in beside:
            del beside[key]
            if key not in (name, "chosen", "rejected", "output"):
                ignored.setdefault(quoted(key), where)
    if name is None:
        return {**beside, "messages": turns(answer) if isinstance(answer, str) else answer}
    if name == "instruction":
        return {**beside, "instruction": question, "output": answer}
    return {**beside, "prompt": question, "completion": answer}


def unpacked(value):
    """A turn, or turns that are JSON in a text, as in tables, as a list; all else as it is."""
    found = value
    with suppress(TypeError, ValueError, RecursionError):  # it is no text, or no JSON
        found = json.loads(value)
    found = [found] if isinstance(found, dict) else found
    return found if is_turns(found) or not isinstance(value, str) else value


def is_turns(value):
    """Whether it is a list of messages, in either spelling."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and (
        one.keys() >= {"from", "value"} or "role" in one and one.keys() & {"content", "tool_calls"})
        for one in value)


def turns(text):
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ...", as HH-RLHF writes a conversation."""
    before, *parts = TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if before.strip() or not parts:
        raise Refused("a pair of texts with neither a prompt nor turns (Human:, Assistant:)")
    return [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": words.strip()}
            for who, words in zip(parts[::2], parts[1::2])]


class Pairs(Encoded):
    """Pairs of documents, each as one document of an `Encoded`, which a pack holds whole or not."""

    unit = "pairs"

    @classmethod
    def of(cls, encoded, batch_tokens):
        """The pairs of an `Encoded` of records in twos that are whole, fit a pack of `batch_tokens`
        and differ in the answers' tokens alone; counts the others. UserError if none is left."""
        rows, tokens = encoded.documents, np.asarray(encoded.tokens)
        groups, numbers = {}, rows["record"]  # by reason, None for those that are kept
        firsts = np.flatnonzero((numbers[:-1] % 2 == 0) & (numbers[1:] == numbers[:-1] + 1))
        for i in firsts.tolist():
            one, two = (tokens[start:start + length]
                        for start, length, *_ in rows[i:i + 2].tolist())
            ids, others = one["id"], two["id"]
            asked, other = ids[:one["trained"].argmax()], others[:two["trained"].argmax()]
            reason = (
                "whose answers are the same" if np.array_equal(ids, others) else
                "whose prompts are not the same tokens" if not np.array_equal(asked, other) else
                f"longer together than --batch-tokens {batch_tokens}"
                if len(ids) + len(others) > batch_tokens else None)
            groups.setdefault(reason, []).append(i)
        kept = groups.pop(None, [])
        notes = [f"skipped, {len(found):,} {reason} (first: example {numbers[found[0]] // 2 + 1})"
                 for reason, found in groups.items()]
        if lone := len(np.unique(numbers // 2)) - len(firsts):
            notes.append(f"skipped, {lone:,} of which only one answer can be used")
        if not kept:
            raise UserError("no pair can be trained on: " + ("; ".join(notes) or "no data"))
        pairs = np.empty(len(kept), ROW)
        chosen, rejected = rows[kept], rows[np.add(kept, 1)]
        pairs["start"], pairs["record"] = chosen["start"], chosen["record"]
        for name in ("length", "trained"):
            pairs[name] = chosen[name] + rejected[name]
        pairs["digest"] = chosen["digest"] * 3 + rejected["digest"]  # not the same, exchanged
        pairs["border"] = chosen["length"]
        return cls(encoded.tokens, pairs, notes).announce("pairs")

    def document_lengths(self):
        """Of all the documents, two for each pair."""
        border = self.documents["border"]
        return np.concatenate((border, self.lengths - border))

    def example(self, chat):
        """The first pair as text: its chosen answer as `show_example` has it, and the other one."""
        chosen, (ids, labels) = self.pair(0)
        rejected = chat.decode(ids[labels >= 0].tolist(), skip_special=False).split("\n")
        return "\n".join((show_example([chosen], chat), "its rejected answer:",
                          *(printable(line, 400) for line in rejected)))

    def pair(self, i):
        """The chosen and the rejected document of pair i, each (input_ids, labels)."""
        (ids, labels), border = self[i], self.documents["border"][i]
        return (ids[:border], labels[:border]), (ids[border:], labels[border:])


def tiny_pairs(options, device, dtype, chat):
    """--data tiny for `prepare.load`: what the model, untrained, gets wrong in SKILL, to learn from
    and held out; then the questions of SKILL and of all the skills that it knew before."""
    if options.init == "random":
        raise UserError("--data tiny needs a model that can do something: leave --init random out")
    model, _ = load_model(options.model, device, dtype, base=base_kind(options))
    train, held_out = (own_mistakes(model.to(device), chat, SKILL, split, PROMPTS, options.seed)
                       for split in ("train", "eval"))
    number = int.from_bytes(hashlib.sha256(repr((train, held_out)).encode()).digest()[:7], "big")
    least, most = (all_sum(torch.tensor(number), how) for how in (ReduceOp.MIN, ReduceOp.MAX))
    if least != most:
        raise UserError("the model answers differently on different ranks, so each would have other"
                        " pairs: give them with --data")
    random = Random(f"{SKILL} asked {options.seed}")
    return train, {
        "mistakes": held_out, SKILL: [skills.record(SKILL, "eval", random) for _ in range(100)],
        "base": skills.records("base", "eval", 200, options.seed)}


def own_mistakes(model, chat, skill, split, count, seed):
    """Records in twos: to prompts of a tiny skill, `count` at most, the right answer and the first
    wrong one of TRIES that `model` gave at temperature 1. Prompts without one make no pair."""
    random = Random(f"{skill} {split} {seed}")
    drawn = (skills.record(skill, split, random)["messages"] for _ in range(count))
    asked = list({question["content"]: (question, answer) for question, answer in drawn}.values())
    prompts = [chat.encode_prompt([question]) for question, _ in asked for _ in range(TRIES)]
    answers = [chat.decode(ids) for start in range(0, len(prompts), TOGETHER) for ids in generate(
        model, prompts[start:start + TOGETHER], 16, chat.stop_ids, 1.0, seed + start)]
    records = []
    for n, (question, answer) in enumerate(asked):
        wrong = next((one for one in answers[n * TRIES:(n + 1) * TRIES]
                      if one.strip() and one != answer["content"]), None)
        if wrong is not None:
            records += [{"messages": [question, answer]},
                        {"messages": [question, {"role": "assistant", "content": wrong}]}]
    say(f"{skill}: {len(records) // 2} of {len(asked)} prompts ({split}) that the model gets wrong "
        f"at least once in {TRIES} tries")
    return records
