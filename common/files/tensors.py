"""Folders of safetensors files: tensors by name, in one or in shards with an index. Read a tensor
at a time, written a shard at a time; names, links and headers are checked, nothing is pickled."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, listed, writing
from common.files.json_files import read_json
from common.ranks import is_main, on_all_ranks

# The floating-point ones, as safetensors spells them.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def iter_tensors(path, stem="model"):
    """Every (name, tensor) of `<stem>.safetensors`, or its shards, on the CPU. Raises UserError."""
    for file in _files(Path(path), stem):
        with open_file(file) as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def tensor_headers(path, stem="model"):
    """{name: (shape, dtype as safetensors spells it, file)}, reading no tensor, or UserError."""
    headers = {}
    for file in _files(Path(path), stem):
        with open_file(file) as tensors:
            for name in tensors.keys():
                if name in headers:
                    raise UserError(f"{file}: {name} is in {headers[name][2].name} too")
                part = tensors.get_slice(name)
                headers[name] = (tuple(part.get_shape()), part.get_dtype(), file)
    return headers


def tensor_problems(headers, wanted, loadable=DTYPES.values()):
    """Why the tensors of `headers` (see `tensor_headers`) are not the `wanted` ones, {name: shape},
    with one of the dtypes `loadable`: at most four reasons; "" if they are."""
    problems = [f"{what} {listed(sorted(names), 3)}" for what, names in (
        ("missing", wanted.keys() - headers.keys()),
        ("unexpected", headers.keys() - wanted.keys())) if names]
    for name in sorted(wanted.keys() & headers.keys()):
        shape, dtype, _ = headers[name]
        if shape != tuple(wanted[name]):
            problems.append(f"{name} has shape {shape}, not {tuple(wanted[name])}")
        elif dtype not in loadable:
            problems.append(f"{name} is {dtype}, not {' or '.join(sorted(loadable))}")
    return listed(problems, 4, "; ")


def _files(path, stem):
    """The safetensors files of folder `path` under this stem."""
    single, index = f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if os.path.lexists(path / single):
        return [plain_file(path, single)]
    if not index.exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise UserError(f"{path}: only pickled weights here, which are never read; convert to"
                            " safetensors")
        raise UserError(f"{path}: no {single} here, so no weights; to train an untrained model of"
                        " this architecture give train.py --init random")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is said to be in {file!r}, not a .safetensors file")
    return [plain_file(path, file) for file in sorted(set(weight_map.values()))]


def plain_file(folder, name):
    """`folder / name`, after checking that it is a plain name of a file really in that folder: what
    was downloaded may name `../` or link anywhere. The Hub's own cache does hold links, from
    snapshots/<commit>/ into blobs/ beside it (or in the cache's root): those are accepted."""
    folder = Path(folder).resolve()
    if {"/", "\\", "\0"} & set(name):
        raise UserError(f"{folder}: refused the file name {name!r}: it must be a plain name")
    file = folder / name
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; the download or copy may be incomplete")
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes += [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
    if not any(file.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{file}: refused, a link out of its folder (to {file.resolve()})")
    return file


@contextmanager
def open_file(file):
    """safe_open, with plain error messages."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    except SafetensorError as error:
        with open(file, "rb") as head:
            pointer = head.read(40).startswith(b"version https://git-lfs")
        why = "a git-lfs pointer, not the file itself: run `git lfs pull`" if pointer else (
            f"not a whole safetensors file ({error}); copy or download it again")
        raise UserError(f"{file}: {why}") from error


def save_tensors(tensors, path, metadata=None, max_shard_bytes=5_000_000_000, stem="model"):
    """Write an iterator of (name, tensor) into a folder: one file `<stem>.safetensors` or, past
    `max_shard_bytes`, `<stem>-00001-of-0000N.safetensors` and so on with an index; `metadata`, a
    dict of texts, into the headers. The same tensors give the same bytes. Collective: the iterator
    may gather; rank 0 writes, and if it fails, all raise."""
    tensors = iter(tensors)

    def write():
        try:
            if is_main():
                with writing(path):
                    _write(tensors, Path(path), {"format": "pt", **(metadata or {})},
                           max_shard_bytes, stem)
        finally:
            for _ in tensors:  # the other ranks go on gathering: keep step with them
                pass

    on_all_ranks(write)


def _write(tensors, path, metadata, max_shard_bytes, stem):
    path.mkdir(parents=True, exist_ok=True)
    parts, weight_map, total = [], {}, 0
    for shard in _grouped(tensors, max_shard_bytes):
        parts.append((path / f"{stem}.part{len(parts)}.safetensors", list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
        _save_shard(shard, parts[-1][0], metadata)
        del shard  # before the next one is gathered

    single, index = (path / f"{stem}.safetensors{suffix}" for suffix in ("", ".index.json"))
    for old in (single, index, *path.glob(f"{stem}-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for number, (part, names) in enumerate(parts, 1):
        file = path / f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(file if len(parts) > 1 else single)
        weight_map |= dict.fromkeys(names, file.name)
    if len(parts) > 1:
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_shard(shard, file, metadata):
    file.touch()
    mode = file.stat().st_mode  # safetensors would leave it readable by its owner only
    try:
        save_file(shard, file, metadata)
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be written: {error}") from error
    file.chmod(mode)
    with open(file, "r+b") as opened:  # it also writes the metadata in a random order
        size = int.from_bytes(opened.read(8), "little")
        header = {**json.loads(opened.read(size)), "__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(text.ljust(size))


def _grouped(tensors, max_bytes):
    """Dicts of tensors ready to be written, each as full as `max_bytes` allows; at least one."""
    shard, size = {}, 0
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view: safetensors refuses tensors that share memory
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
