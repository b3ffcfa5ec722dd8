"""Make tests/goldens/trl-rewards/: GRPO's losses and gradients, its advantages, and the divergences
of distillation, as TRL computes them.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0
    python tests/goldens/make_trl_rewards.py

Nothing else in this project imports trl. All is float32, on the CPU, with one thread. The policy
is ../trl/qwen3 with the adapter ../trl/qwen3-lora, the reference is the same with its adapter
switched off. N = 6 answers: 0 to 2 are a group with one prompt, 3 to 5 another.

grpo.safetensors        the batch, as TRL takes it: P = 9, C = 8
                            prompt_ids, prompt_mask (N, P) int64: prompts, padding on the left
                            completion_ids, completion_mask (N, C) int64: answers, padding on the
                                right. Answer 4 was cut off, the others end with <|im_end|>
                            advantages (N,): made up, of both signs. Those of a group do not sum to
                                0: otherwise the loss of `grpo` would be 0 on-policy
                            logps, entropies (N, C): log-probability of each answer's token and
                                entropy in nats of the distribution it came from, under the policy
                            logps-temperature, entropies-temperature (N, C): with temperature 0.7
                            old_logps (N, C): `logps` plus noise with a deviation of 0.3
                            ref_logps (N, C): under the reference
                        Whatever belongs to padding is 0.
grpo.json               {"gradients": list of the C cases, in their order in grpo-gradients,
                         "cases": {CASE: {
                             "options": what GRPOConfig was given
                             "old": true if old_logps was given. Otherwise the answers are
                                 on-policy: TRL puts in `logps`, without gradient
                             "loss": TRL's _compute_loss of the whole batch
                             "metrics": TRL's own names and values for the batch}}}
grpo-gradients.safetensors
                        PARAMETER: (C, *shape of the parameter) float32, the gradients of "loss",
                        named as in the adapter's file: all A and B
advantages.json         {"num_generations": G = 5, "rewards": (20,), 4 groups one after the other,
                         "group", "none": (20,) TRL's advantages with this scale_rewards,
                         "frac_reward_zero_std": of the four groups, as TRL logs it}
                        In group 2 all rewards are the same, in group 3 one is 0.01 above the rest.
distillation.safetensors
                        T = 7 positions, V = 40, hidden sizes 12 (student) and 20 (teacher). At the
                        last position some of the teacher's probabilities are 0 in float32.
                            student_hidden, student_head, teacher_hidden, teacher_head:
                                (T, 12), (V, 12), (T, 20), (V, 20)
                            student_logits, teacher_logits (T, V): hidden @ head.T
                            labels (T,) int64: -100 where nothing is learned, else 0. They belong
                                to the same row of the logits: there is nothing to shift
                            losses (5, 3), by beta and temperature of distillation.json: the sum
                                over live positions, by GKDTrainer.generalized_jsd_loss
                            logits_gradients (5, 3, T, V): its gradient along student_logits
                            chunked_losses (5, 3), hidden_gradients (5, 3, T, 12), head_gradients
                                (5, 3, V, 12): by the _chunked_divergence_loss of
                                DistillationTrainer, which forms the gradients by itself
                            entropies (3,): sum of the student's entropy over live positions
distillation.json       {"betas": list of 5, "temperatures": list of 3, "live": live positions,
                         "batchmean": (5, 3), generalized_jsd_loss with its default reduction}
versions.json           what made all this

What TRL 1.16 computes for GRPO, with w = exp(logps - old_logps) of each token, advantage A, and
epsilon_high = epsilon where it is not given:
    token          l = -min(w * A, clip(w, 1 - epsilon, 1 + epsilon_high) * A)
    sequence       the same with one w for an answer: exp(mean of logps - old_logps over its
                   tokens). Each of its tokens gets the same l.
    beta           k = exp(d) - d - 1 with d = ref_logps - logps; l + beta * k of each token. With
                   use_bias_correction_kl, TRL's default, k is multiplied by w, before that w is
                   clipped, and gradients flow through it: on-policy the same loss, not the same
                   gradient.
    dapo           sum of l over all tokens / num_items_in_batch, here the tokens of all answers
    grpo           mean over answers of the mean of l over an answer's tokens
    dr_grpo        sum of l over all tokens / (N * max_completion_length): 16 is in "options",
                   longer than the batch is wide
    temperature    divides all logits, in the metric `entropy` too
The metrics: `kl` is the mean of k over all tokens, times w with the correction. For clip_ratio a
token is `low` if w < 1 - epsilon and A < 0, `high` if w > 1 + epsilon_high and A > 0; `region` is
either. `mean` is the share of all tokens; `low_min` and `high_max` are the lowest and the highest
share of one answer. With `sequence` the answers are counted, not tokens: `low_min` is 0 or 1.

advantages: A = r - mean of its group; `group` divides that by (std + 1e-4), std with G - 1 in the
denominator. Here the advantages of equal rewards are 0. That is luck: in groups of eight rewards of
0.7 the mean is off by 6e-8 in float32, `group` makes that 6e-4 for each answer, and the group is
not counted in frac_reward_zero_std.

distillation, with p the teacher's and q the student's softmax(logits / temperature):
    beta 0         KL(p || q), forward
    beta 1         KL(q || p), reverse
    between        beta * KL(p || m) + (1 - beta) * KL(q || m) with m = beta * p + (1 - beta) * q
The last is 0 at both ends, so these two are defined apart. Nothing multiplies by
temperature ** 2. What divides the sum: in generalized_jsd_loss num_items_in_batch if it is given;
else, for `batchmean`, the live positions (without labels it is the size of the first dimension,
the batch); for `mean`, positions times V. In _chunked_divergence_loss num_items_in_batch, else
the live positions. GKDTrainer calls its loss without a temperature: it trains at 1 whatever it
samples with.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import numpy as np
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file, save_file
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

HERE = Path(__file__).resolve().parent / "trl-rewards"
BASE, ADAPTER = (HERE.parent / "trl" / name for name in ("qwen3", "qwen3-lora"))
TOKENIZER = HERE.parent / "chat" / "qwen3"
IM_END, VOCABULARY = 317, 300  # the ids from 300 on are special
PROMPTS, LENGTHS = (9, 3), (5, 1, 8, 3, 7, 2)  # tokens of each group's prompt, of each answer
CUT_OFF = 4  # the answer without <|im_end|>
ADVANTAGES = [0.9, -1.3, 0.7, -0.6, 1.1, -0.4]
LONGEST = 16
TOKEN = {"epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06}
KL = {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False}
CASES = {  # options, and whether old_logps is given
    "dapo": ({"loss_type": "dapo"}, False),
    "grpo": ({"loss_type": "grpo"}, False),
    "dr_grpo": ({"loss_type": "dr_grpo"}, False),
    "dapo-old": ({"loss_type": "dapo", **TOKEN}, True),
    "grpo-old": ({"loss_type": "grpo", **TOKEN}, True),
    "dr_grpo-old": ({"loss_type": "dr_grpo", **TOKEN}, True),
    "sequence-grpo-old": ({"loss_type": "grpo", **SEQUENCE}, True),
    "sequence-dapo-old": ({"loss_type": "dapo", **SEQUENCE}, True),
    "kl": (KL, False),
    "kl-old": ({**KL, **TOKEN}, True),
    "kl-sequence-grpo-old": ({**KL, **SEQUENCE, "loss_type": "grpo"}, True),
    "kl-corrected": ({**KL, "use_bias_correction_kl": True}, False),
    "kl-corrected-old": ({**KL, **TOKEN, "use_bias_correction_kl": True}, True),
    "temperature": ({"loss_type": "dapo", "temperature": 0.7}, False),
}
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0,
           0.35, -1.2, 2.75, 0.1, 0.8,
           0.7, 0.7, 0.7, 0.7, 0.7,
           0.5, 0.5, 0.5, 0.5, 0.51]
GENERATIONS = 5
BETAS, TEMPERATURES = [0.0, 0.1, 0.5, 0.9, 1.0], [1.0, 0.9, 2.0]


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    batch = make_batch(torch.Generator().manual_seed(0))
    save("grpo", batch)
    answers, gradients = grpo(batch)
    check_grpo(batch, answers["cases"], gradients)
    write("grpo.json", answers)
    save("grpo-gradients", gradients)
    write("advantages.json", advantages())
    tensors, answers = distillation(torch.Generator().manual_seed(1))
    check_distillation(tensors)
    save("distillation", tensors)
    write("distillation.json", answers)
    write("versions.json", {each.__name__: each.__version__
                            for each in (torch, transformers, peft, trl)})


def write(name, value):
    (HERE / name).write_text(json.dumps(short(value)) + "\n")


def save(name, tensors):
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"format": "pt"})


def short(value):
    """The same lists and dicts, with every float the shortest that is the same float32."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(each) for each in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def make_trainer(folder, rows, generations, reward=lambda prompts, **_: [0.0] * len(prompts),
                 **options):
    """A new GRPOTrainer, with the policy. A new one each time: it changes the model's forward."""
    config = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_dropout=True, max_completion_length=LONGEST, num_generations=generations,
        per_device_train_batch_size=rows, **options)
    adapter = peft.LoraConfig.from_pretrained(ADAPTER)
    adapter.inference_mode = False  # as stored, it would not be trained
    # TRL never sees these prompts: the batch is made by hand.
    data = datasets.Dataset.from_list([{"prompt": "the sky"}] * rows)
    trainer = trl.GRPOTrainer(
        model=base(), reward_funcs=reward, args=config, train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=adapter)
    weights = load_file(ADAPTER / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(trainer.model, weights)
    assert not result.unexpected_keys and list(trainer.model.peft_config) == ["default"]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_batch(generator):
    def draw(length):
        return torch.randint(VOCABULARY, (length,), generator=generator)

    prompts = [draw(length) for length in PROMPTS]
    size, width = len(LENGTHS), max(LENGTHS)
    batch = {key: torch.zeros(size, max(PROMPTS), dtype=torch.int64)
             for key in ("prompt_ids", "prompt_mask")}
    batch |= {key: torch.zeros(size, width, dtype=torch.int64)
              for key in ("completion_ids", "completion_mask")}
    for i, length in enumerate(LENGTHS):
        prompt, answer = prompts[i // 3], draw(length)
        if i != CUT_OFF:
            answer[-1] = IM_END
        batch["prompt_ids"][i, -len(prompt):] = prompt
        batch["prompt_mask"][i, -len(prompt):] = 1
        batch["completion_ids"][i, :length] = answer
        batch["completion_mask"][i, :length] = 1
    batch["advantages"] = torch.tensor(ADVANTAGES)
    mask = batch["completion_mask"]
    for suffix, temperature in (("", 1.0), ("-temperature", 0.7)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(folder, size, 3, temperature=temperature)
        batch[f"logps{suffix}"], batch[f"entropies{suffix}"] = score(trainer, batch)
        if temperature == 1:
            with trainer.model.disable_adapter():
                batch["ref_logps"], _ = score(trainer, batch)
    # This seed clips on both sides, tokens and answers, and others are beyond a border unclipped.
    noise = 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(242))
    batch["old_logps"] = batch["logps"] + noise * mask
    for key in ("logps", "ref_logps", "old_logps", "entropies", "logps-temperature"):
        assert torch.equal(batch[key] != 0, mask.bool()), key
    return batch


@torch.no_grad()
def score(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True)
    return logps, entropies * batch["completion_mask"]


def grpo(batch):
    cases, gradients = {}, {}
    inputs = {key: batch[key] for key in ("prompt_ids", "prompt_mask", "completion_ids",
                                          "completion_mask", "advantages")}
    inputs["num_items_in_batch"] = batch["completion_mask"].sum()
    inputs["ref_per_token_logps"] = batch["ref_logps"]
    for case, (options, old) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(folder, len(LENGTHS), 3, **options)
        given = inputs | ({"old_per_token_logps": batch["old_logps"]} if old else {})
        loss = trainer._compute_loss(trainer.model, given)
        loss.backward()
        found = {key.replace(".default.", "."): parameter.grad
                 for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert len(found) == 2 * 7 * 2 and all(value.any() for value in found.values())
        for key, value in found.items():
            gradients.setdefault(key, []).append(value)
        metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
        options = {"max_completion_length": LONGEST, **options}
        cases[case] = {"options": options, "old": old, "loss": loss.item(), "metrics": metrics}
        print(case, cases[case])
    gradients = {key: torch.stack(values) for key, values in gradients.items()}
    return {"gradients": list(CASES), "cases": cases}, gradients


def check_grpo(batch, cases, gradients):
    """Compute TRL's numbers again from the stored files: each sequence by itself, without padding,
    in float64, from the formulas of the docstring. Raise an AssertionError where they differ."""
    policy = peft.PeftModel.from_pretrained(base(), ADAPTER, is_trainable=True).double().eval()
    advantages = batch["advantages"].double()

    def rows(key):
        return [row[mask].double() for row, mask in zip(batch[key], batch["completion_mask"] == 1)]

    def distributions(temperature):
        results = []
        for i, length in enumerate(LENGTHS):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1]
            ids = torch.cat([prompt, batch["completion_ids"][i, :length]])
            assert len(prompt) == PROMPTS[i // 3]
            logits = policy(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1:-1]
            results.append((ids[len(prompt):], (logits / temperature).log_softmax(1)))
        return results

    names = {key.replace(".default.", "."): parameter
             for key, parameter in policy.named_parameters() if parameter.requires_grad}
    assert set(names) == set(gradients)
    old, ref = rows("old_logps"), rows("ref_logps")
    with policy.disable_adapter(), torch.no_grad():
        for expected, (ids, each) in zip(ref, distributions(1.0)):
            close(expected, each.gather(1, ids[:, None])[:, 0])
    for number, (case, values) in enumerate(cases.items()):
        options, metrics = values["options"], values["metrics"]
        temperature = options.get("temperature", 1.0)
        suffix = "" if temperature == 1 else "-temperature"
        both = distributions(temperature)
        logps = [each.gather(1, ids[:, None])[:, 0] for ids, each in both]
        entropies = [-(each.exp() * each).sum(1) for _, each in both]
        for found, expected in ((rows(f"logps{suffix}"), logps),
                                (rows(f"entropies{suffix}"), entropies)):
            close(torch.cat(found), torch.cat(expected).detach())
        before = old if values["old"] else [each.detach() for each in logps]
        low = 1 - options.get("epsilon", 0.2)
        high = 1 + options.get("epsilon_high", 0.2)
        by_answer = options.get("importance_sampling_level") == "sequence"
        losses, kls, clips, ratios = [], [], [], []
        for new, was, other, advantage in zip(logps, before, ref, advantages):
            change = (new - was).mean() if by_answer else new - was
            ratio = change.exp()
            ratios.append(ratio.detach().reshape(-1))
            loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
            k = (other - new).exp() - (other - new) - 1
            if options.get("use_bias_correction_kl"):
                k = k * ratio
            kls.append(k)
            losses.append(loss.expand(len(new)) + options.get("beta", 0.0) * k)
            clips.append(((ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)))
        tokens = torch.cat(losses)
        loss = {"dapo": tokens.mean(), "dr_grpo": tokens.sum() / (len(losses) * LONGEST),
                "grpo": torch.stack([each.mean() for each in losses]).mean()}[options["loss_type"]]
        close(torch.tensor(values["loss"]), loss.detach())
        for key, gradient in zip(names, torch.autograd.grad(loss, list(names.values()))):
            found = gradients[key][number].double()
            assert (found - gradient).abs().max() <= 2e-5 * gradient.abs().max(), (case, key)
        if "beta" in options:
            close(torch.tensor(metrics["kl"]), torch.cat(kls).mean().detach())
        close(torch.tensor(metrics["entropy"]), torch.cat(entropies).mean().detach())
        ratios = torch.cat(ratios)
        if values["old"]:  # no ratio so near to a border that rounding could decide
            assert ((ratios - low).abs().min() > 1e-3) and ((ratios - high).abs().min() > 1e-3)
        for side, name in enumerate(("low", "high")):
            flags = [clip[side].double().reshape(-1) for clip in clips]
            close(torch.tensor(metrics[f"clip_ratio/{name}_mean"]), torch.cat(flags).mean())
            assert bool(torch.cat(flags).any()) == values["old"], (case, name)
            assert not torch.cat(flags).all()
            shares = torch.stack([each.mean() for each in flags])
            key, share = (("low_min", shares.min()), ("high_max", shares.max()))[side]
            close(torch.tensor(metrics[f"clip_ratio/{key}"]), share)
        print(case, "ratios", ratios.tolist() if values["old"] else 1, "clipped on each side:",
              [torch.cat([clip[side].reshape(-1) for clip in clips]).sum().item()
               for side in (0, 1)])


def advantages():
    """TRL's own, from its method that generates and scores, with its generation replaced."""
    result = {"num_generations": GENERATIONS, "rewards": REWARDS}
    rows = len(REWARDS)
    for scale in ("group", "none"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                folder, rows, GENERATIONS, reward=lambda prompts, **_: REWARDS,
                scale_rewards=scale)
        ids = [[1]] * rows
        trainer._generate = lambda prompts: (
            ids, ids, None, ["the"] * len(prompts), None, {}, None, None)
        found = trainer._generate_and_score_completions([{"prompt": "the sky"}] * rows)
        result[scale] = found["advantages"].tolist()
        (result["frac_reward_zero_std"],) = trainer._metrics["train"]["frac_reward_zero_std"]
        print(scale, result[scale], result["frac_reward_zero_std"])
    groups = torch.tensor(REWARDS).view(-1, GENERATIONS)
    difference = groups - groups.mean(1, keepdim=True)
    close(torch.tensor(result["none"]), difference.view(-1))
    scaled = difference / (groups.std(1, keepdim=True) + 1e-4)
    close(torch.tensor(result["group"]), scaled.view(-1), atol=2e-3)
    return result


def distillation(generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {"student_hidden": draw(7, 12), "student_head": 0.6 * draw(40, 12),
               "teacher_hidden": draw(7, 20), "teacher_head": 0.5 * draw(40, 20)}
    for side, scale in (("student", 3), ("teacher", 15)):
        tensors[f"{side}_hidden"][-1] *= scale
        for key in ("hidden", "head"):  # products of these are exact in float32
            tensors[f"{side}_{key}"] = tensors[f"{side}_{key}"].bfloat16().float()
        tensors[f"{side}_logits"] = tensors[f"{side}_hidden"] @ tensors[f"{side}_head"].T
    tensors["labels"] = torch.tensor([-100, 0, 0, -100, 0, 0, 0])
    live = tensors["labels"] != -100
    assert not tensors["teacher_logits"][-1].softmax(0).all()
    found = {key: [] for key in ("losses", "logits_gradients", "chunked_losses",
                                 "hidden_gradients", "head_gradients", "entropies")}
    batchmean = []
    for beta in BETAS:
        for temperature in TEMPERATURES:
            logits = tensors["student_logits"].clone().requires_grad_()
            arguments = dict(labels=tensors["labels"][None], beta=beta, temperature=temperature)
            both = logits[None], tensors["teacher_logits"][None]
            loss = GKDTrainer.generalized_jsd_loss(*both, reduction="sum", **arguments)
            loss.backward()
            batchmean.append(GKDTrainer.generalized_jsd_loss(*both, **arguments).item())
            hidden, head = (tensors[f"student_{key}"].clone().requires_grad_()
                            for key in ("hidden", "head"))
            chunked, entropy, count = _chunked_divergence_loss(
                hidden[None], tensors["teacher_hidden"][None], head, tensors["teacher_head"],
                live[None], beta, num_items_in_batch=1, temperature=temperature)
            assert count == live.sum()
            chunked.backward()
            for key, value in (("losses", loss), ("logits_gradients", logits.grad),
                               ("chunked_losses", chunked), ("hidden_gradients", hidden.grad),
                               ("head_gradients", head.grad), ("entropies", entropy)):
                found[key].append(value.detach())
            print(beta, temperature, loss.item(), chunked.item(), batchmean[-1], entropy.item())
    for key, values in found.items():
        tensors[key] = torch.stack(values).unflatten(0, (len(BETAS), len(TEMPERATURES)))
    tensors["entropies"] = tensors["entropies"][0].clone()
    answers = {"betas": BETAS, "temperatures": TEMPERATURES, "live": live.sum().item(),
               "batchmean": torch.tensor(batchmean).view(len(BETAS), -1).tolist()}
    close(torch.tensor(answers["batchmean"]) * answers["live"], tensors["losses"])
    return tensors, answers


def check_distillation(tensors):
    """Compute TRL's numbers again in float64, from the formulas of the docstring."""
    live = tensors["labels"] != -100
    for i, beta in enumerate(BETAS):
        for j, temperature in enumerate(TEMPERATURES):
            hidden, head = (tensors[f"student_{key}"].double().requires_grad_()
                            for key in ("hidden", "head"))
            logits = hidden @ head.T
            logits.retain_grad()
            teacher = tensors["teacher_hidden"].double() @ tensors["teacher_head"].double().T
            log_q, log_p = ((each / temperature).log_softmax(1)[live]
                            for each in (logits, teacher))
            p, q = log_p.exp(), log_q.exp()
            if beta == 0:
                loss = (p * (log_p - log_q)).sum()
            elif beta == 1:
                loss = (q * (log_q - log_p)).sum()
            else:
                log_m = (beta * p + (1 - beta) * q).log()
                loss = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum()
            loss.backward()
            for key in ("losses", "chunked_losses"):
                close(tensors[key][i, j], loss.detach())
            for key, expected in (("logits_gradients", logits.grad), ("head_gradients", head.grad),
                                  ("hidden_gradients", hidden.grad)):
                worst = (tensors[key][i, j].double() - expected).abs().max()
                worst = (worst / expected.abs().max()).item()
                assert worst <= 2e-5, (beta, temperature, key, worst)
                print(beta, temperature, key, "off by", worst)
            close(tensors["entropies"][j], -(q * log_q).sum().detach())
            assert not tensors["logits_gradients"][i, j][~live].any()
            assert not tensors["hidden_gradients"][i, j][~live].any()


def close(found, expected, rtol=1e-5, atol=2e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


if __name__ == "__main__":
    main()
