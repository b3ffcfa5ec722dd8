"""Hugging Face model folders, in and out. Reading is strict, as a model with a few random layers
would train without complaint, and needs the memory of the model and one tensor more."""

import shutil
from pathlib import Path

import torch

from common.errors import UserError, located, writing
from common.files.checkpoint import verify
from common.files.config import read_config, write_config
from common.files.tensors import (
    iter_tensors, plain_file, save_tensors, tensor_headers, tensor_problems)
from common.ranks import copy_into, full_tensor, is_main

__all__ = ["copy_tokenizer", "load_weights", "read_config", "save_weights"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json", "tokenizer.model", "merges.txt", "vocab.json")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # old versions of transformers wrote it; we compute it


def load_weights(model, path):
    """Copy the checkpoint in folder `path` into the model's parameters, which keep their dtype and
    may be sharded by FSDP2. UserError, before anything is copied, for a tensor missing, unexpected,
    mis-shaped or not floating point, or a file that has changed. Tied head: see `own_tensors`."""
    path = Path(path)
    verify(path)
    wanted = dict(model.named_parameters())  # name in the checkpoint -> parameter
    if any(parameter.is_meta for parameter in wanted.values()):
        raise ValueError("the model has parameters on the meta device: call to_empty first")
    headers = {name: h for name, h in tensor_headers(path).items() if not name.endswith(COMPUTED)}
    shapes = {name: value.shape for name, value in wanted.items()}
    if HEAD not in wanted and HEAD in headers:
        headers.setdefault(EMBEDDING, headers[HEAD])
        shapes[HEAD] = shapes[EMBEDDING]
    if problems := tensor_problems(headers, shapes):
        raise UserError(f"{path}: the tensors do not fit config.json: {problems}")
    with located(path):
        for name, tensor in own_tensors(iter_tensors(path), tied=HEAD not in wanted):
            copy_into(wanted[name], tensor)


def own_tensors(tensors, tied):
    """Iterate over the (name, tensor) of a checkpoint that the model has too. The one tensor of a
    `tied` head and embedding may stand under either name, or both; ValueError if these differ."""
    shared = None
    for name, tensor in tensors:
        if name.endswith(COMPUTED):
            continue
        if tied and name in (EMBEDDING, HEAD):
            if shared is None:
                name, shared = EMBEDDING, tensor
            elif shared.dtype == tensor.dtype and torch.equal(shared, tensor):
                continue
            else:
                raise ValueError(f"{HEAD} differs from {EMBEDDING}, yet config.json ties them; set"
                                 " tie_word_embeddings to false there if the head is its own")
        yield name, tensor


def save_weights(model, config, path, dtype=None, metadata=None, max_shard_bytes=5_000_000_000):
    """Write the model into folder `path` as transformers would: config.json, safetensors. `config`
    is from `read_config`, `dtype` what to store (default: as is). Collective; rank 0 writes."""
    parameters = dict(model.named_parameters())  # a parameter shared by two names comes once
    tied = bool(config.get("tie_word_embeddings", False))
    if tied == (HEAD in parameters):
        raise ValueError(f"tie_word_embeddings is {tied}, but the model has {HEAD}: {not tied}")
    dtype = dtype or parameters[EMBEDDING].dtype
    tensors = ((name, full_tensor(value).to(dtype)) for name, value in parameters.items())
    save_tensors(tensors, path, metadata, max_shard_bytes)
    if is_main():
        # What is written is dense, even if the base model that it came from was quantised.
        dense = {key: value for key, value in config.items() if key != "quantization_config"}
        write_config(dense, path, dtype)


def copy_tokenizer(source, target):
    """Copy the tokenizer's files and generation_config.json, those that are there, byte for byte:
    what one version of transformers writes anew may not load in another."""
    source, target = Path(source), Path(target)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (source / name).exists() and source.resolve() != target.resolve():
                shutil.copyfile(plain_file(source, name), target / name)
