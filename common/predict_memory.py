"""Memory of a training step, predicted: what is kept for the backward, and the fullest moment.

Counted by hand from the model files, term by term; `tests/common/test_predict.py` holds every
term against PyTorch's own list of saved tensors, and the sum against measured peaks.

Sizes: T tokens in the pack, D model width, H query heads, K key/value heads, d head size,
F feed-forward width, V vocabulary, r rank; c bytes of one number of the compute dtype.
"""

from common.adapters.layers import base, keeps_input, linears, matrix

FLOAT32 = 4  # bytes; master weights, gradients, both Adam moments, norm statistics, the loss


def memory(model, tokens, dtype, *, grad_accum=1, checkpointing="none", chunk=None, ranks=1,
           kernel_joins=False, compiled=False):
    """Bytes by category at the fullest moment of a training step: their sum is the peak.

    `model` needs only shapes (the "meta" device will do), with adapters in place and frozen
    parameters marked. `tokens` is T, of the largest pack. `dtype` is the compute dtype.
    `checkpointing` is "none", "selective" or "full"; `chunk` is the rows of the chunked loss, or
    None for the plain one; `ranks` share the parameters (FSDP2: a rough figure, as gathered
    weights are freed when their time comes, not at once). `kernel_joins`: attention is one
    kernel for all documents (CUDA, 16 bits) rather than one call for each. `compiled`: what
    surrounds attention is. The optimizer is AdamW, fused, whose step needs nothing of its own.
    """
    return max(phases(model, tokens, dtype, grad_accum=grad_accum, checkpointing=checkpointing,
                      chunk=chunk, ranks=ranks, kernel_joins=kernel_joins,
                      compiled=compiled).values(),
               key=lambda categories: sum(categories.values()))


def phases(model, tokens, dtype, *, grad_accum=1, checkpointing="none", chunk=None, ranks=1,
           kernel_joins=False, compiled=False):
    """The moments of a step at which memory can be fullest: name -> {category: bytes}.

    Going forward activations pile up; going backward they make room for gradients. So the peak
    is at the turning point (the loss), or at the end, when all gradients are there.
    """
    c = dtype.itemsize
    config, layers = model.model.config, list(model.model.layers)
    embedding = model.model.embed_tokens.weight
    tied = model.lm_head is None
    head = embedding if tied else matrix(model.lm_head)
    V, D = embedding.shape
    head_trained = head is not None and head.requires_grad
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    if not tied and base(model.lm_head) is not model.lm_head:
        chunk = None  # a head with an adapter gives logits

    # --- what stays from step to step ---
    weights = sum(t.nbytes for t in model.parameters()) // ranks
    weights += sum(t.nbytes for t in model.buffers())  # not sharded
    gradients = FLOAT32 * trained // ranks
    held = gradients if grad_accum > 1 else 0  # gradients of the micro-batches before
    moments = 2 * FLOAT32 * trained // ranks

    # --- what the forward keeps for the backward ---
    per_layer = [sum(saved_per_token(layer, dtype, kernel_joins, compiled).values())
                 for layer in layers]
    copies = [weight_copies(layer, dtype) for layer in layers]
    head_copy = c * V * D if head is not None and head.dtype.itemsize != c else 0
    if ranks > 1:  # FSDP2 gathers in c: embedding and head for the step, two layers at a time
        copies = [0] * len(layers)
        head_copy = c * (embedding.numel() * (1 if tied else 2)
                         + 2 * sum(p.numel() for p in layers[0].parameters()))
    last = norm_per_token(model.model.norm, D, dtype,
                          chunk is None and keeps_input(model.lm_head or model.model.embed_tokens))
    tables = c * config.head_dim  # cos and sin, once for all layers
    kept, again = sum(per_layer), 0
    dear = dear_per_token(layers[0], dtype, compiled)
    if checkpointing != "none":
        # Kept: the layer's input, and if selective what is dear to compute. The layer at work is
        # computed once more, so its own tensors are there a second time.
        # Attention in blocks has q, k and v there a third time, heads first.
        again = max(per_layer) * tokens + max(copies)
        if checkpointing == "selective":
            again -= dear * tokens
        if hasattr(layers[0], "run") and not kernel_joins:
            again += c * tokens * sum(base(getattr(layers[0].self_attn, f"{n}_proj")).out_features
                                      for n in "qkv")
        kept = len(layers) * (c * D + dear * (checkpointing == "selective"))
        copies = [0] * len(copies)
    activations = tokens * (kept + last + tables)
    all_copies = sum(copies) + head_copy

    loss, head_phase = loss_and_head(
        tokens, V, D, c, chunk, head_trained, head_copy, kernel_joins, compiled)

    # --- what the backward needs for itself ---
    head_gradient = FLOAT32 * V * D * head_trained
    # One layer's backward: the residual's gradient, and those of the feed-forward's products.
    F = base(layers[-1].mlp.up_proj).out_features
    # A quantised layer's matrices are dequantised in turn, or, in a compiled layer that is computed
    # again, all at once.
    whole = [base(m).in_features * base(m).out_features for m in linears(layers[0])
             if matrix(m) is None]
    whole = sum(whole) if compiled and checkpointing == "full" else max(whole, default=0)
    at_work = tokens * (2 * c * D + 2 * c * F) + c * whole + again
    if ranks > 1:  # its whole gradient, in float32 for the reduction too; the gathering's buffer
        at_work += (2 * c + FLOAT32) * sum(p.numel() for p in layers[0].parameters())
    # A tied matrix has two gradients in the backward: the head's waits, apart from those of the
    # micro-batches before, for the embedding's. From a plain float32 product it is a view, so that
    # their sum is a third; otherwise autograd adds in place.
    waiting = head_gradient if tied and held else 0
    in_embedding = 0
    if embedding.requires_grad:
        extra = (tied or grad_accum > 1 or ranks > 1) + (tied and c == FLOAT32 and chunk is None)
        in_embedding = FLOAT32 * V * D * extra + tokens * D * (c + FLOAT32) + waiting

    compute = str(dtype).removeprefix("torch.")

    def moment(gradients, activations=0, copies=0, loss=0, at_work=0):
        return {"weights": weights, "optimizer moments": moments, "gradients": gradients,
                "activations": activations, f"copies of weights in {compute}": copies,
                "logits and loss": loss, "layer at work": at_work}

    after_head = all_copies - head_copy * (ranks == 1)
    not_yet = FLOAT32 * V * D // ranks if embedding.requires_grad and not tied and not held else 0
    return {
        "loss": moment(held, activations, all_copies, loss),
        "backward of the head": moment(held, activations, all_copies, head_phase),
        "backward of the last layer": moment(
            held + waiting if held else head_gradient, activations, after_head, at_work=at_work),
        "backward of the first layer": moment(
            gradients - not_yet, activations // len(layers), head_copy * (ranks > 1),
            at_work=at_work + waiting),
        "end of the backward": moment(
            gradients, tokens * tables, head_copy * (ranks > 1), at_work=in_embedding),
        "optimizer step": moment(gradients),
    }


def loss_and_head(tokens, V, D, c, chunk, trained, copy, on_gpu, compiled):
    """Bytes that the loss needs at its worst, and then the backward of the head.

    `trained`: the head is. `copy`: bytes of its weight in c, which goes when the head's turn ends.
    """
    narrow = c < FLOAT32
    if chunk is None:
        # Backward of the softmax: log-probabilities, their gradient, the logits' gradient.
        loss = 3 * FLOAT32 * tokens * V
        # Then of the head: the logits' gradient, in c; the weight's, in c and then in float32.
        product = c * tokens * V + c * V * D * trained
        cast = (c + FLOAT32) * V * D * trained - copy if narrow else 0
        return loss, c * tokens * D + max(product, cast)
    # Both gradients are formed in the forward, one chunk's logits after another (loss.py): in c,
    # with float32 pieces that fit a cache; then the chunk's share of the weight's gradient, in c
    # and, where adding it up needs that, in float32. On a GPU that is one product, and the compiled
    # softmax has no pieces. The backward multiplies both gradients, and has them twice for that
    # moment.
    rows = -(-tokens // -(-tokens // chunk))
    both = c * tokens * D + FLOAT32 * V * D * trained
    pieces = (1 + narrow) * FLOAT32 * min(rows * V, 2**23 if on_gpu else 2**21)
    share = (c + FLOAT32) * min(V, 2**13) * D * narrow * trained  # in parts of 8,192 rows of W
    if on_gpu:
        pieces, share = pieces * (not compiled), 0
    return both + c * rows * (V + 2 * D) + max(pieces, share), 2 * both - copy


def saved_per_token(layer, dtype, kernel_joins=False, compiled=False):
    """What a decoder layer keeps for its backward, bytes per token: named terms, in order.

    Compiled code computes what is cheap a second time: it keeps what goes into a norm as it came,
    in c and not in float32, and neither x / rms nor silu(gate), nor what DoRA has scaled.
    """
    def norm(module, width, keeps_result, rows=1):
        if compiled:
            return c * width * (1 + keeps_result) + FLOAT32 * rows
        return norm_per_token(module, width, dtype, keeps_result, rows)

    c, attention, mlp = dtype.itemsize, layer.self_attn, layer.mlp
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    d = attention.head_dim
    Hd, Kd, F = base(q).out_features, base(k).out_features, base(mlp.up_proj).out_features
    D = base(q).in_features
    terms = {}
    terms["input norm: x, x / rms, result"] = norm(
        layer.input_layernorm, D, any(map(keeps_input, (q, k, v))))
    if hasattr(attention.q_norm, "weight"):
        # The result is turned by the rotary tables, which keeps none of it.
        terms["norms of q and k: x, x / rms"] = (
            norm(attention.q_norm, Hd, False, Hd // d) + norm(attention.k_norm, Kd, False, Kd // d))
    terms["attention: q, k, v"] = c * (Hd + 2 * Kd)
    if hasattr(layer, "run") and not kernel_joins:  # chapter 3's blocks: nothing but q, k and v
        terms["input of o_proj"] = c * Hd * keeps_input(o)
    else:
        terms["attention: output, log-sum-exp"] = c * Hd + FLOAT32 * Hd // d
        # One call a document: the outputs are then joined in a tensor of their own.
        terms["input of o_proj"] = c * Hd * (keeps_input(o) and not kernel_joins)
    readers = (m for m in linears(mlp) if m is not mlp.down_proj)
    terms["feed-forward norm: x, x / rms, result"] = norm(
        layer.post_attention_layernorm, D, any(map(keeps_input, readers)))
    terms["gate, up, silu(gate)"] = c * F * (2 if compiled else 3)
    terms["input of down_proj"] = c * F * keeps_input(mlp.down_proj)
    terms["adapters"] = sum(adapter_per_token(module, dtype) for module in linears(layer))
    terms["DoRA: unscaled outputs"] = sum(unscaled_per_token(module, dtype) for module in (
        *((v, o, mlp.down_proj) if compiled else linears(layer)),
        *((q, k) if compiled and not hasattr(attention.q_norm, "weight") else ())))
    return terms


def norm_per_token(norm, width, dtype, keeps_result, rows=1):
    """RMSNorm keeps x and 1/rms in float32, x/rms if its weight is trained, maybe its result.

    The result is kept by the next product, if that needs it for a gradient of its own.
    """
    c = dtype.itemsize
    return FLOAT32 * (width + rows) + c * width * (norm.weight.requires_grad + keeps_result)


def dear_per_token(layer, dtype, compiled=False):
    """Outputs of the matrix products and of attention: what selective checkpointing keeps.

    Compiled code does not keep the last product, which nothing but the next layer needs (or DoRA).
    """
    c, d = dtype.itemsize, layer.self_attn.head_dim
    Hd = base(layer.self_attn.q_proj).out_features
    kept = Hd + sum(base(m).out_features for m in linears(layer))
    kept += sum(m.factors()[0].shape[0] for m in linears(layer) if base(m) is not m)  # x Aᵀ
    if compiled and not unscaled_per_token(layer.mlp.down_proj, dtype):
        kept -= base(layer.mlp.down_proj).out_features
    return c * kept + FLOAT32 * Hd // d


def adapter_per_token(module, dtype):
    """An adapter keeps x Aᵀ (r); with dropout its own x and the mask."""
    if base(module) is module:
        return 0
    c, A = dtype.itemsize, module.factors()[0]
    dropped = 2 * c * A.shape[1] if module.dropout else 0
    return c * A.shape[0] + dropped


def unscaled_per_token(module, dtype):
    """DoRA keeps its output before it is scaled, for the gradient of the magnitudes."""
    if not hasattr(module, "lora_magnitude_vector"):
        return 0
    return dtype.itemsize * module.base.out_features


def weight_copies(layer, dtype):
    """Bytes of a layer's matrices in the compute dtype that an eager step keeps until backward.

    A float32 master is cast for its product, and the product keeps what it multiplied by. (An
    adapter's B is multiplied by its scale first, which is a copy in any dtype.)
    """
    c, total = dtype.itemsize, 0
    for module in linears(layer):
        weight = matrix(module)
        if weight is not None and weight.dtype.itemsize != c:
            total += c * weight.numel()
        if base(module) is not module:
            A, B = module.factors()
            total += c * A.numel() * (A.dtype.itemsize != c) + c * B.numel()
    return total
