"""The 28 incidents of other frameworks that must not happen here: each row's test, or why not.

The rows are those of the project's incident table; a line says what went wrong elsewhere. Where a
row's test stands in another file, `ROWS` names it, and `test_every_row_has_its_test` checks that it
is there. `tests/long/bugs.py` puts each bug in and sees the row's test fail.
"""

import ast
import json
import os
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import forked
from helpers import GOLDENS, ROOT, encode_text, load

sys.path += [str(ROOT / "tests" / name) for name in ("chapter-02", "chapter-03")]
import ch2_folders
import ch3_models
import small_runs

from common.adapters import peft
from common.data import encode, readers
from common.data.chat import Chat
from common.errors import UserError
from common.files import tensors as tensor_files


HERE, CH1, CH2 = "test_incidents.py", "chapter-01/", "chapter-02/"
ACCUMULATED = CH1 + "test_ch1_train.py::test_incidents_1_and_2_accumulated_packs_equal_one_large_pack"
RANKS = "test_scale_out.py::test_incidents_3_4_14_17_ranks_equal_one_process"
RESUME = CH1 + "test_ch1_train.py::test_incidents_12_13_15_n_plus_n_steps_equal_2n_bitwise"
STATE = "common/test_state.py::"
MERGED = CH2 + "test_ch2_train.py::test_incidents_21_24_train_merge_generate"
ROWS = {
    1: ACCUMULATED,  # transformers#34191: mean of means under accumulation
    2: ACCUMULATED,  # transformers#34263, axolotl#2262: logged loss times accumulation
    3: RANKS,  # transformers#34242, torchtitan#2206: per-rank means weighted equally
    4: RANKS,  # twinkle#290: the norm reduced twice over ranks
    5: CH1 + "test_qwen3_model.py::test_incident_5_changing_document_a_leaves_document_b_bitwise",
    6: CH1 + "test_qwen3_model.py::test_incident_6_packed_equals_separate",  # LlamaFactory#7318
    7: CH1 + "test_ch1_packing.py::test_incident_7_no_target_crosses_a_border",  # torchtune#2613
    8: HERE + "::test_incident_8_the_mask_reaches_the_labels_of_the_pack",  # nanochat#582
    9: HERE + "::test_incident_9_a_pack_without_targets_is_finite_and_pulls_at_nothing",
    10: HERE + "::test_incident_10_a_conversation_longer_than_a_row_is_cut_dropped_or_an_error",
    11: HERE + "::test_incident_11_one_bos_and_a_trained_end",  # trl#1400, unsloth#2648
    12: RESUME,  # torchtitan#275, torchtune#1551: the schedule restarts
    13: RESUME,  # torchtitan#809: the loss jumps
    14: RANKS,  # torchtitan#1136: vocabulary % ranks != 0
    15: STATE + "test_rows_12_13_15_resume_is_bitwise_at_every_step",  # KempnerForge#115: moments
    16: HERE + "::test_incident_16_each_rank_sees_the_same_documents_after_a_resume",
    17: STATE + "test_row_17_other_numbers_of_ranks_take_up_the_same_state",  # torchtitan#816
    18: "test_kill.py::test_incident_18_a_killed_run_becomes_what_it_would_have_been",
    19: "test_disk.py::test_incident_19_a_disk_that_fills_up_at_any_size_of_any_file",
    20: STATE + "test_row_20_what_does_not_fit_is_named_before_anything_changes",  # nanoGPT#325
    21: MERGED,  # peft#1402, #2892: lora_B zero in the file after a good loss
    22: HERE + "::test_incident_22_an_adapter_on_the_head_stays_on_the_head",
    23: HERE + "::test_incident_23_merged_into_what_it_was_trained_on_it_is_the_same_model",
    24: MERGED,  # litgpt#1224, #960: merge broken by a regression
    25: HERE + "::test_incident_25_weight_map_cannot_leave_its_folder",
    26: HERE + "::test_incident_26_a_token_beyond_the_embedding_is_refused_up_front",
    27: HERE + "::test_incident_27_the_loss_of_a_bf16_model_is_a_float32_number",
    28: "does not apply: bits per byte are nowhere computed, losses are per token and scores are"
        " exact matches of tokens (the test looks for them: test_incident_28_no_byte_is_counted)",
}


def test_every_row_has_its_test():
    assert list(ROWS) == list(range(1, 29))
    for row, where in ROWS.items():
        if where.startswith("does not apply: "):
            continue
        file, _, name = where.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], where
        assert str(row) in name.split("_") and ("incident" in name or "row" in name), where


# --- what is trained on ---

@pytest.mark.parametrize("chapter", ["01", "02", "03"])
@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_incident_8_the_mask_reaches_the_labels_of_the_pack(tmp_path, monkeypatch, name, chapter):
    """Golden conversations, from a .jsonl to the collated pack: exactly the tokens that
    transformers marks are targets, each of the position before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = GOLDENS / "chat" / name
    examples = json.loads((folder / "expected.json").read_text())["examples"]
    chosen = [one for one in examples.values() if not one["variables"] and any(one["trained"])]
    assert len(chosen) >= 5
    with open(tmp_path / "data.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": one["messages"]}) + "\n" for one in chosen)
    made = encode.encode(readers.Records([tmp_path / "data.jsonl"]), Chat.load(folder), 4096)
    collate = load(f"chapter-{chapter}/packing.py").packed_sequence_collate_fn
    pack = collate([made[i] for i in range(len(made))])
    expected = []
    for one in chosen:
        labels = [token if trained else -100 for token, trained in zip(one["ids"], one["trained"])]
        expected += labels[1:] + [-100]
    assert pack["labels"].tolist() == expected
    assert pack["input_ids"].tolist() == sum((one["ids"] for one in chosen), [])


def losses_of_a_pack():
    """{chapter: (model, function of a pack that gives the sum of its losses)}"""
    found = {}
    for chapter in ("01", "02"):
        train = load(f"chapter-{chapter}/train.py")
        kind = {"01": "Qwen3", "02": "Llama"}[chapter]
        config = getattr(train, f"{kind}Config").from_dict(
            {**small_runs.CONFIG, "rope_scaling": None})
        torch.manual_seed(0)
        model = getattr(train, f"{kind}ForCausalLM")(config)
        found[chapter] = model, lambda pack, train=train, model=model: train.loss_sum(model, pack)
    model = ch3_models.build()
    found["03"] = model, lambda pack: model(**pack)
    return found


@pytest.mark.parametrize("chapter", ["01", "02", "03"])
def test_incident_9_a_pack_without_targets_is_finite_and_pulls_at_nothing(
        tmp_path, monkeypatch, capsys, chapter):
    """The sum over no targets is 0 and so is its gradient; and such examples never come so far:
    they are skipped, counted and named."""
    model, loss_of = losses_of_a_pack()[chapter]
    ids = torch.tensor([5, 6, 7, 8])
    pack = load(f"chapter-{chapter}/packing.py").packed_sequence_collate_fn(
        [(ids, torch.full_like(ids, -100)), (ids[:1], ids[:1])])
    assert (pack["labels"] == -100).all()
    loss = loss_of(pack) / max(1, 0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chat = Chat.load(ROOT / "common/tiny")
    records = [{"messages": [{"role": "user", "content": "a"}], "where": "d:1"},
               {"messages": [{"role": "user", "content": "a"},
                             {"role": "assistant", "content": "b"}], "where": "d:2"}]
    made = encode.encode(records, chat, 64)
    assert len(made) == 1 and made.notes == ["1 skipped, nothing in it to train on (first: d:1)"]
    assert "nothing in it to train on" in capsys.readouterr().out
    with pytest.raises(UserError, match="no example can be trained on"):
        encode.encode(records[:1], chat, 64)

    code, text = forked(lambda: run_without_targets(tmp_path, chapter))
    assert code == 0, text
    for line in small_runs.metrics(tmp_path / "run"):
        assert line.get("loss", 0) == line.get("grad_norm", 0) == line.get("eval_loss", 0) == 0


def run_without_targets(folder, chapter):
    """A whole run of a chapter's loop in which no pack has any target."""
    train = load(f"chapter-{chapter}/train.py")
    collate = train.packed_sequence_collate_fn

    def masked(examples, *more):
        return collate([(ids, torch.full_like(ids, -100)) for ids, _ in examples], *more)

    with mock.patch.object(train, "packed_sequence_collate_fn", masked):
        small_runs.train([*small_runs.write_inputs(folder), "--out", folder / "run"], chapter)


def test_incident_10_a_conversation_longer_than_a_row_is_cut_dropped_or_an_error(
        tmp_path, monkeypatch):
    """As --too-long says, and counted; never a row of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chat = Chat.load(ROOT / "common/tiny")

    def record(question, answer, where):
        return {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": answer}], "where": where}

    records = [record("a", "b", "d:1"), record("a", "xyz " * 50, "d:2"),
               record("xyz " * 50, "b", "d:3")]
    for policy, count, note in (("truncate", 2, "2 cut, longer than 40 tokens (first: d:2)"),
                                ("drop", 1, "2 dropped, longer than 40 tokens (first: d:2)")):
        made = encode.encode(records, chat, 40, policy)
        assert len(made) == count and note in made.notes, made.notes
        for i in range(len(made)):
            ids, labels = made[i]
            assert len(ids) <= 40 and (labels[1:] >= 0).any()
        if policy == "truncate":  # of the third nothing is left that is trained on
            assert "1 skipped, nothing in it to train on within 40 tokens (first: d:3)" in made.notes
    with pytest.raises(UserError, match="d:2: .* tokens, the limit is 40"):
        encode.encode(records, chat, 40, "error")
    packing = load("chapter-01/packing.py")
    with pytest.raises(ValueError, match="longer than batch_tokens"):
        packing.PackSampler([41, 3], 40, 0)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_incident_11_one_bos_and_a_trained_end(name):
    """The ids are transformers'; where the template writes a BOS the tokenizer adds no second; the
    end of the answer is trained, or a model never learns to stop."""
    folder = GOLDENS / "chat" / name
    chat = Chat.load(folder)
    bos = chat.tokenizer.token_to_id(chat.special_tokens.get("bos_token", "")) if (
        name == "llama3") else None
    for one in json.loads((folder / "expected.json").read_text())["examples"].values():
        ids, trained = chat.encode_messages(one["messages"], **one["variables"])
        assert ids == one["ids"]
        assert bos is None or (ids.count(bos) == 1 and ids[0] == bos)
        assert bos is None or chat.encode_prompt(one["messages"]).count(bos) == 1
        if one["messages"][-1]["role"] == "assistant" and any(trained):
            last = max(i for i, yes in enumerate(trained) if yes)
            assert ids[last] in chat.stop_ids
    ids, trained = encode_text(chat, "A text.")
    assert (bos is None or ids.count(bos) == 1) and ids[-1] == chat.eos_id and trained[-1]


# --- resume ---

def documents_of(arguments, rank, world, stop_after=None):
    """Which documents rank `rank` of `world` takes at each step, in a fork in which it is alone;
    `stop_after` a step it gets SIGTERM."""
    train = load("chapter-01/train.py")
    reader, writer = os.pipe()

    def action():
        pack, rate, taken = train.PackSampler.pack, train.learning_rate, []

        def note_pack(sampler, index):
            chosen = pack(sampler, index)
            if sampler.seed is not None:  # not those of the evaluation
                taken.append(chosen)
            return chosen

        def note_step(step, total, options):
            os.write(writer, (json.dumps([step, taken]) + "\n").encode())
            taken.clear()
            if step == stop_after:
                os.kill(os.getpid(), 15)
            return rate(step, total, options)

        os.environ.update(WORLD_SIZE=str(world), RANK="0", LOCAL_RANK="0")
        with mock.patch.object(train.PackSampler, "pack", note_pack), mock.patch.object(
                train, "learning_rate", note_step), mock.patch.object(
                train, "start_ranks", torch.device), mock.patch.object(
                train, "this_rank", lambda: rank), mock.patch.object(
                train, "shard", lambda *given: None):
            small_runs.train(arguments)

    code, text = forked(action)
    os.close(writer)
    assert code == (0 if stop_after is None else 143), text
    with open(reader) as pipe:
        return dict(json.loads(line) for line in pipe)


def test_incident_16_each_rank_sees_the_same_documents_after_a_resume(tmp_path, monkeypatch):
    """accelerate#4195: the right cursor in the wrong shuffle. Stopped in the middle of an epoch,
    two ranks go on with the documents that they would have had; so does one with twice the packs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = [*small_runs.write_inputs(tmp_path, steps=12), "--save-every", "0"]
    one = documents_of([*options, "--grad-accum", "2", "--out", tmp_path / "one"], 0, 1)
    assert len(one) == 12 and sum(len(pack) for packs in one.values() for pack in packs) > 46  # epochs
    for rank in (0, 1):
        run = tmp_path / f"rank{rank}"
        whole = documents_of([*options, "--out", tmp_path / f"whole{rank}"], rank, 2)
        first = documents_of([*options, "--out", run], rank, 2, stop_after=5)
        rest = documents_of(["--resume", run], rank, 2)
        assert first == {step: whole[step] for step in range(1, 6)}
        assert rest == {step: whole[step] for step in range(6, 13)}
        assert {step: packs[rank::2] for step, packs in one.items()} == whole
    rest = documents_of(["--resume", run, "--grad-accum", "2"], 0, 1)  # again from step 5
    assert rest == {step: one[step] for step in range(6, 13)}


# --- adapters and merging ---

@pytest.mark.parametrize("method", ["lora", "dora"])
def test_incident_22_an_adapter_on_the_head_stays_on_the_head(tmp_path, method):
    """peft#2018: it leaks into a tied embedding. Untied, export and reload give the live logits and
    the merged embedding is untouched; tied, it is refused with the reason."""
    base = ch2_folders.write_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = ch2_folders.write_adapter(tmp_path / "adapter", base, method, targets="lm_head,q_proj")
    assert any("lm_head" in name for name, _ in tensor_files.iter_tensors(adapter, "adapter_model"))
    merge, generate = load("chapter-02/merge.py"), load("chapter-02/generate.py")
    live, _ = generate.load_model(base, "cpu", torch.float32)
    peft.load_adapter(live, adapter, ch2_folders.lora)
    merge.merge(adapter, tmp_path / "merged", dtype="float32")
    merged, _ = generate.load_model(tmp_path / "merged", "cpu", torch.float32)
    original = dict(tensor_files.iter_tensors(base))
    assert torch.equal(merged.model.embed_tokens.weight, original["model.embed_tokens.weight"])
    assert not torch.equal(merged.lm_head.weight, original["lm_head.weight"])
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-5, atol=1e-5)

    tied = ch2_folders.write_model(tmp_path / "tied")
    assert "lm_head.weight" not in dict(tensor_files.iter_tensors(tied))
    with pytest.raises(UserError, match="are one tensor"):
        ch2_folders.write_adapter(tmp_path / "none", tied, method, targets="lm_head,q_proj")
    inner = ch2_folders.write_adapter(tmp_path / "inner", tied, method)
    live, _ = generate.load_model(tied, "cpu", torch.float32)
    peft.load_adapter(live, inner, ch2_folders.lora)
    merge.merge(inner, tmp_path / "tied-merged", dtype="float32")
    merged, _ = generate.load_model(tmp_path / "tied-merged", "cpu", torch.float32)
    assert torch.equal(merged.model.embed_tokens.weight, live.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def logits(model, length=12, vocabulary=90):
    """Of a fixed pack of one document."""
    ids = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, cu_seqlens=torch.tensor([0, length]).int(), max_seqlen=length,
                 position_ids=torch.arange(length))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_incident_23_merged_into_what_it_was_trained_on_it_is_the_same_model(method):
    """transformers#31293, unsloth-zoo#810: an adapter of a 4-bit base, merged into the 16-bit
    weights, is another model. Into the dequantised ones it is the same; the other way the error is
    that of the quantisation, and is there to be seen."""
    quantised, dense = ch3_models.build("nf4", method), ch3_models.build("dense")
    expected = logits(quantised)
    in_4_bit, in_16_bit = ch3_models.build("dense"), ch3_models.build("dense")
    lora = ch3_models.lora
    adapted = dict(lora.adapter_modules(quantised))
    with torch.no_grad():
        for name, module in adapted.items():
            merged = module.merged()
            delta = merged - module.base.weight.float()
            in_4_bit.get_submodule(name).weight.copy_(merged)
            in_16_bit.get_submodule(name).weight.add_(delta)
    right, wrong = (logits(model) - expected for model in (in_4_bit, in_16_bit))
    assert right.abs().max() <= 1e-4 * expected.abs().max()
    assert wrong.abs().max() > 100 * right.abs().max()
    assert len(adapted) == 21 and not torch.equal(logits(dense), expected)


# --- files and numbers ---

@pytest.mark.parametrize("entry", [
    "../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..",
    "sub\\model.safetensors", "link.safetensors", "./model-1.safetensors", "model\0.safetensors"])
def test_incident_25_weight_map_cannot_leave_its_folder(tmp_path, entry):
    """transformers#47176, #46913: `..`, an absolute path, a folder, a link out."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    tensor_files.save_tensors({"a": torch.ones(2)}.items(), tmp_path)
    for place in (folder / "model-1.safetensors", folder / "sub/model.safetensors"):
        shutil.copyfile(tmp_path / "model.safetensors", place)
    (folder / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert len(list(tensor_files.iter_tensors(folder))) == 1
    index.write_text(json.dumps({"weight_map": {"a": entry}}))
    with pytest.raises(UserError, match="refused|not a .safetensors file"):
        list(tensor_files.iter_tensors(folder))


def test_incident_26_a_token_beyond_the_embedding_is_refused_up_front(tmp_path, monkeypatch):
    """torchtitan#1495: a CUDA assert in mid-run. Here a line, before the model is made, that names
    the example and both numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = small_runs.write_inputs(tmp_path)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**small_runs.CONFIG, "vocab_size": 300}))
    code, text = small_runs.start([*options, "--out", tmp_path / "run"])
    assert code == 2 and not (tmp_path / "run").exists(), text
    line = text.splitlines()[-1]
    assert "data.jsonl:1: token " in line and "vocab_size 300" in line, line


@pytest.mark.parametrize("chapter", ["01", "02", "03"])
def test_incident_27_the_loss_of_a_bf16_model_is_a_float32_number(chapter):
    """Modalities#464, and a sum in bfloat16 that was 7 % off: against the float64 loss of the same
    rounded logits, over enough tokens for a 16-bit sum to fail."""
    model, loss_of = losses_of_a_pack()[chapter]
    model.compute_dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    examples = [(ids, ids) for ids in (
        torch.randint(0, 90, (60,), generator=generator) for _ in range(40))]
    pack = load(f"chapter-{chapter}/packing.py").packed_sequence_collate_fn(examples)
    with torch.no_grad():
        loss = loss_of(pack)
        rounded = model(**{name: value for name, value in pack.items() if name != "labels"})
    assert loss.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    exact = F.cross_entropy(rounded.double(), pack["labels"], ignore_index=-100, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6 if chapter != "03" else 1e-5)
    assert exact.bfloat16().double() != exact  # a 16-bit number could not have said it
    naive = F.cross_entropy(rounded, pack["labels"], ignore_index=-100, reduction="none")
    assert abs(naive.double().sum() - exact) > 1e-5 * exact


def test_incident_28_no_byte_is_counted():
    """nanochat 2ce972a: bits per byte with wrong byte counts. None are reported here; and a text
    of which tokens end in the middle of characters is decoded whole."""
    for file in [*ROOT.glob("common/*.py"), *ROOT.glob("chapter-0?/*.py")]:
        text = file.read_text(encoding="utf-8").lower()
        assert "bits per byte" not in text and "bpb" not in text and "token_bytes" not in text, file
    chat = Chat.load(ROOT / "common/tiny")
    text = "naïve 日本語 👩‍👩‍👧 ≠"
    ids = encode_text(chat, text)[0][:-1]
    assert any("\ufffd" in chat.decode([token]) for token in ids)  # half a character
    assert chat.decode(ids) == text
    assert np.all([isinstance(chat.decode([token]), str) for token in range(chat.vocab_size)])
