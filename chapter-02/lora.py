"""The LoRA family: fine-tuning a frozen weight W (out, in) through a few numbers beside it.

Every method here adds a product of two thin matrices, A (r, in) and B (out, r), to the weight:

    y = x (W + s B A)ᵀ + bias      x (T, in), y (T, out); T tokens, r the rank, s the scale

and is one small class, which says what it changes: the scale, the first values, the layer's
equation, or the optimisation. `METHODS` at the end lists them; a new method is one more class (or
none) and one more row there.

    apply_adapter(model, config)                       once, after the weights are loaded
    groups = optimizer_groups(model, config, lr, weight_decay)
    loss.backward(); before_step(model, config); clip; optimizer.step(); after_step(model, ...)

W keeps its own dtype and is never given a gradient. A and B are float32, whatever W is: at the
usual learning rates bfloat16 would round most of their updates away. They are cast *down* to the
dtype of x for the products. Casting x up, as PEFT does by default, doubles what the backward keeps.
"""

import math
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from common.distributed import full_tensor
from common.errors import UserError
from targets import select_targets


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. Raises UserError on a value that no run could use."""

    method: str = "lora"  # a key of METHODS
    rank: int = 16  # r
    alpha: float = 32.0  # s = α/r (rsLoRA: α/√r); VeRA has no scale
    dropout: float = 0.0  # of x on its way into A
    target_modules: str | tuple = "all-linear"  # or names, "q_proj,v_proj", or a regex
    seed: int = 0  # of A's first values
    lr_ratio: float = 16.0  # LoRA+: learning rate of B over that of A
    project_gradient: bool = True  # LoRA-FA: the paper's second version; False is the first
    delta_ratio: float = 1.0  # Delta-LoRA: λ
    delta_start: int = 100  # Delta-LoRA: K, the number of first steps that leave W alone
    vera_d: float = 0.1  # VeRA: first value of d

    def __post_init__(self):
        if self.method not in METHODS:
            near = get_close_matches(str(self.method), METHODS, 1, 0.0)[0]
            raise UserError(f"--method {self.method!r} does not exist, did you mean {near!r}?"
                            f" There are: {', '.join(METHODS)}")
        for name, least in (("rank", 1), ("alpha", 0), ("dropout", 0), ("lr_ratio", 0),
                            ("delta_ratio", 0), ("delta_start", 0)):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if type(value) not in ((int,) if name == "rank" else (int, float)):
                raise UserError(f"{flag} {value!r} is not {'whole' if name == 'rank' else 'a'} number")
            if not least <= value < (1 if name == "dropout" else math.inf):
                raise UserError(f"{flag} {value!r} is out of range")
        if self.dropout and METHODS[self.method] and METHODS[self.method].no_dropout:
            raise UserError(f"--dropout must be 0 with {self.method}:"
                            f" {METHODS[self.method].no_dropout}")


# --- the layer, and the methods as what they change of it ---

def add_low_rank(y, x, A, B):
    """y += x Aᵀ Bᵀ, in place; gives y (T, out), from x (T, in), A (r, in), B (out, r).

    For the backward autograd keeps x only if A is trained (and W's layer gave us that x, so it is
    one tensor for q, k and v), and x Aᵀ, which is (T, r).
    """
    return y.addmm_(F.linear(x, A.to(x.dtype)), B.to(x.dtype).t())


def kaiming_uniform(shape, slope, generator):
    """U(-b, b) with b = √3 · √(2 / (1 + slope²)) / √(shape[1]) (He et al., 1502.01852), float32.

    Drawn on the CPU, so that a seed means the same numbers on every device and rank.
    """
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + slope**2)) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def wide(tensor):
    """The tensor in float32, or as it is if it has more digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LoRALinear(nn.Module):
    """LoRA: y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ, s = α/r; A random, B = 0, so nothing changes at first.

    "LoRA: Low-Rank Adaptation of Large Language Models", 2106.09685, equation 3. A starts as in
    the authors' code, U(±1/√in), where the paper says Gaussian.

    `base` is the linear layer that is adapted: it computes x Wᵀ + bias, has `in_features`,
    `out_features`, `bias`, and `weight` (a parameter, or what a quantised layer makes of its own).
    """

    no_dropout = None  # or the reason why a method has none

    def __init__(self, base, config, source):
        super().__init__()
        self.base = base
        self.dropout = config.dropout
        self.scale = self.scaling(config)
        self.make(config, source)

    @staticmethod
    def scaling(config):
        """The scale s."""
        return config.alpha / config.rank

    @staticmethod
    def source(bases, config):
        """What all layers of the model draw from: here, random numbers."""
        return torch.Generator().manual_seed(config.seed)

    def make(self, config, source):
        """Make the parameters of the adapter, on the device of the base."""
        device = next(t for t in (*self.base.parameters(), *self.base.buffers())).device
        A = kaiming_uniform((config.rank, self.base.in_features), math.sqrt(5), source)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.base.out_features, config.rank, device=device))

    def factors(self):
        """A (r, in) and s B (out, r): what multiplies x."""
        return self.lora_A, self.scale * self.lora_B

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def forward(self, x):
        return add_low_rank(self.base(x), self.drop(x), *self.factors())

    def merged(self):
        """W + s B A."""
        A, B = self.factors()
        return wide(self.base.weight) + B @ A

    def original(self):
        """The weight before it was adapted."""
        return wide(self.base.weight)

    def lr_ratio(self, name, config):
        """How much faster than the others the parameter `name` learns."""
        return 1.0

    def before_step(self, config):
        """Between the backward pass and the optimizer."""

    def after_step(self, config, step):
        """After the optimizer."""


class RsLoRALinear(LoRALinear):
    """rsLoRA: s = α/√r. With α/r the update shrinks as r grows, so that higher ranks learn less.

    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2312.03732, theorem 3.2.
    It is LoRA with α√r in place of α, no more: exactly so, and as fast.
    """

    @staticmethod
    def scaling(config):
        return config.alpha / math.sqrt(config.rank)


class DoRALinear(LoRALinear):
    """DoRA: y = x (m ⊙ V/‖V‖)ᵀ + bias, V = W + s B A: length m and direction of V learn apart.

    "DoRA: Weight-Decomposed Low-Rank Adaptation", 2402.09353, equation 5. ‖V‖ is the norm of each
    output's row of V (the paper, which transposes, says column), m (out,) starts as ‖W‖. ‖V‖ is
    a constant to the backward (section 4.3). The bias is not scaled.
    """

    def make(self, config, source):
        super().make(config, source)
        norms = torch.linalg.vector_norm(wide(self.base.weight.detach()), dim=1)
        self.register_buffer("row_squares", norms.square(), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self):
        """‖W + s B A‖ by rows, (out,), without making B A, which is as large as W.

        ‖w + bA‖² = ‖w‖² + 2 (w Aᵀ)·b + (b A Aᵀ)·b for each row w of W and b of s B. The first
        term never changes. While B = 0 the others are zeros, so m/‖V‖ is 1 to the last bit.
        """
        weight, (A, B) = self.base.weight, self.factors()
        rest = (2 * (weight @ A.to(weight.dtype).t()) + B @ (A @ A.t())) * B
        return (self.row_squares + rest.sum(1)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def forward(self, x):
        dropped = self.drop(x)
        plain = self.base(dropped)
        y = add_low_rank(plain if dropped is x else plain.clone(), dropped, *self.factors())
        # In float32 here: bfloat16 has no number between 1 and 1.008 for m/‖V‖ to move to.
        gain = self.lora_magnitude_vector / self.row_norms()
        y = y * gain
        if self.base.bias is not None:
            y = y + (1 - gain) * self.base.bias  # gives back what the gain took from the bias
        y = y.to(x.dtype)
        # Dropout acts on the change that DoRA makes, never on the base model's own output.
        return y if dropped is x else self.base(x) + (y - plain)

    def merged(self):
        """(m/‖V‖) ⊙ V."""
        V = super().merged()
        norms = torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)
        return (self.lora_magnitude_vector / norms)[:, None] * V


class VeRAProjections(nn.Module):
    """VeRA's two random matrices, one pair for the whole model: A (r, widest in), B (widest out, r).

    As a module that every layer holds, they stay one pair when the model is moved. The numbers
    are PEFT's: one generator, A first, Kaiming-uniform. Not in state_dict: the seed gives them.
    """

    def __init__(self, bases, config):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        first = next(t for t in (*bases[0].parameters(), *bases[0].buffers()))
        for name, shape in (("vera_A", (config.rank, max(base.in_features for base in bases))),
                            ("vera_B", (max(base.out_features for base in bases), config.rank))):
            matrix = kaiming_uniform(shape, 0.0, generator).to(first.device)
            self.register_buffer(name, matrix, persistent=False)


class VeRALinear(LoRALinear):
    """VeRA: y = x Wᵀ + b ⊙ (B (d ⊙ (A x))); only the vectors b (out,) and d (r,) are trained.

    "VeRA: Vector-based Random Matrix Adaptation", 2310.11454, equation 2. A and B are random,
    frozen and shared by all layers; b = 0, d = 0.1. While b = 0, d has no gradient: it moves
    from the second step on.
    """

    source = VeRAProjections

    def make(self, config, source):
        self.shared = source
        device = source.vera_A.device
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.base.out_features, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.vera_d, device=device))

    def factors(self):
        """A (r, in) and diag(b) B diag(d) (out, r), each cut from the shared matrix.

        Folding both vectors into B, rather than into the products, keeps (T, r) for the backward
        where the equation as it stands would keep (T, out).
        """
        A = self.shared.vera_A[:, :self.base.in_features]
        B = self.shared.vera_B[:self.base.out_features]
        return A, self.vera_lambda_b[:, None] * B * self.vera_lambda_d


class PiSSALinear(LoRALinear):
    """PiSSA: LoRA that starts from W's r largest singular values, with the rest of W frozen.

    "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2404.02948, equations 2-4.
    With W = U S Vᵀ: A₀ = √(S_r/s) V_rᵀ, B₀ = U_r √(S_r/s), and the base becomes W - s B₀ A₀. A₀
    and B₀ are kept: against the original W the adapter is s (B A - B₀ A₀), of rank 2r, and so it
    is saved. In float32: a base stored in bfloat16 would be left off by its rounding.
    """

    no_dropout = "its A and B hold part of the pretrained weight, which dropout would switch off"

    def make(self, config, source):
        weight = dense_weight(self.base, "pissa")
        if config.rank > min(weight.shape):
            raise UserError(f"--rank {config.rank} is too large for pissa: a weight of shape"
                            f" {tuple(weight.shape)} has {min(weight.shape)} singular values")
        U, S, Vt = torch.linalg.svd(wide(weight), full_matrices=False)
        root = (S[:config.rank] / self.scale).sqrt()
        A, B = root[:, None] * Vt[:config.rank], U[:, :config.rank] * root
        self.register_buffer("initial_A", A, persistent=False)
        self.register_buffer("initial_B", B, persistent=False)
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        weight.copy_(wide(weight) - self.scale * B @ A)

    def original(self):
        return wide(self.base.weight) + self.scale * self.initial_B @ self.initial_A


class LoRAPlusLinear(LoRALinear):
    """LoRA+: LoRA, but B learns λ times faster than A.

    "LoRA+: Efficient Low Rank Adaptation of Large Models", 2402.12354, section 4: with one rate
    for both, wide models learn features inefficiently. λ is about 16; `lr` is the rate of A.
    """

    def lr_ratio(self, name, config):
        return config.lr_ratio if name == "lora_B" else 1.0


class LoRAFALinear(LoRALinear):
    """LoRA-FA: LoRA with *frozen A*, so that x need not be kept for the backward, only x Aᵀ.

    "LoRA-FA: Memory-efficient Low-rank Adaptation", 2308.03303. The saving is real per layer, and
    gone once activations are recomputed anyway. The paper's second version also replaces B's
    gradient g by g (A Aᵀ)⁻¹ / s²: then s g A, the first-order change of W, is the nearest that A's
    rows can come to the gradient of W. Where r > in, A Aᵀ has no inverse: the pseudo-inverse it is.
    """

    def make(self, config, source):
        super().make(config, source)
        self.lora_A.requires_grad_(False)
        self.correction = None  # (A Aᵀ)⁻¹ / s² (r, r), made once: A never changes

    def before_step(self, config):
        if not config.project_gradient or self.lora_B.grad is None:
            return
        if self.correction is None:
            inverse = torch.linalg.pinv(full_tensor(self.lora_A).double())  # A⁺ (in, r)
            self.correction = (inverse.t() @ inverse / self.scale**2).to(self.lora_B.dtype)
        gradient = own_rows(self.lora_B.grad)
        gradient.copy_(gradient @ self.correction)


class DeltaLoRALinear(LoRALinear):
    """Delta-LoRA: after each step t > K, W += λ s (B⁺ A⁺ - B A), with no gradient of W.

    "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", 2309.02411,
    equation 5. The sum telescopes: W moves by λ s (B_T A_T - B_K A_K) in all, so with s B_T A_T its
    rank is at most 2r; and from K = 0 it is LoRA with α (1 + λ), see the tests. W is changed, so
    what comes out is a model, not an adapter, and a checkpoint must hold W.
    """

    no_dropout = "W moves by B A itself, which must be what the forward pass used"

    def make(self, config, source):
        weight = dense_weight(self.base, "delta-lora")
        if weight.dtype != wide(weight).dtype:
            raise UserError(f"delta-lora needs a float32 base weight, not {weight.dtype}: most of"
                            " its small changes of W would be rounded away")
        super().make(config, source)
        self.previous = None

    def before_step(self, config):
        self.previous = full_tensor(self.lora_A).clone(), own_rows(self.lora_B).clone()

    def after_step(self, config, step):
        if step > config.delta_start:
            A, B = self.previous
            A_new, B_new = full_tensor(self.lora_A), own_rows(self.lora_B)
            # B⁺A⁺ - BA = (B⁺ - B) A⁺ + B (A⁺ - A): no difference of large products, which would
            # leave only their rounding, and nothing as large as W beside W.
            left, right = torch.cat((B_new - B, B), 1), torch.cat((A_new, A_new - A))
            own_rows(self.base.weight).addmm_(left, right, alpha=config.delta_ratio * self.scale)
        self.previous = None


METHODS = {
    "full": None,  # every parameter of the model is trained: no adapter at all
    "lora": LoRALinear,
    "rslora": RsLoRALinear,
    "dora": DoRALinear,
    "vera": VeRALinear,
    "pissa": PiSSALinear,
    "lora+": LoRAPlusLinear,
    "lora-fa": LoRAFALinear,
    "delta-lora": DeltaLoRALinear,
}


def dense_weight(base, method):
    """The weight of `base` as a parameter that can be written to; UserError if there is none."""
    if not isinstance(getattr(base, "weight", None), nn.Parameter):
        raise UserError(f"{method} changes the base weight, and a quantised one cannot be changed:"
                        " take another method, or a base that is not quantised")
    return base.weight.data


def own_rows(tensor):
    """The rows of a parameter or gradient that are this process's own; without FSDP2, all."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- into a model, and through a training step ---

def apply_adapter(model, config):
    """Freeze the model and put an adapter around each target layer, in place; gives the model.

    Call it when the weights are loaded (DoRA and PiSSA look at them) and before FSDP2 and the
    optimizer. With method "full" nothing is done: all parameters stay trainable. Raises UserError
    where the targets or the method do not fit the model.
    """
    layer = METHODS[config.method]
    if layer is None:
        return model
    if any(True for _ in adapter_modules(model)):
        raise UserError("the model has adapters already: merge them before adding others")
    targets = select_targets(model, config.target_modules)
    model.requires_grad_(False)
    source = layer.source(list(targets.values()), config)
    for name, base in targets.items():
        parent, _, attribute = name.rpartition(".")
        adapted = layer(base, config, source).train(base.training)
        setattr(model.get_submodule(parent), attribute, adapted)
    return model


def adapter_modules(model):
    """Iterate over (dotted name, adapter layer)."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


@torch.no_grad()
def merged_weight(module):
    """The dense weight (out, in) that computes what adapter layer and base do together, float32.

    The bias stays the base's. Parameters must be whole: under FSDP2 call `unshard()` before.
    """
    return module.merged()


@torch.no_grad()
def delta_weight(module):
    """What the adapter adds to the weight that the layer had before it, (out, in), float32.

    For Delta-LoRA only the part that is not in W yet.
    """
    return module.merged() - module.original()


def state_names(model):
    """Names of the parameters that a checkpoint must hold so that training can go on from it.

    All of the adapters, and where W itself is trained (Delta-LoRA) W; other frozen weights are
    those of the base model. Without adapters ("full") all parameters.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        return [name for name, _ in model.named_parameters()]
    names = []
    for prefix, module in modules.items():
        names += [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, DeltaLoRALinear):
            names.append(f"{prefix}.base.weight")
    return names


def optimizer_groups(model, config, lr, weight_decay):
    """The trainable parameters as groups for torch.optim.

    A group has `lr`, its `lr_ratio` to the `lr` given here (so that a schedule can keep the ratio:
    group["lr"] = lr(step) * group["lr_ratio"]), and `weight_decay`, which vectors (norms, biases,
    DoRA's m, VeRA's b and d) are spared.
    """
    ratios = {parameter: module.lr_ratio(name, config) for _, module in adapter_modules(model)
              for name, parameter in module.named_parameters(recurse=False)}
    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = ratios.get(parameter, 1.0), weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault(kind, []).append(parameter)
    return [{"params": parameters, "lr": lr * ratio, "lr_ratio": ratio, "weight_decay": decay}
            for (ratio, decay), parameters in groups.items()]


@torch.no_grad()
def before_step(model, config):
    """Call after the backward pass and before clipping: LoRA-FA replaces B's gradient here.

    Before clipping, so that the norm that is clipped and logged is of what the optimizer gets.
    """
    for _, module in adapter_modules(model):
        module.before_step(config)


@torch.no_grad()
def after_step(model, config, step):
    """Call after the optimizer's step number `step`, counted from 1: Delta-LoRA moves W here.

    Not after a step that was skipped.
    """
    for _, module in adapter_modules(model):
        module.after_step(config, step)
