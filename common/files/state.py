"""What a step folder holds: all that a run needs to go on exactly where it was.

    model.safetensors       the parameters as they are (float32 masters), by name
    optimizer.safetensors   `<parameter name>.<entry>`: AdamW's exp_avg, exp_avg_sq and step
    rng.safetensors         the states of PyTorch's random generators, a row for each rank
    state.json              the loop's own state: step, next pack, best loss ...

By name, never by index: an optimizer that lists its parameters in another order would otherwise
get the wrong moments. Sharded tensors are gathered one at a time, and on loading each rank takes
its own rows again, whatever the number of ranks.
"""

import json
import sys
from pathlib import Path

import torch

from common.files.json_files import read_json
from common.files.manifest import CheckpointError, MARK
from common.files.tensors import iter_tensors, save_tensors, tensor_headers, tensor_problems
from common.ranks import all_sum, copy_into, full_tensor, is_main, this_rank, world_size

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
STATELESS = "optimizer_without_state"  # key of state.json: parameters that have no moments yet


def save_state(folder, model, optimizer, state, names=None):
    """Write model, optimizer, random generators and `state` into `folder` (see `commit`).

    `names` are the parameters to save, default all. An adapter run gives those that training can
    change, as the rest comes from the base model again. `state` is a dict that JSON holds exactly
    (no NaN, no tuples, only text as keys). Collective; rank 0 writes.
    """
    parameters = _named(model, names)
    kept = {name: optimizer.state.get(parameter, {})
            for name, (parameter, _) in _optimized(model, optimizer).items()}
    contents = {**state, STATELESS: sorted(name for name, entries in kept.items() if not entries)}
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False)
    if json.loads(text) != contents:
        raise ValueError("state must be a dict that is the same after JSON")

    moments = {f"{name}.{entry}": value for name, entries in kept.items()
               for entry, value in entries.items()}
    for stem, tensors in (("model", parameters), ("optimizer", moments)):
        gathered = ((name, full_tensor(value)) for name, value in tensors.items())
        save_tensors(gathered, folder, MARK, stem=stem)
    save_tensors(_random_states(_device(model)).items(), folder, MARK, stem="rng")
    if is_main():
        (Path(folder) / "state.json").write_text(text + "\n", encoding="ascii")


def load_state(folder, model, optimizer, names=None):
    """Put back what `save_state` wrote, in place, and give its `state`.

    Strict: parameters and moments that are missing, unexpected, or of another shape or dtype raise
    CheckpointError by name, before anything is changed. `folder` should have been verified, as
    `latest` does. With another number of ranks the random generators are left alone, with a note.
    """
    parameters, optimized = _named(model, names), _optimized(model, optimizer)
    state = read_json(Path(folder) / "state.json")
    stateless = state.pop(STATELESS, None)
    if not isinstance(stateless, list):
        raise CheckpointError(f"{folder}: state.json was not written by save_state")

    headers = tensor_headers(folder, "optimizer")
    entries = {key.rpartition(".")[2] for key in headers} or {"exp_avg"}
    moments = {f"{name}.{entry}": (name, entry)
               for name in optimized if name not in stateless for entry in entries}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    shapes_of_moments = {key: () if entry == "step" else optimized[name][0].shape
                         for key, (name, entry) in moments.items()}
    dtypes = {DTYPES[parameter.dtype] for parameter in parameters.values()}
    problems = [tensor_problems(tensor_headers(folder, "model"), shapes, dtypes),
                tensor_problems(headers, shapes_of_moments, dtypes | {"F32"})]
    if any(problems):
        raise CheckpointError(f"{folder}: does not fit this model and optimizer: "
                              + "; ".join(filter(None, problems)))

    for name, tensor in iter_tensors(folder, "model"):
        copy_into(parameters[name], tensor)
    optimizer.state.clear()
    for key, tensor in iter_tensors(folder, "optimizer"):
        name, entry = moments[key]
        parameter, group = optimized[name]
        optimizer.state[parameter][entry] = _as_kept(parameter, group, entry, tensor)
    _set_random_states(folder, _device(model))
    return state


def _named(model, names=None):
    """{name: parameter}, all or `names`, without what torch.compile adds to a name."""
    every = {name.replace("_orig_mod.", ""): value for name, value in model.named_parameters()}
    return {name: value for name, value in every.items() if names is None or name in names}


def _optimized(model, optimizer):
    """{name: (parameter, its group)} of all that the optimizer updates."""
    names = {parameter: name for name, parameter in _named(model).items()}
    return {names[parameter]: (parameter, group) for group in optimizer.param_groups
            for parameter in group["params"]}


def _as_kept(parameter, group, entry, tensor):
    """`tensor` as the optimizer keeps it: moments like their parameter, step counts on the CPU."""
    if entry == "step":
        on_device = group.get("fused") or group.get("capturable")
        return tensor.clone().to(parameter.device if on_device else "cpu")
    moment = torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False)
    copy_into(moment, tensor)
    return moment


# --- random generators ---

def _device(model):
    return next(model.parameters()).device


def _random_states(device):
    """{"cpu" and the device's type: uint8 (ranks, bytes of a state)}. Collective."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state().cpu()
    rows = {}
    for name, state in states.items():
        rows[name] = torch.zeros(world_size(), state.numel(), dtype=torch.uint8)
        rows[name][this_rank()] = state
        all_sum(rows[name])
    return rows


def _set_random_states(folder, device):
    rows = dict(iter_tensors(folder, "rng"))
    saved = {name: state.shape[0] for name, state in rows.items()}
    if saved != dict.fromkeys({"cpu", device.type}, world_size()):
        if is_main():
            print(f"{folder}: was saved on other devices or another number of ranks ({saved}):"
                  " random numbers (dropout) go on differently", file=sys.stderr)
        return
    try:
        for name, state in rows.items():
            module = torch if name == "cpu" else torch.get_device_module(name)
            module.set_rng_state(state[this_rank()].clone())
    except (RuntimeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: rng.safetensors: {error}") from error
