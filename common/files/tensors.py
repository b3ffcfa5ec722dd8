"""Folders of safetensors files: tensors by name, in one file or in shards with an index.

Both ways a tensor or a shard at a time, and never a pickle. What is read was downloaded from
somewhere: names, links and headers are checked before they are believed.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, writing
from common.files.json_files import read_json
from common.ranks import is_main, on_all_ranks

HEAD = "lm_head.weight"
LOADABLE = ("F64", "F32", "F16", "BF16")  # as safetensors names them


# --- in ---

def iter_tensors(path, stem="model"):
    """Every (name, tensor) in the safetensors files of folder `path`, one at a time, on the CPU.

    Reads `<stem>.safetensors`, else the shards that `<stem>.safetensors.index.json` lists. All
    headers are checked before the first tensor comes. Raises UserError for files that are
    missing, truncated or otherwise not what the index says; the index may name only plain files,
    and nothing may be a link out of the folder.
    """
    for file, names in _shards(Path(path), stem):
        with open_file(file) as tensors:
            for name in names:
                yield name, tensors.get_tensor(name)


def tensor_headers(path, stem="model"):
    """{name: (shape, dtype as safetensors spells it, file)}, reading no tensor. Errors as above."""
    headers = {}
    for file, names in _shards(Path(path), stem):
        with open_file(file) as tensors:
            for name in names:
                part = tensors.get_slice(name)
                headers[name] = (tuple(part.get_shape()), part.get_dtype(), file)
    return headers


def _shards(path, stem):
    """[(file, its tensor names)] of folder `path`, after checking files, headers and index."""
    single, index = f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if (path / single).exists() or (path / single).is_symlink():
        file = plain_file(path, single)
        with open_file(file) as tensors:
            return [(file, list(tensors.keys()))]
    if not index.exists():
        raise UserError(_no_weights(path, single))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    listed = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is said to be in {file!r}, not a .safetensors file")
        listed.setdefault(file, set()).add(name)
    shards = []
    for file in sorted(listed):
        checked = plain_file(path, file)
        with open_file(checked) as tensors:
            names = list(tensors.keys())
        listed[file] -= {HEAD} - set(names)  # a tied head, listed all the same
        for where, lost in (("the index", set(names) - listed[file]),
                            (file, listed[file] - set(names))):
            if lost:
                raise UserError(f"{index}: {file} does not match: not in {where}: {listing(lost)}")
        shards.append((checked, names))
    return shards


def plain_file(folder, name):
    """`folder / name`, after checking that it is a plain name of a file really in that folder.

    What was downloaded may name `../` or link anywhere. The Hub's own cache does hold links,
    from snapshots/<commit>/ into blobs/ beside it (or in the cache's root): those are accepted.
    """
    folder = Path(folder).resolve()
    too_long = len(name.encode("utf-8", "replace")) > 255
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or too_long:
        raise UserError(f"{folder}: refused the file name {name!r}: it must be a plain name")
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file}: no such file; the download or copy may be incomplete")
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes += [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
    if not any(file.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{file}: refused, a link out of its folder (to {file.resolve()})")
    return file


def _no_weights(path, single):
    if not path.is_dir():
        return f"{path}: no such folder"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return f"{path}: only pickled weights here, which are never read; convert to safetensors"
    return (f"{path}: no {single} here, so no weights; to train an untrained model of this"
            " architecture give train.py --init random")


@contextmanager
def open_file(file):
    """safe_open with its errors in plain words."""
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


# --- out ---

def save_tensors(tensors, path, metadata=None, max_shard_bytes=5_000_000_000, stem="model"):
    """Write an iterator of (name, tensor) into folder `path`, made if it is not there.

    One file `<stem>.safetensors`; if that would pass `max_shard_bytes`, several
    `<stem>-00001-of-0000N.safetensors` with an index, as transformers has them. Holds one shard
    in memory at a time. Files of an earlier save under this stem are replaced. `metadata` (text to
    text) goes into every file's header. Where there are several ranks all must call it, since the
    iterator may gather; rank 0 writes, and if it cannot, all raise. The same tensors give the same
    bytes.
    """
    tensors = iter(tensors)

    def write():
        try:
            if is_main():
                _write(tensors, Path(path), metadata or {}, max_shard_bytes, stem)
        except Exception:
            _exhaust(tensors)  # the other ranks go on gathering: keep step with them
            raise
        _exhaust(tensors)

    on_all_ranks(write)


def _exhaust(tensors):
    for _ in tensors:
        pass


def _write(tensors, path, metadata, max_shard_bytes, stem):
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    parts, weight_map, total = [], {}, 0
    for shard in _grouped(tensors, max_shard_bytes):
        part = path / f"{stem}.part{len(parts)}.safetensors"
        with writing(part):
            part.touch()
            mode = part.stat().st_mode  # safetensors would leave it readable by its owner only
            try:
                save_file(shard, part, {"format": "pt", **metadata})
            except SafetensorError as error:
                raise UserError(f"{part}: cannot be written: {error}") from error
            part.chmod(mode)
            _sort_metadata(part)
        parts.append(part)
        weight_map |= dict.fromkeys(shard, len(parts))
        total += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next one is gathered

    index = path / f"{stem}.safetensors.index.json"
    names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    with writing(path):
        for old in (index, path / f"{stem}.safetensors", *path.glob(f"{stem}-*-of-*.safetensors")):
            old.unlink(missing_ok=True)
        if len(parts) == 1:
            parts[0].rename(path / f"{stem}.safetensors")
            return
        for part, name in zip(parts, names):
            part.rename(path / name)
        weight_map = {name: names[number - 1] for name, number in sorted(weight_map.items())}
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _sort_metadata(file):
    """Put the metadata in `file`, which safetensors writes in a random order, into a fixed one."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{file}: its header is not as it was expected")
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


def tensor_problems(headers, wanted, loadable=LOADABLE):
    """What of a checkpoint does not fit a model: "" if all does, else up to four problems.

    `headers` is {name: (shape, dtype, file)} as `tensor_headers` gives it, `wanted` {name: shape},
    `loadable` the dtypes that can be taken.
    """
    problems = []
    for how, names in (("missing", wanted.keys() - headers.keys()),
                       ("unexpected", headers.keys() - wanted.keys())):
        problems += [f"{how} {listing(names)}"] if names else []
    for name in sorted(wanted.keys() & headers.keys()):
        shape, dtype, _ = headers[name]
        if tuple(shape) != tuple(wanted[name]):
            problems.append(f"{name} has shape {tuple(shape)}, the model {tuple(wanted[name])}")
        elif dtype not in loadable:
            problems.append(f"{name} is {dtype}: a quantised checkpoint is not loaded here")
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return "; ".join(problems[:4]) + more


def listing(names):
    """The first three of some names, and how many more there are, for an error message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
