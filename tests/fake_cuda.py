"""The CUDA branch without a GPU: fake tensors on "cuda" through whole training steps.

    python tests/fake_cuda.py steps       every chapter and method, two layers, a line of JSON each
    python tests/fake_cuda.py pairs       learning from pairs: the reference pass, log p, the loss
    python tests/fake_cuda.py rewards     from rewards: what is drawn, and a step on it
    python tests/fake_cuda.py teachers    from a teacher: its pass, the divergence
    python tests/fake_cuda.py compiled    chapter 3 through torch.compile, as far as AOTAutograd
    python tests/fake_cuda.py memory      Qwen3 at full depth: the predicted peak and the traced one
    python tests/fake_cuda.py "chapter 2, lora" loss        some cases by their names

Nothing is computed, but every operator is called: one that gets tensors of two devices or of dtypes
that do not go together fails as on a GPU. test_cuda_branch.py reads the lines. It needs g++, once:
autograd asks for a device guard, and fake_cuda.cpp has one that does nothing.

Memory is the sum of the live storages, in the allocator's blocks of 512 bytes. What a kernel takes
for itself (FlashAttention's float32 scratch, cuBLAS's workspace) is not in it.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
MEMORY = 80 * 2**30  # bytes of the card that we play
QUANTIZE = {"none": {"quantize": "none"}, "nf4": {"quantize": "nf4"},
            "double": {"quantize": "nf4", "double_quant": True}}


def before_torch():
    """Compile fake_cuda.cpp for the torch that is installed, and load it; gives the library."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_cuda.so"
        subprocess.run(
            ["g++", "-std=c++20", "-fPIC", "-shared", HERE / "fake_cuda.cpp", "-o", library,
             f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10",
             "-ltorch_cpu"], check=True)
        return ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    LIBRARY = before_torch()

import torch
from torch._dynamo.utils import counters
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(HERE), str(HERE.parent)]
from helpers import ROOT, _loaded, load

from common import predict, predict_memory
from common.data.chat import Chat
from common.weights import read_config

CUDA = torch.device("cuda")
COPIES = []  # where compiled code adds a product to a copy and not in place


def after_torch():
    """Have torch.cuda answer as if an H100 were there."""
    LIBRARY.take_over()
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9, minor=0,
        multi_processor_count=132)
    for name, answer in {
            "is_available": True, "is_initialized": True, "_lazy_init": None, "device_count": 1,
            "current_device": 0, "get_device_name": properties.name, "synchronize": None,
            "get_device_properties": properties, "get_device_capability": (9, 0),
            "is_current_stream_capturing": False, "is_bf16_supported": True,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None}.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    fake_tensor.init_gpu_context = lambda *_: None
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA"):
        torch.nn.functional.rms_norm = rms_norm  # PyTorch for CPUs does not have the GPU's


class RMSNorm(torch.autograd.Function):
    """What a GPU's kernel takes and keeps: x and, for each row, 1/rms in float32."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, _ = ctx.saved_tensors
        return torch.empty_like(x)


def rms_norm(x, shape, eps, real=torch.nn.functional.rms_norm):
    """F.rms_norm, without a weight."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return real(x, shape, eps=eps)
    return RMSNorm.apply(x)


class Trace(TorchDispatchMode):
    """Live bytes on "cuda" and their peak, and which operators are called on another device."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.elsewhere = set(), 0, 0, set()

    @classmethod
    def is_infra_mode(cls):  # or dynamo stands aside
        return True

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.live:
            self.live.add(key)
            weakref.finalize(storage, self.drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        self.live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        node = torch._C._current_autograd_node()
        if function is torch.ops.aten.add.Tensor and not torch.is_grad_enabled() and node and (
                "Compiled" not in node.name() and getattr(args[1], "shape", 0) == args[0].shape):
            function = torch.ops.aten.add_.Tensor  # autograd adds fake gradients out of place
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                           for tree in ((args, kwargs), result))
        others = {t.device.type for t in (*inputs, *outputs) if t.ndim and t.numel()} - {"cuda"}
        if others and not function.is_view and "prim" not in str(function):
            self.elsewhere.add(str(function))
        for tensor in outputs:
            if tensor.device.type == "cuda":
                self.add(tensor)
        return result


# --- a model, a pack, a step ---

def to_cuda(module):
    """The module with its parameters and buffers as fake tensors on "cuda", shared ones shared."""
    made = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is not None and id(old) not in made:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new, old
                store[name] = old if old is None else made[id(old)][0]
    return module


class Case:
    """A chapter's model and step under a configuration; `run` gives what was seen of it."""

    def __init__(self, chapter, method="full", quantize="none", checkpointing="none",
                 compiled=False, model="qwen3-0.6b", layers=2, tokens=2048, post=None,
                 dtype="bfloat16", **options):
        self.chapter, self.tokens, self.compiled, self.whole = chapter, tokens, compiled, not layers
        self.post, self.teacher = post, None  # a step of train_dpo.py, _grpo.py or _distill.py
        self.raw = dict(read_config(ROOT / "common/architectures" / model))
        self.raw["num_hidden_layers"] = layers or self.raw["num_hidden_layers"]
        self.files = {path.stem: load(path.relative_to(ROOT)) for path in
                      sorted((ROOT / chapter).glob("*.py")) if path.stem in (
                          "train", "packing", "modeling_qwen3", "modeling_llama", "lora",
                          "quantized_model", "compiling", "loss")}
        more = {} if chapter == "chapter-01" else {"method": method, "rank": 16, "alpha": 32.0}
        if chapter == "chapter-03":
            more |= {**QUANTIZE[quantize], "compile": compiled,
                     "activation_checkpointing": checkpointing}
        if post:
            self.files["train"] = load(f"chapter-03/post_training/train_{post}.py")
        train = self.files["train"]
        self.options = (train.TrainOptions if chapter == "chapter-01" else train.Options)(
            dtype=dtype, device="cuda", init="pretrained", batch_tokens=tokens, **more, **options)

    def build(self):
        """The base model, shapes alone, and its adapter's config (or None)."""
        options, files = self.options, self.files
        if self.chapter == "chapter-01":
            file = files["modeling_qwen3"]
            with torch.device("meta"):
                model = file.Qwen3ForCausalLM(file.Qwen3Config.from_dict(self.raw))
            model.compute_dtype = getattr(torch, options.dtype)
            return model, None
        config = files["modeling_llama"].LlamaConfig.from_dict(self.raw)
        none, adapter = (files["lora"].AdapterConfig(method, rank=16, alpha=32.0)
                         for method in ("full", options.method))
        return files["train"].build(config, options, none), adapter

    def pack(self, step):
        """A pack of documents of 2,048 tokens at most, each with 100 · `step` that have no label; of
        a fixed shape if it is to be compiled."""
        packing, length = self.files["packing"], min(512 if self.post else 2048, self.tokens)
        ids = torch.zeros(self.tokens // length, length, dtype=torch.int64)
        examples = [(row, row.masked_fill(torch.arange(length) < 100 * step, -100)) for row in ids]
        if self.compiled:
            shape = packing.StaticShape(self.tokens, len(examples) + 2, length)
            return packing.packed_sequence_collate_fn(examples, shape)
        return packing.packed_sequence_collate_fn(examples)

    def step(self, model, adapter, optimizer, pack, number):
        """One optimizer step as the loop has it; gives what is wrong with the gradients."""
        pack = {name: torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                if torch.is_tensor(value) else value for name, value in pack.items()}
        if self.post:
            loss = getattr(self, self.post)(self.files["train"], model, pack)
        elif self.chapter == "chapter-03":
            loss = model(**pack)
        else:
            loss = self.files["train"].loss_sum(model, pack)
        (loss / 100).backward()
        wrong = [name for name, p in model.named_parameters() if p.requires_grad and (
            p.grad is None or p.grad.dtype != p.dtype or p.grad.device != p.device)]
        if adapter is not None:
            self.files["lora"].before_step(model, adapter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if adapter is not None:
            self.files["lora"].after_step(model, adapter, number)
        optimizer.zero_grad(set_to_none=True)
        return wrong

    def dpo(self, train, model, pack):
        """The loss of a pack of pairs."""
        model.loss = train.chunked_log_probs
        return train.scored(model, None, pack, self.options)[0].sum()

    def grpo(self, train, model, pack):
        """The loss of a pack of answers."""
        model.loss = lambda hidden, *rest: train.chunked_log_probs(
            hidden / self.options.temperature, *rest)
        log_p = model(**pack)
        beside = {name: torch.empty(len(log_p), device=CUDA) for name in ("weight", "share")}
        log_ref = train.reference_log_probs(model, pack) if self.options.kl else None
        return train.policy_loss(pack, beside, log_p, log_p.detach(), log_ref, self.options)[0]

    def distill(self, train, model, pack):
        """The loss of a pack of which the teacher has a part: itself, or a smaller model."""
        options = self.options
        model.loss = functools.partial(
            train.chunked_divergence, share=options.kd, beta=options.beta,
            temperature=options.kd_temperature, vocabulary=self.vocabulary,
            **train.lesson(model, self.teacher, pack))
        return model(**pack)[0]

    def with_teacher(self, model, predicted):
        """Adds what the teacher needs; sets `self.teacher` if that is another model."""
        dtype = getattr(torch, self.options.dtype)
        teacher = load("chapter-03/post_training/teacher.py")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            chat = Chat.load(ROOT / "common/tiny")
            if self.options.teacher != "self":
                config = {**self.raw, "num_hidden_layers": 1, "hidden_size": 512}
                shutil.copytree(ROOT / "common/tiny", folder, dirs_exist_ok=True)
                Path(folder, "config.json").write_text(json.dumps(config))
                self.options.teacher = folder
                self.teacher = to_cuda(self.files["quantized_model"].base_model(
                    self.files["modeling_llama"].LlamaConfig.from_dict(config), None, dtype,
                    base="none", init="shapes"))
            self.vocabulary = teacher.add_teacher(
                predicted, model, teacher.teacher_shapes(self.options, model), self.options, chat)

    def run(self):
        """A few steps, of a whole model the last alone: gradients that are wrong, operators on
        another device, compiled graphs and breaks; of the last step the peak of memory, and the
        predicted one."""
        torch._dynamo.reset()
        model, adapter = self.build()
        packs = [self.pack(1), self.pack(0)]  # the larger one last
        with FakeTensorMode(allow_non_fake_inputs=True):
            to_cuda(model)
            groups = [{"params": list(model.parameters())}]
            if adapter is not None:
                self.files["lora"].apply_adapter(model, adapter)
                groups = self.files["lora"].optimizer_groups(model, adapter, 1e-4, 0.1)
            optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
            if self.compiled:
                sys.modules.update(_loaded[ROOT / self.chapter])  # the compiler imports by name
                self.files["compiling"].compile_model(model, as_far_as_autograd)
            if self.post in ("grpo", "distill"):
                predicted = predict.costs(model, [self.tokens], self.options, model.chunk)
                if self.post == "distill":
                    self.with_teacher(model, predicted)
            counters.clear()
            COPIES.clear()
            with Trace() as trace:
                for tensor in (*model.parameters(), *model.buffers(), *(
                        self.teacher.parameters() if self.teacher else ())):
                    trace.add(tensor)
                wrong, last = [], 2 + self.compiled
                if self.whole:  # only the optimizer's state is needed of the first steps
                    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                        parameter.grad = torch.empty_like(parameter)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for number in range(last if self.whole else 1, last + 1):
                    if number == 3:  # one kernel, which has nothing of its own in memory
                        model.loss = functools.partial(
                            model.loss, softmax=lambda *_: torch.zeros((), device=CUDA))
                    trace.peak = trace.now
                    wrong += self.step(model, adapter, optimizer, packs[number > 1], number)
        if self.post not in ("grpo", "distill"):
            predicted = predict_memory.memory(
                model, self.tokens, getattr(torch, self.options.dtype), compiled=self.compiled,
                chunk=model.chunk if self.chapter == "chapter-03" else None, varlen_kernel=True,
                checkpointing=getattr(self.options, "activation_checkpointing", "none"))
        return {"wrong": wrong, "elsewhere": sorted(trace.elsewhere), "peak": trace.peak,
                "predicted": sum(predicted.values()), "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()), "copies": len(COPIES)}


def as_far_as_autograd(graph, inputs):
    """torch.compile's backend: traced, differentiated and cut in two as Inductor has it, what may
    be done in place done so, then run operator by operator."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core

    def boxed(module, inputs):
        reinplace_inplaceable_ops_core(module.graph)
        decompose_auto_functionalized(module.graph)
        module.recompile()
        copying = torch.ops.aten.addmm.default
        COPIES.extend(module.graph.find_nodes(op="call_function", target=copying))
        return make_boxed_func(module)

    return aot_autograd(fw_compiler=boxed, bw_compiler=boxed, inference_compiler=boxed,
                        decompositions=select_decomp_table(), keep_inference_input_mutations=True,
                        partition_fn=min_cut_rematerialization_partition)(graph, inputs)


# --- what is run ---

METHODS = ("full", "lora", "rslora", "dora", "vera", "pissa", "lora+", "lora-fa", "delta-lora")
MODES = ("none", "full", "selective")
STEPS = {"chapter 1": ("chapter-01",),
         **{f"chapter 2, {method}": ("chapter-02", method) for method in METHODS},
         **{f"chapter 3, dense, {mode}": ("chapter-03", "full", "none", mode) for mode in MODES},
         **{f"chapter 3, lora on {base}, {mode}": ("chapter-03", "lora", base, mode)
            for base in QUANTIZE for mode in MODES},
         "chapter 3, dora on double, selective": ("chapter-03", "dora", "double", "selective")}
PAIRS = {f"pairs, {method} on {base}": dict(method=method, quantize=base) for method, base in (
    ("lora", "none"), ("lora", "nf4"), ("dora", "double"), ("pissa", "none"))}
REWARDS = {
    "rewards, full": dict(method="full", quantize="none"),
    "rewards, lora on nf4, to a reference": dict(method="lora", quantize="nf4", kl=0.1),
    "rewards, dora on double, of answers": dict(
        method="dora", quantize="double", ratio="sequence", temperature=0.7),
    "rewards, lora on none, float32": dict(
        method="lora", quantize="none", kl=0.1, dtype="float32")}
DRAWN = (("nf4", "bfloat16"), ("none", "float32"))
TEACHERS = {
    "teachers, full, another": dict(method="full", quantize="none", teacher="another", beta=0.5),
    "teachers, lora on nf4, itself": dict(method="lora", quantize="nf4", beta=1.0),
    "teachers, pissa on none, itself, float32": dict(
        method="pissa", quantize="none", beta=0.0, dtype="float32")}
COMPILED = {f"{name}, compiled": (*case, True) for name, case in STEPS.items()
            if name.startswith("chapter 3")}
COMPILED |= {f"chapter 3, {method}, compiled": ("chapter-03", method, "none", "none", True)
             for method in ("vera", "lora-fa")}
WHOLE = {  # row of chapter 3's table, of Qwen3-0.6B: its case
    "chapter 1": ("chapter-01",), "chapter 2, LoRA": ("chapter-02", "lora"),
    "chapter 3, dense": ("chapter-03",),
    "chapter 3, dense, compiled": ("chapter-03", "full", "none", "none", True),
    "chapter 3, LoRA": ("chapter-03", "lora"), "chapter 3, QLoRA": ("chapter-03", "lora", "double")}
# Of 2,048 tokens only: where a layer at work decides, what fake tensors make of SiLU's backward
# (eight operators, where a GPU has one) takes more than the real thing.
EIGHT_BILLION = "Qwen3-8B, QLoRA, full checkpointing, 2048 tokens"


def drawn(quantize, dtype, end=7):
    """A rollout on a model of two layers: operators on another device, the answers' lengths.

    Fake tensors do not know what a GPU would be asked for: how long documents are, what is drawn.
    It is told here; of each draw every second token is `end`."""
    case = Case("chapter-03", "lora", quantize, post="grpo", dtype=dtype)
    file, (model, adapter) = load("chapter-03/post_training/rollout.py"), case.build()
    lengths, group, limit = (9, 10, 11), 4, 5

    def really(function):
        """As outside of all modes: what a CPU prepares for a GPU is no fake, and is not traced."""
        def call(*given, **how):
            with _disable_current_modes():
                return function(*given, **how)
        return call

    def tensor(data, device=None, real=really(torch.tensor), **how):
        made = data if torch.is_tensor(data) else real(data, **how)
        return made if device is None else torch.empty(
            made.shape, dtype=made.dtype, device=device)

    def pack(documents, real=really(file.packed_sequence_collate_fn)):
        return {name: tensor(value, CUDA) if torch.is_tensor(value) else value
                for name, value in real(documents).items()}

    def tolist(fake):
        if fake.dtype == torch.int32:
            return [*lengths] if len(fake) == len(lengths) else [1] * len(fake)
        if fake.dim() == 2 and fake.dtype == torch.int64:  # each answer's: even rows end at once
            return [[end] * limit if n % 2 == 0 else [end + 1] * limit for n in range(len(fake))]
        if fake.dim() > 1:
            return [[[0.5] * limit] * len(fake[0])] * len(fake)
        return [end + n % 2 if fake.dtype == torch.int64 else 0.5 for n in range(len(fake))]

    def repeat(fake, repeats, real=torch.Tensor.repeat_interleave):
        rows = len(fake)
        return real(fake, repeats, output_size=sum(lengths) if rows == len(lengths) else rows)

    def item(fake, index, real=torch.Tensor.__getitem__):
        return real(fake, tensor(index, CUDA) if isinstance(index, list) else index)

    told = {"tolist": tolist, "repeat_interleave": repeat, "__getitem__": item,
            "__bool__": lambda fake: True, "__int__": lambda fake: max(lengths) + limit - 1}
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        to_cuda(model)
        case.files["lora"].apply_adapter(model, adapter)
        for where, name, function in (
                (torch, "tensor", tensor), (file, "packed_sequence_collate_fn", pack),
                (file, "document", really(file.document)),
                *((FakeTensor, *one) for one in told.items())):
            stack.enter_context(mock.patch.object(where, name, function))
        with Trace() as trace:
            answers = file.rollout(model, [[1] * n for n in lengths], group, limit, {end}, 0.7)
    return {"elsewhere": sorted(trace.elsewhere), "drawn": [len(one.ids) for one in answers]}


def whole(case, tokens=2048, model="qwen3-0.6b"):
    return lambda: Case(*case, model=model, layers=None, tokens=tokens).run()


KINDS = {
    "steps": {name: lambda case=case: Case(*case).run() for name, case in STEPS.items()},
    "pairs": {name: lambda case=case: Case("chapter-03", post="dpo", nll=1.0, **case).run()
              for name, case in PAIRS.items()},
    "rewards": {name: lambda case=case: Case("chapter-03", post="grpo", **case).run()
                for name, case in REWARDS.items()},
    "drawn": {f"drawn, {base}, {dtype}": lambda base=base, dtype=dtype: drawn(base, dtype)
              for base, dtype in DRAWN},
    "teachers": {name: lambda case=case: Case("chapter-03", post="distill", kd=0.5, **case).run()
                 for name, case in TEACHERS.items()},
    "compiled": {name: lambda case=case: Case(*case).run() for name, case in COMPILED.items()},
    "memory": {"loss": lambda: loss_memory(), **{
        f"{name}, {tokens} tokens": whole(case, tokens)
        for tokens in (2048, 16384) for name, case in WHOLE.items()},
        EIGHT_BILLION: whole(("chapter-03", "lora", "double", "full"), model="qwen3-8b")}}


def loss_memory(T=4096, V=151_936, D=1024):
    """Bytes above inputs and gradients: of the plain loss, of the chunked one, and of that with its
    softmax compiled to one kernel."""
    loss = load("chapter-03/loss.py")

    def plain(hidden, weight, labels, labelled):
        logits = hidden @ weight.to(hidden.dtype).t()
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    def chunked(*inputs, softmax=None):
        hidden, weight, labels, labelled = inputs
        return loss.chunked_cross_entropy(
            hidden, weight, labels, loss.chunk_for(V, MEMORY), labelled, softmax)

    found = {}
    for name, function in {"plain": plain, "chunked": chunked, "compiled": lambda *inputs: chunked(
            *inputs, softmax=lambda *_: torch.zeros((), device=CUDA))}.items():
        with FakeTensorMode():
            hidden = torch.empty(T, D, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
            weight = torch.empty(V, D, device=CUDA, requires_grad=True)
            labels, labelled = torch.empty(2, T, dtype=torch.int64, device=CUDA)
            with Trace() as trace:
                for tensor in (hidden, weight, labels):
                    trace.add(tensor)
                inputs = trace.now
                (function(hidden, weight, labels, labelled) / T).backward()
        found[name] = trace.peak - inputs - hidden.nbytes - weight.nbytes
    return found


def main():
    after_torch()
    every = {name: run for kind in KINDS.values() for name, run in kind.items()}
    for name in [name for word in sys.argv[1:] for name in KINDS.get(word, [word])]:
        try:
            found = every[name]()
        except Exception as error:  # told by the test of that name
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main()
