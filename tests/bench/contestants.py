"""The rows of peers.py: what is compared, each as a model and the loss of a list of documents.

Ours come from the chapters; the others are transformers in a plain loop, with PEFT's adapters and
bitsandbytes' four bits, and TRL's trainer. Whatever is not installed gives a row that says so.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers import ROOT, load

from common import weights

CPU = torch.device("cpu")
WARM = 3  # first steps, with what is compiled and allocated in them: not timed
LORA = {"rank": 16, "alpha": 32.0}
# Qwen3-0.6B's proportions (F = 3D, H·d = 2D, K = H/2). "0.6b-layers" is a seventh of the real
# model, 4 of 28 layers and as much of its vocabulary, so layers and head keep their shares.
SIZES = {  # tokens per step, V, D, layers, H, d
    "tiny": (512, 512, 128, 4, 8, 32),
    "mid": (2048, 16384, 512, 8, 8, 128),
    "0.6b-layers": (1024, 21704, 1024, 4, 16, 128),
}


@dataclass
class Row:
    """A contestant: `loss(documents, targets)` is the mean loss of a list of (ids, labels)."""

    name: str
    ours: bool
    model: object = None
    loss: object = None
    missing: str = ""  # why there are no figures
    same: bool = True  # its losses should be the others'
    recompute: str = "none"  # what it recomputes in the backward
    optimizer: object = None
    seconds: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def step(self, documents):
        """One optimizer step, as every chapter's loop does it; gives the loss."""
        targets = sum(int((labels[1:] >= 0).sum()) for _, labels in documents)
        loss = self.loss(documents, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def config_of(size):
    """config.json of a random Qwen3 model."""
    _, vocabulary, width, layers, heads, head_dim = SIZES[size]
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
            "num_key_value_heads": heads // 2, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
            "initializer_range": 0.02, "tie_word_embeddings": True, "attention_bias": False}


# --- ours ---

def ours(chapter, kind, folder, dtype, shape=None, adapters=None, recompute="none"):
    """A row of chapter 1, 2 or 3; `shape`, a StaticShape, asks for the compiled one. `adapters`
    is a dict that gets the first values of the adapters, for the peers. `recompute` is chapter 3's
    --activation-checkpointing."""
    part = {name: load(f"chapter-0{chapter}/{name}.py") for name in
            ("train", "packing", "modeling_qwen3" if chapter == 1 else "modeling_llama")}
    modeling = part["modeling_qwen3" if chapter == 1 else "modeling_llama"]
    config_class, model_class = ((modeling.Qwen3Config, modeling.Qwen3ForCausalLM) if chapter == 1
                                 else (modeling.LlamaConfig, modeling.LlamaForCausalLM))
    config = config_class.from_dict(weights.read_config(folder))
    if kind == "qlora":
        model = load("chapter-03/quantized_model.py").base_model(config, folder, dtype)
    else:
        model = model_class(config)
        weights.load_weights(model, folder)
        model.compute_dtype = dtype
        model.to(dtype if kind == "lora" else torch.float32)
    if kind != "dense":
        lora = load(f"chapter-0{chapter}/lora.py")
        lora.apply_adapter(model, lora.AdapterConfig(**LORA))
        if adapters is not None:
            adapters.update({n: p.detach().clone() for n, p in model.named_parameters()
                             if "lora_" in n})
    for layer in model.model.layers if recompute != "none" else ():
        layer.checkpointing = recompute
    if shape is not None:
        load("chapter-03/compiling.py").compile_model(model)

    def loss(documents, targets):
        collate = part["packing"].packed_sequence_collate_fn
        pack = collate(documents, shape) if shape else collate(documents)
        total = model(**pack) if chapter == 3 else part["train"].loss_sum(model, pack)
        return total / targets

    how = "eager" if shape is None else "compiled"
    name = f"chapter {chapter}, {how}" + (", NF4" if kind == "qlora" else "")
    name += f", {recompute} recomputation" * (recompute != "none")
    return Row(name, True, model, loss, recompute=recompute)


# --- peers ---

def attention_of(device):
    """transformers' fastest attention that is installed."""
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def transformers_model(kind, folder, dtype, adapters, pure, device=CPU):
    """transformers' model: float32 masters, or a frozen base in `dtype` or 4 bits under PEFT."""
    from transformers import AutoModelForCausalLM

    stored = torch.float32 if kind == "dense" and not pure else dtype
    extra = {}
    if kind == "qlora":
        from transformers import BitsAndBytesConfig

        extra = {"device_map": device.type, "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=stored, attn_implementation=attention_of(device), **extra)
    if kind != "qlora":  # that one is there already
        model.to(device)
    model.config.use_cache = False
    if kind != "dense":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear"))
        own = dict(model.named_parameters())
        for name, value in adapters.items():
            own[f"base_model.model.{name}.default.weight"].data.copy_(value)
    return model.train()


def peer(name, kind, folder, dtype, adapters, padded=False, pure=False, needs=("transformers",),
         device=CPU):
    """A row of transformers in a plain loop, or why there is none. `pure`: no float32 masters."""
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    if absent:
        return Row(name, False, missing=f"not installed: {', '.join(absent)}")
    try:
        model = transformers_model(kind, folder, dtype, adapters, pure, device)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        return Row(name, False, missing=f"does not run here: {str(error).splitlines()[0][:90]}")
    pad, packing = torch.nn.utils.rnn.pad_sequence, load("chapter-01/packing.py")

    def inputs_of(documents):
        if not padded:  # one row, without a mask: transformers tells documents by position 0
            pack = packing.packed_sequence_collate_fn(documents)
            fields = {name: pack[name][None] for name in ("input_ids", "position_ids")}
            return fields, pack["labels"]
        ids = pad([ids for ids, _ in documents], batch_first=True)
        mask = pad([torch.ones_like(ids) for ids, _ in documents], batch_first=True)
        labels = pad([F.pad(labels[1:], (0, 1), value=-100) for _, labels in documents],
                     batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": mask}, labels.flatten()

    def loss(documents, targets):
        fields, labels = inputs_of(documents)
        fields, labels = {n: t.to(device) for n, t in fields.items()}, labels.to(device)
        mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not pure)
        with mixed:
            logits = model(**fields, use_cache=False).logits.flatten(0, 1)
        return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / targets

    return Row(name, False, model, loss, same=not pure)


def trl_row(folder, documents, options, lr, tokens=None, device=CPU):
    """TRL's SFTTrainer on the same documents, in its own loop and packing: not interleaved. A step
    has `tokens`, else those of options.size."""
    name = "TRL SFTTrainer, packed (own loop, afterwards)"
    absent = [p for p in ("trl", "datasets") if importlib.util.find_spec(p) is None]
    if absent:
        return Row(name, False, missing=f"not installed: {', '.join(absent)}")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "common/tiny/tokenizer.json"),
        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch, max_steps=WARM + options.steps, packing=True,
            use_cpu=device.type == "cpu", bf16=options.dtype == "bfloat16",
            max_length=tokens or SIZES[options.size][0],
            per_device_train_batch_size=1, gradient_accumulation_steps=1, optim="adamw_torch_fused",
            gradient_checkpointing=False, learning_rate=lr, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", dataloader_pin_memory=False, seed=0)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention_of(device)), arguments,
            train_dataset=Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in documents]}),
            processing_class=tokenizer, callbacks=[Clock()])
        rows = trainer.train_dataset["input_ids"]
        trainer.train()
    seconds = [b - a for a, b in zip(marks, marks[1:])][WARM - 1:]
    tokens = sum(map(len, rows)) / len(rows)
    return Row(name, False, figures={"tokens_per_second": tokens / statistics.median(seconds)})
