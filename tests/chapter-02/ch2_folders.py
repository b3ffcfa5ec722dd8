"""Small model and adapter folders for chapter 2's tests: random weights, bytes as tokens."""

import json

import torch
from helpers import load
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common import weights
from common.adapters import peft

llama = load("chapter-02/modeling_llama.py")
lora = load("chapter-02/lora.py")

CONFIG = dict(
    model_type="llama", vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, rope_theta=1e4,
    rms_norm_eps=1e-6, tie_word_embeddings=True)
IM_START, IM_END, END_OF_TEXT = 256, 257, 258
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def random_model(seed=0, noise=0.2, **changes):
    """A model in which every parameter matters, biases and norms too."""
    config = {**CONFIG, **changes}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    torch.manual_seed(seed)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model, config


def write_tokenizer(folder, template=TEMPLATE):
    """The 256 bytes and ChatML's tokens. One end token is the tokenizer's, one the config's."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(name, special=True, normalized=False)
        for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_OF_TEXT]}))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def write_model(folder, dtype=torch.float32, template=TEMPLATE, seed=0, **changes):
    """Write a random model's folder; gives the folder."""
    folder.mkdir(parents=True)
    model, config = random_model(seed, noise=0.1, **changes)
    weights.save_weights(model, config, folder, dtype)
    write_tokenizer(folder, template)
    return folder


def write_adapter(folder, base, method="lora", scale=0.2, targets="all-linear", tokenizer=True):
    """Write an adapter, as if trained, of the model in folder `base`; gives its folder."""
    config = llama.LlamaConfig.from_dict(weights.read_config(base))
    model = llama.LlamaForCausalLM(config)
    weights.load_weights(model, base)
    adapter = lora.AdapterConfig(method=method, rank=4, alpha=8.0, target_modules=targets)
    lora.apply_adapter(model, adapter)
    generator = torch.Generator().manual_seed(5)
    for _, module in lora.adapter_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    peft.save_adapter(model, adapter, folder, str(base), lora)
    if tokenizer:
        weights.copy_tokenizer(base, folder)
    return folder
