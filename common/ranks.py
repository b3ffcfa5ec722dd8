"""Several processes as one: ranks under torchrun, parameters sharded by PyTorch's FSDP2.

    python chapter-01/train.py ...                          one process, no process group at all
    torchrun --nproc-per-node 8 chapter-01/train.py ...     8 ranks; several nodes work the same

Every function here also works in a single process, where it does nothing or next to nothing, so
that a training loop reads the same either way. What must hold is that N ranks give the loss, the
gradient and the clip norm of one process: a loss here is a sum over the labelled tokens, divided
by the labelled tokens of the whole step, so gradients are *summed* over ranks, never averaged.

Ranks exchange tensors, never objects: PyTorch's object collectives unpickle what they receive.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from common.errors import UserError, out_of_memory

# How long a rank waits for the others. Rank 0 writes checkpoints while they wait, so not seconds.
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Ranks:
    """Which process this is: `rank` of `world_size`, computing on `device`."""

    rank: int
    world_size: int
    device: torch.device


def world_size():
    """How many processes torchrun started for this run; 1 without it."""
    return _whole_number("WORLD_SIZE", 1)


def this_rank():
    """The number of this process among them, from 0; known before `start_ranks` too."""
    return 0 if world_size() == 1 else _whole_number("RANK")


def is_main():
    """True on the one rank that prints and writes files."""
    return this_rank() == 0


def say(*words):
    """Print on the main rank, at once."""
    if is_main():
        print(*words, flush=True)


def start_ranks(device, timeout_seconds=None):
    """Join the other ranks, if torchrun started any; gives a `Ranks`.

    `device` is "cpu", "cuda", "mps" or a torch.device. On CUDA the rank takes the GPU numbered
    LOCAL_RANK. A wait for the other ranks ends with an error after `timeout_seconds` (default:
    BARELOOP_TIMEOUT_SECONDS in the environment, else 1800). Raises UserError where the
    environment is incomplete or a node has more ranks than GPUs.
    """
    device = torch.device(device)
    if world_size() == 1:
        return Ranks(0, 1, device)
    rank, local_rank = _whole_number("RANK"), _whole_number("LOCAL_RANK")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is {world_size()}, {name} is not set: start with torchrun")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} wants GPU {local_rank} but this node has {torch.cuda.device_count()}:"
                " lower torchrun's --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several ranks need --device cpu or cuda, not {device.type}")
    if timeout_seconds is None:
        timeout_seconds = _whole_number("BARELOOP_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    with _plain_words("joining the other ranks"):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank, world_size=world_size(), timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None)
    return Ranks(rank, world_size(), device)


def shard(model, ranks, dtype):
    """Spread the model's parameters over the ranks, in place (FSDP2); nothing for a single process.

    Each decoder layer, then what remains (embeddings, last norm, head), becomes one group: gathered
    in `dtype` (None: as they are) when its forward or backward begins. Parameters keep their
    own dtype between steps (float32 masters), gradients arrive in float32, summed over the ranks.
    Frozen parameters are gathered but have no gradient; buffers (an NF4 base is one) are not
    sharded: every rank keeps them whole, as splitting rows would cut across quantisation blocks.

    All ranks begin from rank 0's values, whatever each had. Tensors go to `ranks.device` one
    group at a time, so no GPU ever holds the whole model.

    Call it after adapters are in place and before the optimizer is made. Afterwards only the
    model's own forward sees whole parameters: compute nothing on one outside of it but through
    `full_tensor`. (Zhao et al. 2023, arXiv:2304.11277; FSDP2 shards each parameter by rows.)
    """
    if ranks.world_size == 1:
        return
    with _plain_words("handing out rank 0's weights"):
        for tensor in (*model.parameters(), *model.buffers()):
            _copy_from_rank_0(tensor, ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # FSDP would also cast what goes into a layer: the rotary tables must stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # The root too: left whole after an evaluation, its parameters would not be the optimizer's.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the loop has divided already: a plain sum
        module.set_force_sum_reduction_for_comms(True)  # "sum, then times 1" exists on gloo too


def full_tensor(tensor):
    """The whole of a sharded parameter, gradient or norm, detached; any other tensor as it is.

    Collective: every rank must call it, in the same order. The result is a new tensor for a
    sharded one and shares memory otherwise. So the clip norm is the same on any number of ranks:
    `full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit))`.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    with _plain_words("gathering a sharded tensor"):
        return tensor.full_tensor()


def own_rows(tensor):
    """The rows of a parameter or gradient that this rank holds: all, if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def copy_into(parameter, tensor):
    """Copy a whole `tensor` into a parameter, which may be sharded: each rank takes its own rows.

    `tensor` may be on any device and of any dtype; only this rank's rows are moved and cast, and
    nothing is communicated. Raises ValueError if the shapes differ.
    """
    if parameter.shape != tensor.shape:
        raise ValueError(f"cannot copy {tuple(tensor.shape)} into {tuple(parameter.shape)}")
    if not isinstance(parameter, DTensor):
        parameter.copy_(tensor)
        return
    if parameter.placements != (Shard(0),):
        raise ValueError(f"copy_into knows parameters sharded by rows, not {parameter.placements}")
    # The rows are cut as torch.chunk cuts them: equal pieces but the last, which may be empty.
    mesh = parameter.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, tensor.shape[0])
    parameter.to_local().copy_(tensor[first:first + rows])


def all_sum(tensor):
    """Replace `tensor` by its sum over the ranks, in place; gives it back. Collective."""
    if not dist.is_initialized():
        return tensor
    with _plain_words("adding up over the ranks"):
        # NCCL reduces GPU tensors only, and a token count may well live on the CPU.
        on_device = tensor.to(_device())
        dist.all_reduce(on_device)
        if on_device is not tensor:
            tensor.copy_(on_device)
    return tensor


def least(number):
    """The smallest of the ranks' whole numbers. Collective."""
    if not dist.is_initialized():
        return number
    with _plain_words("comparing the ranks"):
        tensor = torch.tensor(number, device=_device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def any_rank(flag):
    """True on every rank if `flag` is true on any, say "a signal arrived". Collective."""
    if not dist.is_initialized():
        return bool(flag)
    return bool(all_sum(torch.tensor(int(bool(flag)), dtype=torch.int32)).item() > 0)


def on_all_ranks(action):
    """`action()` on every rank; where it fails on one, all raise, so that none waits for ever."""
    answer = failure = None
    try:
        answer = action()
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or UserError("another rank failed: its own message says why")
    return answer


def barrier():
    """Wait until every rank has come here."""
    any_rank(False)  # a barrier that needs no device argument and times out like the rest


def stop_ranks():
    """Leave the other ranks; call it once at the end of a run. Nothing for a single process."""
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            # Gloo's threads live on with the sharded model and drop the last collective's tensor a
            # moment later, for which they need the interpreter: if it is gone, the process aborts.
            time.sleep(0.2)


def _device():
    """The device that this process's collectives work on."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _copy_from_rank_0(tensor, device):
    """Broadcast one whole parameter or buffer; one without values yet (meta) is left alone."""
    if tensor.is_meta:
        return
    values = tensor.detach()
    moved = values.to(device).contiguous()
    dist.broadcast(moved, src=0)
    if moved.data_ptr() != values.data_ptr() or moved.device != values.device:
        values.copy_(moved)


def _whole_number(name, default=None):
    """An environment variable as an int."""
    text = os.environ.get(name, default)
    if text is None:
        raise UserError(f"WORLD_SIZE is set but {name} is not: start with torchrun")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name} must be a whole number, not {text!r}")


@contextlib.contextmanager
def _plain_words(doing):
    """A collective fails when another rank is gone or stuck: say so, ahead of PyTorch's words."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one
        if out_of_memory(error):  # the caller's to explain
            raise
        rank = os.environ.get("RANK", "?")
        raise UserError(
            f"rank {rank}: another rank has ended or does not answer ({doing}); its own message,"
            f" above or in its log, says why. PyTorch says: {str(error).splitlines()[0]}"
        ) from error
