"""Qwen3, the dense decoder, on packed sequences, in plain PyTorch.

Shapes, here and in every chapter:

    T  tokens in the pack, of all documents together     N  documents in the pack
    D  model width (hidden_size)                         F  feed-forward width
    H  query heads      K  key/value heads               d  head size (head_dim)
    V  vocabulary size

There is no batch dimension. Documents lie end to end in one row of T tokens, and `cu_seqlens`
says where each begins: the hidden states are (T, D) from the embedding to the last norm. Only
attention looks across tokens, so only attention needs to know about documents.

Parameters bear Hugging Face's names, so that checkpoints load with no renaming. They stay float32
(the master weights); matrix products run in `model.compute_dtype`, for example bfloat16.

Sources: Qwen3 Technical Report (arXiv 2505.09388); RMSNorm (1910.07467); rotary embedding
(2104.09864); grouped-query attention (2305.13245); SwiGLU (2002.05202)."""

from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from common.files.config import model_fields, read_windows

# Newer versions of varlen_attn want grouped heads announced; PyTorch 2.11's has no such argument.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
# Fields of config.json that change the maths and that this file does not implement, each with
# the values that leave it out.
NOT_SUPPORTED = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of a Qwen3 config.json that this model uses, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config):
        """Take the fields from `config`, as `common.weights.read_config` gives it. ValueError names
        a field that is missing, has a wrong type, or asks for what this file does not compute."""
        values = model_fields(cls, config, NOT_SUPPORTED)
        read_windows(config)  # only to refuse layer_types that are not full_attention
        return cls(**values)


class Linear(nn.Linear):
    """y = x Wᵀ + b in the dtype of x, while W stays a float32 master weight. The cast is part of
    the graph, so W's gradient is float32 too, where a small update is not rounded away."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """y = w ⊙ x / √(mean(x²) + ε), over the last dimension (RMSNorm, equation 4). `F.rms_norm` has
    the mean in float32: squares of bfloat16 numbers lose too much in bfloat16. On a GPU it is one
    kernel, which keeps x and 1/rms for the backward."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight.to(x.dtype)


def rotary_tables(position_ids, head_dim, theta):
    """cos and sin of mθ_i, each (T, 1, d/2), for positions m and θ_i = theta^(-2i/d) (RoFormer,
    3.2.2), in float32: in bfloat16 the angle of position 4095 would be off by radians."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None] / theta**exponents  # (T, d/2)
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def apply_rotary(x, cos, sin):
    """Turn each pair (x_i, x_{i+d/2}) of every head by its angle. x is (T, heads, d)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def varlen_attention(q, k, v, cu_seqlens, max_seqlen):
    """Causal softmax(q kᵀ / √d) v within each document: (T, H, d).

    q is (T, H, d); k and v are (T, K, d), query head h using key/value head h // (H/K). No mask is
    made: document n is the tokens cu_seqlens[n] to cu_seqlens[n+1]. On CUDA in 16 bits this is one
    call of PyTorch's FlashAttention for packed sequences. Elsewhere the documents are computed one
    after another; `split` and not slices, whose backward fills a whole pack with zeros, for each.
    """
    if q.is_cuda and q.dtype != torch.float32:
        # window (-1, 0): everything to the left, nothing to the right, which is causal.
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                           window_size=(-1, 0), **GROUPED)
    if q.is_cuda:  # CUDA's float32 kernel wants as many key/value heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        q_n, k_n, v_n = (x.transpose(0, 1)[None] for x in document)  # (1, heads, tokens, d)
        output = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


class Attention(nn.Module):
    """Grouped-query attention, with Qwen3's RMSNorm on every query and key before the rotation."""

    window = None  # for common/predict.py: a token sees all that is before it

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q = apply_rotary(self.q_norm(q), cos, sin)
        k = apply_rotary(self.k_norm(k), cos, sin)
        output = varlen_attention(q, k, v, cu_seqlens, max_seqlen)
        return self.o_proj(output.flatten(-2))  # (T, H·d) -> (T, D)


class MLP(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), the SwiGLU feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_seqlen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    """Embedding, decoder layers, last norm: token ids (T,) to hidden states (T, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, cu_seqlens, max_seqlen, position_ids, dtype):
        x = self.embed_tokens(input_ids).to(dtype)  # (T, D)
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos.to(dtype), sin.to(dtype)  # once per pack, not once per layer
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens, max_seqlen)
        return self.norm(x)


class Qwen3ForCausalLM(nn.Module):
    """The decoder with its output head. A fresh one is random, as Qwen3 before its training: every
    matrix normal with standard deviation `initializer_range`, every norm one. `compute_dtype` is
    the dtype of the activations and matrix products; set it after construction."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = Qwen3Model(config)
        self.lm_head = None  # tied: the embedding is also the head, one parameter
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids, cu_seqlens, max_seqlen, position_ids):
        """Logits (T, V) in `compute_dtype`, from a pack (packing.py): input_ids and position_ids
        (T,) int64, cu_seqlens (N+1,) int32, and max_seqlen, the longest document's length."""
        x = self.model(input_ids, cu_seqlens, max_seqlen, position_ids, self.compute_dtype)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(x, head.weight.to(x.dtype))
