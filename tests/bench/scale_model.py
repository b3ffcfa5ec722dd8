"""A training step on many GPUs, simulated: what scale_out.py prints and checks.

FSDP2 (`common.ranks.shard`) as three lanes in time. Gathering a group's weights, computing the
group, and reducing its gradients each go on in order, beside one another. A group, a decoder layer
or what remains (embedding, last norm, head), can be computed once it is gathered, and gathering
runs at most one group ahead, which bounds memory. What is not in it: stragglers, the file system, a
network shared with others. So it is what can be hoped for.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import predict


@dataclass(frozen=True)
class Machine:
    """What a rank can do. Bandwidths are of a rank's own link, what a ring really moves."""

    name: str
    flops: float  # a second, that a step reaches on one rank alone
    ranks_per_node: int
    inside: float  # bytes a second between the ranks of a node
    between: float  # and between nodes, for each rank
    latency: float  # seconds of each hop of a collective
    optimizer: float  # bytes a second of memory that AdamW reaches
    memory: float  # bytes of it
    overlap: bool = True  # communication goes on beside computing, which a CPU would have to do


MACHINES = {
    # 312 and 989 TFLOP/s at an MFU, the optimizer apart, of 55 %, which is assumed, and 38 %, which
    # gpu.py has measured on an H100 (Qwen3-0.6B, dense). NVLink of 300 and 450 GB/s each way, of
    # which rings reach some 75 %; 200 and 400 Gb/s of network per GPU, some 85 %; 2.0 and 4.8 TB/s
    # of memory, some 70 %.
    "A100": Machine("A100 80 GB", 0.55 * 312e12, 8, 225e9, 21e9, 5e-6, 1.4e12, 80e9),
    "H200": Machine("H200", 0.38 * 989e12, 8, 340e9, 42e9, 5e-6, 3.3e12, 141e9),
}


@dataclass(frozen=True)
class Group:
    """What FSDP2 gathers and reduces at once, of one rank and micro-batch."""

    name: str
    forward: float  # FLOPs
    backward: float
    gathered: float  # bytes of its whole weights as they travel
    reduced: float  # bytes of its whole gradient as it travels (float32)


def groups_of(model, tokens, attended, dtype):
    """The `Group`s of a model in the order of the forward: each layer, then the root.

    `dtype`: what trained matrices travel in; None: each as it is stored (adapter runs).
    """
    flops, config = predict.flops_per_token(model, attended), model.config
    layers = list(model.model.layers)
    # A third of a trained matrix's FLOPs, half of a frozen one's, are the forward's.
    frozen = not layers[0].input_layernorm.weight.requires_grad
    share = 1 / 2 if frozen else 1 / 3
    layer = flops["matrices"] * tokens / len(layers)
    attention = flops["attention"] * tokens / len(layers)
    found = []
    inside = {id(p) for each in layers for p in each.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    for number, parameters in enumerate([*(list(each.parameters()) for each in layers), rest]):
        gathered = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)
        reduced = sum(4 * p.numel() for p in parameters if p.requires_grad)
        if number < config.num_hidden_layers:
            found.append(Group(f"layer {number}", share * layer + attention / 3,
                               (1 - share) * layer + attention * 2 / 3, gathered, reduced))
        else:
            head = flops["head"] * tokens
            found.append(Group("root", share * head, (1 - share) * head, gathered, reduced))
    return found


def collective(size, ranks, machine):
    """Seconds to gather, or to reduce and scatter, `size` bytes over a ring of all ranks.

    Each rank passes on (n-1)/n of the bytes; where a ring crosses nodes its slowest link counts.
    """
    if ranks == 1 or not size:
        return 0.0
    link = machine.inside if ranks <= machine.ranks_per_node else machine.between
    return (ranks - 1) / ranks * size / link + (ranks - 1) * machine.latency


def simulate(groups, ranks, machine, trained, accumulate=1):
    """Seconds of one optimizer step: dict with step, compute, gather, reduce, exposed, optimizer.

    `trained` numbers are updated; each rank has its share of them. `exposed` is the time in which
    a rank waits for others instead of computing.
    """
    def time_of(flops):
        return flops / machine.flops

    *layers, root = groups
    # (seconds of computing, bytes gathered for it, bytes reduced after it). The root is gathered
    # for the embedding, is there for the head, and is gathered once more for the backward, at
    # whose very end the embedding's gradient, and so the root's, is whole.
    forward = [(0.0, root.gathered, 0.0), *((time_of(g.forward), g.gathered, 0.0) for g in layers),
               (time_of(root.forward), 0.0, 0.0)]
    backward = [(time_of(root.backward), root.gathered, 0.0),
                *((time_of(g.backward), g.gathered, g.reduced) for g in reversed(layers)),
                (0.0, 0.0, root.reduced)]
    gather_free = compute_free = reduce_free = 0.0
    computed = [0.0]  # when each computation ended
    totals = {"compute": 0.0, "gather": 0.0, "reduce": 0.0}
    for seconds, gathered, reduced in (forward + backward) * accumulate:
        # One ahead: this gathering may begin when the group before the last one is computed.
        begin = max(gather_free, computed[-2] if len(computed) > 1 else 0.0)
        there = collective(gathered, ranks, machine)
        gather_free = begin + there if gathered else gather_free
        compute_free = max(compute_free, gather_free) + seconds
        computed.append(compute_free)
        away = collective(reduced, ranks, machine)
        reduce_free = max(reduce_free, compute_free) + away if reduced else reduce_free
        for name, part in zip(totals, (seconds, there, away)):
            totals[name] += part
    end = max(compute_free, reduce_free) if machine.overlap else sum(totals.values())
    optimizer = 40 * trained / ranks / machine.optimizer  # AdamW's 28 bytes and clipping's 12
    return {**totals, "exposed": end - totals["compute"], "optimizer": optimizer,
            "step": end + optimizer}
