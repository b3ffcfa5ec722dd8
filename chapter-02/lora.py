"""The LoRA family: fine-tuning a frozen weight W (out, in) by training a few numbers beside it.

Every method adds a product of two thin matrices, A (r, in) and B (out, r), to the weight:

    y = x (W + s B A)ᵀ + bias      x (T, in), y (T, out); T tokens, r the rank, s the scale

and is one small class that says what it changes: the scale, the first values, the layer's
equation or the optimisation. A new method is a class and a row in `METHODS`; and, if it is not
saved as plain A and B, a branch in common/adapters/peft.py.

W keeps its own dtype and has no gradient. A and B are float32 whatever W is: bfloat16 would round
most of their updates away. For the products they are cast *down* to the dtype of x; casting x up,
as PEFT does by default, doubles what is kept for the backward pass."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.adapters.targets import check_config, dense_weight, select_targets
from common.predict_memory import linear_cost
from common.ranks import full_tensor, own_rows

SMALLEST = torch.finfo(torch.float32).tiny  # or an all-zero row of W would be divided by zero


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. Raises UserError on a value that no run could use."""

    method: str = "lora"  # a key of METHODS
    rank: int = 16  # r
    alpha: float = 32.0  # s = α/r (rsLoRA: α/√r); VeRA has no scale
    dropout: float = 0.0  # of x on its way into A
    target_modules: str | tuple = "all-linear"  # or names, or a regex: see select_targets
    seed: int = 0  # of A's first values
    lr_ratio: float = 16.0  # LoRA+: λ, the learning rate of B over that of A
    project_gradient: bool = True  # LoRA-FA: the paper's second version; False is the first
    delta_ratio: float = 1.0  # Delta-LoRA: λ
    delta_start: int = 100  # Delta-LoRA: K, how many first steps leave W alone
    vera_d: float = 0.1  # VeRA: first value of d

    def __post_init__(self):
        check_config(self, METHODS)


# --- the layer, and each method as what it changes of it ---

def add_low_rank(y, x, A, B):
    """y += x Aᵀ Bᵀ, in place; gives y (T, out), from x (T, in), A (r, in), B (out, r).

    The backward keeps x Aᵀ (T, r), and x if A is trained: what full fine-tuning keeps too."""
    return y.addmm_(F.linear(x, A.to(x.dtype)), B.to(x.dtype).t())


def kaiming_uniform(shape, slope, generator):
    """U(-b, b), b = √3 √(2/(1 + slope²)) / √shape[1] (1502.01852), drawn in float32 on the CPU, so
    that a seed means the same numbers on every device and rank."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + slope**2)) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class LoRALinear(nn.Module):
    """LoRA: y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ, s = α/r; A random, B = 0, so nothing changes at first.

    arXiv 2106.09685, equation 3. A starts as in the authors' code, U(±1/√in); the paper says
    Gaussian. `base` is the adapted layer: an nn.Linear, or a quantised layer in its place."""

    rank_power = 1.0  # s = α / r^power
    no_dropout = None  # or the reason why a method cannot have any
    add = staticmethod(add_low_rank)  # chapter 3 replaces it to compile the layer

    def __init__(self, base, config, source):
        super().__init__()
        self.base = base
        self.dropout = config.dropout
        self.scale = config.alpha / config.rank**self.rank_power
        self.make(config, source)

    @staticmethod
    def source(bases, config):
        """One random generator for all layers of the model."""
        return torch.Generator().manual_seed(config.seed)

    def make(self, config, source):
        """Make the adapter's parameters, on the device of the base."""
        device, r = device_of(self.base), config.rank
        A = kaiming_uniform((r, self.base.in_features), math.sqrt(5), source)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.base.out_features, r, device=device))

    def factors(self):
        """A (r, in) and s B (out, r)."""
        return self.lora_A, self.scale * self.lora_B

    def cost(self):
        """What a step keeps, for common/predict_memory.py; with dropout, its result and mask."""
        A, B = self.factors()
        return linear_cost(self.base)._replace(
            factors=(A, B), keeps_input=A.requires_grad and not self.dropout,
            keeps=len(A) + 2 * A.shape[1] * bool(self.dropout))

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def forward(self, x):
        return self.add(self.base(x), self.drop(x), *self.factors())

    @torch.no_grad()
    def merged(self):
        """The one weight (out, in), float32, that does the same: W + s B A. Collective (FSDP2)."""
        A, B = self.factors()
        return full_precision(self.base.weight) + full_tensor(B @ A)

    def original(self):
        """The weight before it was adapted."""
        return full_precision(self.base.weight)

    @torch.no_grad()
    def delta(self):
        """How the adapter changes the weight (out, in), float32; for Delta-LoRA only s B A."""
        return self.merged() - self.original()

    def lr_ratio(self, name, config):
        """The learning rate of parameter `name`, relative to the run's."""
        return 1.0

    def before_step(self, config):
        """Between the backward pass and the optimizer."""

    def after_step(self, config, step):
        """After the optimizer."""


class RsLoRALinear(LoRALinear):
    """rsLoRA: s = α/√r. With α/r a larger r makes a smaller update, and learns no more.

    arXiv 2312.03732, theorem 3.2. It is LoRA with α√r in place of α."""

    rank_power = 0.5


class DoRALinear(LoRALinear):
    """DoRA: y = x (m ⊙ V/‖V‖)ᵀ + bias, V = W + s B A: length m and direction V learn apart.

    arXiv 2402.09353, equation 5. ‖V‖ is taken of each output's row of V (the paper, which
    transposes, says column); m (out,) starts as ‖W‖. The backward treats ‖V‖ as a constant (section
    4.3). The bias is not scaled."""

    def make(self, config, source):
        super().make(config, source)
        norms = torch.linalg.vector_norm(full_precision(self.base.weight), dim=1)
        self.register_buffer("row_squares", norms.square(), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self):
        """‖W + s B A‖ by rows, (out,), without making B A, which is as large as W.

        ‖w + bA‖² = ‖w‖² + 2 (w Aᵀ)·b + (b A Aᵀ)·b, for w a row of W and b of s B. The first term
        never changes; while B = 0 the others are zero, and m/‖V‖ is 1 to the last bit."""
        weight, (A, B) = self.base.weight, self.factors()
        rest = (2 * (weight @ A.to(weight.dtype).t()) + B @ (A @ A.t())) * B
        return (self.row_squares + rest.sum(1)).clamp_min(SMALLEST).sqrt()

    def forward(self, x):
        dropped = self.drop(x)
        plain = self.base(dropped)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        y = (self.add(plain, x, A, B) if dropped is x else  # in place only if `plain` is done with
             torch.addmm(plain, F.linear(dropped, A), B.t()))
        # m/‖V‖ is near 1 and stays float32: in bfloat16 the next number after 1 is 1.0078.
        gain = self.lora_magnitude_vector / self.row_norms()
        y = y * gain
        if self.base.bias is not None:
            y = y + (1 - gain) * self.base.bias  # gives back what the gain took from the bias
        y = y.to(x.dtype)
        # Dropout acts on DoRA's change of the output, never on the base model's own.
        return y if dropped is x else self.base(x) + (y - plain)

    def cost(self):
        return super().cost()._replace(  # y before it is scaled, for m's gradient
            keeps_output=True, products=3 if self.dropout else 1)

    @torch.no_grad()
    def merged(self):
        V = super().merged()
        norms = torch.linalg.vector_norm(V, dim=1).clamp_min(SMALLEST)
        return (full_tensor(self.lora_magnitude_vector) / norms)[:, None] * V


class VeRALinear(LoRALinear):
    """VeRA: y = x Wᵀ + b ⊙ (B (d ⊙ (A x))); only the vectors b (out,) and d (r,) are trained.

    arXiv 2310.11454, equation 2. A (r, widest in) and B (widest out, r) are random, frozen, and
    one pair for the whole model, cut to size. While b = 0, as at first, d has no gradient."""

    @staticmethod
    def source(bases, config):
        """A and B, drawn as PEFT draws them. In a module that all layers share, they stay one pair
        when the model is moved. They are not in state_dict, since the seed determines them."""
        shared, generator = nn.Module(), torch.Generator().manual_seed(config.seed)
        for name, shape in (("vera_A", (config.rank, max(base.in_features for base in bases))),
                            ("vera_B", (max(base.out_features for base in bases), config.rank))):
            matrix = kaiming_uniform(shape, 0.0, generator).to(device_of(bases[0]))
            shared.register_buffer(name, matrix, persistent=False)
        return shared

    def make(self, config, source):
        self.shared = source
        device = source.vera_A.device
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.base.out_features, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.vera_d, device=device))

    def factors(self):
        """A (r, in) and diag(b) B diag(d) (out, r): so the backward needs (T, r) activations, where
        the equation as written needs (T, out) for the gradient of b."""
        A = self.shared.vera_A[:, :self.base.in_features]
        B = self.shared.vera_B[:self.base.out_features]
        return A, self.vera_lambda_b[:, None] * B * self.vera_lambda_d


class PiSSALinear(LoRALinear):
    """PiSSA: LoRA that starts as W's r largest singular values; what remains of W is frozen.

    arXiv 2404.02948, equations 2-4. With W = U S Vᵀ: A₀ = √(S_r/s) V_rᵀ, B₀ = U_r √(S_r/s), and
    the base becomes W - s B₀ A₀. To the original W, s (B A - B₀ A₀) is an adapter of rank 2r, and
    is saved as that. In bfloat16 the base would lose more to rounding than training gains."""

    no_dropout = "its A and B hold part of the pretrained weight, which dropout would switch off"

    def make(self, config, source):
        weight, r = dense_weight(self.base, config), config.rank
        U, S, Vt = torch.linalg.svd(full_precision(weight), full_matrices=False)
        root = (S[:r] / self.scale).sqrt()
        A, B = (root[:, None] * Vt[:r]).contiguous(), (U[:, :r] * root).contiguous()
        self.register_buffer("initial_A", A, persistent=False)
        self.register_buffer("initial_B", B, persistent=False)
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        weight.copy_(full_precision(weight) - self.scale * B @ A)

    def original(self):
        return full_precision(self.base.weight) + self.scale * self.initial_B @ self.initial_A


class LoRAPlusLinear(LoRALinear):
    """LoRA+: LoRA, but B learns λ times faster than A, whose learning rate is the run's.

    arXiv 2402.12354: with one rate for both, a wide model learns slowly. λ is about 16."""

    def lr_ratio(self, name, config):
        return config.lr_ratio if name == "lora_B" else 1.0


class LoRAFALinear(LoRALinear):
    """LoRA-FA: LoRA with *frozen A*: the backward needs x Aᵀ and no more, so x is not kept.

    arXiv 2308.03303. Its second version also replaces B's gradient g by g (A Aᵀ)⁻¹ / s²: then
    s g A, to first order the change of W, is as near to W's own gradient as A's rows can come.
    Where r > in, the inverse is the pseudo-inverse."""

    def make(self, config, source):
        super().make(config, source)
        self.lora_A.requires_grad_(False)
        self.correction = None  # (A Aᵀ)⁻¹ / s² (r, r), computed once: A never changes

    def before_step(self, config):
        if not config.project_gradient or self.lora_B.grad is None:
            return
        if self.correction is None:
            inverse = torch.linalg.pinv(full_tensor(self.lora_A).cpu().double())  # A⁺ (in, r)
            self.correction = inverse.t() @ inverse / self.scale**2
        gradient = own_rows(self.lora_B.grad)
        self.correction = self.correction.to(gradient)
        gradient.copy_(gradient @ self.correction)


class DeltaLoRALinear(LoRALinear):
    """Delta-LoRA: after each step t > K, W += λ s (B⁺A⁺ - B A), without any gradient of W.

    arXiv 2309.02411, equation 5. The sum telescopes to λ s (B_T A_T - B_K A_K): with LoRA's own
    product, W changes by rank 2r at most; and K = 0 is LoRA with α (1 + λ), as the tests show."""

    no_dropout = "W moves by B A itself, which must be what the forward pass used"

    def make(self, config, source):
        dense_weight(self.base, config)  # raises if W cannot be moved
        super().make(config, source)
        self.previous = None  # A and B before the step

    def before_step(self, config):
        self.previous = full_tensor(self.lora_A).clone(), own_rows(self.lora_B).clone()

    def after_step(self, config, step):
        (A, B), self.previous = self.previous, None
        if step > config.delta_start:
            A_new, B_new = full_tensor(self.lora_A), own_rows(self.lora_B)
            # B⁺A⁺ - BA = (B⁺ - B) A⁺ + B (A⁺ - A): not the difference of two large products,
            # which is mostly their rounding, and nothing as large as W is made.
            left, right = torch.cat((B_new - B, B), 1), torch.cat((A_new, A_new - A))
            own_rows(self.base.weight).addmm_(left, right, alpha=config.delta_ratio * self.scale)


METHODS = {
    "full": None,  # no adapter: every parameter of the model is trained
    "lora": LoRALinear,
    "rslora": RsLoRALinear,
    "dora": DoRALinear,
    "vera": VeRALinear,
    "pissa": PiSSALinear,
    "lora+": LoRAPlusLinear,
    "lora-fa": LoRAFALinear,
    "delta-lora": DeltaLoRALinear,
}


def full_precision(tensor):
    """The whole of a tensor, in float32, or in its own dtype if that has more digits."""
    return full_tensor(tensor).to(torch.promote_types(tensor.dtype, torch.float32))


def device_of(base):
    return next(tensor.device for tensor in (*base.parameters(), *base.buffers()))


# --- a model with adapters, from the start to the end of a training run ---

def apply_adapter(model, config):
    """Freeze the model and put an adapter around each target layer, in place; gives the model.

    Call it after the weights are loaded (DoRA and PiSSA read them) and before FSDP2 and the
    optimizer. "full" does nothing. Raises UserError if targets or method do not fit the model."""
    layer = METHODS[config.method]
    if layer is None:
        return model
    targets = select_targets(model, config.target_modules)
    source = layer.source(list(targets.values()), config)
    model.requires_grad_(False)
    for name, base in targets.items():
        model.set_submodule(name, layer(base, config, source))
    return model.train(model.training)  # the new layers as the rest: with dropout, or without


def adapter_modules(model):
    """Iterate over (dotted name, adapter layer)."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


def state_names(model):
    """Names of the parameters that a checkpoint must hold: the adapters', and W if it moves
    (Delta-LoRA). All others are the base model's, frozen. Without adapters: every parameter."""
    modules = dict(adapter_modules(model))
    names = [f"{prefix}.{name}" for prefix, module in modules.items()
             for name, _ in module.named_parameters(recurse=False)]
    names += [f"{n}.base.weight" for n, m in modules.items() if isinstance(m, DeltaLoRALinear)]
    return names or [name for name, _ in model.named_parameters()]


def optimizer_groups(model, config, lr, weight_decay):
    """The trainable parameters as groups for torch.optim: vectors are not decayed, and `lr_ratio`
    is what a schedule multiplies its learning rate by."""
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
    """Call between the backward pass and clipping: LoRA-FA replaces B's gradient here."""
    for _, module in adapter_modules(model):
        module.before_step(config)


@torch.no_grad()
def after_step(model, config, step):
    """Call after optimizer step `step`, from 1 on, unless it was skipped: Delta-LoRA moves W."""
    for _, module in adapter_modules(model):
        module.after_step(config, step)
