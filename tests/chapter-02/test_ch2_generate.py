"""Generation: the cache against computing anew, the sampling against float64, the command line."""

import io
import sys

import ch2_folders as folders
import numpy as np
import pytest
import torch
from helpers import load, run_script

from common.adapters import peft
from common.asking import generation, terminal
from common.data.chat import Chat
from common.errors import UserError

script = load("chapter-02/generate.py")
packing = load("chapter-02/packing.py")
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
FAMILIES = [
    dict(rope_scaling=LLAMA3), dict(model_type="qwen2", tie_word_embeddings=False),
    dict(model_type="qwen3", head_dim=12, num_key_value_heads=1),
]


def random_prompts(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_from_scratch(model, prompt, tokens, stop_ids=()):
    """The oracle: the whole document anew for every token, alone, without a cache."""
    ids = torch.tensor(prompt)
    for _ in range(tokens):
        pack = packing.packed_sequence_collate_fn([(ids, ids)])
        pack.pop("labels")
        token = model(**pack)[-1].argmax()
        if token.item() in stop_ids:
            break
        ids = torch.cat((ids, token[None]))
    return ids[len(prompt):].tolist()


# --- the cache ---

@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_recomputing_token_for_token(family):
    model, _ = folders.random_model(**family)
    prompts = random_prompts([9, 1, 17, 4, 30])
    expected = [greedy_from_scratch(model, prompt, 20) for prompt in prompts]
    assert generation.generate(model, prompts, 20) == expected
    # Each document stops at its own place: a stop token from the middle of some of the answers.
    stops = {expected[0][3], expected[2][11], expected[3][0]}
    stopped = [greedy_from_scratch(model, prompt, 20, stops) for prompt in prompts]
    assert stopped[3] == [] and len({len(answer) for answer in stopped}) >= 3
    assert generation.generate(model, prompts, 20, stops) == stopped


def test_one_token_prompts_and_one_prompt():
    model, _ = folders.random_model()
    prompts = random_prompts([1, 1, 1])
    expected = [greedy_from_scratch(model, prompt, 8) for prompt in prompts]
    assert generation.generate(model, prompts, 8) == expected
    assert generation.generate(model, prompts[1:2], 8) == expected[1:2]


def test_ends_at_the_last_position_and_passes_empty_prompts():
    model, _ = folders.random_model()  # 96 positions
    prompts = [*random_prompts([90, 95, 5]), []]
    answers = generation.generate(model, prompts, 10)
    assert [len(answer) for answer in answers] == [6, 1, 10, 0]
    assert generation.generate(model, [], 10) == [] and generation.generate(model, [[]], 10) == [[]]
    assert generation.generate(model, prompts, 0) == [[], [], [], []]
    with pytest.raises(UserError, match="prompt 1 has 96 tokens"):
        generation.generate(model, random_prompts([96]), 10)
    with pytest.raises(UserError, match="prompt 2 has token 264.*ends at 263"):
        generation.generate(model, [[5], [264, 1]], 10)


def test_dropout_is_off_and_the_mode_is_put_back():
    model, _ = folders.random_model()
    config = folders.lora.AdapterConfig(rank=4, dropout=0.5)
    folders.lora.apply_adapter(model, config)
    for _, module in folders.lora.adapter_modules(model):
        module.lora_B.data += 0.3
    model.train()
    answers = [generation.generate(model, random_prompts([5, 3]), 12) for _ in range(2)]
    assert model.training and answers[0] == answers[1]
    model.eval()
    assert generation.generate(model, random_prompts([5, 3]), 12) == answers[0]
    assert not model.training


def test_tokens_are_reported_as_they_come():
    model, _ = folders.random_model()
    seen = [[], []]
    answers = generation.generate(model, random_prompts([5, 3]), 6,
                              on_token=lambda n, token: seen[n].append(token))
    assert seen == answers


def test_logits_that_are_not_finite_end_it():
    model, _ = folders.random_model()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generation.generate(model, [[1, 2]], 3)


# --- sampling ---

def oracle(logits, temperature, top_k, top_p):
    """Probabilities (V,) in float64, from the definitions."""
    logits = logits.astype(np.float64) / temperature
    chances = np.exp(logits - logits.max())
    order = np.argsort(-chances, kind="stable")
    chances[order[top_k or len(order):]] = 0
    chances /= chances.sum()
    mass = 0.0
    for token in order:
        if mass >= top_p:
            chances[token] = 0
        else:
            mass += chances[token]
    return chances / chances.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (3.0, 0, 1.0), (1.0, 5, 1.0), (1.5, 500, 1.0), (1.0, 1, 1.0),
    (1.0, 0, 0.9), (0.7, 0, 0.3), (1.3, 7, 0.8), (1.0, 0, 1e-6), (1e-30, 0, 1.0),
])
def test_sampling_has_the_distribution_of_the_definition(temperature, top_k, top_p):
    """Draws on an even grid: what share of it falls to a token is the token's probability."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, generator=generator)
    count = 20_000
    draws = (torch.arange(count) + 0.5) / count
    tokens = generation.choose_tokens(logits.expand(count, -1), temperature, top_k, top_p, draws)
    found = torch.bincount(tokens, minlength=40).double().numpy() / count
    expected = oracle(logits.numpy(), temperature, top_k, top_p)
    assert np.abs(found - expected).max() <= 1.01 / count
    assert (found[expected == 0] == 0).all()


def test_the_largest_draw_takes_no_token_that_is_cut_off():
    logits = torch.tensor([[0.0, 5.0, 4.0, -40.0, 3.0]])
    last = torch.tensor([np.nextafter(np.float32(1), np.float32(0))])
    assert generation.choose_tokens(logits, 1.0, 3, 1.0, last).item() == 4
    assert generation.choose_tokens(logits, 1.0, 0, 0.9, last).item() == 2
    assert generation.choose_tokens(logits, 1.0, 0, 1.0, torch.zeros(1)).item() == 1
    even = torch.zeros(1, 4)  # 1/4 each, exactly: two tokens are the fewest with one half
    assert generation.choose_tokens(even, 1.0, 0, 0.5, last).item() == 1
    assert generation.choose_tokens(logits.bfloat16(), 0, 0, 1.0, last).item() == 1


def test_numbers_too_small_for_float32_leave_the_likeliest():
    choose_tokens = generation.choose_tokens
    logits = torch.tensor([[0.0, 5.0, 4.99, -40.0], [1e30, -1e30, 0.0, 9e29]])
    draws = torch.tensor([0.0, np.nextafter(np.float32(1), np.float32(0))])
    for temperature in (5e-324, 1e-46, 1e-40, 1.1e-38, 2e-38, 1e-30):
        assert choose_tokens(logits, temperature, 0, 1.0, draws).tolist() == [1, 0]
        assert choose_tokens(logits.bfloat16(), temperature, 3, 0.9, draws)[1] == 0
    for top_p in (5e-324, 1e-46, 1e-40):
        assert choose_tokens(logits, 1.0, 0, top_p, draws).tolist() == [1, 0]
        assert choose_tokens(logits, 1.0, 2, top_p, draws).tolist() == [1, 0]


def test_a_document_draws_by_the_seed_and_its_place_alone():
    model, _ = folders.random_model()
    prompts = random_prompts([6, 6, 2])
    prompts[1] = prompts[0]
    settings = dict(max_new_tokens=15, temperature=1.0, top_k=50, top_p=0.95)
    answers = generation.generate(model, prompts, seed=4, **settings)
    assert answers[0] != answers[1]  # the same prompt twice: two answers
    assert generation.generate(model, prompts, seed=4, **settings) == answers
    assert generation.generate(model, prompts[:2], seed=4, **settings) == answers[:2]
    assert generation.generate(model, prompts, seed=5, **settings) != answers


def test_sampled_frequencies_are_the_models():
    """End to end: 1000 documents, one prompt, one token each."""
    model, _ = folders.random_model()
    (prompt,) = random_prompts([6])
    pack = packing.packed_sequence_collate_fn([(torch.tensor(prompt), torch.tensor(prompt))])
    pack.pop("labels")
    with torch.no_grad():
        expected = oracle(model(**pack)[-1].numpy(), 0.5, 0, 1.0)
    answers = generation.generate(model, [prompt] * 1000, 1, temperature=0.5)
    tokens = [answer[0] for answer in answers]
    found = np.bincount(tokens, minlength=264) / 1000
    likely = np.argsort(-expected)[:5]
    assert np.abs(found - expected)[likely].max() < 4 * np.sqrt(0.25 / 1000)


# --- the command line ---

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.write_model(tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return folders.write_adapter(base.parent / "adapter", base)


def ask(capsys, *arguments):
    script.main([*map(str, arguments), "--device", "cpu", "--dtype", "float32"])
    return capsys.readouterr().out


def expected_answers(base, texts, tokens, adapter=None):
    """What the model says, from scratch."""
    model, _ = script.load_model(str(base), "cpu", torch.float32)
    if adapter:
        peft.load_adapter(model, adapter, folders.lora)
    chat = Chat.load(base)
    assert chat.stop_ids == {folders.IM_END, folders.END_OF_TEXT}
    return [chat.decode(greedy_from_scratch(
        model, chat.encode_prompt([{"role": "user", "content": text}]), tokens, chat.stop_ids))
        for text in texts]


def test_prompts_are_answered_and_one_prompt_is_streamed(capsys, base, adapter):
    texts = ["Hi", "What is a llama?"]
    first, second = expected_answers(base, texts, 12)
    arguments = ["--model", base, "--max-new-tokens", 12, "--prompt"]
    assert ask(capsys, *arguments, *texts) == f"> Hi\n{first}\n\n> {texts[1]}\n{second}\n\n"
    assert ask(capsys, *arguments, "Hi") == f"> Hi\n{first}\n"
    (other,) = expected_answers(base, ["Hi"], 12, adapter)
    assert other != first
    arguments[:2] = ["--adapter", adapter]  # the base is the one that it names
    assert ask(capsys, *arguments, "Hi") == f"> Hi\n{other}\n"
    assert ask(capsys, *arguments, "Hi", "--raw") != f"> Hi\n{other}\n"


def test_compare_shows_base_and_adapter(capsys, base, adapter, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    texts = ["Hi", "What?"]
    out = ask(capsys, "--adapter", adapter, "--compare", "--max-new-tokens", 8, "--prompt", *texts)
    before = expected_answers(base, texts, 8)
    after = expected_answers(base, texts, 8, adapter)
    for text, left, right in zip(texts, before, after):
        shown = terminal.side_by_side(f"BASE\n{left}", f"ADAPTER\n{right}", 120)
        assert f"> {text}\n{shown}\n" in out


def test_side_by_side_wraps_both_columns():
    text = terminal.side_by_side("one two three\n\nfour", "a\nbcdefghijklmnop", 23)
    assert text.splitlines() == [
        "one two    | a", "three      | bcdefghijk", "           | lmnop", "four       |"]


def test_chat_remembers_and_ends_with_the_input(capsys, base, monkeypatch):
    said = []

    def fake(model, chat, ids, settings):
        said.append(chat.decode(ids, skip_special=False))
        return f"answer {len(said)}"

    monkeypatch.setattr(terminal, "stream", fake)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo <|im_end|>\ntwo\n"))
    script.main(["--model", str(base), "--chat", "--device", "cpu"])
    assert said == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"]
    assert "<|im_end|>" in capsys.readouterr().err  # refused, and the conversation goes on


def test_streaming_waits_for_whole_characters(capsys, base, monkeypatch):
    chat = Chat.load(base)
    ids = chat.encode_prompt("é€ 😀!")
    ids.append(chat.encode_prompt("é")[0])  # ends in the middle of a character
    pieces = []

    def fake(model, prompts, on_token, **settings):
        for token in ids:
            on_token(0, token)
            pieces.append(capsys.readouterr().out)
        return [ids]

    monkeypatch.setattr(terminal, "generate", fake)
    text = terminal.stream(None, chat, [], {})
    assert [piece for piece in pieces if piece] == ["é", "€", " ", "😀", "!"]
    assert text == "é€ 😀!\ufffd" and capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "a"], "give --model or --adapter"),
    (["--model", "BASE"], "--prompt or --chat"),
    (["--model", "BASE", "--prompt", "a", "--chat"], "not both"),
    (["--model", "BASE", "--prompt", "a", "--compare"], "--compare needs --adapter"),
    (["--model", "BASE", "--prompt", "a", "--top-p", "0"], "--top-p 0.0 is out of range"),
    (["--model", "BASE", "--prompt", "a", "--top-p", "0.5"], "give --temperature above 0"),
    (["--model", "BASE", "--prompt", "a", "--top-k", "5"], "give --temperature above 0"),
    (["--model", "BASE", "--prompt", "a", ""], "--prompt: a prompt is empty"),
    (["--model", "BASE", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0 is out"),
    (["--model", "BASE", "--prompt", "a", "--temperature", "nan"], "--temperature nan is out"),
    (["--model", "BASE", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 is out"),
    (["--model", "BASE", "--prompt", "a<|im_end|>"], "<|im_end|>"),
    (["--adapter", "BASE", "--prompt", "a"], "adapter_config.json"),
    (["--model", "ADAPTER", "--prompt", "a"], "an adapter, not a model"),
    (["--model", "BASE", "--prompt", "a" * 99], "the model takes 96"),
])
def test_bad_requests_are_user_errors(base, adapter, arguments, message):
    names = {"BASE": str(base), "ADAPTER": str(adapter)}
    with pytest.raises(UserError) as error:
        script.main([names.get(word, word) for word in arguments] + ["--device", "cpu"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_as_a_script(tmp_path, base):
    done = run_script("chapter-02/generate.py", "--model", base, "--prompt", "Hi", "--device",
                      "cpu", "--dtype", "float32", "--max-new-tokens", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (answer,) = expected_answers(base, ["Hi"], 5)
    assert done.stdout == f"> Hi\n{answer}\n"
    done = run_script("chapter-02/generate.py", "--model", "nowhere", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
