"""Make tests/goldens/trl/: preference losses, metrics and gradients as TRL's trainers compute them.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0
    python tests/goldens/make_trl.py

Nothing else in this project imports trl. All is float32, on the CPU, with one thread. N = 6 is the
number of pairs; every (N, 2) has the chosen answer in column 0 and the rejected one in column 1.
MODEL is qwen3 (tied) or llama3 (untied, with its scaled RoPE); its tokenizer and its chat template
are the ones in ../chat/MODEL. Two settings for each: in `dense` the policy is another model and
the reference is MODEL; in `lora` the policy is MODEL with an adapter, and the reference is the
same with its adapter switched off.

records.json            list of N: {"prompt": messages, "chosen": [message], "rejected": [message]}
MODEL/                  the base model, as save_pretrained writes it
MODEL-dense.safetensors the policy of `dense`: every parameter of MODEL, by the same names, in
                        bfloat16; the policy is these values in float32
MODEL-lora/             the adapter of `lora`, as PEFT writes it: r 4, alpha 8, all linear layers
disabled.safetensors    input_ids (T,) int64; logits (T, V) float32 of the model qwen3. In PEFT a
                        LoRA, a DoRA and a VeRA adapter without zeros gives exactly these when it
                        is switched off (only the LoRA one is stored, qwen3-lora)
tokens.json             {MODEL: list of N: {
                            "prompt", "chosen", "rejected": token ids. A sequence is prompt + one
                                answer; TRL renders and encodes both together, then cuts where the
                                prompt by itself (with the generation prompt) ends
                            "chosen_mask", "rejected_mask": one 0 or 1 for each token of a sequence,
                                TRL's completion_mask without padding; 1 where the token is scored}}
                        TRL scores all that follows the prompt: for qwen3 that is the empty think
                        block before the answer, <|im_end|>, and also the "\\n" that the template
                        puts behind it. No model writes that "\\n": use this mask, not another.
answers.json            {MODEL: {"dense" or "lora": {
                            "tokens": (N, 2) scored tokens
                            "logps", "ref_logps": (N, 2) summed log-probabilities of these tokens
                                under the policy and under the reference
                            "losses": {CASE: {
                                "options": what DPOConfig was given
                                "loss": of all pairs as one batch: TRL's compute_loss
                                "pairs": (N,) compute_loss of every pair as a batch of its own.
                                    Their mean is "loss", but not where `sft` is part of it
                                "metrics": TRL's own names and values for the batch of all pairs}}
                            "gradients": list of C cases
                            "simpo", "orpo": (N,) losses of "logps" / "tokens", see below}},
                         "extremes": {"inputs": (M, 2), "simpo": (M,), "orpo": (M,)}}
MODEL-SETTING-gradients.safetensors
                        PARAMETER: (C, *shape of the parameter) float32, gradients of "loss" in C
                        cases, which are those of "gradients" in answers.json, in that order.
                        `lora`: all A and B, named as in the adapter's file. `dense`: the embedding,
                        one q_proj, one norm and one down_proj, named as in the model's file. Of the
                        embedding each twentieth row is stored: gradient[::20]
versions.json           what made all this

What TRL 1.16 computes, with s = logps - ref_logps, n = tokens and beta from "options":
    sigmoid        -log sigmoid(beta * (s_chosen - s_rejected)): sums over tokens
    hinge          max(0, 1 - beta * (s_chosen - s_rejected))
    robust         (-(1 - e) * log sigmoid(x) + e * log sigmoid(-x)) / (1 - 2e), with
                   x = beta * (s_chosen - s_rejected) and e = label_smoothing
    ipo            (s_chosen / n_chosen - s_rejected / n_rejected - 1 / (2 * beta)) ** 2
    sigmoid_norm   -log sigmoid(beta * (s_chosen / n_chosen - s_rejected / n_rejected))
    apo_zero       1 - sigmoid(beta * s_chosen) + sigmoid(beta * s_rejected)
    sft            the mean of -log p over all chosen tokens of the batch: -sum(logps) / sum(n)
                   over the chosen answers. It is not the mean of each answer's mean.
All but sft are the mean over pairs. sigmoid+sft is sigmoid + 0.7 * sft.
The metrics rewards/chosen and rewards/rejected are the means of beta * s, rewards/margins the mean
of their differences, rewards/accuracies the share of pairs with s_chosen > s_rejected (a tie is
wrong), logps/chosen and logps/rejected the means of the sums. IPO's and sigmoid_norm's rewards are
of sums, too.
    simpo          CPOTrainer.cpo_loss: -log sigmoid(2 * (a_chosen - a_rejected) - 1): beta 2,
                   gamma 1; a are mean log-probabilities per token
    orpo           ORPOTrainer.odds_ratio_loss, 0.1 * log sigmoid(o_chosen - o_rejected) with
                   o = a - log(1 - exp(a)). It is negative: TRL subtracts it from the loss of SFT.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import numpy as np
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file, save_file
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = Path(__file__).resolve().parent / "trl"
CHATS = HERE.parent / "chat"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=16, max_position_embeddings=512, initializer_range=0.2, dtype="float32")
# The wavelengths are 6, 20, 63 and 199 tokens: the first is kept, the second is in between and the
# others are divided by the factor.
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32)
MODELS = {
    "qwen3": transformers.Qwen3Config(
        vocab_size=328, hidden_size=24, tie_word_embeddings=True, eos_token_id=317, **SIZES),
    "llama3": transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, tie_word_embeddings=False, rope_parameters=LLAMA3,
        bos_token_id=315, eos_token_id=319, **SIZES),
}
LORA = dict(r=4, lora_alpha=8, target_modules=ALL)
DISABLED = {
    "dora": peft.LoraConfig(use_dora=True, **LORA),
    "vera": peft.VeraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=7),
}
CASES = {
    "sigmoid": {"loss_type": ["sigmoid"], "beta": 0.1},
    "sigmoid-beta-0.5": {"loss_type": ["sigmoid"], "beta": 0.5},
    "ipo": {"loss_type": ["ipo"], "beta": 0.1},
    "hinge": {"loss_type": ["hinge"], "beta": 0.1},
    "robust": {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 0.1},
    "apo_zero": {"loss_type": ["apo_zero"], "beta": 0.1},
    "sft": {"loss_type": ["sft"], "beta": 0.1},
    "sigmoid+sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1},
}
GRADIENTS = {
    "qwen3": ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "sigmoid+sft"],
    "llama3": ["sigmoid", "sigmoid+sft"],
}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected")
EMBEDDING = "model.embed_tokens.weight"
DENSE_GRADIENTS = (EMBEDDING, "model.layers.0.self_attn.q_proj.weight",
                   "model.layers.1.post_attention_layernorm.weight",
                   "model.layers.1.mlp.down_proj.weight")
EXTREMES = [[-1e-4, -8.0], [-8.0, -1e-4], [-1e-6, -1e-5], [-0.693, -0.6932], [-3.0, -3.0],
            [-40.0, -0.5]]


def message(role, content):
    return {"role": role, "content": content}


def record(prompt, chosen, rejected):
    """Prompt: texts by turns, the user's first; or messages."""
    if isinstance(prompt[0], str):
        prompt = [message(("user", "assistant")[i % 2], text) for i, text in enumerate(prompt)]
    return {"prompt": prompt, "chosen": [message("assistant", chosen)],
            "rejected": [message("assistant", rejected)]}


RECORDS = [
    record(["what is the weather"], "it is seven", "it is forty"),
    record(["is the sky a user"], "y", "the sky is the sky"),  # one token
    record(["what is two of seven"], "the two",
           "the grass is the system of the sky, the weather is the user of the grass, and two of "
           "the seven is what it is: seven, forty, two, the assistant and the rest of it."),
    record([message("system", "the system is seven words"), message("user", "what is grass")],
           "it is what the weather is", "grass"),
    record(["what is it", "it is the sky", "even the grass", "the grass is two", "of what"],
           "of the system", "of seven or of forty"),
    record([message("system", "assist the user"), message("user", "what is forty"),
            message("assistant", "forty is two of two, of ten"), message("user", "say it again")],
           "forty is two of two, of ten, and it is still so when the weather is not as it was.",
           "seven is seven"),
]


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    write("records.json", RECORDS)
    tokens, answers = {}, {}
    for seed, name in enumerate(MODELS):
        generator = torch.Generator().manual_seed(seed)
        make_base(name, generator)
        make_policies(name, generator)
        tokens[name] = tokenise(name)
        answers[name] = {setting: answer(name, setting, tokens[name])
                         for setting in ("dense", "lora")}
    write("tokens.json", tokens)
    means = torch.tensor(EXTREMES)
    answers["extremes"] = {"inputs": EXTREMES, "simpo": simpo(means), "orpo": orpo(means)}
    write("answers.json", short(answers))
    disabled()
    write("versions.json", {each.__name__: each.__version__
                            for each in (torch, transformers, peft, trl)})


def write(name, value):
    (HERE / name).write_text(json.dumps(value) + "\n")


def short(value):
    """The same lists and dicts, with every float the shortest that is the same float32."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [short(each) for each in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def make_base(name, generator):
    torch.manual_seed(generator.initial_seed())
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that a mistake would not leave unseen
            parameter.data.copy_(0.7 + 0.3 * torch.randn(parameter.shape, generator=generator))
    model.model.norm.weight.data *= 3  # logits, and what two models differ by, of order 1 and more
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink()


def base(name):
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)


@torch.no_grad()
def make_policies(name, generator):
    """The dense policy, 0.05 of each parameter's scale away from the base; and the adapter."""
    policy = {
        key: (value + 0.05 * value.std() * torch.randn(value.shape, generator=generator)).bfloat16()
        for key, value in load_file(HERE / name / "model.safetensors").items()}
    save_file(policy, HERE / f"{name}-dense.safetensors", {"format": "pt"})
    make_adapter(name, HERE / f"{name}-lora", peft.LoraConfig(**LORA), generator)


@torch.no_grad()
def make_adapter(name, folder, config, generator):
    """Save an adapter of the model `name`, with values that are not 0, in `folder`."""
    model = peft.get_peft_model(base(name), config)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in key or "lambda" in key:
                parameter.copy_(0.2 * noise)
            else:  # B starts at 0, DoRA's magnitude at the norm of its row
                parameter.add_(0.1 * noise)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    options = json.loads((folder / "adapter_config.json").read_text())
    options["base_model_name_or_path"] = name
    options["target_modules"].sort()  # PEFT keeps a set, in another order each time
    text = json.dumps(options, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text)


def make_trainer(name, setting, folder, options):
    """A new DPOTrainer, with new models: it changes the forward of those it gets."""
    config = trl.DPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_dropout=True, max_length=None, per_device_train_batch_size=len(RECORDS), **options)
    arguments = dict(
        args=config, train_dataset=datasets.Dataset.from_list(RECORDS),
        processing_class=transformers.AutoTokenizer.from_pretrained(CHATS / name))
    policy = base(name)
    if setting == "dense":
        weights = load_file(HERE / f"{name}-dense.safetensors")
        missing, unexpected = policy.load_state_dict(weights, strict=False)
        assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
        trainer = trl.DPOTrainer(model=policy, ref_model=base(name), **arguments)
    else:
        # Given a model that has its adapter already, TRL would keep a copy of that adapter as the
        # reference; made here, the reference is the model without any.
        trainer = trl.DPOTrainer(model=policy, peft_config=peft.LoraConfig(**LORA), **arguments)
        weights = load_file(HERE / f"{name}-lora" / "adapter_model.safetensors")
        result = peft.set_peft_model_state_dict(trainer.model, weights)
        assert not result.unexpected_keys and list(trainer.model.peft_config) == ["default"]
    trainer.model.train()
    return trainer


def collate(trainer, indices):
    return trainer.data_collator([trainer.train_dataset[i] for i in indices])


def tokenise(name):
    """TRL's ids and masks of every record, from its dataset and its collator."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, "lora", folder, CASES["sigmoid"])
    batch = collate(trainer, range(len(RECORDS)))
    tokenizer = trainer.processing_class
    results = []
    for i, (example, source) in enumerate(zip(trainer.train_dataset, RECORDS)):
        result = {"prompt": example["prompt_ids"]}
        alone = tokenizer.apply_chat_template(
            source["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert alone == example["prompt_ids"]  # nothing of the prompt went to the answers
        for answer, row in (("chosen", i), ("rejected", i + len(RECORDS))):
            result[answer] = example[f"{answer}_ids"]
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == result["prompt"] + result[answer]
            result[f"{answer}_mask"] = batch["completion_mask"][row][real].tolist()
            print(name, i, answer, len(result["prompt"]), len(result[answer]),
                  repr(tokenizer.decode(result[answer])))
        results.append(result)
    return results


def answer(name, setting, tokens):
    result = {"tokens": [[sum(each["chosen_mask"]), sum(each["rejected_mask"])] for each in tokens]}
    counts = torch.tensor(result["tokens"])
    losses, gradients = {}, {}
    for case, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(name, setting, folder, options)
        batch = collate(trainer, range(len(RECORDS)))
        if case == "sigmoid":
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            with torch.no_grad():
                policy = trainer.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                    labels=labels, fused_lm_head=True).log_probs.sum(1)
            reference = trainer.ref_model if setting == "dense" else trainer.model
            ref = torch.stack(trainer.compute_ref_log_probs(reference, batch), 1)
            logps = policy.view(2, -1).T
            assert (logps != ref).all()
            result |= {"logps": logps.tolist(), "ref_logps": ref.tolist()}
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {key: trainer._metrics["train"][key][0] for key in METRICS}
        if case in GRADIENTS[name]:
            for key, value in kept(trainer, setting).items():
                gradients.setdefault(key, []).append(value)
        with torch.no_grad():
            pairs = [trainer.compute_loss(trainer.model, collate(trainer, [i])).item()
                     for i in range(len(RECORDS))]
        if "sft" not in options["loss_type"]:
            close(torch.tensor(pairs).mean(), loss.detach())
        losses[case] = {"options": options, "loss": loss.item(), "pairs": pairs, "metrics": metrics}
        print(name, setting, case, losses[case])
    assert [case for case in CASES if case in GRADIENTS[name]] == GRADIENTS[name]  # their order
    gradients = {key: torch.stack(values) for key, values in gradients.items()}
    save_file(gradients, HERE / f"{name}-{setting}-gradients.safetensors", {"format": "pt"})
    check(name, setting, tokens, logps, ref, counts, losses)
    means = logps / counts
    return result | {"losses": losses, "gradients": GRADIENTS[name],
                     "simpo": simpo(means), "orpo": orpo(means)}


def kept(trainer, setting):
    """The gradients to store, by the names that their parameters have in the files."""
    parameters = dict(trainer.model.named_parameters())
    if setting == "lora":
        found = {key.replace(".default.", "."): parameter.grad
                 for key, parameter in parameters.items() if parameter.requires_grad}
        assert len(found) == 2 * 7 * 2
    else:
        found = {key: parameters[key].grad for key in DENSE_GRADIENTS}
        found[EMBEDDING] = found[EMBEDDING][::20]
    assert all(value.any() for value in found.values())
    return found


@torch.no_grad()
def check(name, setting, tokens, logps, ref, counts, losses):
    """Compute all of TRL's numbers again from the stored files: each sequence by itself, without
    padding, float64 log-softmax. Raise an AssertionError where they differ."""
    reference, policy = base(name).double().eval(), base(name).eval()
    if setting == "dense":
        weights = load_file(HERE / f"{name}-dense.safetensors")
        policy.load_state_dict(weights, strict=False)
    else:
        policy = peft.PeftModel.from_pretrained(policy, HERE / f"{name}-lora").eval()
    policy = policy.double()

    def score(model, prompt, ids):
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].double()
        logits = logits[len(prompt) - 1:-1]
        picked = logits[torch.arange(len(ids)), torch.tensor(ids)]
        highest = logits.max(1, keepdim=True).values
        return (picked - highest[:, 0] - (logits - highest).exp().sum(1).log()).sum()

    ours, theirs = (
        torch.stack([torch.stack([score(model, each["prompt"], each[answer])
                                  for answer in ("chosen", "rejected")]) for each in tokens])
        for model in (policy, reference))
    assert counts.tolist() == [[len(each["chosen"]), len(each["rejected"])] for each in tokens]
    close(logps, ours)
    close(ref, theirs)
    s = ours - theirs
    delta, m = s[:, 0] - s[:, 1], (s / counts) @ torch.tensor([1.0, -1.0]).double()

    def nll(x):
        return (1 + (-x).exp()).log()

    sft = -ours[:, 0].sum() / counts[:, 0].sum()
    expected = {
        "sigmoid": nll(0.1 * delta), "sigmoid-beta-0.5": nll(0.5 * delta), "ipo": (m - 5) ** 2,
        "hinge": (1 - 0.1 * delta).clamp(min=0), "sigmoid_norm": nll(0.1 * m),
        "robust": (0.9 * nll(0.1 * delta) - 0.1 * nll(-0.1 * delta)) / 0.8,
        "apo_zero": 1 - (0.1 * s[:, 0]).sigmoid() + (0.1 * s[:, 1]).sigmoid()}
    for case, pairs in expected.items():
        close(torch.tensor(losses[case]["pairs"]), pairs)
        close(torch.tensor(losses[case]["loss"]), pairs.mean())
    alone = -ours[:, 0] / counts[:, 0]
    close(torch.tensor(losses["sft"]["loss"]), sft)
    close(torch.tensor(losses["sft"]["pairs"]), alone)
    close(torch.tensor(losses["sigmoid+sft"]["loss"]), expected["sigmoid"].mean() + 0.7 * sft)
    close(torch.tensor(losses["sigmoid+sft"]["pairs"]), expected["sigmoid"] + 0.7 * alone)
    print(name, setting, "sft: mean over tokens", sft.item(), "mean of means", alone.mean().item())
    print(name, setting, "differences of the rewards / beta", delta.tolist(), "per token",
          m.tolist(), "float32 is off by", (logps - ours).abs().max().item(),
          (ref - theirs).abs().max().item())
    for case, values in losses.items():
        rewards = values["options"]["beta"] * s
        wanted = (*rewards.mean(0), (delta > 0).double().mean(),
                  (rewards[:, 0] - rewards[:, 1]).mean(), *ours.mean(0))
        close(torch.tensor([values["metrics"][key] for key in METRICS]), torch.stack(wanted))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=2e-5)


def simpo(means):
    options = SimpleNamespace(
        loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = CPOTrainer.cpo_loss(options, means[:, 0], means[:, 1])
    return losses.tolist()


def orpo(means):
    options = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(options, means[:, 0], means[:, 1])
    return losses.tolist()


@torch.no_grad()
def disabled():
    """The logits of qwen3, which PEFT gives too when an adapter of any of three kinds is off."""
    generator = torch.Generator().manual_seed(100)
    ids = torch.tensor([[316, 260, 12, 280, 292, 309, 77, 317]])
    logits = base("qwen3").eval()(input_ids=ids).logits[0]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [HERE / "qwen3-lora"] + [Path(scratch) / kind for kind in DISABLED]
        for folder in folders[1:]:
            make_adapter("qwen3", folder, DISABLED[folder.name], generator)
        for folder in folders:
            model = peft.PeftModel.from_pretrained(base("qwen3"), folder).eval()
            assert all(value.all() for key, value in model.state_dict().items()
                       if "lora" in key or "vera" in key)
            change = (model(input_ids=ids).logits[0] - logits).abs().max().item()
            assert change > 0.01, (folder.name, change)
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids).logits[0], logits), folder.name
            print(folder.name, "changes logits by", change)
    save_file({"input_ids": ids[0], "logits": logits}, HERE / "disabled.safetensors")


if __name__ == "__main__":
    main()
