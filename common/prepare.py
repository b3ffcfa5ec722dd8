"""From --model and --data to documents of token ids, and to the questions that are asked.

What lies between the options and the loop: which data, which tokenizer, how long a document may
be, what is held out, and a few prompts that show before and after what the model has learned.
"""

from dataclasses import dataclass


from common import datasets, encode, hub
from common.chat import Chat
from common.encode import Encoded
from common.errors import UserError
from common.tiny import skills as tiny

SHOWN = 4  # prompts whose answers are printed
TINY_DOCUMENTS = 20_000  # of --data tiny
ASKED = 100  # documents of each set on which exact match is measured (tiny data only)


@dataclass(frozen=True)
class Data:
    """What a run works on. `quizzes` are held-out documents by name: answers are scored on them."""

    train: Encoded
    held_out: Encoded
    chat: Chat | None  # None: random tokens, nothing to ask
    quizzes: dict
    scored: bool  # exact match means something for these answers

    def show_example(self, say):
        """Print one training document with the trained tokens marked."""
        if self.chat is not None:
            say(encode.show_example(self.train, self.chat))


def longest_document(options, config):
    """The limit of a document in tokens: it must fit a pack and the model's positions."""
    return min(options.max_seq_len, options.batch_tokens, config.max_position_embeddings)


def load(options, source, config, skills):
    """The `Data` of this run.

    `source` is the model's folder (for its tokenizer), `config` the model's. `skills` ("base" or
    "new") are what --data tiny stands for: the skills that the embedded model learns from
    scratch, or those that it has never seen; then the base skills are asked too, to show what is
    forgotten.
    """
    limit = longest_document(options, config)
    if {"virtual", "tiny"} & set(options.data):
        if len(options.data) > 1:
            raise UserError("--data tiny and --data virtual stand alone, not beside files")
        for flag, value in (("--eval-data", options.eval_data), ("--columns", options.columns)):
            if value:
                raise UserError(f"{flag} goes with a file of your own in --data; "
                                f"{options.data[0]} has all it needs")
    if options.data == ["virtual"]:
        train = encode.virtual(2000, config.vocab_size, limit, options.seed)
        return Data(train, encode.virtual(8, config.vocab_size, limit, options.seed + 1), None, {},
                    False)
    chat = Chat.load(source)

    def encoded(records, key, files=(), title="data"):
        key = [key, limit, options.too_long, config.vocab_size, chat.fingerprint]
        return encode.cached(lambda: encode.encode(records, chat, limit, options.too_long,
                                                   config.vocab_size, title), key, files, title)

    if options.data == ["tiny"]:
        def of(name, part, count, title):
            key = ["tiny", name, part, count, options.seed]
            return encoded(tiny.records(name, part, count, seed=options.seed), key,
                           [tiny.__file__], title)

        train = of(skills, "train", TINY_DOCUMENTS, "data")
        held_out = of(skills, "eval", 200, "held out")
        quizzes = {skills: held_out}
        if skills != "base":
            quizzes["base"] = of("base", "eval", 200, "base skills")
        return Data(train, held_out, chat, quizzes, True)

    columns = datasets.parse_columns(options.columns) if options.columns else None
    files = [path for name in options.data for path in hub.resolve_data(name)]
    train = encoded(datasets.read_records(files, columns), columns, files)
    if options.eval_data:
        files = hub.resolve_data(options.eval_data)
        held_out = encoded(datasets.read_records(files, columns), columns, files, "held out")
    else:
        train, held_out = encode.split(train, options.seed)
    return Data(train, held_out, chat, {"held-out": held_out}, False)


def question(document):
    """(prompt ids, expected ids) of one document: what comes before its first trained token, and
    the trained tokens that follow it. Of a plain text, its first 16 tokens are the prompt."""
    ids, labels = document
    trained = (labels >= 0).tolist()
    start = trained.index(True) or min(16, len(ids) - 1)
    end = start + (trained[start:] + [False]).index(False)
    return ids[:start].tolist(), ids[start:end].tolist()


def ask(data, model, generate):
    """The model's greedy answers: {quiz: [(prompt ids, expected ids, answer ids), ...]}."""
    was_training = model.training
    model.eval()
    results = {}
    for name, documents in data.quizzes.items():
        count = min(len(documents), ASKED if data.scored else SHOWN)
        pairs = [question(documents[i]) for i in range(count)]
        longest = max(len(expected) for _, expected in pairs) if data.scored else 64
        stops = data.chat.stop_ids
        answers = generate(model, [prompt for prompt, _ in pairs], longest, stops)
        pairs = [(p, [t for t in e if t not in stops]) for p, e in pairs]
        results[name] = [(p, e, a) for (p, e), a in zip(pairs, answers)]
    model.train(was_training)
    return results


def exact_match(results):
    """{"exact_match_<quiz>": share of answers that are the expected ones, token for token}."""
    return {f"exact_match_{name}": sum(e == a for _, e, a in answers) / len(answers)
            for name, answers in results.items()}


def show_answers(data, results, when, say):
    """Print the first few answers of each quiz and, where it means something, exact match."""
    for name, answers in results.items():
        title = f"\n{name}, {when} training"
        if data.scored:
            (score,) = exact_match({name: answers}).values()
            title = f"\n{name} skills, {when} training: exact match {score:.0%} of {len(answers)}"
        say(title)
        for prompt, expected, answer in answers[:SHOWN]:
            shown = data.chat.decode(answer).strip().replace("\n", " ")[:72]
            wanted = data.chat.decode(expected).strip().replace("\n", " ")[:72]
            mark = " " if not data.scored else "+" if expected == answer else "-"
            asked = data.chat.decode(prompt).strip().replace("\n", " ")[-64:]
            say(f"  {mark} {asked}\n      {shown!r}" + (f"  (expected {wanted!r})" if mark == "-"
                                                        else ""))
