"""What a step folder holds: all that a run needs to go on exactly where it was.

    model.safetensors       the parameters as they are (float32 masters), by name
    optimizer.safetensors   `<parameter name>.<entry>`: AdamW's exp_avg, exp_avg_sq and step
    rng.safetensors         the states of PyTorch's random generators, a row for each rank
    state.json              what the loop wants back: step, next pack, best loss ...

By name, never by index: an optimizer whose parameters were listed in another order would otherwise
take up the moments of others. Sharded tensors are gathered one at a time, and each rank takes its
own rows again on loading, whatever the number of ranks.
"""

import json
import sys
from pathlib import Path

import torch

from common.files.json_files import read_json
from common.files.manifest import CheckpointError, MARK
from common.files.tensors import iter_tensors, listing, save_tensors, tensor_headers
from common.ranks import all_sum, copy_into, full_tensor, is_main, this_rank, world_size

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
STATELESS = "optimizer_without_state"  # key of state.json: parameters that were never stepped


def save_state(folder, model, optimizer, state, names=None):
    """Write model, optimizer, random generators and `state` into `folder` (see `commit`).

    `names` are the parameters to save, default all. An adapter run gives those that training can
    change, as the rest comes from the base model again. `state` is a dict that JSON holds exactly
    (no NaN, no tuples, only text as keys). Collective; rank 0 writes.
    """
    parameters = _chosen(model, names)
    moments, stateless = _moments(model, optimizer)
    contents = {**state, STATELESS: sorted(stateless)}
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False)
    if json.loads(text) != contents or STATELESS in state:
        raise ValueError("state must be a dict that is the same after JSON")

    _save(((name, full_tensor(value)) for name, value in parameters.items()), folder, "model")
    _save(((name, full_tensor(value)) for name, value in moments.items()), folder, "optimizer")
    _save(_random_states(_device(model)).items(), folder, "rng")
    if is_main():
        (Path(folder) / "state.json").write_text(text + "\n", encoding="ascii")


def load_state(folder, model, optimizer, names=None):
    """Put back what `save_state` wrote, in place, and give its `state`.

    Strict: parameters and moments that are missing, unexpected, or of another shape or dtype raise
    CheckpointError by name, before anything is changed. `folder` should have been verified, as
    `latest` does. On another number of ranks the random generators go on as they are, said on
    stderr.
    """
    parameters = _chosen(model, names)
    optimized = _by_name(model, optimizer)
    state = read_json(Path(folder) / "state.json")
    stateless = state.pop(STATELESS, None)
    if not isinstance(stateless, list):
        raise CheckpointError(f"{folder}: state.json was not written by save_state")

    found = tensor_headers(folder, "model")
    found_moments = tensor_headers(folder, "optimizer")
    entries = {key.rpartition(".")[2] for key in found_moments} or {"exp_avg"}
    moments = {f"{name}.{entry}": (name, entry)
               for name in optimized if name not in stateless for entry in entries}
    problems = _misfits(parameters, found)
    problems += _misfits({key: None if entry == "step" else optimized[name][0]
                          for key, (name, entry) in moments.items()}, found_moments)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{folder}: does not fit this model and optimizer: {'; '.join(problems[:4])}{more}")

    for name, tensor in iter_tensors(folder, "model"):
        copy_into(parameters[name], tensor)
    optimizer.state.clear()
    for key, tensor in iter_tensors(folder, "optimizer"):
        name, entry = moments[key]
        parameter, group = optimized[name]
        optimizer.state[parameter][entry] = _as_kept(parameter, group, entry, tensor)
    _check_moments(folder, _moments(model, optimizer)[0])
    _set_random_states(folder, _device(model))
    return state


def state_bytes(model, optimizer, names=None):
    """About how many bytes `save_state` writes, with the moments that AdamW will have."""
    parameters = sum(value.numel() * value.element_size()
                     for value in _chosen(model, names).values())
    moments = sum(2 * value.numel() * value.element_size()
                  for value, _ in _by_name(model, optimizer).values())
    return parameters + moments + 2**20


# --- names ---

def _names(model):
    """{name: parameter}, without the parts that torch.compile and checkpoint wrappers put in."""
    plain = {}
    for name, parameter in model.named_parameters():
        for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
            name = name.replace(wrapper, "")
        plain[name] = parameter
    return plain


def _chosen(model, names):
    parameters = _names(model)
    if names is None:
        return parameters
    unknown = set(names) - set(parameters)
    if unknown:
        raise ValueError(f"the model has no parameter {listing(unknown)}")
    return {name: parameters[name] for name in parameters if name in set(names)}


def _by_name(model, optimizer):
    """{name: (parameter, its group)} of all that the optimizer steps."""
    names = {parameter: name for name, parameter in _names(model).items()}
    optimized = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError("the optimizer has a parameter that is not the model's")
            optimized[names[parameter]] = (parameter, group)
    return optimized


def _moments(model, optimizer):
    """({"<name>.<entry>": tensor}, names of the parameters without state)."""
    moments, stateless = {}, []
    for name, (parameter, _) in _by_name(model, optimizer).items():
        entries = optimizer.state.get(parameter, {})
        if not entries:
            stateless.append(name)
        for entry, value in entries.items():
            if not isinstance(value, torch.Tensor) or "." in entry:
                raise TypeError(f"optimizer state {entry} of {name} is not a tensor")
            moments[f"{name}.{entry}"] = value
    return moments, stateless


def _misfits(wanted, found):
    """What is missing, unexpected, or of another shape or dtype, each in a few words.

    `wanted` is {name: parameter to be like, or None for a single number}, `found` {name: header}.
    """
    problems = []
    for what, names in (("missing", set(wanted) - set(found)),
                        ("unexpected", set(found) - set(wanted))):
        if names:
            problems.append(f"{what}: {listing(names)}")
    for name in sorted(set(wanted) & set(found)):
        shape, dtype, _ = found[name]
        parameter = wanted[name]
        expected = () if parameter is None else tuple(parameter.shape)
        if shape != expected:
            problems.append(f"{name} has shape {shape} there and {expected} here")
        elif parameter is not None and dtype != DTYPES.get(parameter.dtype, dtype):
            problems.append(f"{name} is {dtype} there and {parameter.dtype} here")
    return problems


# --- tensors ---

def _save(tensors, folder, stem):
    save_tensors(tensors, folder, MARK, stem=stem)


def _as_kept(parameter, group, entry, tensor):
    """`tensor` as the optimizer keeps it: moments like their parameter, step counts on the CPU."""
    if entry == "step":
        on_device = group.get("fused") or group.get("capturable")
        return tensor.clone().to(parameter.device if on_device else "cpu")
    moment = torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False)
    copy_into(moment, tensor)
    return moment


def _check_moments(folder, moments):
    """Frameworks have resumed with empty moments and no error; so read back what was loaded."""
    for key, tensor in iter_tensors(folder, "optimizer"):
        value = full_tensor(moments.pop(key)).cpu()
        if value.dtype != tensor.dtype or not torch.equal(_bits(value), _bits(tensor)):
            raise CheckpointError(f"{folder}: {key} is not what was loaded")
    if moments:
        raise CheckpointError(f"{folder}: {listing(moments)} was not loaded")


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# --- random generators ---

def _device(model):
    return next(model.parameters()).device


def _random_states(device):
    """{"cpu" and the device's type: uint8 (ranks, bytes of a state)}. Collective."""
    rank, ranks = this_rank(), world_size()
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state().cpu()
    rows = {}
    for name, state in states.items():
        rows[name] = torch.zeros(ranks, state.numel(), dtype=torch.uint8)
        rows[name][rank] = state
        all_sum(rows[name])
    return rows


def _set_random_states(folder, device):
    rank, ranks = this_rank(), world_size()
    rows = dict(iter_tensors(folder, "rng"))
    saved = {name: state.shape[0] for name, state in rows.items()}
    if saved != dict.fromkeys({"cpu", device.type}, ranks):
        if is_main():
            print(f"{folder}: was saved on other devices or another number of ranks ({saved}):"
                  " random numbers (dropout) go on differently", file=sys.stderr)
        return
    try:
        for name, state in rows.items():
            module = torch if name == "cpu" else torch.get_device_module(name)
            module.set_rng_state(state[rank].clone())
    except (RuntimeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: rng.safetensors: {error}") from error
