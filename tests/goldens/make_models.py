"""Make tests/goldens/models/: tiny random checkpoints as transformers writes them, and its answers.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_models.py

For each model there is a folder, saved by `save_pretrained`, and `<name>.safetensors` beside it:
    input_ids, labels   (T,) int64: all documents one after another; labels not shifted, -100 where
                        nothing is trained
    lengths             (N,) int64: tokens of each document
    logits              (T, V) float32: every document run alone, nothing packed
    loss                float32: cross-entropy summed over all documents / labelled tokens
    grad.<parameter>    float32: the gradient of that loss, for every parameter
All of it is computed in float32 from the weights as saved. A tied model's lm_head has no gradient
of its own: it is in the embedding's.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

FOLDER = Path(__file__).parent / "models"
LENGTHS = (7, 1, 12, 2, 5)
SIZES = dict(
    vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2)
# The scaling must show within a dozen positions: with these values one frequency is kept, one is
# in between and the rest are divided by the factor.
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32)
THETA = dict(rope_type="default", rope_theta=1000000.0)

MODELS = {  # name: (config, dtype of the saved weights, shard size)
    "qwen3_tied": (Qwen3Config(
        **SIZES, head_dim=8, rope_parameters=THETA, tie_word_embeddings=True),
        torch.bfloat16, "1GB"),
    "qwen3_untied": (Qwen3Config(
        **SIZES | dict(num_key_value_heads=1), head_dim=10, rope_parameters=THETA,
        tie_word_embeddings=False),
        torch.bfloat16, "10KB"),
    "llama3_tied": (LlamaConfig(
        **SIZES, head_dim=8, rope_parameters=LLAMA3, rms_norm_eps=1e-5, tie_word_embeddings=True),
        torch.bfloat16, "1GB"),
    "llama3_untied": (LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, rms_norm_eps=1e-5, tie_word_embeddings=False),
        torch.float32, "1GB"),
    "qwen2_tied": (Qwen2Config(
        **SIZES, rope_parameters=THETA, tie_word_embeddings=True), torch.float32, "1GB"),
    "qwen2_untied": (Qwen2Config(
        **SIZES, rope_parameters=THETA, tie_word_embeddings=False), torch.bfloat16, "1GB"),
}


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for seed, (name, (config, dtype, shard_size)) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(seed)
        model = make_model(config, dtype, generator)
        model.save_pretrained(FOLDER / name, max_shard_size=shard_size)
        save_file(answers(model.float(), generator), FOLDER / f"{name}.safetensors",
                  {"format": "pt"})
        print(name, sum(parameter.numel() for parameter in model.parameters()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def make_model(config, dtype, generator, kind=transformers.AutoModelForCausalLM):
    """A model without a parameter that would hide a mistake, as biases of 0 and norms of 1 do.

    The logits are of order 1, so that float32 rounding, which differs between thread counts and
    CPUs, stays near 1e-6 and far from the 1e-5 that tests allow.
    """
    config.dtype = dtype
    config._attn_implementation = "eager"
    model = kind.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.3 * noise
        elif name.endswith("bias"):
            values = 0.3 * noise
        elif "embed" in name or "lm_head" in name:
            values = 0.15 * noise
        else:
            values = noise / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)
    return model.train()


def answers(model, generator, lengths=LENGTHS):
    """Run each document alone; a dict of the tensors that the docstring above lists."""
    documents = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    labels = [document.clone() for document in documents]
    labels[0][:3] = -100  # a prompt
    labels[2][5:8] = -100  # a turn in the middle
    labels[4][-1] = -100  # the last position
    # Packed position_ids or a mask are what transformers may mistake; alone there is neither.
    logits = [model(document[None], use_cache=False).logits[0] for document in documents]
    total = sum(
        F.cross_entropy(each[:-1], label[1:], reduction="sum", ignore_index=-100)
        for each, label in zip(logits, labels))
    loss = total / sum((label[1:] != -100).sum() for label in labels)
    loss.backward()
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return gradients | {
        "input_ids": torch.cat(documents), "labels": torch.cat(labels),
        "lengths": torch.tensor(lengths), "logits": torch.cat(logits).detach(),
        "loss": loss.detach()}


if __name__ == "__main__":
    main()
