"""Write tests/goldens/peft/: adapters made and saved by PEFT, and the logits that PEFT gives.

    python tests/goldens/make_peft.py

Needs transformers and peft, which nothing else in this project imports. Each case is a tiny base
model (random, saved once), PEFT's adapter with random values that are not zero, as PEFT saves
it, and the float32 logits of two documents, each run by itself.
"""

import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "peft"
DOCUMENTS = ([5, 17, 3, 60, 22, 9, 41], [1, 33, 8, 8, 50])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.2}
BASES = {
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8, **SIZES)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, **SIZES)),
}
SPREAD = "qwen3-spread"  # qwen3 with its RANK largest singular values doubled: see `spread`
RANK = 4
CASES = {  # name: (base, PEFT's config)
    "lora": ("qwen3", peft.LoraConfig(r=4, lora_alpha=16, target_modules=ALL)),
    "rslora": ("qwen3", peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True)),
    "dora": ("qwen3", peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_dora=True)),
    "dora-bias": ("qwen2", peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=ALL, use_dora=True, use_rslora=True)),
    "regex": ("qwen3", peft.LoraConfig(
        r=3, target_modules=r".*layers\.1\.(self_attn\.q_proj|mlp\.down_proj)")),
    "vera": ("qwen3", peft.VeraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=7)),
    "vera-seed": ("qwen3", peft.VeraConfig(
        r=4, target_modules=ALL, projection_prng_key=11, save_projection=False)),
    "pissa-raw": (SPREAD, peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=ALL, init_lora_weights="pissa")),
    "pissa": ("qwen3", peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=ALL, init_lora_weights="pissa")),
    "head": ("qwen3", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "lm_head"])),
}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(0)
    for name, (model_class, config) in BASES.items():
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that a mistake would not leave unseen
                torch.nn.init.normal_(parameter.data, mean=0.7, std=0.3)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "qwen3")
    spread(model)
    model.save_pretrained(HERE / SPREAD)
    (HERE / SPREAD / "generation_config.json").unlink(missing_ok=True)

    logits = {}
    for name, (base, config) in CASES.items():
        plain = transformers.AutoModelForCausalLM.from_pretrained(HERE / base)
        logits.setdefault(base, run(plain))
        model = peft.get_peft_model(plain, config)
        with tempfile.TemporaryDirectory() as start:
            if name == "pissa":  # PEFT converts by the difference to the untrained adapter
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(start)
                model.peft_config["default"].init_lora_weights = "pissa"
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        scale = 0.02 if "magnitude" in key else 0.1
                        parameter.add_(scale * torch.randn_like(parameter))
            logits[name] = run(model)
            if name == "pissa":
                model.save_pretrained(HERE / name, path_initial_model_for_weight_conversion=start)
            else:
                model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink()
        options = json.loads((HERE / name / "adapter_config.json").read_text())
        options["base_model_name_or_path"] = base
        text = json.dumps(options, indent=2, sort_keys=True) + "\n"
        (HERE / name / "adapter_config.json").write_text(text)
        reloaded = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(HERE / base), HERE / name)
        print(name, "changes logits by", (logits[name] - logits[base]).abs().max().item(),
              "and is off after reloading in PEFT by",
              (run(reloaded) - logits[name]).abs().max().item())
    save_file(logits, HERE / "logits.safetensors")
    about = {"documents": DOCUMENTS, "cases": {name: base for name, (base, _) in CASES.items()},
             "made_with": {"torch": torch.__version__, "transformers": transformers.__version__,
                           "peft": peft.__version__}}
    (HERE / "about.json").write_text(json.dumps(about, indent=1) + "\n")


@torch.no_grad()
def spread(model):
    """Double the RANK largest singular values of every linear layer. A raw PiSSA adapter means
    something only beside the decomposition of its base, done anew; where two singular values at
    the cut are nearly alike, each processor's LAPACK cuts elsewhere."""
    for name, weight in model.named_parameters():
        if "proj" in name:
            U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
            weight += ((U[:, :RANK] * S[:RANK]) @ Vt[:RANK]).float()


@torch.no_grad()
def run(model):
    """Float32 logits of the documents, each by itself, one after the other: (T, V)."""
    model.eval()
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in DOCUMENTS])


if __name__ == "__main__":
    main()
