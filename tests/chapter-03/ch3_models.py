"""Small random models and packs for chapter 3's tests."""

import json

import torch
from helpers import ROOT, load

llama = load("chapter-03/modeling_llama.py")
lora = load("chapter-03/lora.py")
packing = load("chapter-03/packing.py")
quantized_model = load("chapter-03/quantized_model.py")

CONFIG = dict(
    model_type="qwen3", vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4,
    max_position_embeddings=128, tie_word_embeddings=True)


def build(base="dense", method="full", seed=0, **changes):
    """A model in which every parameter matters; `base` "dense" or "nf4"; with its adapters."""
    torch.manual_seed(seed)
    config = llama.LlamaConfig.from_dict({**CONFIG, **changes})
    model = llama.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if base == "nf4":
        tensors = [(name, p.detach().clone()) for name, p in model.named_parameters()]
        with torch.device("meta"):
            model = llama.LlamaForCausalLM(config)
        quantized_model.load_base(model, tensors)
    if method != "full":
        lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=4, alpha=8.0))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write_half(folder):
    """The config of the tiny model with two of its four layers, in `folder`; gives the folder."""
    config = json.loads((ROOT / "common/tiny/config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pack_of(lengths, shape=None, seed=1, vocabulary=96):
    """A pack of random documents, most of their tokens trained on."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for n in lengths:
        ids = torch.randint(vocabulary, (n,), generator=generator)
        labels = ids.where(torch.rand(n, generator=generator) < 0.8, -100)
        examples.append((ids, labels))
    return packing.packed_sequence_collate_fn(examples, shape)


def inputs_of(pack):
    return {name: value for name, value in pack.items() if not name.startswith("label")}


def loss_and_gradients(model, pack):
    """The sum of the losses, and the gradients by name; the model's own are cleared."""
    loss = model(**pack)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients
