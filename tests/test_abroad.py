"""Train with a template that is not ours, ask as people ask: the answer is right, and it ends.

Two faults were silent. With a base model whose end token is not the one that its template ends a
turn with, a run reported 100 % and gave a model that never stops. With a template that inserts an
empty think block, it reported 100 % and the model answered nothing rightly when it was asked. (The
folders that these tests write were once given to transformers as well, with the same answers.)
"""

import json
import shutil

import pytest
from helpers import ROOT, run_script

QUESTIONS = {"When do you open?": "At eight.", "What is the soup today?": "Pumpkin.",
             "Do you take cards?": "Of course.", "Who bakes the bread?": "Jonas."}
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# As Qwen3's does: an empty think block goes before the last answer, but not into the prompt.
THINK = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
         "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
         "{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n"
         "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
         "{% endif %}{% endif %}")


def base(folder, template, eos="<|endoftext|>"):
    """The tiny model with another chat template, and another end token."""
    shutil.copytree(ROOT / "common" / "tiny", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": eos}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 7}))
    return folder


def write_questions(file):
    rows = [{"instruction": question, "output": answer} for question, answer in QUESTIONS.items()]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def train(chapter, model, data, out, *more, steps=75):
    done = run_script(
        f"chapter-{chapter}/train.py", "--model", model, "--data", data, "--eval-data", data,
        "--steps", steps, "--batch-tokens", 256, "--eval-every", 0, "--save-every", 0, "--device",
        "cpu", "--dtype", "float32", "--out", out, *more, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(chapter, *where, cwd):
    done = run_script(f"chapter-{chapter}/generate.py", *where, "--max-new-tokens", 40, "--device",
                      "cpu", "--prompt", *QUESTIONS, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = done.stdout.strip().split("\n\n> ")
    return {block.partition("\n")[0].removeprefix("> "): block.partition("\n")[2]
            for block in blocks}


@pytest.mark.parametrize("chapter, options", [
    ("01", ["--init", "pretrained", "--lr", "2e-3"]), ("02", ["--lr", "5e-3"]),
    pytest.param("03", ["--lr", "5e-3"], marks=pytest.mark.slow)])
def test_the_end_of_turn_that_the_template_trains_is_where_it_stops(tmp_path, chapter, options):
    data = write_questions(tmp_path / "data.jsonl")
    train(chapter, base(tmp_path / "base", CHATML), data, tmp_path / "run", *options)
    final = tmp_path / "run" / "final"
    settings = json.loads((final / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [0, 2], "top_k": 7}
    kind = "--model" if chapter == "01" else "--adapter"
    assert ask(chapter, kind, final, cwd=tmp_path) == QUESTIONS
    if chapter != "01":
        done = run_script(f"chapter-{chapter}/merge.py", "--adapter", final, "--out", "merged",
                          cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "merged/generation_config.json").read_text()) == settings


def test_what_the_template_inserts_is_trained_so_the_model_knows_what_it_is_asked(tmp_path):
    data = write_questions(tmp_path / "data.jsonl")
    shown = train("02", base(tmp_path / "base", THINK), data, tmp_path / "run",
                  "--lr", "5e-3", steps=110)
    assert "[<think>\n\n</think>\n\nAt eight.<|im_end|>]" in shown and "warning" not in shown
    after = shown.partition("held-out, after training\n")[2]
    for question, answer in QUESTIONS.items():
        assert f"    {question}\n      <think> </think> {answer}\n" in after
    final = tmp_path / "run" / "final"
    thinking = {question: f"<think>\n\n</think>\n\n{a}" for question, a in QUESTIONS.items()}
    assert ask("02", "--adapter", final, cwd=tmp_path) == thinking
    assert ask("02", "--adapter", final, "--no-thinking", cwd=tmp_path) == QUESTIONS
