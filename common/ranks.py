"""Several processes as one: ranks under torchrun, parameters sharded by PyTorch's FSDP2; or one.

A loss is a sum over labelled tokens, divided by those of the whole step: so gradients are *summed*
over ranks, never averaged. Ranks exchange tensors, as PyTorch's object collectives unpickle."""

import contextlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.errors import UserError, located, one_line, out_of_memory


def world_size():
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def this_rank():
    """The number of this process among them, from 0; known before `start_ranks` too."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def is_main():
    """True on the rank that prints and writes files."""
    return this_rank() == 0


def say(*words):
    """Print on the main rank, at once."""
    if is_main():
        print(*words, flush=True)


def start_ranks(device):
    """Join the other ranks, if torchrun started any; gives the torch.device to compute on. A wait
    for another rank is a UserError after BARELOOP_TIMEOUT_SECONDS (default 1800)."""
    device = torch.device(device)
    if world_size() == 1:
        return device
    cuda = device.type == "cuda"
    if cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", this_rank()))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {this_rank()} wants GPU {local_rank} but this node has "
                            f"{torch.cuda.device_count()}: lower torchrun's --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several ranks need --device cpu or cuda, not {device.type}")
    with located("start with torchrun"), _plain_words("joining the other ranks"):
        timeout = timedelta(seconds=int(os.environ.get("BARELOOP_TIMEOUT_SECONDS", 1800)))
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    return device


def shard(model, device, dtype):
    """Spread the model over the ranks, each on its `device`, in place, by rows of each parameter
    (FSDP2, Zhao et al. 2023, arXiv:2304.11277); alone, do nothing. Call it between adapters and
    optimizer. Then only the model's own forward sees whole parameters: elsewhere use `full_tensor`.

    A layer is gathered in `dtype` (None: as it is) when its forward or backward begins. Buffers
    (an NF4 base) are not sharded: rows would cut across quantisation blocks."""
    if world_size() == 1:
        return
    with _plain_words("handing out rank 0's weights"), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                values = tensor.detach().to(device).contiguous()
                dist.broadcast(values, src=0)
                tensor.copy_(values)
    mesh = init_device_mesh(device.type, (world_size(),))
    # FSDP would also cast what goes into a layer: the rotary tables must stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # The root too: left whole after an evaluation, its parameters would not be the optimizer's.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the loop has divided already: a plain sum
        module.set_force_sum_reduction_for_comms(True)  # "sum, then times 1" exists on gloo too


def full_tensor(tensor):
    """A sharded parameter, gradient or norm whole, as a new tensor; others detached. Collective."""
    tensor = tensor.detach()
    with _plain_words("gathering a sharded tensor"):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor):
    """The rows of a parameter or gradient that this rank holds: all, if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def copy_into(parameter, tensor):
    """Copy a whole `tensor` of any device and dtype into a parameter; if that is sharded, each rank
    takes its own rows, with no communication. Raises ValueError if the shapes differ."""
    if parameter.shape != tensor.shape:
        raise ValueError(f"cannot copy {tuple(tensor.shape)} into {tuple(parameter.shape)}")
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        rows = tensor.chunk(mesh.size())  # as FSDP2 cuts them; the last ranks may have none
        if mesh.get_local_rank() < len(rows):
            parameter.to_local().copy_(rows[mesh.get_local_rank()])
    else:
        parameter.copy_(tensor)


def all_sum(tensor, operation=dist.ReduceOp.SUM):
    """Replace `tensor` by its sum, or other `operation`, over the ranks; gives it. Collective."""
    if dist.is_initialized():
        with _plain_words("adding up over the ranks"):
            # NCCL reduces GPU tensors only, and a token count may well live on the CPU.
            on_device = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(on_device, operation)
            tensor.copy_(on_device)
    return tensor


def any_rank(flag):
    """True on every rank if `flag` is true on any, say "a signal arrived". Collective."""
    return bool(all_sum(torch.tensor(int(bool(flag)))))


def on_all_ranks(action):
    """`action()` on every rank; if it fails on one, all raise, so that none waits for ever."""
    answer = failure = None
    try:
        answer = action()
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or UserError("another rank failed: its own message says why")
    return answer


def on_main(action):
    """`action()` on the main rank, its number (None: 0) on all of them; if it fails, all raise."""
    return int(all_sum(torch.tensor(on_all_ranks(lambda: is_main() and action()) or 0)))


def stop_ranks():
    """Leave the other ranks; call it once at the end of a run. Nothing for a single process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads live on with the sharded model and free the last collective's tensor a
        # moment later, for which they need the interpreter: if it is gone, the process aborts.
        time.sleep(0.2)


@contextlib.contextmanager
def _plain_words(doing):
    """A collective fails when another rank is gone or stuck: say so before PyTorch's words."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one
        if out_of_memory(error):  # the caller's to explain
            raise
        raise UserError(
            f"rank {this_rank()}: another rank has ended or does not answer ({doing}); its own"
            f" message, above or in its log, says why. PyTorch says: {one_line(error)}") from error
