"""Every row of the incident table: with its bug put in, the row's test fails; without, it passes.
And the bugs that learning from preferences invites, which are no incidents: row "dpo".

    python tests/long/bugs.py                all rows
    python tests/long/bugs.py --row 15       one of them; --row may be given several times

The bug is a small change of the text of a file, in a copy of the tree; the checkout is not touched.
The tests are those that `ROWS` of tests/test_incidents.py names; those of "dpo" stand beside it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

from test_incidents import HERE, ROWS

STATE = "common/test_state.py::"
CH1 = "chapter-01/train.py"
PACKING = "chapter-01/packing.py"

# (row, what is wrong then, [(file, what stands there, what to put there), ...][, another test])
BUGS = [
    (1, "the mean of the packs' means", [
        (CH1, "pack, device)) / max(1, targets)",
         'pack, device)) / max(1, int((pack["labels"] != IGNORE).sum())) / len(packs)')]),
    (2, "the logged loss times --grad-accum", [
        (CH1, "total_loss += loss.detach()", "total_loss += loss.detach() * len(packs)")]),
    (3, "each rank's mean weighs the same", [
        (CH1, "targets, tokens = all_sum(counts).tolist()",
         "targets = counts[0].item() * world_size()\n"
         "            tokens = all_sum(counts)[1].item()")]),
    (4, "the norm is added up over the ranks twice", [
        (CH1, "norm = full_tensor(norm)", "norm = all_sum(full_tensor(norm))")]),
    (5, "attention crosses documents", [
        ("chapter-01/modeling_qwen3.py", "lengths = cu_seqlens.diff().tolist()",
         "lengths = [len(q)]")]),
    (6, "positions are those of the pack", [
        (PACKING, "torch.cat([torch.arange(length) for length in lengths.tolist()])",
         "torch.arange(int(lengths.sum()))")]),
    (7, "the shift is done across the documents", [
        (PACKING, "torch.cat([F.pad(labels[1:], (0, 1), value=IGNORE) for _, labels in examples])",
         "F.pad(torch.cat([labels for _, labels in examples])[1:], (0, 1), value=IGNORE)")]),
    (8, "the mask is dropped", [
        ("common/data/encode.py", "return input_ids, torch.where(trained, input_ids, IGNORE)",
         "return input_ids, input_ids")]),
    (9, "the mean of no losses", [(CH1, 'reduction="sum"', 'reduction="mean"')]),
    (9, "a step without targets is divided by 0", [
        (CH1, "pack, device)) / max(1, targets)", "pack, device)) / torch.tensor(targets)")]),
    (9, "examples with nothing to train on are kept", [
        ("common/data/encode.py", "if not trained[start + 1:end].any():", "if end <= start:")]),
    (10, "what is cut before the answer is kept", [
        ("common/data/encode.py", "if not trained[start + 1:end].any():", "if end < start + 2:")]),
    (10, "nothing is cut", [("common/data/encode.py", "if length <= max_length:", "if length:")]),
    (11, "the tokenizer adds a second BOS", [
        ("common/data/chat.py", "self.tokenise([layout.text], layout.whole)",
         "self.tokenise([layout.text], True)")]),
    (11, "the end of the turn is not trained", [
        ("common/data/trained_spans.py", "end = stop.end()", "end = end")]),
    (12, "the schedule begins anew", [
        (CH1, "nonfinite = guard.NonFinite()",
         'nonfinite, began = guard.NonFinite(), state["step"]'),
        (CH1, "lr = learning_rate(step, total_steps, options)",
         "lr = learning_rate(step - began, total_steps, options)")]),
    (13, "the data begin anew", [
        ("common/runs.py", "state = load_state(saved, model, optimizer, names)",
         'state = load_state(saved, model, optimizer, names) | {"next_pack": 0}')]),
    (14, "rows are cut rounding down", [
        ("common/ranks.py", "rows = tensor.chunk(mesh.size())",
         "rows = tensor.split(max(1, len(tensor) // mesh.size()))"),
        ("common/ranks.py", "parameter.to_local().copy_(rows[mesh.get_local_rank()])",
         "own = rows[mesh.get_local_rank()]\n"
         "            parameter.to_local()[:len(own)].copy_(own)")]),
    (15, "the moments are not loaded, and nobody looks", [
        ("common/files/state.py",
         "optimizer.state[parameter][entry] = kept", "pass")]),
    (15, "the moments are zeros", [
        ("common/files/state.py", "copy_into(kept, tensor)", "pass")]),
    (16, "the right place in another shuffle", [
        (CH1, "    # --- before ---\n",
         '    sampler.seed += bool(state["step"])\n    # --- before ---\n')]),
    (17, "another number of ranks drops the moments", [
        ("common/files/state.py", "copy_into(kept, tensor)",
         "copy_into(kept, tensor * (world_size() == 2))")]),
    (17, "nobody counts the packs of a step", [
        ("common/options.py", '"packs per step": its_ranks * one', '"packs per step": one')],
     "test_scale_out.py::test_another_number_of_packs_a_step_is_refused"),
    (18, "written under its name at once, and believed", [
        ("common/files/checkpoint.py", "on_all_ranks(lambda: write(tmp))",
         "on_all_ranks(lambda: (os.rename(tmp, folder), write(folder)))"),
        ("common/files/checkpoint.py", "    files = {path.name: fingerprint(path, flush=True)",
         "    tmp = folder\n    files = {path.name: fingerprint(path, flush=True)"),
        ("common/files/checkpoint.py", "    if folder.exists():\n"
         "        os.rename(folder, f\"{folder}{OLD}\")\n    os.rename(tmp, folder)\n", ""),
        ("common/files/checkpoint.py", "        if not verify(folder):\n", "        if False:\n")]),
    (18, "the last evaluation is forgotten on a resume", [
        ("common/runs.py", "state = load_state(saved, model, optimizer, names)",
         'state = load_state(saved, model, optimizer, names) | {"eval_loss": None}')],
     "test_kill.py::test_a_run_killed_after_its_last_checkpoint_logs_what_it_would_have[01]"),
    (19, "half a checkpoint stays behind", [
        ("common/files/checkpoint.py", "            shutil.rmtree(tmp, ignore_errors=True)\n", "")]),
    (19, "the old one goes before the new one is written", [
        ("common/runs.py", "    commit(folder, lambda temporary",
         "    import shutil\n    shutil.rmtree(step_folder(run, state['step'] - 2), True)\n"
         "    commit(folder, lambda temporary")]),
    (19, "nothing is said of the space needed", [
        ("common/files/checkpoint.py", "any(text in str(error) for text in FULL)", "False")]),
    (20, "what does not fit is left as it is", [
        ("common/files/state.py", "if problems:", "if False:")]),
    (20, "_orig_mod. stays in the names", [
        ("common/files/state.py", 'name.replace("_orig_mod.", "")', "name")],
     STATE + "test_row_20_compiled_modules_keep_their_names"),
    (21, "the file holds zeros for lora_B", [
        ("common/adapters/peft.py", "yield key, tensor",
         'yield key, tensor * ("lora_B" not in key)')]),
    (21, "the file holds another lora_A", [
        ("common/adapters/peft.py", "yield key, tensor",
         'yield key, tensor * (1 + ("lora_A" in key))')]),
    (22, "the head's change goes into the embedding too", [
        ("common/adapters/merging.py", "module.base.weight.copy_(merged)",
         "module.base.weight.copy_(merged)\n        if name == \"lm_head\":\n"
         "            model.model.embed_tokens.weight.copy_(merged)")]),
    (22, "a tied head is adapted", [
        ("common/adapters/targets.py", "            if tied:", "            if False:")]),
    (23, "merged into weights that were rounded once more", [
        ("chapter-03/lora.py", "return full_precision(self.base.weight) + full_tensor(B @ A)",
         "return full_precision(self.base.weight.bfloat16()) + full_tensor(B @ A)")]),
    (24, "merged without the scale", [
        ("chapter-02/lora.py", "return full_precision(self.base.weight) + full_tensor(B @ A)",
         "return full_precision(self.base.weight) + full_tensor(B @ A) / self.scale")]),
    (24, "the merged weight is not kept", [
        ("common/adapters/merging.py", "module.base.weight.copy_(merged)\n", "pass\n")]),
    (25, "any name is followed", [
        ("common/files/tensors.py",
         """if {"/", "\\\\", "\\0"} & set(name):""", "if False:")]),
    (25, "a link is followed", [
        ("common/files/tensors.py",
         "if not any(file.resolve().is_relative_to(home) for home in homes):", "if False:")]),
    (26, "ids are not looked at", [
        ("common/data/encode.py",
         "if vocab_size is not None and len(ids) and ids.max() >= vocab_size:",
         "if False:")]),
    (27, "chapter 1 adds up in bfloat16", [
        (CH1, "logits = model(**inputs).float()", "logits = model(**inputs)")]),
    (27, "chapter 3 adds up in bfloat16", [
        ("chapter-03/loss.py", "sum_dtype = torch.promote_types(hidden.dtype, torch.float32)",
         "sum_dtype = hidden.dtype")]),
    (28, "bits per byte are reported", [
        ("common/metrics.py", "Report an evaluation", "Report bits per byte: an evaluation")]),
]

LOG_P, PAIRS, REFERENCE = (f"chapter-03/test_{name}.py::"
                           for name in ("logprobs", "preference", "reference"))
POST = "chapter-03/post_training/"
MASKS = PAIRS + "test_tokens_and_masks_are_trls"
# The same, each with its test.
DPO = [("dpo", *bug) for bug in [
    ("a position is scored with its own token", [
        ("chapter-03/packing.py", "F.pad(labels[1:], (0, 1), value=IGNORE) for", "labels for")],
     PAIRS + "test_log_probs_of_answers_are_trls"),
    ("the mask is shifted by one", [
        ("common/data/encode.py", "torch.where(trained, input_ids, IGNORE)",
         "torch.where(trained.roll(1), input_ids, IGNORE)")], MASKS),
    ("the prompt is scored", [
        ("common/data/encode.py", "return input_ids, torch.where(trained, input_ids, IGNORE)",
         "return input_ids, input_ids")], MASKS),
    ("earlier answers are scored", [
        (POST + "pairs.py", 'message["train"] = False', "pass")], MASKS),
    ("the end of the turn is not scored", [
        ("common/data/trained_spans.py", "end = stop.end()", "end = end")], MASKS),
    ("the mean of an answer's log p", [
        (POST + "logprobs.py", '.double(), "sum",', '.double(), "mean",')],
     PAIRS + "test_log_probs_of_answers_are_trls"),
    ("sums of log p in float32", [
        (POST + "logprobs.py", "values.to(device).double()", "values.to(device)")],
     LOG_P + "test_long_documents_are_summed_to_the_last_digit"),
    ("every token pulls as much", [
        (POST + "logprobs.py", "torch.mul(slopes, -gradient[:, None],",
         "torch.mul(slopes, -gradient.mean(),")], LOG_P + "test_float32_equals_the_oracle"),
    ("every token pulls as much at the head", [
        (POST + "logprobs.py", "(x * -gradient[rows, None])", "(x * -gradient.mean())")],
     LOG_P + "test_tied_embedding_gets_the_sum_of_both_gradients"),
    ("c c r r", [
        (POST + "preference.py", "[one for pair in pairs for one in pair]",
         "[pair[i] for i in (0, 1) for pair in pairs]")],
     PAIRS + "test_collated_pairs_stand_next_to_each_other"),
    ("the other answer is preferred", [
        (POST + "preference.py", "return values[:, 0] - values[:, 1]",
         "return values[:, 1] - values[:, 0]")], PAIRS + "test_losses_and_scores_are_trls"),
    ("IPO of sums", [
        (POST + "preference.py", "(difference(q.m) - 1 / (2 * o.beta))",
         "(q.delta - 1 / (2 * o.beta))")], PAIRS + "test_every_loss_is_its_equation"),
    ("the odds of a certain token", [
        (POST + "preference.py", "a.clamp(max=-1e-6)", "a")],
     PAIRS + "test_orpo_is_finite_for_a_token_that_is_certain"),
    ("dropout", [(POST + "loops.py", "if options.dropout:", "if False:")],
     "chapter-03/test_train_dpo.py::"
     "test_wrong_use_is_one_line_and_leaves_nothing"),
    ("the mean of a pack, whatever its pairs", [
        (POST + "train_dpo.py", "(losses.sum() / count).backward()", "losses.mean().backward()")],
     PAIRS + "test_a_step_divides_by_all_of_its_pairs"),
    ("adapters stay off", [
        (POST + "reference.py", "del layer.forward  #", "pass  #")],
     REFERENCE + "test_without_its_adapters_a_model_is_its_base_to_the_last_bit"),
    ("adapters stay off after an error", [
        (POST + "reference.py", "    try:\n        yield\n    finally:",
         "    yield\n    if True:")], REFERENCE + "test_adapters_are_on_again_after_an_error"),
    ("the adapter is the reference too", [
        (POST + "reference.py", "return lambda x: layer.base(x)",
         "return type(layer).forward.__get__(layer)")],
     PAIRS + "test_log_probs_of_answers_are_trls"),
    ("PiSSA's reference lacks what its adapter holds", [
        (POST + "reference.py", "if isinstance(layer, PiSSALinear):", "if False:")],
     REFERENCE + "test_pissas_reference_is_the_model_before_and_not_what_was_left_of_it"),
    ("the reference has a gradient", [
        (POST + "reference.py", "@torch.no_grad()\ndef reference_log_probs",
         "def reference_log_probs")],
     REFERENCE + "test_the_reference_pass_has_no_gradient_whatever_could_be_trained"),
    ("the reference moves with the policy", [
        (POST + "reference.py", "copy.deepcopy(model).to(dtype).requires_grad_(False).eval()",
         "model")], REFERENCE + "test_a_frozen_copy_is_the_model_as_it_was"),
]]
ROLLOUT, GRPO, REWARDS, DISTILL = (f"chapter-03/test_{name}.py::" for name in (
    "rollout", "grpo", "rewards", "distill"))
REWARDED = [("rewards", *bug) for bug in [
    ("the prompt is trained too", [
        (POST + "batches.py", "torch.arange(len(ids)) < len(prompt)",
         "torch.arange(len(ids)) < 0")],
     ROLLOUT + "test_a_document_is_a_prompt_and_its_answer_which_alone_is_trained"),
    ("the weights are shifted by one", [
        (POST + "grpo.py", 'nothing.index_put((pack["labelled"],), value.float())',
         'nothing.index_put((pack["labelled"] + 1,), value.float())')],
     GRPO + "test_a_pack_has_each_answers_numbers_where_its_tokens_are_predicted"),
    ("the stop token is dropped", [
        (POST + "rollout.py", "lengths[row] = min(lengths[row], n + 1)",
         "lengths[row] = min(lengths[row], n)")],
     ROLLOUT + "test_the_stop_token_is_kept_and_trained_and_cut_answers_are_told"),
    ("only one stop id counts", [
        (POST + "rollout.py", "if token in stop_ids:",
         "if token == min(stop_ids, default=-1):")],
     ROLLOUT + "test_the_stop_token_is_kept_and_trained_and_cut_answers_are_told"),
    ("a cut answer counts as finished", [
        (POST + "rollout.py", "finished=ids[n - 1] in stop_ids",
         "finished=True")],
     ROLLOUT + "test_the_stop_token_is_kept_and_trained_and_cut_answers_are_told"),
    ("tokens are drawn at temperature 1", [
        (POST + "rollout.py", "(temperature or 1)", "1")],
     ROLLOUT + "test_tokens_are_drawn_from_exactly_the_softmax"),
    ("the log p that is kept is that at temperature 1", [
        (POST + "rollout.py", "log_p.gather(1, token)[:, 0], -(p",
         "rows.float().log_softmax(-1).gather(1, token)[:, 0], -(p")],
     ROLLOUT + "test_log_probs_are_those_of_the_training_pass"),
    ("top-k is left on", [
        (POST + "rollout.py", "        p = log_p.exp()\n",
         "        p = log_p.exp() * (log_p >= log_p.topk(20).values[:, -1:])\n")],
     ROLLOUT + "test_tokens_are_drawn_from_exactly_the_softmax"),
    ("top-p is left on", [
        (POST + "rollout.py", "u[:, None] * sums[:, -1:]", "0.99 * u[:, None] * sums[:, -1:]")],
     ROLLOUT + "test_tokens_are_drawn_from_exactly_the_softmax"),
    ("a draw of 0 takes the first token, however impossible", [
        (POST + "rollout.py", "right=True", "right=False")],
     ROLLOUT + "test_an_impossible_token_is_never_drawn"),
    ("the entropy of impossible tokens is no number", [
        (POST + "rollout.py", "nansum", "sum")],
     ROLLOUT + "test_an_impossible_token_is_never_drawn"),
    ("dropout is on while answers are drawn", [
        (POST + "rollout.py", "    model.eval()\n", "")],
     ROLLOUT + "test_dropout_is_off_meanwhile_and_on_again_afterwards"),
    ("a rollout leaves the model in eval mode", [
        (POST + "rollout.py", "model.train(was_training)", "pass")],
     ROLLOUT + "test_dropout_is_off_meanwhile_and_on_again_afterwards"),
    ("an error leaves the model in eval mode", [
        (POST + "rollout.py", "    finally:\n        model",
         "    except ValueError:\n        model")],
     ROLLOUT + "test_the_mode_is_restored_after_an_error_too"),
    ("the cache's rows are repeated in the wrong order", [
        (POST + "rollout.py", "repeated = [asked.index(tuple(one)) for one in prompts]",
         "repeated = [n % len(asked) for n in range(N)]")],
     ROLLOUT + "test_greedy_answers_are_generates_one_by_one"),
    ("the cache is repeated and the logits are not", [
        (POST + "rollout.py", "cache=cache)[repeated]",
         "cache=cache).repeat(N, 1)[:N]")],
     ROLLOUT + "test_log_probs_are_those_of_the_training_pass"),
    ("all answers stand at the longest prompt's end", [
        (POST + "rollout.py", "ends = sums.diff().long()[repeated]",
         "ends = sums.diff().long()[repeated].amax().expand(N)")],
     ROLLOUT + "test_log_probs_are_those_of_the_training_pass"),
    ("finished rows are dropped from the cache and not from the positions", [
        (POST + "rollout.py", "new[growing], ends[growing]",
         "new[growing], ends[:len(growing)]")],
     ROLLOUT + "test_log_probs_are_those_of_the_training_pass"),
    ("a row's draws depend on the others", [
        (POST + "rollout.py", "np.random.default_rng((*seed, n)).random",
         "np.random.default_rng((*seed, n, len(prompts))).random")],
     ROLLOUT + "test_the_same_seed_gives_the_same_answers_whatever_is_drawn_beside"),
    ("one stream of draws for all", [
        (POST + "rollout.py", "draws[rows, n])", "draws[rows[:1], n].expand(len(rows)))")],
     ROLLOUT + "test_the_same_seed_gives_the_same_answers_whatever_is_drawn_beside"),
    ("a batch is one row too large", [
        (POST + "batches.py", "(len(found[-1]) + 1) *", "len(found[-1]) *")],
     ROLLOUT + "test_batches_hold_every_row_once_and_fit"),
    ("values are not counted in the cache", [
        (POST + "batches.py", "row = 2 * config.num_key_value_heads",
         "row = config.num_key_value_heads")],
     ROLLOUT + "test_room_is_counted_as_the_caches_tensors_are"),
    ("the cache is counted in float32", [
        (POST + "batches.py", "c = getattr(torch, options.dtype).itemsize", "c = 4")],
     ROLLOUT + "test_room_is_counted_as_the_caches_tensors_are"),
    ("the reference model's memory is given away", [
        (POST + "batches.py", '"weights", "optimizer moments", "reference model"',
         '"weights", "optimizer moments"')],
     ROLLOUT + "test_room_is_counted_as_the_caches_tensors_are"),
    ("the mean of a pack", [
        (POST + "grpo.py", "return losses.sum(),", "return losses.mean(),")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("the divisor is the pack's", [
        (POST + "grpo.py", "weights[live][rows], shares[live][rows]",
         "weights[live][rows] / shares[live][rows] / sum(len(answers[kept[i]].ids) for i in rows), "
         "shares[live][rows]")],
     GRPO + "test_a_step_is_the_same_however_it_is_packed"),
    ("the divisor counts live groups alone", [
        (POST + "grpo.py", "divisors([len(one.ids) for one in answers],",
         "divisors([len(one.ids) * bool(live_groups(rewards)[n // options.group])\n"
         "                        for n, one in enumerate(answers)],")],
     GRPO + "test_a_group_of_equal_rewards_is_left_out_but_counted"),
    ("equal groups are trained on", [
        (POST + "grpo.py", "| bool(options.kl)", "| True")],
     GRPO + "test_a_group_of_equal_rewards_is_left_out_but_counted"),
    ("what is left out shifts the weights of the rest", [
        (POST + "grpo.py", "weights[live][rows], shares[live][rows]",
         "weights[rows], shares[rows]")],
     GRPO + "test_a_group_of_equal_rewards_is_left_out_but_counted"),
    ("the rounding of equal rewards is learned", [
        (POST + "grpo.py", "torch.where(live_groups(rewards)[:, None], centred, 0.0)", "centred")],
     GRPO + "test_equal_rewards_give_exactly_nothing"),
    ("the mean is another group's", [
        (POST + "grpo.py", "centred = rewards - rewards.mean(1, keepdim=True)",
         "centred = rewards - rewards.mean(1, keepdim=True).roll(1, 0)")],
     GRPO + "test_advantages_are_trls"),
    ("advantages are dealt out by column", [
        (POST + "grpo.py", "options.scale_rewards).flatten()",
         "options.scale_rewards).t().flatten()")],
     GRPO + "test_a_group_of_equal_rewards_is_left_out_but_counted"),
    ("the standard deviation is the batch's", [
        (POST + "grpo.py", "rewards.std(1, keepdim=True)", "rewards.std()")],
     GRPO + "test_advantages_are_the_equation"),
    ("the standard deviation is biased", [
        (POST + "grpo.py", "rewards.std(1, keepdim=True)",
         "rewards.std(1, keepdim=True, correction=0)")],
     GRPO + "test_advantages_are_the_equation"),
    ("the clip takes no notice of the sign", [
        (POST + "grpo.py", "-torch.minimum(gains, bounded)", "-bounded")],
     GRPO + "test_the_clip_stops_what_goes_too_far_and_nothing_else"),
    ("the clip is as wide above as below", [
        (POST + "grpo.py", "1 + options.epsilon_high", "1 + options.epsilon")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("an answer's ratio is the sum, not the mean", [
        (POST + "grpo.py", "/ sums[:, 1].clamp(min=1)", "/ 1")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("the estimators are exchanged", [
        (POST + "grpo.py", 'options.kl_estimator == "k2"', 'options.kl_estimator == "k3"')],
     GRPO + "test_the_expectations_of_the_estimators_and_of_their_gradients"),
    ("the distance has the other sign", [
        (POST + "grpo.py", "d = log_ref - log_p", "d = log_p - log_ref")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("the distance is not divided", [
        (POST + "grpo.py", 'cost * beside["share"]', "cost")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("whatever is beyond a border counts as clipped", [
        (POST + "grpo.py", "(bounded < gains).sum()", "(bounded != gains).sum()")],
     GRPO + "test_loss_and_gradients_are_trls"),
    ("an unfinished answer is judged", [
        (POST + "rewards.py", "\n                      if answer.finished else 0)",
         ")")],
     REWARDS + "test_an_unfinished_answer_gets_nothing_unasked"),
    ("the first marker counts", [
        (POST + "rewards.py", '"", found[-1]))', '"", found[0]))')], REWARDS + "test_gsm8k"),
    ("a number needs no marker", [
        (POST + "rewards.py", 'number(answer, "####") == number', "number(answer) == number")],
     REWARDS + "test_gsm8k"),
    ("numbers are compared as floats", [
        (POST + "rewards.py", "return Decimal(re", "return float(re")], REWARDS + "test_numbers"),
    ("no number is a reward of 0", [
        (POST + "rewards.py", "if not math.isfinite(value):", "if False:")],
     REWARDS + "test_what_is_no_number_names_the_problem"),
    ("a reward may change the record", [
        (POST + "rewards.py", "copy.deepcopy(problem.record)",
         "problem.record")],
     REWARDS + "test_it_sees_the_text_without_the_stop_token_and_the_record_as_it_is"),
    ("the first answer is asked for", [
        (POST + "prompts.py", "messages[:turns[-1]]", "messages[:turns[0] - 1]")],
     REWARDS + "test_every_format_gives_the_question_as_generate_would_ask_it"),
    ("earlier answers are trained", [
        (POST + "prompts.py", 'message["train"] = False', "pass")],
     REWARDS + "test_only_the_last_turn_is_the_answer"),
    ("tools are not in the prompt", [
        (POST + "prompts.py", "**more, **variables", "**variables")],
     REWARDS + "test_tools_are_in_the_prompt"),
    ("problems are not those of the documents", [
        (POST + "prompts.py", "if numbers is not None and number not in numbers:", "if False:")],
     REWARDS + "test_problems_are_those_of_the_documents_they_are_given"),
    ("the teacher's temperature is 1", [
        (POST + "distill.py", "(others.to(sum_dtype) / temperature)",
         "(others.to(sum_dtype) / 1)")],
     DISTILL + "test_every_divergence_is_its_equation"),
    ("the student's temperature is 1", [
        (POST + "distill.py", "(z / temperature).log_softmax", "(z / 1).log_softmax")],
     DISTILL + "test_every_divergence_is_its_equation"),
    ("the gradient shrinks with the temperature", [
        (POST + "distill.py", "gradient *= share * temperature",
         "gradient *= share / temperature")],
     DISTILL + "test_at_a_high_temperature_the_gradient_is_that_of_matching_logits"),
    ("the loss shrinks with the temperature", [
        (POST + "distill.py", "share * temperature**2 * both[1]", "share * both[1]")],
     DISTILL + "test_divergences_and_gradients_are_trls"),
    ("teacher and student change places", [
        (POST + "distill.py", "(z / temperature).log_softmax(-1), beta)",
         "(z / temperature).log_softmax(-1), 1 - beta)")],
     DISTILL + "test_divergences_and_gradients_are_trls"),
    ("the mixture's weights are exchanged", [
        (POST + "distill.py", "log_p + math.log(beta), log_q + math.log1p(-beta)",
         "log_p + math.log1p(-beta), log_q + math.log(beta)")],
     DISTILL + "test_divergences_and_gradients_are_trls"),
    ("log p is mixed, not p", [
        (POST + "distill.py", "torch.logaddexp(\n"
         "        log_p + math.log(beta), log_q + math.log1p(-beta))",
         "log_p * beta + log_q * (1 - beta)")],
     DISTILL + "test_divergences_and_gradients_are_trls"),
    ("the gradient of the reverse KL lacks its mean", [
        (POST + "distill.py", "gradient = q * (ratio - found)", "gradient = q * ratio")],
     DISTILL + "test_the_gradients_along_the_logits_are_the_closed_forms"),
    ("divergences in the teacher's 16 bits", [
        (POST + "distill.py", "(others.to(sum_dtype) / temperature).log_softmax(-1)",
         "(others / temperature).log_softmax(-1)")],
     DISTILL + "test_many_chunks_lose_nothing_in_bfloat16"),
    ("a divergence's chunks are added up in 16 bits", [
        ("chapter-03/loss.py", "torch.zeros_like(weight, dtype=sum_dtype) if wanted[1]",
         "torch.zeros_like(weight) if wanted[1]")],
     DISTILL + "test_many_chunks_lose_nothing_in_bfloat16"),
    ("a padded head is not cut", [
        (POST + "distill.py", "hidden, weight[:vocabulary], rows", "hidden, weight, rows"),
        (POST + "distill.py", "teacher_weight[:vocabulary].detach()", "teacher_weight.detach()")],
     DISTILL + "test_padded_heads_are_cut_before_the_softmax"),
    ("tokens without a label are taught", [
        (POST + "distill.py", "labelled = (labels >= 0).nonzero()[:, 0]",
         "labelled = torch.arange(len(labels), device=labels.device)\n"
         "        labels = labels.clamp(min=0)")],
     DISTILL + "test_tokens_without_a_label_are_left_out_whatever_they_hold"),
    ("the cross-entropy keeps its whole weight", [
        (POST + "distill.py", "gradient += (1 - share) * log_q", "gradient += log_q")],
     DISTILL + "test_shares_mix"),
    ("the teacher's logits are those of the whole pack", [
        (POST + "distill.py", "    def losses_(",
         "    taught = teacher_hidden @ head.t()\n\n    def losses_("),
        (POST + "distill.py", "teacher_hidden[rows] @ head.t()", "taught[rows]")],
     DISTILL + "test_no_logits_of_the_whole_pack_are_alive"),
    ("a chunk is the whole pack", [
        (POST + "distill.py", "rows, chunk, labelled, losses_",
         "rows, len(labels), labelled, losses_")],
     DISTILL + "test_no_logits_of_the_whole_pack_are_alive"),
    ("a chunk's rows are another chunk's", [
        (POST + "distill.py", "teacher_hidden[rows] @ head.t()",
         "teacher_hidden[:len(rows)] @ head.t()")],
     DISTILL + "test_chunks_make_no_difference"),
]]

RUN_GRPO, RUN_DISTILL = (f"chapter-03/test_train_{name}.py::" for name in ("grpo", "distill"))
REWARDED += [("rewards", *bug) for bug in [
    ("the temperature is left out in training", [
        (POST + "train_grpo.py", "chunked_log_probs(hidden / options.temperature, *rest)",
         "chunked_log_probs(hidden, *rest)")], RUN_GRPO + "test_drawing_and_training_agree"),
    ("divided by pack", [
        (POST + "train_grpo.py", "loss.backward()", "(loss / len(packs)).backward()")],
     RUN_GRPO + "test_more_packs_are_one_larger_pack"),
    ("rewards (G, P) for (P, G)", [
        (POST + "train_grpo.py", "rewards = rewards.view(-1, options.group)",
         "rewards = rewards.view(options.group, -1).T")],
     RUN_GRPO + "test_a_run_logs_what_it_drew"),
    ("prompts repeated in another order than answers", [
        (POST + "train_grpo.py", "asked = [one for one in asked for _ in range(options.group)]",
         "asked = asked * options.group")], RUN_GRPO + "test_a_run_logs_what_it_drew"),
    ("a step with nothing to learn moves", [
        (POST + "grpo.py", "| bool(options.kl)", "| True")],
     RUN_GRPO + "test_a_step_without_a_live_group_moves_nothing"),
    ("the old log p is the new one", [
        (POST + "train_grpo.py", "log_p, old[n], log_ref", "log_p, log_p.detach(), log_ref")],
     RUN_GRPO + "test_the_clip_matters_from_the_second_update_on"),
    ("GRPO's reference moves too", [
        (POST + "train_grpo.py", "reference = frozen_copy(model, options, device)",
         "reference = None")], RUN_GRPO + "test_the_reference_stays_what_the_model_was"),
    ("one end of the turn of several is known", [
        (POST + "train_grpo.py", "1, options.max_new_tokens, chat.stop_ids,",
         "1, options.max_new_tokens, {chat.eos_id},")],
     RUN_GRPO + "test_held_out_prompts_are_answered_greedily_and_rewarded"),
    ("samples of undone steps stay", [
        (POST + "train_grpo.py", 'total_steps, start_step=state["step"], name="samples',
         'total_steps, start_step=2**62, name="samples')], RUN_GRPO + "test_resume_is_bitwise"),
    ("distillation divided by pack", [
        (POST + "train_distill.py", "(loss / targets).backward()",
         '(loss / len(pack["labelled"]) / len(packs)).backward()')],
     RUN_DISTILL + "test_more_packs_are_one_larger_pack"),
    ("the padding is compared too", [
        (POST + "teacher.py", "1 + max(own.values())", "min(V, shapes.config.vocab_size)")],
     RUN_DISTILL + "test_the_teachers_padding_is_cut"),
    ("the teacher is the model as it is now", [
        (POST + "teacher.py", "hidden, weight = reference_log_probs(model, pack, teacher)",
         "hidden, weight = map(torch.Tensor.detach, (teacher or model)(**pack))")],
     RUN_DISTILL + "test_the_teacher_stays_what_the_model_was"),
    ("what the student wrote is trained as if it were right", [
        (POST + "train_distill.py", "[(pack, 1.0) for pack in written]",
         "[(pack, options.kd) for pack in written]")],
     RUN_DISTILL + "test_of_what_the_student_writes_only_the_teachers_part_counts"),
    ("the same prompts every step", [
        (POST + "train_distill.py", 'state["next_prompt"] += own', "pass")],
     RUN_DISTILL + "test_a_share_of_the_documents_gives_way"),
    ("any tokenizer will do", [(POST + "teacher.py", "if own != theirs:", "if False:")],
     RUN_DISTILL + "test_wrong_use_is_one_line_and_leaves_nothing"),
]]


def test_of(row):
    """What pytest is to run for this row."""
    where = ROWS[row]
    return where if "::" in where else f"{HERE}::" + re.search(r"test_\w+", where)[0]


def copied(place):
    """A copy of the tree in `place`, without what was compiled or run there."""
    for name in ("common", "tests", *(path.name for path in ROOT.glob("chapter-0?"))):
        shutil.copytree(ROOT / name, place / name,
                        ignore=shutil.ignore_patterns("__pycache__", "runs", ".*"))
    return place


def outcome(tree, test):
    """pytest's exit code (0: passed, 1: failed), and the line in which it says why."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider",
         f"tests/{test}"], cwd=tree, text=True, capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    said = re.findall(r"^E   (.*)", run.stdout, re.MULTILINE) or run.stdout.splitlines()[-1:]
    return run.returncode, (said or [run.stderr[-200:]])[0].strip()


def put_in(tree, changes):
    """Make the changes in the tree; gives {path: what it was}."""
    kept = {}
    for name, old, new in changes:
        path = tree / name
        text = path.read_text(encoding="utf-8")
        kept.setdefault(path, text)
        if text.count(old) != 1:
            raise SystemExit(f"{name}: {text.count(old)} times in it, and not once: {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    rows = [*map(str, ROWS), "dpo", "rewards"]
    parser.add_argument("--row", action="append", choices=rows, help="only these")
    chosen = parser.parse_args().row or rows
    began, clean, missed, count = time.monotonic(), {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        for row, what, changes, *other in BUGS + DPO + REWARDED:
            if str(row) not in chosen:
                continue
            test = other[0] if other else test_of(row)
            if test not in clean:
                clean[test] = outcome(tree, test)
            kept = put_in(tree, changes)
            code, said = outcome(tree, test)
            for path, text in kept.items():
                path.write_text(text, encoding="utf-8")
            good = clean[test][0] == 0 and code == 1
            missed, count = missed + (not good), count + 1
            verdict = "caught" if good else "FAILS WITHOUT IT" if clean[test][0] else "NOT CAUGHT"
            print(f"{row:>3} {verdict}: {what}\n      {said[:110]}", flush=True)
    print(f"{count} bugs of {len(set(chosen))} rows, {missed} not caught; "
          f"{time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
