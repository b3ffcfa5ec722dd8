"""`--compile`: each decoder layer as one graph, compiled once for all layers and all packs."""

import torch
from modeling_llama import run

from common.errors import UserError


def compile_model(model, backend="inductor"):
    """Compile the model's layers, in place; gives the model.

    One graph, made at the first step and used by every layer; it fits packs of the same T, N and
    max_seqlen (`packing.StaticShape`). Within it attention is an operator that the compiler does
    not look into. Embedding, loss and generation stay as they are. Call it last, when weights and
    adapters are in place. Raises UserError where nothing can be compiled, as without a C++
    compiler.
    """
    device = next(model.parameters()).device
    try:
        torch.compile(torch.exp, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, all of them meaning the same to the user
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error))
        raise UserError(f"--compile: PyTorch cannot compile here ({reason}): install a C++"
                        " compiler, such as g++, or leave --compile out") from error
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)
    for layer in model.model.layers:
        layer.run = compiled
    return model
