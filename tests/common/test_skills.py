"""The embedded data is right, repeatable and fairly split; its tokenizer loses nothing."""

import hashlib
import json
import re

import pytest
from helpers import ROOT, load
from tokenizers import Tokenizer

from common.data.chat import Chat
from common.tiny import skills

make_tokenizer = load("tests/goldens/make_tokenizer.py")
TINY = ROOT / "common" / "tiny"
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PER_UNIT = {"centimetres": 10, "metres": 100, "kilograms": 1000, "hours": 60, "weeks": 7}


def prompt_of(record):
    return record["messages"][0]["content"]


def answer_of(record):
    return record["messages"][-1]["content"]


@pytest.fixture(scope="module")
def sample():
    return {name: skills.records("all", name, 6000, seed=3) for name in ("train", "eval")}


# --- an oracle: the answer, found again from nothing but the prompt ---

def oracle(skill, prompt):
    """Written without skills.py's functions: it reads the prompt, as a person would."""
    quoted, counts = re.findall('"(.*?)"', prompt), [int(n) for n in re.findall(r"\d+", prompt)]
    word = quoted[0] if quoted else ""
    if skill == "copy":
        return word
    if skill in ("reverse", "shout"):
        back = ""
        for letter in word:
            back = letter + back
        return back if skill == "reverse" else "".join(chr(ord(c) - 32) for c in back)
    if skill == "uppercase":
        return "".join(chr(ord(c) - 32) for c in word)
    if skill == "spell":
        return "".join("-" + c for c in word)[1:]
    if skill == "length":
        return str(sum(1 for _ in word))
    if skill == "last":
        return re.search("(.)$", word).group(1)
    if skill == "repeat":
        return "".join(word for _ in range(counts[0]))
    if skill == "sort":
        return " ".join(str(n) for n in range(10) if n in counts)
    if skill == "largest":
        return str(next(n for n in range(9, -1, -1) if n in counts))
    if skill == "add":
        return str(counts[0] + counts[1])
    if skill == "calendar":
        today = next(i for i, day in enumerate(WEEK) if day in prompt)
        return (WEEK * 2)[today + counts[0]]
    if skill == "convert":
        return str(counts[0] * PER_UNIT[re.search(r"\d+ (\w+)", prompt).group(1)])
    if skill == "vowels":
        return re.sub("[^aeiou]", "", word)
    if skill == "double":
        return re.sub("(.)", r"\1\1", word)
    raise AssertionError(f"no oracle for {skill}")


def test_every_answer_is_right(sample):
    for record in sample["train"] + sample["eval"]:
        assert answer_of(record) == oracle(record["skill"], prompt_of(record)), record


def test_examples_of_the_readme_are_right():
    text = (TINY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\*new:\* )?(\w+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert [skill for skill, _, _ in rows] == list(skills.SKILLS["all"])
    for skill, prompt, answer in rows:
        assert answer == oracle(skill, prompt), skill


def test_every_prompt_has_one_answer_and_one_skill():
    seen = {}
    for seed in range(3):
        for record in skills.records("all", "train", 6000, seed):
            value = record["skill"], answer_of(record)
            assert seen.setdefault(prompt_of(record), value) == value, record


def test_records_have_the_promised_form(sample):
    for record in sample["train"]:
        assert set(record) == {"messages", "skill"}
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        assert all(m["content"] == m["content"].strip() != "" for m in record["messages"])


def test_skills_are_named_and_take_turns():
    assert len(skills.BASE) >= 10 and len(skills.NEW) == 3
    assert not set(skills.BASE) & set(skills.NEW)
    for name, of_name in skills.SKILLS.items():
        made = skills.records(name, "train", 3 * len(of_name))
        assert [r["skill"] for r in made] == 3 * list(of_name)


def test_same_seed_same_records_and_a_longer_list_continues_the_shorter():
    one = skills.records("base", "train", 300, seed=7)
    assert one == skills.records("base", "train", 300, seed=7)
    assert one == skills.records("base", "train", 500, seed=7)[:300]
    assert one != skills.records("base", "train", 300, seed=8)


def test_train_and_eval_share_no_prompt(sample):
    train, held_out = ({prompt_of(r) for r in sample[name]} for name in ("train", "eval"))
    assert not train & held_out
    for seed in range(5):
        other = {prompt_of(r) for r in skills.records("base", "train", 2000, seed)}
        assert not other & held_out, "also across seeds and names"
    assert len(held_out) > 2000


def test_new_skills_stay_unseen(sample):
    """No base prompt is a new skill's, and the new prompts use words that base prompts lack."""
    base = {prompt_of(r) for r in sample["train"] if r["skill"] in skills.BASE}
    new = {prompt_of(r) for r in sample["train"] if r["skill"] in skills.NEW}
    assert not base & new


def test_the_data_is_pinned():
    """The committed weights were trained on exactly this; change it and they must be retrained."""
    text = json.dumps([skills.records(name, split, 500) for name in ("base", "new")
                       for split in ("train", "eval")])
    assert hashlib.sha256(text.encode()).hexdigest() == PINNED


PINNED = "ef89c1d23765c86a9aba694f1edfa8a1e33ce464a01d0156d6d10cafe405c768"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="base, new or all"):
        skills.records("old", "train", 3)
    with pytest.raises(ValueError, match="train or eval"):
        skills.records("base", "test", 3)


# --- tokenizer, template, configuration ---

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.mark.parametrize("text", [
    "", " ", "\n\n \t", "plain words, and more", "Ünïcode ßtraße, été, naïve", "日本語のテキスト。中文",
    "🙂👩‍👩‍👧 flags 🇨🇭", "العربية עברית हिन्दी", "e\u0301 \u00e9 \u200d\u200b\ufeff",
    "\x00\x01\x7f\x85\u2028",
    "a\r\nb\rc", "x = {'k': [1, 2.5e-3]}  # code\n\tindented", "ABC abc Abc aBC",
    "\U0010ffff\ue000",
])
def test_tokenizer_returns_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_returns_every_character_of_the_basic_plane(tokenizer):
    text = "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_what_is_worked_on_is_seen_as_letters(tokenizer, sample):
    """Arguments and answers one character a token, but for days of the week."""
    for record in sample["train"][:1500]:
        tokens = tokenizer.encode(f"assistant\n{answer_of(record)}").tokens[2:]
        if record["skill"] == "calendar":
            assert len(tokens) == 1
        else:
            assert all(len(token) == 1 for token in tokens)
        offset = tokenizer.encode(f"user\n{prompt_of(record)}")
        for match in re.finditer('"(.+?)"', prompt_of(record)):
            start, end = match.start(1) + 5, match.end(1) + 5
            inside = [o for o in offset.offsets if start <= o[0] < end]
            assert inside == [(i, i + 1) for i in range(start, end)]


def test_documents_vary_in_length(sample):
    chat = Chat.load(TINY)
    lengths = [len(chat.encode_messages(r["messages"])[0]) for r in sample["train"][:1500]]
    assert min(lengths) < 20 and max(lengths) > 60 and 20 < sum(lengths) / len(lengths) < 40


def test_committed_tokenizer_is_what_the_script_makes(tokenizer):
    assert make_tokenizer.train().get_vocab() == tokenizer.get_vocab()


def test_template_is_chatml():
    chat = Chat.load(TINY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"}]
    text = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHo<|im_end|>\n")
    assert chat.render(messages) == text
    assert chat.render(messages[:2], add_generation_prompt=True) == text[:-len("Ho<|im_end|>\n")]
    ids, trained = chat.encode_messages(messages)
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == text
    learned = [i for i, t in zip(ids, trained) if t]
    assert chat.tokenizer.decode(learned, skip_special_tokens=False).rstrip() == "Ho<|im_end|>"


def test_the_files_agree_with_one_another(tokenizer):
    """Ids of the special tokens in tokenizer.json and in the three files that speak of them."""
    config, generation, settings = (
        json.loads((TINY / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "generation_config", "tokenizer_config"))
    ids = {name: tokenizer.token_to_id(name) for name in make_tokenizer.SPECIAL}
    assert {int(i): t["content"] for i, t in settings["added_tokens_decoder"].items()} == {
        i: name for name, i in ids.items()}
    assert config["eos_token_id"] == ids[settings["eos_token"]]
    assert config["pad_token_id"] == generation["pad_token_id"] == ids[settings["pad_token"]]
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert tokenizer.get_vocab_size() <= config["vocab_size"] == 512
    assert settings["model_max_length"] == config["max_position_embeddings"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # both dialects
    assert len(config["layer_types"]) == config["num_hidden_layers"]
