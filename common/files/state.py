"""What a step folder holds: all that a run needs to go on exactly where it was.

    model.safetensors       the parameters as they are (float32 masters), by name
    optimizer.safetensors   `<parameter name>.<entry>`: AdamW's exp_avg, exp_avg_sq and step
    rng.safetensors         the states of PyTorch's random generators, a row for each rank
    state.json              the loop's own state: step, next pack, best loss ...

By name, as an optimizer may list its parameters in another order; whole, whatever the ranks."""

import json
import sys
from pathlib import Path

import torch

from common.files.checkpoint import CheckpointError, MARK
from common.files.json_files import read_json
from common.files.tensors import DTYPES, iter_tensors, save_tensors, tensor_headers, tensor_problems
from common.ranks import all_sum, copy_into, full_tensor, is_main, this_rank, world_size

STATELESS = "optimizer_without_state"  # key of state.json: parameters that have no moments yet


def save_state(folder, model, optimizer, state, names=None):
    """Write model, optimizer, random generators and `state` (a dict that JSON holds exactly) into
    `folder`. `names` are the parameters to save (default: all). Collective; rank 0 writes."""
    kept = {name: optimizer.state.get(parameter, {})
            for name, parameter in _optimized(model, optimizer).items()}
    moments = {f"{name}.{entry}": value for name, entries in kept.items()
               for entry, value in entries.items()}
    contents = {**state, STATELESS: sorted(name for name, entries in kept.items() if not entries)}
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False)
    for stem, tensors in (("model", _named(model, names)), ("optimizer", moments)):
        gathered = ((name, full_tensor(value)) for name, value in tensors.items())
        save_tensors(gathered, folder, MARK, stem=stem)
    save_tensors(_random_states(_generators(model)), folder, MARK, stem="rng")
    if is_main():
        (Path(folder) / "state.json").write_text(text + "\n", encoding="ascii")


def load_state(folder, model, optimizer, names=None):
    """Put back what `save_state` wrote, in place, and give its `state`. CheckpointError, before
    anything is changed, if it does not fit. `folder` must be verified."""
    state = read_json(Path(folder) / "state.json")
    stateless = state.pop(STATELESS, None)
    if not isinstance(stateless, list):
        raise CheckpointError(f"{folder}: state.json was not written by save_state")

    parameters, headers = _named(model, names), tensor_headers(folder, "optimizer")
    entries = {key.rpartition(".")[2] for key in headers} or {"exp_avg"}
    moments = {f"{name}.{entry}": (parameter, entry)
               for name, parameter in _optimized(model, optimizer).items()
               if name not in stateless for entry in entries}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    shapes_of_moments = {key: () if entry == "step" else parameter.shape
                         for key, (parameter, entry) in moments.items()}
    dtypes = {DTYPES[parameter.dtype] for parameter in parameters.values()}
    problems = (tensor_problems(tensor_headers(folder, "model"), shapes, dtypes)
                or tensor_problems(headers, shapes_of_moments, dtypes | {"F32"}))
    if problems:
        raise CheckpointError(f"{folder}: does not fit this model and optimizer: {problems}")

    for name, tensor in iter_tensors(folder, "model"):
        copy_into(parameters[name], tensor)
    fused = optimizer.defaults.get("fused")
    optimizer.state.clear()
    for key, tensor in iter_tensors(folder, "optimizer"):
        parameter, entry = moments[key]
        if entry == "step":  # a fused optimizer has it beside the parameter, others on the CPU
            kept = tensor.to(parameter.device if fused else "cpu", copy=True)
        else:
            kept = torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False)
            copy_into(kept, tensor)
        optimizer.state[parameter][entry] = kept
    _set_random_states(folder, _generators(model))
    return state


def _named(model, names=None):
    """{name: parameter}, without what torch.compile adds to a name."""
    every = {name.replace("_orig_mod.", ""): value for name, value in model.named_parameters()}
    return {name: value for name, value in every.items() if names is None or name in names}


def _optimized(model, optimizer):
    names = {parameter: name for name, parameter in _named(model).items()}
    return {names[one]: one for group in optimizer.param_groups for one in group["params"]}


def _generators(model):
    """{"cpu" and the type of the model's device: the module that has its random state}."""
    kind = next(model.parameters()).device.type
    return {"cpu": torch} | ({} if kind == "cpu" else {kind: torch.get_device_module(kind)})


def _random_states(generators):
    """Iterate over (name, uint8 (ranks, bytes of a state)). Collective."""
    for name, module in generators.items():
        state = module.get_rng_state().cpu()
        rows = torch.zeros(world_size(), state.numel(), dtype=torch.uint8)
        rows[this_rank()] = state
        yield name, all_sum(rows)


def _set_random_states(folder, generators):
    rows = dict(iter_tensors(folder, "rng"))
    saved = {name: state.shape[0] for name, state in rows.items()}
    if saved != dict.fromkeys(generators, world_size()):
        if is_main():
            print(f"{folder}: was saved on other devices or another number of ranks ({saved}):"
                  " random numbers (dropout) go on differently", file=sys.stderr)
        return
    try:
        for name, module in generators.items():
            module.set_rng_state(rows[name][this_rank()].clone())
    except (RuntimeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: rng.safetensors: {error}") from error
