"""Make tests/goldens/families/: more tiny random checkpoints of transformers, and its answers.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/goldens/make_families.py              all of them
    python tests/goldens/make_families.py gemma3_tied  only some

Those whose name begins with a family that the chapters know have a field more than the models of
make_models.py; the others are for the worked changes in tests/extensions/. Folders and files are
as in make_models.py, and each file has also

    generated   (N, 8) int64: what `generate` goes on with, greedily, after each document alone

and those of Qwen3-MoE, whose experts' gradients have the names of the files, also

    aux_loss    float32: how unevenly all tokens of all documents and layers use the experts,
                without its coefficient; not part of `loss`
    aux_grad.<parameter>    float32: its gradient, for the routers
"""

import json
import sys
from pathlib import Path

import make_models
import torch
import transformers as t
from make_models import LENGTHS, SIZES, THETA, answers
from safetensors.torch import save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

FOLDER = Path(__file__).parent / "families"
NEW = 8  # tokens generated
YARN = dict(  # of four pairs, one is kept, one is blended, and two are slowed down
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16,
    beta_fast=2.0, beta_slow=0.5)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=4.0)
FOUR = SIZES | dict(num_hidden_layers=4)
WIDE = SIZES | dict(hidden_size=32)  # so that each matrix is some blocks of NF4
GEMMA = FOUR | dict(
    head_dim=8, sliding_window=4, query_pre_attn_scalar=12,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0)})
PHI = WIDE | dict(pad_token_id=0, original_max_position_embeddings=64)
LONG = dict(  # no document comes to 24 tokens, so `long_factor` is not used
    rope_type="longrope", rope_theta=100.0, partial_rotary_factor=0.75,
    short_factor=[1.0, 1.25, 2.5], long_factor=[1.5, 3.0, 8.0])
MOE = SIZES | dict(
    head_dim=8, rope_parameters=THETA, num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=16, router_aux_loss_coef=0.01)
QWEN35 = FOUR | dict(  # that epsilon: a norm follows the recurrence, whose first tokens give little
    rms_norm_eps=0.05,
    head_dim=16, linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=12,
    linear_num_key_heads=2, linear_num_value_heads=8, max_position_embeddings=128,
    rope_parameters=THETA | dict(
        partial_rotary_factor=0.25, mrope_section=[1, 1, 0], mrope_interleaved=True))
LONGER = (*LENGTHS, 70)  # tokens: more than a chunk of the recurrence

MODELS = {  # name: (config, dtype of the saved weights, lengths of the documents)
    "mistral_window": (t.MistralConfig(
        **WIDE, rope_parameters=THETA, sliding_window=4, tie_word_embeddings=False),
        torch.float32, LENGTHS),
    "qwen2_window": (t.Qwen2Config(
        **WIDE, rope_parameters=THETA, use_sliding_window=True, sliding_window=5,
        max_window_layers=1, tie_word_embeddings=True), torch.float32, LENGTHS),
    "qwen3_window": (t.Qwen3Config(
        **SIZES, head_dim=8, rope_parameters=YARN, use_sliding_window=True, sliding_window=3,
        max_window_layers=2, layer_types=["sliding_attention", "full_attention"],
        attention_bias=True, tie_word_embeddings=False), torch.float32, LENGTHS),
    "llama_yarn": (t.LlamaConfig(
        **SIZES, head_dim=8, rope_parameters=YARN, attention_bias=True,
        tie_word_embeddings=True), torch.float32, LENGTHS),
    "llama_linear": (t.LlamaConfig(
        **WIDE, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False), torch.float32, LENGTHS),
    "gemma3_tied": (t.Gemma3TextConfig(**GEMMA, tie_word_embeddings=True), torch.float32, LENGTHS),
    "gemma3_untied": (t.Gemma3TextConfig(
        **GEMMA, tie_word_embeddings=False), torch.bfloat16, LENGTHS),
    "phi3_untied": (t.Phi3Config(
        **PHI, rope_parameters=THETA, sliding_window=4, tie_word_embeddings=False),
        torch.float32, LENGTHS),
    "phi3_tied": (t.Phi3Config(
        **PHI, rope_parameters=THETA | dict(partial_rotary_factor=0.75), sliding_window=None,
        tie_word_embeddings=True), torch.bfloat16, LENGTHS),
    "qwen3_moe_tied": (t.Qwen3MoeConfig(
        **MOE, norm_topk_prob=True, tie_word_embeddings=True), torch.float32, LENGTHS),
    "qwen3_moe_untied": (t.Qwen3MoeConfig(
        **MOE, norm_topk_prob=False, tie_word_embeddings=False), torch.bfloat16, LENGTHS),
    "qwen3_5_tied": (t.Qwen3_5TextConfig(
        **QWEN35, tie_word_embeddings=True), torch.float32, LONGER),
    "qwen3_5_untied": (t.Qwen3_5TextConfig(
        **QWEN35, tie_word_embeddings=False), torch.bfloat16, LONGER),
    "phi3_longrope": (t.Phi3Config(
        **PHI | dict(original_max_position_embeddings=24), rope_parameters=LONG, sliding_window=9,
        tie_word_embeddings=True), torch.float32, LENGTHS),
    "qwen3_5_vision": (t.Qwen3_5Config(
        text_config=QWEN35, tie_word_embeddings=False, vision_config=dict(
            depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2,
            out_hidden_size=24, num_position_embeddings=4)), torch.bfloat16, LENGTHS),
}


def by_expert(tensors):
    """The gradients of stacked experts as those of the matrices that are in the files."""
    for name, tensor in tensors.items():
        owner, _, stack = name.rpartition(".")
        if not owner.endswith("mlp.experts"):
            yield name, tensor
            continue
        names = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
        for expert, matrices in enumerate(tensor):
            for matrix, part in zip(names, matrices.chunk(len(names))):
                yield f"{owner}.{expert}.{matrix}.weight", part.clone()


def balance(model, documents):
    """Each document is run alone; then what its tokens were given counts with all the others'."""
    model.zero_grad()
    logits = [model(ids[None], output_router_logits=True).router_logits for ids in documents]
    loss = load_balancing_loss_func(
        tuple(torch.cat(layer) for layer in zip(*logits)), model.config.num_experts,
        model.config.num_experts_per_tok)
    loss.backward()
    gradients = {f"aux_grad.{name}": parameter.grad for name, parameter in model.named_parameters()
                 if name.endswith("mlp.gate.weight")}
    return gradients | {"aux_loss": loss.detach()}


def soften(model):
    """Keep rounding and logits small, as make_model does, where a norm is 1 + w and would be 2."""
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear_attn" not in name and "visual" not in name:
            parameter.data -= 1.5 if name.endswith("model.norm.weight") else 1
        if "embed_tokens" in name:
            parameter.data *= 2


def main(names):
    FOLDER.mkdir(exist_ok=True)
    for seed, (name, (config, dtype, lengths)) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        generator = torch.Generator().manual_seed(seed)
        kind = t.AutoModelForImageTextToText if "vision" in name else t.AutoModelForCausalLM
        model = make_models.make_model(config, dtype, generator, kind)
        if name.startswith("gemma3"):  # norms multiply by 1 + w
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.data -= 1
        if name.startswith("qwen3_5"):
            soften(model)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        # As it loads: some constants, such as a scale of embeddings, are rounded to the dtype that
        # a model is made in, and stay so.
        model = kind.from_pretrained(
            FOLDER / name, dtype=torch.float32, attn_implementation="eager").train()
        if "vision" in name:
            model.requires_grad_(False).lm_head.requires_grad_()  # the others' gradients say it all
        tensors = answers(model, generator, lengths)
        if config.model_type == "qwen3_moe":
            tensors = dict(by_expert(tensors))
            tensors |= balance(model, tensors["input_ids"].split(lengths))
        model.eval()
        tensors["generated"] = torch.stack([
            model.generate(ids[None], do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                           eos_token_id=None, pad_token_id=0)[0, len(ids):]
            for ids in tensors["input_ids"].split(lengths)])
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        save_file(tensors, FOLDER / f"{name}.safetensors", {"format": "pt"})
        print(name, sum(parameter.numel() for parameter in model.parameters()))
    versions = {"torch": torch.__version__, "transformers": t.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
