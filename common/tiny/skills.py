"""The embedded data: small skills over words and numbers, instruction and response, made here from
a seed. Chapter 1 learns the BASE skills from scratch; the others adapt its model to the NEW ones.
A word to be worked on is in quotation marks: README.md, here, says why."""

import hashlib
from itertools import cycle, islice
from random import Random

CONSONANTS, VOWELS = "bcdfghklmnprstv", "aeiou"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = {  # (from, to): how many, and the largest amount that is asked for
    ("centimetres", "millimetres"): (10, 99),
    ("metres", "centimetres"): (100, 99),
    ("kilograms", "grams"): (1000, 99),
    ("hours", "minutes"): (60, 9),
    ("weeks", "days"): (7, 9)}


def word(random, least=3, most=7):
    """A made-up word, no letter twice: consonants and vowels in turn, until vowels run out."""
    consonants = random.sample(CONSONANTS, len(CONSONANTS))
    pools = [consonants, random.sample(VOWELS, len(VOWELS))]
    random.shuffle(pools)
    length = random.randint(least, most)
    return "".join((pools[i % 2] or consonants).pop() for i in range(length))


def an_amount(random):
    """(how many, of what, to be converted to what)."""
    source, target = random.choice(list(UNITS))
    return random.randint(2, UNITS[source, target][1]), source, target


# What a skill is asked about: from a random generator, the arguments of its phrase.
DRAWS = {
    "word": lambda random: (word(random),),
    "long word": lambda random: (word(random, 3, random.choice((7, 7, 7, 7, 7, 18))),),
    "letter": lambda random: (random.choice(CONSONANTS + VOWELS), random.randint(2, 9)),
    "digits": lambda random: (" ".join(random.sample("0123456789", random.randint(3, 7))),),
    "sum": lambda random: (random.randint(1, 99), random.randint(1, 3)),
    "day": lambda random: (random.randint(1, 5), random.choice(DAYS)),
    "amount": an_amount}
# name: (one of DRAWS, the answer from the arguments, three phrases)
BASE = {
    "copy": ("long word", lambda w: w,
        ('Repeat "{}".', 'Copy "{}".', 'Say "{}" again.')),
    "reverse": ("word", lambda w: w[::-1],
        ('Reverse "{}".', 'Turn "{}" around.', 'Write "{}" backwards.')),
    "uppercase": ("word", str.upper,
        ('Write "{}" in capitals.', 'Turn "{}" into capitals.', 'Make "{}" uppercase.')),
    "spell": ("long word", "-".join,
        ('Spell "{}".', 'Write "{}" with dashes.', 'Spell "{}" with dashes.')),
    "length": ("word", lambda w: str(len(w)),
        ('How long is "{}"?', 'Count the letters of "{}".', 'How many letters are in "{}"?')),
    "last": ("word", lambda w: w[-1],
        ('What is the last letter of "{}"?', 'Which letter ends "{}"?', 'How does "{}" end?')),
    "repeat": ("letter", lambda c, n: c * n,
        ('Write "{}" {} times.', 'Give me "{}" {} times over.', 'Repeat "{}" {} times.')),
    "sort": ("digits", lambda d: " ".join(sorted(d.split())),
        ("Sort {}.", "Put {} in order.", "Sort the digits {}.")),
    "largest": ("digits", lambda d: max(d),
        ("What is the largest of {}?", "Give the largest of {}.", "Which is the biggest of {}?")),
    "add": ("sum", lambda a, b: str(a + b),
        ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")),
    "calendar": ("day", lambda n, day: DAYS[(DAYS.index(day) + n) % 7],
        ("Which day is {} days after {}?", "Count {} days on from {}.",
         "What day comes {} days after {}?")),
    "convert": ("amount", lambda n, a, b: str(n * UNITS[a, b][0]),
        ("Convert {} {} to {}.", "Turn {} {} into {}.", "Write {} {} in {}."))}
NEW = {
    "vowels": ("word", lambda w: "".join(c for c in w if c in VOWELS),
        ('Keep only the vowels of "{}".', 'Which vowels are in "{}"?', 'List the vowels of "{}".')),
    "double": ("word", lambda w: "".join(c + c for c in w),
        ('Double each letter of "{}".', 'Write each letter of "{}" twice.',
         'Give each letter of "{}" twice.')),
    "shout": ("word", lambda w: w[::-1].upper(),
        ('Shout "{}" backwards.', 'Write "{}" backwards in capitals.',
         'Reverse "{}" in capitals.'))}
SKILLS = {"base": BASE, "new": NEW, "all": {**BASE, **NEW}}


def records(name, split, count, seed=0):
    """`count` records of the skills `name`, "base", "new" or "all", each skill in turn, determined
    by the seed; a longer list starts with the shorter one. `split` is "train" or "eval"."""
    if name not in SKILLS or split not in ("train", "eval"):
        raise ValueError(f"skills: no data {name!r} {split!r}: base, new or all; train or eval")
    random = Random(f"{name} {split} {seed}")
    return [record(skill, split, random) for skill in islice(cycle(SKILLS[name]), count)]


def record(skill, split, random):
    """A record of `skill`, drawn until its prompt's hash fits `split` ("eval": one in eight)."""
    kind, answer, phrases = SKILLS["all"][skill]
    while True:
        arguments = DRAWS[kind](random)
        prompt = random.choice(phrases).format(*arguments)
        held_out = hashlib.sha256(prompt.encode()).digest()[0] < 32
        if held_out == (split == "eval"):
            return {"messages": [{"role": "user", "content": prompt},
                                 {"role": "assistant", "content": answer(*arguments)}],
                    "skill": skill}
