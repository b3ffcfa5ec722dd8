"""Make the chat goldens: what transformers renders and tokenises for two conversation layouts.

    pip install transformers==5.23.0 && python tests/goldens/make_chat.py

The templates below are written for this test and behave as Qwen3's and Llama 3's do: Qwen3 drops
the thoughts of earlier turns, puts an empty think block before a last answer that has none (which
is the model's to write), and knows tools; Llama 3 begins with BOS and trims every content. `[[` and
`]]` stand where the model's own words begin and end. They become nothing in chat_template.jinja, and {% generation %} in
marked.jinja, of which transformers computes masks: those that we must find without the marks.
"""

import json
import random
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

HERE = Path(__file__).parent / "chat"

QWEN3 = r"""
{%- set seen = namespace(user=-1) %}
{%- for turn in messages %}
    {%- if turn.role == 'user' %}{% set seen.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if messages[0].role == 'system') }}
    {{- 'Functions, one JSON object a line:\n<tools>' }}
    {%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
    {{- '\n</tools>\nCall one as <tool_call>{"name": ..., "arguments": ...}</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for turn in messages %}
    {%- set words = turn.content if turn.content is string else '' %}
    {%- if turn.role == 'system' and loop.first and tools %}{% continue %}{% endif %}
    {%- if turn.role == 'assistant' %}
        {%- set thoughts = turn.reasoning_content if turn.reasoning_content is string else '' %}
        {%- if not thoughts and '</think>' in words %}
            {%- set thoughts = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set words = words.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > seen.user and thoughts %}
            {%- set words = words.lstrip('\n') %}
            {%- set said = '<think>\n' ~ thoughts.strip('\n') ~ '\n</think>\n\n' ~ words %}
        {%- elif loop.index0 > seen.user and loop.last %}
            {%- set said = '<think>\n\n</think>\n\n' ~ words.lstrip('\n') %}
        {%- else %}
            {%- set said = words %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        [[
        {{- said }}
        {%- for call in turn.tool_calls or [] %}
            {%- if words or not loop.first %}{{ '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        ]]
        {{- '\n' }}
    {%- elif turn.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ words ~ '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ turn.role ~ '\n' ~ words ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = r"""
{{- bos_token }}
{%- for turn in messages %}
    {{- '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\n\n' }}
    {%- if turn['role'] == 'assistant' %}
        [[
        {{- turn['content'] | trim ~ '<|eot_id|>' }}
        ]]
    {%- else %}
        {{- turn['content'] | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = [{"type": "function",
         "function": {"name": "weather", "arguments": {"town": "Zürich", "days": 2}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Forecast <b> & 'all'",
                                           "parameters": {"type": "object", "properties": {}}}}]
CONVERSATIONS = {
    "one turn": [turn("user", "What is 2 + 3?"), turn("assistant", "It is 5.")],
    "system": [turn("system", "Answer in one word."), turn("user", "The sky?"),
               turn("assistant", "Blue."), turn("user", "And grass?"), turn("assistant", "Green.")],
    "spaces": [turn("user", "  indented\n"), turn("assistant", "\n two lines \n\nand an end  \n"),
               turn("user", "\tmore"), turn("assistant", "  leading")],
    "unicode": [turn("user", "日本語 ‘naïve’ \u200d👩‍👩‍👧"),
                turn("assistant", "Zürich ≠ Ζυρίχη 👍🏽 e\u0301")],
    "braces": [turn("user", "{{ messages }} {% endfor %} \\n"), turn("assistant", "{'a': [1]}")],
    "question last": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    "none": [turn("user", "a", name=None), turn("assistant", "b", tool_calls=None)],
}
THINKING = {
    "thoughts": [turn("user", "7 * 6?"),
                 turn("assistant", "<think>\nSeven sixes: 42.\n</think>\n\nIt is 42.")],
    "earlier thoughts": [turn("user", "1?"), turn("assistant", "<think>\nold\n</think>\n\none"),
                         turn("user", "2?"), turn("assistant", "<think>\nnew\n</think>\n\ntwo")],
    "reasoning": [turn("user", "1?"), turn("assistant", "one", reasoning_content="old"),
                  turn("user", "2?"), turn("assistant", "two", reasoning_content="\nnew\nline\n")],
    "empty thoughts": [turn("user", "1?"), turn("assistant", "<think>\n\n</think>\n\none")],
    "tool": [turn("system", "Be brief."), turn("user", "Weather?"),
             turn("assistant", None, tool_calls=CALL), turn("tool", "sun, \"hot\""),
             turn("assistant", "Sunny.")],
    "tool at the end": [turn("user", "Weather?"), turn("assistant", "", tool_calls=CALL)],
    "words and a tool": [turn("user", "Weather?"),
                         turn("assistant", "I look.", tool_calls=CALL * 2), turn("tool", "sun"),
                         turn("assistant", "Sunny.")],
}


def tokenizer(special, added, **kind):
    """A byte-level BPE tokenizer trained on text that this function makes up."""
    rng = random.Random(0)
    words = "the of a is it what sky grass user system assistant weather seven forty two".split()
    texts = [" ".join(rng.choices(words, k=20)) + ".\n" for _ in range(200)]
    tokens = Tokenizer(models.BPE())
    tokens.normalizer = kind.get("normalizer")
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    tokens.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokens.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokens.post_processor = processors.ByteLevel(trim_offsets=kind.get("trim", False))
    if "bos" in kind:
        bos = kind["bos"]
        tokens.post_processor = processors.Sequence([tokens.post_processor, (
            processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                          special_tokens=[(bos, tokens.token_to_id(bos))]))])
    return tokens


def expected(tokens, conversation, **variables):
    """What transformers makes of a conversation: text and ids, and both of the prompt form."""
    render = lambda prompt, **more: tokens.apply_chat_template(  # noqa: E731
        conversation, add_generation_prompt=prompt, **variables, **more)
    return {"messages": conversation, "variables": variables,
            "text": render(False, tokenize=False), "prompt": render(True, tokenize=False),
            "ids": render(False, return_dict=True)["input_ids"],
            "prompt_ids": render(True, return_dict=True)["input_ids"]}


def make(name, template, conversations, tokens, config):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"), pretty=False)
    template = template.strip("\n")
    plain = "".join(line for line in template.splitlines(keepends=True)
                    if line.strip() not in ("[[", "]]"))
    marked = template.replace("[[", "{%- generation %}").replace("]]", "{%- endgeneration %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(plain)
    (folder / "marked.jinja").write_text(marked)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    examples = {}
    for title, (conversation, variables) in conversations.items():
        example = examples[title] = expected(loaded, conversation, **variables)
        found = loaded.apply_chat_template(conversation, chat_template=marked, return_dict=True,
                                           return_assistant_tokens_mask=True, **variables)
        assert found["input_ids"] == example["ids"], title  # the marks change nothing else
        example["trained"] = found["assistant_masks"]
    (folder / "expected.json").write_text(json.dumps(
        {"transformers": transformers.__version__, "examples": examples}, ensure_ascii=False))


def main():
    usual = {title: (turns, {}) for title, turns in CONVERSATIONS.items()}
    thinking = {title: (turns, {}) for title, turns in {**CONVERSATIONS, **THINKING}.items()}
    thinking["tools named"] = (THINKING["tool"], {"tools": TOOLS})
    thinking["no thinking"] = (CONVERSATIONS["one turn"], {"enable_thinking": False})
    make("qwen3", QWEN3, thinking, tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
         "</tool_response>"], normalizer=normalizers.NFC()),
         {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    make("llama3", LLAMA3, usual, tokenizer(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"], [], trim=True, bos="<|begin_of_text|>"),
         {"bos_token": {"__type": "AddedToken", "content": "<|begin_of_text|>"},
          "eos_token": "<|eot_id|>"})


if __name__ == "__main__":
    main()
