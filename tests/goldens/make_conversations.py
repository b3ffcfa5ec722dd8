"""Make the conversation goldens: what transformers makes of records in all their spellings.

    pip install transformers==5.23.0 && python tests/goldens/make_conversations.py

Random conversations, each rendered by templates that behave as templates in the wild misbehave:
they drop, merge, trim, reorder or refuse. All templates are written for this test. The tokenizer
is that of tests/goldens/chat/qwen3. For every conversation conversations.json holds

raw       the record as people have it: arguments as JSON text, functions of the old kind, keys with
          null that Arrow filled in, turns not to train on
plain     the same in the one form that templates expect; transformers rendered this
parts     what stands where: each part has a word of its own (zq07), by which a test finds it in
          the text. The word of a "call" is in the function's name, so a declaration of the tools
          has it too: in a text that shows tools, the call is the word's last place
rendered  by template: text and ids, or the error; prompt and prompt_ids of the messages before the
          last assistant's, with the generation prompt, if there is such a turn and the template
          takes these messages; with "marked" also the mask

To save space, prompt and prompt_ids are stored as [n, what follows]: their first n characters or
ids are those of text and ids. n is 0 where there is no text.
"""

import copy
import json
import random
from pathlib import Path

import transformers
from jinja2.exceptions import TemplateError
from make_chat import QWEN3

HERE = Path(__file__).parent
COUNT = 24

CHATML = r"""
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

STRICT = r"""
{%- for turn in messages %}
    {%- if turn.role == 'system' %}{{ raise_exception('No system message, please') }}{% endif %}
    {%- if turn.role == 'tool' %}{{ raise_exception('There are no tools') }}{% endif %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('User and assistant take turns, the user first') }}
    {%- endif %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content | trim ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

SYSTEM_IN_USER = r"""
{%- set first = namespace(text='') %}
{%- for turn in messages %}
    {%- if turn.role == 'system' %}
        {%- set first.text = turn.content ~ '\n\n' %}
    {%- else %}
        {{- '<|im_start|>' ~ turn.role ~ '\n' }}
        {%- if turn.role == 'user' %}{{ first.text }}{% set first.text = '' %}{% endif %}
        {%- if turn.reasoning_content %}
            {{- '<think>\n' ~ turn.reasoning_content ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- turn.content }}
        {%- for call in turn.tool_calls or [] %}
            {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

LLAMA31 = r"""
{%- set show = namespace(tools=tools) %}
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\n\n' }}
    {%- if turn.role == 'user' and show.tools %}
        {{- 'Functions to answer with:\n' }}
        {%- for tool in show.tools %}{{ tool | tojson(indent=1) ~ '\n' }}{% endfor %}
        {%- set show.tools = none %}
    {%- endif %}
    {%- if turn.tool_calls %}
        {%- if turn.tool_calls | length > 1 %}{{ raise_exception('One call a turn') }}{% endif %}
        {%- set call = turn.tool_calls[0].function %}
        {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}' }}
    {%- elif turn.role == 'tool' %}
        {{- turn.content | tojson }}
    {%- else %}
        {{- turn.content | trim }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}
"""

NO_TOOL_ANSWERS = r"""
{%- for turn in messages if turn.role not in ('tool', 'system') %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '\n<tool_call>\n' ~ call.function | tojson ~ '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

LAST_EXCHANGE = r"""
{%- set last = namespace(user=0) %}
{%- for turn in messages if turn.role == 'user' %}
    {%- set last.user = messages.index(turn) %}
{%- endfor %}
{%- for turn in messages[last.user:] %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

SYSTEM_LAST = r"""
{%- macro say(turn) %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' }}
    {%- if turn.reasoning_content %}
        {{- '<think>\n' ~ turn.reasoning_content ~ '\n</think>\n\n' }}
    {%- endif %}
    {{- turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endmacro %}
{%- set system = messages | selectattr('role', 'equalto', 'system') | list %}
{%- for turn in messages if turn.role != 'system' %}
    {%- if loop.last and turn.role == 'assistant' and system %}{{ say(system[0]) }}{% endif %}
    {{- say(turn) }}
    {%- if loop.last and turn.role != 'assistant' and system %}{{ say(system[0]) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

NO_THOUGHTS = r"""
{%- for turn in messages %}
    {%- set words = turn.content %}
    {%- if turn.role == 'assistant' and '</think>' in words %}
        {%- set words = words.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ words }}
    {%- for call in turn.tool_calls or [] %}
        {{- '<tool_call>\n' ~ call.function | tojson ~ '\n</tool_call>\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

THINK_PROMPT = r"""
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' }}
    {%- if turn.reasoning_content %}
        {{- '<think>\n' ~ turn.reasoning_content ~ '\n</think>\n\n' }}
    {%- endif %}
    {{- turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '\n<tool_call>' ~ call.function.name ~ '\n' }}
        {{- call.function.arguments | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}
"""

PLAIN_NAMES = r"""
{%- for turn in messages %}
    {{- '### ' ~ turn.role | capitalize ~ ':\n' ~ turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- ' ' ~ call.function.name ~ '(' ~ call.function.arguments | tojson ~ ')' }}
    {%- endfor %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}
"""

MERGED = r"""
{%- set open = namespace(role='') %}
{%- for turn in messages %}
    {%- set role = 'user' if turn.role == 'tool' else turn.role %}
    {%- if role == open.role %}
        {{- '\n\n' }}
    {%- else %}
        {{- ('<|im_end|>\n' if open.role) ~ '<|im_start|>' ~ role ~ '\n' }}
        {%- set open.role = role %}
    {%- endif %}
    {{- turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
    {%- endfor %}
{%- endfor %}
{{- '<|im_end|>\n' if open.role }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

MARKED = r"""
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' }}
    {%- if turn.role == 'assistant' %}
        {%- generation %}
        {{- turn.content }}
        {%- for call in turn.tool_calls or [] %}
            {{- '<tool_call>' ~ call.function.name ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- turn.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

BASE_EOS = r"""
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' }}
"""

PLACES = ("[[", "]]")  # where QWEN3 can be marked; left out here
TEMPLATES = {name: source.strip("\n") for name, source in {
    "chatml": CHATML,
    "qwen3": "\n".join(line for line in QWEN3.splitlines() if line.strip() not in PLACES),
    "strict": STRICT, "system_in_user": SYSTEM_IN_USER, "llama31": LLAMA31,
    "no_tool_answers": NO_TOOL_ANSWERS, "last_exchange": LAST_EXCHANGE,
    "system_last": SYSTEM_LAST, "no_thoughts": NO_THOUGHTS, "think_prompt": THINK_PROMPT,
    "plain_names": PLAIN_NAMES, "merged": MERGED, "marked": MARKED, "base_eos": BASE_EOS}.items()}

USUAL = "the of a is it what sky grass weather seven forty two".split()
RARE = ["{{ messages }}", "{% for turn in it %}", "{# no #}", "{'a': [1]}", "日本語", "naïve", "👍🏽",
        "e\u0301a", "\\n", "<b>&", '"so"', "‘it’s’", "}}", "|", "```"]
TEXT = {"type": "string"}
KEYS = {"days": {"type": "integer", "minimum": 1}, "unit": {"type": "string", "enum": ["C", "F"]},
        "exact": {"type": "boolean"}, "tags": {"type": "array", "items": TEXT},
        "ratio": {"type": "number", "description": "0 < it & it < 1"}}
VALUES = {"days": [1, 7, 42], "unit": ["C", "F"], "exact": [True, False], "ratio": [0.5, 1e-05],
          "tags": [[], ["sky", "grün"], ['"', "\n"]]}
TEXT_KEYS = ["town", "query", "note"]
FILLED = [*KEYS, *TEXT_KEYS, "where"]  # every key that some tool has


def wishes(rng, **fixed):
    """What a conversation shall be like."""
    return {"system": rng.random() < 0.5, "exchanges": rng.choice([1, 1, 2, 2, 3, 4]),
            "tools": rng.random() < 0.55, "declared": rng.random() < 0.8,
            "thoughts": rng.choice(["", "", "field", "inside", "either"]),
            "end": rng.choice(["assistant"] * 5 + ["user", "tool"]), "double": rng.random() < 0.1,
            "old": rng.random() < 0.25, "ids": rng.random() < 0.5, "names": rng.random() < 0.5,
            "filled": rng.random() < 0.4, "unweighted": rng.choice([0, 0, 0.5]), **fixed}


class Writer:
    """Writes one conversation: its messages and tools in the plain form, its parts."""

    def __init__(self, rng, wish):
        self.rng, self.wish = rng, wish
        self.messages, self.tools, self.parts, self.untrained = [], [], [], set()
        self.schemas = {}  # of every tool, declared or not: its properties by its name
        self.words = self.calls = 0

    def word(self):
        self.words += 1
        return f"zq{self.words:02}"

    def part(self, what, word, message=None, trained=False):
        self.parts.append({"what": what, "message": message, "word": word, "trained": trained})

    def prose(self, word, most=5):
        """Some words with the given one among them, at times in paragraphs or with odd edges."""
        rng = self.rng
        words = rng.choices(USUAL, k=rng.randint(1, most))
        if rng.random() < 0.4:
            words.insert(rng.randint(0, len(words)), rng.choice(RARE))
        words.insert(rng.choice([0, len(words), rng.randint(0, len(words))]), word)
        text = words[0]
        for other in words[1:]:
            text += rng.choice([" "] * 12 + ["\n\n", "\n"]) + other
        before = rng.choice([""] * 8 + [" ", "\n", "\n  "])
        return before + text + rng.choice([""] * 8 + [" ", "\n\n"])

    def say(self, role, **more):
        """A message of someone else than the assistant."""
        word = self.word()
        self.part({"function": "tool"}.get(role, role), word, len(self.messages))
        self.messages.append({"role": role, "content": self.prose(word), **more})

    def tool(self):
        """A tool with its marked name and description, and up to three arguments."""
        rng, word = self.rng, self.word()
        properties = {rng.choice(TEXT_KEYS): TEXT}
        if rng.random() < 0.35:
            properties = {"where": {"type": "object", "properties": properties}}
        for key in rng.sample(sorted(KEYS), rng.randint(0, 2)):
            properties[key] = KEYS[key]
        self.part("tools", word)
        name = f"{rng.choice(['weather', 'look', 'get'])}_{self.word()}"
        self.schemas[name] = properties
        return {"type": "function", "function": {
            "name": name,
            "description": f"{word} <b> & 'all'" if rng.random() < 0.2 else f"the {word}",
            "parameters": {"type": "object", "properties": properties,
                           "required": list(properties)[:1]}}}

    def arguments(self, properties, word):
        """Arguments of a call, all of those that the tool has."""
        chosen = {}
        for key, schema in properties.items():
            if key == "where":
                chosen[key] = self.arguments(schema["properties"], word)
            elif key in TEXT_KEYS:
                chosen[key] = self.prose(word, 2)
            else:
                chosen[key] = self.rng.choice(VALUES[key])
        return chosen

    def call(self, tool, trained):
        name, word = tool["function"]["name"], self.word()
        self.part("call", name.split("_")[1], len(self.messages), trained)
        self.part("arguments", word, len(self.messages), trained)
        arguments = self.arguments(tool["function"]["parameters"]["properties"], word)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        self.calls += 1
        return {"id": f"call{self.calls}", **call} if self.wish["ids"] else call

    def answer(self, tools=()):
        """A message of the assistant, with a call of each of the tools."""
        rng, index = self.rng, len(self.messages)
        trained = rng.random() >= self.wish["unweighted"]
        if not trained:
            self.untrained.add(index)
        turn = {"role": "assistant", "content": ""}
        if not tools or rng.random() < 0.4:
            word = self.word()
            turn["content"] = self.prose(word)
            self.part("words", word, index, trained)
        where = self.wish["thoughts"]
        if where and rng.random() < 0.75:
            word = self.word()
            thoughts = self.prose(word)
            self.part("thoughts", word, index, trained)
            if where == "field" or where == "either" and rng.random() < 0.5:
                turn["reasoning_content"] = thoughts
            else:
                turn["content"] = f"<think>\n{thoughts}\n</think>\n\n{turn['content']}"
        if tools:
            turn["tool_calls"] = [self.call(tool, trained) for tool in tools]
        self.messages.append(turn)

    def use(self, tools):
        """Call the tools and get what they return."""
        self.answer(tools)
        for call in self.messages[-1]["tool_calls"]:
            more = {"tool_call_id": call["id"]} if self.wish["ids"] else {}
            if self.wish["names"] or self.wish["old"]:
                more["name"] = call["function"]["name"]
            self.say("tool", **more)

    def write(self):
        wish, rng = self.wish, self.rng
        at_end = "assistant" if wish["end"] == "tool" and not wish["tools"] else wish["end"]
        unused = [self.tool() for _ in range(rng.randint(1, 3))] if wish["tools"] else []
        if wish["tools"] and not wish["declared"]:
            self.parts.clear()
        else:
            self.tools = list(unused)
        if wish["system"]:
            self.say("system")
        for left in reversed(range(wish["exchanges"])):
            self.say("user")
            if wish["double"] and not left:
                self.say("user")
            keep = 1 if left else 0  # for the last exchange
            while len(unused) > keep and (rng.random() < 0.7 or not left):
                both = len(unused) - keep > 1 and not wish["old"] and rng.random() < 0.8
                self.use([unused.pop() for _ in range(1 + both)])
            if left or at_end == "assistant":
                self.answer()
        if at_end == "user":
            self.answer()
            self.say("user")


def filled(arguments, properties, rng):
    """Arguments as Arrow has them: with the keys of other tools, which are null."""
    found = {key: filled(value, properties[key]["properties"], rng) if key == "where" else value
             for key, value in arguments.items()}
    return with_nulls(found, [key for key in FILLED if key not in properties], rng)


def with_nulls(found, keys, rng):
    """The dict with null for some of the keys, anywhere between its own."""
    items = list(found.items())
    for key in rng.sample(keys, min(2, len(keys))):
        items.insert(rng.randint(0, len(items)), (key, None))
    return dict(items)


def filled_schema(schema, rng):
    """A tool's parameters as Arrow has them."""
    schema = dict(schema)
    if "properties" in schema:
        inside = {key: filled_schema(value, rng) for key, value in schema["properties"].items()}
        others = [key for key in FILLED if key not in inside]
        schema["properties"] = with_nulls(inside, others, rng)
    return with_nulls(schema, [key for key in ("enum", "items") if key not in schema], rng)


def spell_call(call, properties, wish, rng):
    """A call as the record has it."""
    call = copy.deepcopy(call)
    function = call["function"]
    if wish["filled"]:
        function["arguments"] = filled(function["arguments"], properties, rng)
    elif rng.random() < 0.5:
        function["arguments"] = json.dumps(function["arguments"],
                                           ensure_ascii=rng.random() < 0.5)
    return call


def spell_tools(tools, wish, rng):
    """The declared tools as the record has them: {} if there are none."""
    if not tools:
        return rng.choice([{}, {"tools": None}, {"tools": []}])
    tools = copy.deepcopy(tools)
    if wish["filled"]:
        for tool in tools:
            tool["function"]["parameters"] = filled_schema(tool["function"]["parameters"], rng)
            tool["function"]["strict"] = None
    if wish["old"]:
        tools = [tool["function"] for tool in tools]
    if not wish["filled"] and rng.random() < 0.5:
        tools = json.dumps(tools, ensure_ascii=False)
    return {"functions" if wish["old"] else "tools": tools}


def spell(writer):
    """The record as people have it."""
    rng, wish = writer.rng, writer.wish
    messages = copy.deepcopy(writer.messages)
    flag, stop, go = rng.choice([("weight", 0, 1), ("train", False, True), ("loss", False, True)])
    for index, turn in enumerate(messages):
        if turn["role"] == "tool" and wish["old"]:
            turn["role"] = "function"
        if turn["role"] != "assistant":
            continue
        calls = [spell_call(call, writer.schemas[call["function"]["name"]], wish, rng)
                 for call in turn.pop("tool_calls", [])]
        if not calls:
            turn.update(rng.choice([{}, {"tool_calls": []}, {"tool_calls": None}]))
        elif wish["old"]:
            turn["function_call"] = calls[0]["function"]
        else:
            turn["tool_calls"] = calls
        if calls and not turn["content"]:
            turn["content"] = rng.choice([None, ""])
            if rng.random() < 0.3:
                del turn["content"]
        if index in writer.untrained:
            turn[flag] = stop
        elif rng.random() < 0.2:
            turn[flag] = go
    if wish["filled"]:
        every = dict.fromkeys(key for turn in messages for key in turn)
        messages = [{**dict.fromkeys(every), **turn} for turn in messages]
    return {"messages": messages, **spell_tools(writer.tools, wish, rng)}


def conversation(seed, **fixed):
    """A random conversation: {"raw", "plain", "parts"}. `fixed` are wishes not left to chance."""
    rng = random.Random(seed)
    wish = wishes(rng, **fixed)
    if wish["old"]:
        wish["ids"] = False
    writer = Writer(rng, wish)
    writer.write()
    plain = {"messages": writer.messages}
    if writer.tools:
        plain["tools"] = writer.tools
    return {"raw": spell(writer), "plain": plain, "parts": writer.parts}


def before_last_answer(messages):
    """The messages before the last of the assistant, or none."""
    found = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    return messages[:found[-1]] if found else []


def rendered(tokens, plain, **variables):
    """What transformers makes of a conversation: {"text", "ids"} or {"error"}, and the prompt."""
    def render(messages, name, **more):
        render = lambda **how: tokens.apply_chat_template(  # noqa: E731
            messages, tools=plain.get("tools"), **more, **variables, **how)
        return {name: render(tokenize=False),
                {"text": "ids"}.get(name, "prompt_ids"): render(return_dict=True)["input_ids"]}

    found = {}
    try:
        found.update(render(plain["messages"], "text"))
    except TemplateError as error:
        found["error"] = str(error)
    start = before_last_answer(plain["messages"])
    try:
        found.update(render(start, "prompt", add_generation_prompt=True) if start else {})
    except TemplateError:
        pass
    return found


def mask(tokens, plain, template):
    """Which tokens transformers finds within the marks of a template."""
    found = tokens.apply_chat_template(
        plain["messages"], tools=plain.get("tools"), chat_template=template, return_dict=True,
        return_assistant_tokens_mask=True)
    return found["assistant_masks"]


def check(example, text):
    """Every word stands in the text at most once; a call's also where the tools are declared."""
    shown = any(part["what"] == "tools" and part["word"] in text for part in example["parts"])
    for part in example["parts"]:
        most = 1 + (shown and part["what"] == "call")
        assert text.count(part["word"]) <= most, (part, text)


def shortened(found):
    """The rendering with only that of the prompt in which it differs from the document."""
    for name, full in (("prompt", found.get("text", "")), ("prompt_ids", found.get("ids", []))):
        if name in found:
            both = enumerate(zip(full, found[name]))
            same = next((i for i, (a, b) in both if a != b), min(len(full), len(found[name])))
            found[name] = [same, found[name][same:]]
    return found


def features(index):
    """Wishes of the index-th conversation, so that the few there are have something of all."""
    return {"tools": index % 2 == 0, "old": index % 6 == 0,
            "end": {4: "user", 6: "tool", 7: "user"}.get(index % 8, "assistant"),
            "unweighted": 0.5 if index % 3 == 1 else 0}


def main():
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(HERE / "chat" / "qwen3")
    examples = []
    for index in range(COUNT):
        example = conversation(f"golden {index}", **features(index))
        example["rendered"] = {}
        for name, template in TEMPLATES.items():
            found = rendered(tokens, example["plain"], chat_template=template)
            check(example, found.get("text", ""))
            if name == "marked":
                found["mask"] = mask(tokens, example["plain"], template)
            example["rendered"][name] = shortened(found)
        examples.append(example)
    (HERE / "conversations.json").write_text(json.dumps(
        {"transformers": transformers.__version__, "templates": TEMPLATES,
         "conversations": examples}, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
