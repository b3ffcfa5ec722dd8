"""Is what a device computes right? The first part of gpu.py; each check: (name, error, limit).

The yardstick is the CPU in float32, each document by itself: no packing, no kernel of the device.
So the checks mean something on a CPU too.
"""

import copy
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers import load
from report import largest

modeling = load("chapter-03/modeling_llama.py")
packing, lora, nf4 = (load(f"chapter-03/{name}.py") for name in ("packing", "lora", "nf4"))
loss_module = load("chapter-03/loss.py")
compile_model = load("chapter-03/compiling.py").compile_model

PACKS = ([1], [64], [7, 1, 64], [33] * 5, [200, 3, 57], [2, 2, 2, 129])  # lengths of documents
VOCABULARY = 515  # no multiple of anything that kernels like


def small_model():
    """A model of a few layers, float32, on the CPU."""
    torch.manual_seed(0)
    model = modeling.LlamaForCausalLM(modeling.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=320, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        qk_norm=True, qkv_bias=False, rope_theta=1e6, windows=(None, 40, None),
        tie_word_embeddings=True, initializer_range=0.05))
    return model


def documents_of(lengths):
    """Random documents, a third of each not trained on."""
    random = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(0, VOCABULARY, (n,), generator=random) for n in lengths]
    return [(ids, torch.where(torch.arange(len(ids)) % 3 == 0, -100, ids)) for ids in documents]


def on(device, pack):
    """The pack, its tensors on `device`."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack.items()}


def logits_and_gradients(model, examples, device, shape=None):
    """(logits (T, V) float32, {name: gradient}) of a pack of `examples`, on the CPU. With a
    StaticShape the pack has padding and empty documents too, whose logits are left out."""
    model.zero_grad(set_to_none=True)
    pack = on(device, packing.packed_sequence_collate_fn(examples, shape))
    inputs = {k: v for k, v in pack.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs).float().cpu()[:sum(len(ids) for ids, _ in examples)]
    model(**pack).backward()
    return logits, {n: p.grad.float().cpu() for n, p in model.named_parameters()
                    if p.grad is not None}


def alone(model, examples):
    """The same from each document by itself, on the CPU."""
    found = [logits_and_gradients(model, [one], "cpu") for one in examples]
    names = found[0][1]
    return (torch.cat([logits for logits, _ in found]),
            {n: sum(gradients[n] for _, gradients in found) for n in names})


def distance(found, wanted):
    """‖a - b‖ / ‖b‖ of tensors, or the largest of a dict of them."""
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return float("inf")
        return max(distance(found[n], wanted[n]) for n in wanted if wanted[n].norm() > 0)
    return float((found.double().cpu() - wanted.double().cpu()).norm()
                 / wanted.double().norm().cpu())


def models(device, dtype):
    """Logits and gradients of packs on the device against each document alone on the CPU."""
    reference = small_model()
    there = copy.deepcopy(reference).to(device)
    there.compute_dtype = dtype
    errors = []
    for lengths in PACKS:
        if lengths == [1]:
            continue  # one token has no target; it counts among others
        examples = documents_of(lengths)
        wanted = alone(reference, examples)
        filled = packing.StaticShape(sum(lengths) + 37, len(lengths) + 5, max(lengths))
        for shape in (None, filled):
            found = logits_and_gradients(there, examples, device, shape)
            errors.append([distance(a, b) for a, b in zip(found, wanted)])
    limits = (1e-5, 1e-4) if dtype == torch.float32 else (3e-2, 6e-2)
    name = str(dtype).removeprefix("torch.")
    for what, worst, limit in zip(("logits", "gradients"), map(largest, zip(*errors)), limits):
        yield f"{name} {what}, {len(errors)} packs, against the CPU's of documents alone", \
            worst, limit


def isolation(device, dtype):
    """Another first document leaves the second one's logits as they are, to the last bit."""
    model = small_model().to(device)
    model.compute_dtype = dtype
    first, second = documents_of([70, 90])
    other = ((first[0] + 1) % VOCABULARY, first[1])
    logits = []
    for one in (first, other):
        pack = on(device, packing.packed_sequence_collate_fn([one, second]))
        with torch.no_grad():
            logits.append(model(**{k: v for k, v in pack.items() if k != "labels"})[70:])
    yield "logits of a document when its neighbour changes", \
        float((logits[0].float() - logits[1].float()).abs().max()), 0.0


def chunked_loss(device, dtype, softmax=None, how="chunked"):
    """The loss against float64 on the same rounded logits; gradients against float64's."""
    torch.manual_seed(1)
    hidden = torch.randn(700, 64, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(1003, 64, device=device) * 0.1).requires_grad_()
    labels = torch.randint(0, 1003, (700,), device=device)
    labels[::5] = -100
    rows = (labels >= 0).nonzero()[:, 0]
    loss = loss_module.chunked_cross_entropy(hidden, weight, labels, 256, rows, softmax)
    (loss / 560).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight.to(dtype))]
    logits = exact[0] @ exact[1].t()
    (F.cross_entropy(logits, labels, reduction="sum") / 560).backward()
    rounded, parts = torch.zeros((), dtype=torch.float64, device=device), -(-len(rows) // 256)
    with torch.no_grad():
        for i in range(parts):  # the same pieces, so that the same products are rounded
            part = rows[len(rows) * i // parts:len(rows) * (i + 1) // parts]
            product = hidden[part] @ weight.to(dtype).t()
            rounded += F.cross_entropy(product.double(), labels[part], reduction="sum")
    name = str(dtype).removeprefix("torch.")
    yield f"{name} {how} loss, against float64", abs(loss.item() / rounded.item() - 1), 1e-6
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    yield f"{name} {how} loss, its gradients", max(
        distance(hidden.grad, exact[0].grad), distance(weight.grad, exact[1].grad)), limit


def compiled_loss(device, backend):
    """The loss, its softmax compiled."""
    settings = {"backend": backend, "fullgraph": True, "dynamic": False}
    softmax = functools.partial(loss_module.softmax_at_once_,
                                compiled=torch.compile(loss_module.softmax_, **settings))
    yield from chunked_loss(device, torch.bfloat16, softmax, "compiled")


def compiled_layers(device, backend):
    """Layers with adapters, compiled, against documents alone."""
    reference = small_model()
    lora.apply_adapter(reference, lora.AdapterConfig(rank=4, alpha=8.0))
    random = torch.Generator().manual_seed(3)
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    model = copy.deepcopy(reference).to(device)
    model.compute_dtype = torch.bfloat16
    compile_model(model, backend)
    errors = []
    for lengths in ([70, 30, 9], [50, 50, 1, 9], [128]):
        examples, shape = documents_of(lengths), packing.StaticShape(128, 8, 128)
        found = logits_and_gradients(model, examples, device, shape)
        errors.append([distance(a, b) for a, b in zip(found, alone(reference, examples))])
    found = map(largest, zip(*errors))
    for what, worst, limit in zip(("logits", "gradients"), found, (3e-2, 6e-2)):
        yield f"bfloat16 compiled LoRA, {what}, 3 packs, against the CPU's of documents alone", \
            worst, limit


def four_bits(device):
    """NF4's codes and scales as the CPU's, to the bit; the layer as its dequantised weight."""
    torch.manual_seed(2)
    for shape, double in (((96, 128), False), ((33, 64), False), ((128, 256), True)):
        weight = torch.randn(shape)
        here, there = nf4.quantize_nf4(weight, double), nf4.quantize_nf4(weight.to(device), double)
        wrong = int((here.packed != there.packed.cpu()).sum())
        if not double:  # the mean that is subtracted is a sum, whose order the device chooses
            wrong += int((here.absmax != there.absmax.cpu()).sum())
        yield f"NF4 codes of {shape}{', double' if double else ''}: different bytes", wrong, 0
    layer = nf4.NF4Linear(nf4.quantize_nf4(weight.to(device)))
    x = torch.randn(50, 256, device=device, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    dense = nf4.dequantize_nf4(layer.quantized).cpu()
    wanted = x.detach().cpu() @ dense.t()
    yield "NF4Linear, against the dequantised weight", distance(y.detach(), wanted), 1e-5
    yield "NF4Linear, its gradient", distance(x.grad, 2 * wanted @ dense), 1e-5


def adapters(device):
    """Each method's gradients, after one step, on the device and on the CPU."""
    examples = documents_of([40, 25, 63])
    for method in lora.METHODS:
        if method == "full":
            continue
        model, config = small_model(), lora.AdapterConfig(method=method, rank=4, alpha=8.0)
        lora.apply_adapter(model, config)
        random = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # away from B = 0, where A has no gradient
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
        there = copy.deepcopy(model).to(device)
        found = logits_and_gradients(there, examples, device)
        wanted = alone(model, examples)
        yield f"{method}: logits and gradients", max(
            distance(a, b) for a, b in zip(found, wanted)), 1e-4


def first_checks(device, backend):
    """What everything else rests on, in a quarter of a minute. A check may fail alone."""
    return [models(device, torch.bfloat16), isolation(device, torch.bfloat16),
            chunked_loss(device, torch.bfloat16)]


def other_checks(device, backend):
    """The rest."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return [models(device, torch.float32), chunked_loss(device, torch.float32), four_bits(device),
            adapters(device), compiled_loss(device, backend), compiled_layers(device, backend)]
