"""Make tests/goldens/bnb/ from transformers and bitsandbytes on the CPU. Development only.

    python tests/goldens/make_bnb.py

tensors.safetensors   weights of awkward shapes and values, as bitsandbytes quantises them
dense/                a tiny Qwen3 of random weights, bfloat16
single/, double/      the same, quantised and saved by transformers, without and with double
                      quantisation; logits.safetensors: input ids, and the logits of each
versions.json         what made them
"""

import json
import shutil
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional as bnb
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

OUT = Path(__file__).resolve().parent / "bnb"


def awkward_weights():
    """{name: weight}. Few significant digits in `nested`: its mean is exact in any order."""
    torch.manual_seed(0)
    randn = torch.randn
    zero_blocks = randn(6, 64)
    zero_blocks[1::2] = 0
    levels = bnb.get_4bit_type("nf4", device="cpu")
    middles = (levels[:-1] + levels[1:]) / 2
    ties = torch.zeros(2, 64)
    ties[:, :16] = torch.cat([torch.ones(1), middles])
    return {
        "float32": randn(8, 64),
        "bfloat16": randn(8, 64).bfloat16(),
        "float16": randn(4, 64).half(),
        "odd_numel": randn(7, 33),
        "partial_block": randn(5, 100).bfloat16(),
        "partial_columns": randn(16, 96),
        "zero_blocks": zero_blocks,
        "all_zero": torch.zeros(4, 64),
        "zero_tail": torch.cat([randn(64), torch.zeros(36)]).view(4, 25),
        "huge": randn(4, 64) * 1e36,
        "huge_bfloat16": (randn(4, 64) * 1e36).bfloat16(),
        "tiny": randn(4, 64) * 1e-36,
        "subnormal": randn(4, 64) * 1e-40,
        "outlier": torch.cat([randn(3, 64) * 0.01, torch.full((1, 64), 100.0)]),
        "ties": ties,
        "reciprocal": reciprocal(middles),
        "nested": (randn(65, 256) * 0.02).bfloat16(),
    }


def reciprocal(middles):
    """A whole block and a partial one of values whose code depends on how absmax divides them."""
    row = [1.7]
    absmax = torch.tensor(row)
    for middle in middles:
        x = absmax * middle
        for _ in range(4):
            if (x / absmax > middle) != (x * (1 / absmax) > middle):
                row.append(x.item())
            x = torch.nextafter(x, absmax)
    assert 1 < len(row) < 32, len(row)
    row += [0.0] * (32 - len(row))
    return torch.tensor([row, [0.0] * 32, row])


def dequantised(packed, state):
    """bitsandbytes' own, except where its AVX-512 code is wrong: columns no multiple of 64."""
    if state.shape[-1] % 64 == 0:
        return bnb.dequantize_4bit(packed, state)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).long()
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    n = state.shape.numel()
    weight = state.code[codes][:n] * absmax.repeat_interleave(64)[:n]
    return weight.to(state.dtype).view(state.shape)


def make_tensors():
    tensors = {"levels": bnb.get_4bit_type("nf4", device="cpu"),
               "dynamic_map": bnb.create_dynamic_map()}
    for name, weight in awkward_weights().items():
        tensors[f"{name}.weight"] = weight
        for double in (False, True):
            packed, state = bnb.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=double)
            kind = f"{name}.{'double' if double else 'single'}"
            tensors[f"{name}.packed"] = packed
            tensors[f"{kind}.absmax"] = state.absmax
            if double or name != "nested":  # which is large
                tensors[f"{kind}.dequantised"] = dequantised(packed, state)
            if double:
                tensors[f"{kind}.absmax2"] = state.state2.absmax
                tensors[f"{kind}.offset"] = state.offset.view(1)
    absmax = (torch.randn(1500).abs() * 4096).round() / 4096  # again an exact mean
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    tensors |= {"scales": absmax, "scales.absmax": codes, "scales.absmax2": state.absmax,
                "scales.offset": absmax.mean().view(1)}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()},
              OUT / "tensors.safetensors")


def make_models():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.3)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(OUT / "dense")
    ids = torch.randint(0, 32, (1, 24))
    logits = {"input_ids": ids[0]}
    for kind, dtype in (("single", torch.bfloat16), ("double", torch.float32)):
        quantised = AutoModelForCausalLM.from_pretrained(
            OUT / "dense", dtype=dtype, device_map="cpu",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=kind == "double"))
        quantised.save_pretrained(OUT / kind)
        reference = AutoModelForCausalLM.from_pretrained(
            OUT / kind, dtype=dtype, device_map="cpu", attn_implementation="eager")
        if dtype == torch.bfloat16:
            # bitsandbytes would dequantise to the dtype of x and not of the checkpoint: with
            # float32 maths, where no rounding hides a difference, that is another weight.
            reference = reference.dequantize().float()
        # Training mode: bitsandbytes' CPU code for inference repacks the weights, with loss.
        logits[kind] = reference.train()(ids, use_cache=False).logits[0].detach()
    save_file(logits, OUT / "logits.safetensors")
    for extra in OUT.glob("*/generation_config.json"):
        extra.unlink()


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    make_tensors()
    make_models()
    versions = {package.__name__: package.__version__
                for package in (torch, transformers, bitsandbytes)}
    (OUT / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
