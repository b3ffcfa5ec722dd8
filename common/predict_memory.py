"""Memory of a training step, predicted: what is kept for the backward, and the fullest moment.
Counted by hand from the model files, term by term; `tests/common/test_predict.py` holds every term
against PyTorch's own list of saved tensors, and the sum against measured peaks.

Sizes: T tokens in the pack, D model width, H query heads, K key/value heads, d head size, F
feed-forward width, V vocabulary, r rank; c bytes of one number of the compute dtype."""

from functools import partial
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

FLOAT32 = 4  # bytes; master weights, gradients, both Adam moments, norm statistics, the loss


class LinearCost(NamedTuple):
    """What a training step needs for a linear layer y = x Wᵀ, beside W itself."""
    shape: tuple  # (out, in)
    weight: Tensor | None  # W as a parameter; None if it is quantised, so dequantised at each use
    factors: tuple = ()  # of an adapter: A (r, in) and s B (out, r)
    keeps_input: bool = False  # x, for the gradient of W or of A
    keeps: int = 0  # other numbers per token: an adapter's x Aᵀ; with dropout its result and mask
    keeps_output: bool = False  # y, if a trained operation on it follows, as in DoRA
    products: int = 1  # of y's size, which selective checkpointing keeps

    def flops(self):
        """Of one token in forward and backward: 6 for each trained number, 4 for a frozen one."""
        trained = self.weight is not None and self.weight.requires_grad
        return (6 if trained else 4) * prod(self.shape) + sum(
            (6 if matrix.requires_grad else 4) * matrix.numel() for matrix in self.factors)


def linear_cost(module):
    """The cost of an nn.Linear, an embedding that is the head too, or what has a method `cost`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        weight = module.weight
        return LinearCost(tuple(weight.shape), weight, keeps_input=weight.requires_grad)
    return module.cost()


def layer_costs(layer):
    """The `LinearCost`s of a decoder layer: of q, k, v, o, gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [linear_cost(module) for module in (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def memory(model, tokens, dtype, *, grad_accum=1, checkpointing="none", chunk=None, ranks=1,
           varlen_kernel=False, compiled=False):
    """Bytes by category at a step's fullest moment, the loss or the end; their sum is the peak.

    `model` needs only shapes (the "meta" device will do), with adapters in place and frozen
    parameters marked. `tokens` is T, of the largest pack; `dtype` is the compute dtype; `chunk` is
    the rows of the chunked loss, None for the plain one; `checkpointing` is "none", "selective" or
    "full". `ranks` share the parameters (FSDP2: a rough figure, as gathered weights are not freed
    at once). `varlen_kernel` (CUDA, 16 bits): attention is one kernel for all documents, not a call
    for each, and a norm is one kernel. `compiled`: layers are, bar attention. AdamW is fused. Not
    counted: what chapter 2 keeps on a CPU for a window, c times a document's length squared."""
    c, layers = dtype.itemsize, model.model.layers
    embedding, tied = model.model.embed_tokens.weight, model.lm_head is None
    V, D = embedding.shape
    head = linear_cost(model.lm_head or model.model.embed_tokens)
    if head.factors:
        chunk = None  # a head with an adapter gives logits
    q, k, v, *_, up, down = first = layer_costs(layers[0])
    d = layers[0].self_attn.head_dim

    # --- what stays from step to step ---
    weights = sum(t.nbytes for t in model.parameters()) // ranks
    weights += sum(t.nbytes for t in model.buffers())  # not sharded
    gradients = FLOAT32 * sum(p.numel() for p in model.parameters() if p.requires_grad) // ranks
    held = gradients if grad_accum > 1 else 0  # gradients of earlier micro-batches
    head_gradient = FLOAT32 * V * D * head.weight.requires_grad

    # --- what the forward keeps for the backward ---
    per_layer = [saved_per_token(layer, dtype, varlen_kernel, compiled) for layer in layers]
    kept, copies = sum(per_layer), [weight_copies(layer, dtype) for layer in layers]
    head_copy = c * V * D if head.weight.dtype.itemsize != c else 0
    # One layer's backward: the residual's gradient, and those of the feed-forward's products.
    at_work = tokens * 2 * c * (D + up.shape[0])
    # Quantised matrices are dequantised singly or, if compiled and computed again, all at once.
    whole = [prod(cost.shape) for cost in first if cost.weight is None]
    at_work += c * (sum(whole) if compiled and checkpointing == "full" else max(whole, default=0))
    gathered = 0
    if ranks > 1:  # FSDP2 gathers in c: embedding and head for the step, two layers at a time
        one_layer = sum(p.numel() for p in layers[0].parameters())
        gathered = c * (embedding.numel() * (1 if tied else 2) + 2 * one_layer)
        copies, head_copy = [0] * len(layers), 0
        # Its whole gradient, also in float32 for the reduction; the gathering's buffer.
        at_work += (2 * c + FLOAT32) * one_layer
    if checkpointing != "none":
        # Kept: a layer's input, if selective the outputs of attention and products (compiled, the
        # last one's only if DoRA needs it). The layer at work, computed again, has the others too.
        again = 0
        if checkpointing == "selective":
            again = q.shape[0] + sum(cost.shape[0] * cost.products for cost in first)
            again += sum(len(cost.factors[0]) for cost in first if cost.factors)  # x Aᵀ
            again -= down.shape[0] * (compiled and not down.keeps_output)
            again = c * again + FLOAT32 * q.shape[0] // d
        at_work += (max(per_layer) - again) * tokens + max(copies)
        if not varlen_kernel:  # attention in blocks also holds q, k and v arranged by head
            at_work += c * tokens * (q.shape[0] + k.shape[0] + v.shape[0])
        kept, copies = len(layers) * (c * D + again), [0] * len(layers)
    last = norm_per_token(model.model.norm, D, chunk is None and head.keeps_input, dtype=dtype,
                          one_kernel=varlen_kernel)
    tables = c * tokens * d  # cos and sin, once for all layers
    activations = tokens * (kept + last) + tables

    # --- the loss, and then the backward of the head ---
    if chunk is None:
        # Of the softmax: log-probabilities, their gradient, the logits' gradient. Then of the
        # head: the gradients of logits, of what goes in, and of the weight, all in c.
        loss = max(3 * FLOAT32 * tokens * V,
                   c * (tokens * (D + V) + V * D * head.weight.requires_grad))
    else:
        # Both gradients are formed in the forward, chunk by chunk (loss.py): the logits in c, with
        # float32 pieces that fit a cache (none in a GPU's compiled softmax). The backward scales
        # both gradients, and briefly holds them twice, without the copies of weights.
        rows = -(-tokens // -(-tokens // chunk))
        pieces = 0 if varlen_kernel and compiled else (1 + (c < FLOAT32)) * FLOAT32 * min(
            rows * V, 2**23 if varlen_kernel else 2**21)
        both = c * tokens * D + head_gradient
        loss = both + max(c * rows * (V + 2 * D) + pieces, both - head_copy - gathered)

    # --- the moments ---
    # A tied matrix has two gradients in the backward: the head's, apart from those of earlier
    # micro-batches, is held until the embedding's is there. From a plain float32 product it is a
    # view, so that their sum is a third tensor; otherwise autograd adds in place.
    waiting = head_gradient if tied and held else 0
    in_embedding = not_yet = 0
    if embedding.requires_grad:
        extra = (tied or grad_accum > 1 or ranks > 1) + (tied and c == FLOAT32 and chunk is None)
        in_embedding = FLOAT32 * V * D * extra + tokens * D * (c + FLOAT32) + waiting
        not_yet = 0 if tied or held else FLOAT32 * V * D // ranks
    fullest = max((  # gradients, activations, copies of weights, the loss, the layer at work
        (held, activations, sum(copies) + head_copy, loss, 0),  # loss, and backward of the head
        (held + waiting if held else head_gradient, activations, sum(copies), 0, at_work),
        (gradients - not_yet, activations // len(layers), 0, 0, at_work + waiting),  # first layer
        (gradients, tables, 0, 0, in_embedding)), key=sum)
    compute = str(dtype).removeprefix("torch.")
    return {"weights": weights, "optimizer moments": 2 * gradients, "gradients": fullest[0],
            "activations": fullest[1], f"copies of weights in {compute}": fullest[2] + gathered,
            "logits and loss": fullest[3], "layer at work": fullest[4]}


def saved_per_token(layer, dtype, varlen_kernel=False, compiled=False):
    """Bytes per token kept for backward. Compiled code recomputes silu(gate) and DoRA's scaling."""
    norm = partial(norm_per_token, dtype=dtype, one_kernel=varlen_kernel, compiled=compiled)
    attention = layer.self_attn
    q, k, v, o, gate, up, down = costs = layer_costs(layer)
    (Hd, D), Kd, F, d = q.shape, k.shape[0], up.shape[0], attention.head_dim
    qk_norm = not isinstance(attention.q_norm, nn.Identity)
    kept = norm(layer.input_layernorm, D, q.keeps_input or k.keeps_input or v.keeps_input)
    kept += norm(layer.post_attention_layernorm, D, gate.keeps_input or up.keeps_input)
    if qk_norm:  # their result is then rotated, for which nothing is kept
        kept += norm(attention.q_norm, Hd, False, Hd // d)
        kept += norm(attention.k_norm, Kd, False, Kd // d)
    numbers = Hd + 2 * Kd  # q, k, v
    # Chapter 3's attention recomputes its output in the backward, unless it is one GPU kernel.
    if varlen_kernel or getattr(attention, "keeps_output", True):
        numbers += Hd
        kept += FLOAT32 * Hd // d  # the log-sum-exp
    if not varlen_kernel:  # the outputs by document are joined in a new tensor, o_proj's input
        numbers += Hd * o.keeps_input
    numbers += F * ((2 if compiled else 3) + down.keeps_input)  # gate, up, silu(gate); product
    numbers += sum(cost.keeps for cost in costs)  # adapters
    scaled = costs if not compiled else (v, o, down) if qk_norm else (q, k, v, o, down)
    numbers += sum(cost.shape[0] for cost in scaled if cost.keeps_output)  # DoRA's, to be scaled
    return kept + dtype.itemsize * numbers


def norm_per_token(norm, width, keeps_result, rows=1, *, dtype, one_kernel, compiled=False):
    """Bytes per token of RMSNorm: 1/rms and x in float32, x in its own dtype if all is one kernel;
    x/rms if its weight is trained, unless compiled; its result if a product's gradient needs it."""
    c = dtype.itemsize
    x, scaled = c if one_kernel or compiled else FLOAT32, norm.weight.requires_grad and not compiled
    return FLOAT32 * rows + width * (x + c * (scaled + keeps_result))


def weight_copies(layer, dtype):
    """Bytes of a layer's matrices in the compute dtype that an eager step keeps until backward: the
    cast of a float32 master, and, in any dtype, an adapter's B, which is scaled first."""
    c, total = dtype.itemsize, 0
    for cost in layer_costs(layer):
        cast = [m for m in (cost.weight, *cost.factors[:1]) if m is not None and m.itemsize != c]
        total += c * sum(matrix.numel() for matrix in (*cast, *cost.factors[1:]))
    return total
