"""One decoder for Llama 3.x, Mistral, Qwen3 and Qwen2.5, on packed sequences, in plain PyTorch.

Shapes, here and in every chapter:

    T  tokens in the pack, of all documents together     N  documents in the pack
    D  model width (hidden_size)                         F  feed-forward width
    H  query heads      K  key/value heads               d  head size (head_dim)
    V  vocabulary size

The families differ in a few fields of the config (llama_config.py) and in nothing else; no code
here asks for a family's name. Also new since chapter 1 is the cache of keys and values
(common/asking/kv_cache.py), with which a new token is computed without the document before it.

Sources: Llama 3 (arXiv 2407.21783); Mistral 7B (2310.06825); Qwen2.5 (2412.15115); Qwen3
(2505.09388)."""

from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from llama_config import LlamaConfig

__all__ = ["LlamaConfig", "LlamaForCausalLM"]

# Newer versions of varlen_attn want grouped heads announced; PyTorch 2.11's has no such argument.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


# Copied from chapter-01/modeling_qwen3.py
class Linear(nn.Linear):
    """y = x Wᵀ + b in the dtype of x, while W stays a float32 master weight. The cast is part of
    the graph, so W's gradient is float32 too, where a small update is not rounded away."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


# Copied from chapter-01/modeling_qwen3.py
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


# Changed from chapter-01: Llama 3's scaling.
def rotary_tables(position_ids, config):
    """cos and sin of mθ_i, each (T, 1, d/2), for positions m and θ_i = theta^(-2i/d) (RoFormer,
    3.2.2), in float32: in bfloat16 the angle of position 4095 would be off by radians.

    A model that was trained on short documents first, then on longer ones, may have pairs that turn
    slower, down to 1/factor of their speed: which ones depends on the kind of its `rope_scaling`
    (llama_config.py)."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device).float()
    periods = config.rope_theta ** (exponents / config.head_dim)  # (d/2,) tokens per radian
    size, scaling = 1.0, config.rope_scaling
    if scaling is not None:
        kept = scaling.kept(periods, config.rope_theta)
        periods = periods / (kept + (1 - kept) / scaling.factor)
        size = scaling.attention_factor
    angles = position_ids.float()[:, None] / periods  # (T, d/2)
    return size * angles.cos()[:, None, :], size * angles.sin()[:, None, :]


# Copied from chapter-01/modeling_qwen3.py
def apply_rotary(x, cos, sin):
    """Turn each pair (x_i, x_{i+d/2}) of every head by its angle. x is (T, heads, d)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# Changed from chapter-01: the window.
def varlen_attention(q, k, v, cu_seqlens, max_seqlen, window=None):
    """Causal softmax(q kᵀ / √d) v within each document: (T, H, d). With a `window` a token sees no
    more tokens than that, the last of which is itself.

    q is (T, H, d); k and v are (T, K, d), query head h using key/value head h // (H/K). Document n
    is the tokens cu_seqlens[n] to cu_seqlens[n+1]. On CUDA in 16 bits this is one call of PyTorch's
    FlashAttention for packed sequences. Elsewhere the documents are computed one after another;
    `split` and not slices, whose backward fills a whole pack with zeros, for each.
    """
    if q.is_cuda and q.dtype != torch.float32:
        # (left, 0): so many tokens to the left (-1: all), none to the right, which is causal.
        left = -1 if window is None else window - 1
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                           window_size=(left, 0), **GROUPED)
    if q.is_cuda:  # CUDA's float32 kernel wants as many key/value heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        q_n, k_n, v_n = (x.transpose(0, 1)[None] for x in document)  # (1, heads, tokens, d)
        tokens, seen = q_n.shape[2], None
        if window is not None and window < tokens:
            seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
            seen = seen.tril().triu(1 - window)
        output = F.scaled_dot_product_attention(
            q_n, k_n, v_n, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# Changed from chapter-01: biases, QK norm and a window where the config has them; the cache.
class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config, index):
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.windows[index]
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen, cache=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q = apply_rotary(self.q_norm(q), cos, sin)
        k = apply_rotary(self.k_norm(k), cos, sin)
        if cache is not None:
            cache.store(self, k, v)
        if cache is None or cache.first_pass:
            output = varlen_attention(q, k, v, cu_seqlens, max_seqlen, self.window)
        else:
            output = cache.attention(self, q, self.window)
        return self.o_proj(output.flatten(-2))  # (T, H·d) -> (T, D)


# Changed from chapter-01: biases where the config has them.
class MLP(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), the SwiGLU feed-forward."""

    def __init__(self, config):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# Changed from chapter-01: hands the cache on.
class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen, cache=None):
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, cos, sin, cu_seqlens, max_seqlen, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# Changed from chapter-01: the scaled rotation, and the cache.
class LlamaModel(nn.Module):
    """Embedding, decoder layers, last norm: token ids (T,) to hidden states (T, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, cu_seqlens, max_seqlen, position_ids, dtype, cache=None):
        x = self.embed_tokens(input_ids).to(dtype)  # (T, D)
        cos, sin = rotary_tables(position_ids, self.config)
        cos, sin = cos.to(dtype), sin.to(dtype)  # once per pack, not once per layer
        if cache is not None:
            cache.begin(cu_seqlens, max_seqlen, position_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens, max_seqlen, cache)
        return self.norm(x)


# Changed from chapter-01: biases start at zero; with a cache only the last token has logits.
class LlamaForCausalLM(nn.Module):
    """The decoder with its output head. A fresh one has random weights: every matrix is normal with
    standard deviation `initializer_range`, every norm is one, every bias zero. `compute_dtype` is
    the dtype of the activations and matrix products; set it after construction."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = LlamaModel(config)
        self.lm_head = None  # tied: the embedding is also the head, one parameter
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids, cu_seqlens, max_seqlen, position_ids, cache=None):
        """Logits (T, V) in `compute_dtype`, from a pack (packing.py): input_ids and position_ids
        (T,) int64, cu_seqlens (N+1,) int32, and max_seqlen, the longest document's length. With a
        `KVCache` a pack holds only what is new; the logits (N, V) are of documents' last tokens."""
        x = self.model(input_ids, cu_seqlens, max_seqlen, position_ids, self.compute_dtype, cache)
        if cache is not None:
            x = x[cu_seqlens[1:].long() - 1]
        if self.lm_head is not None:
            return self.lm_head(x)  # called, as it may carry an adapter
        return F.linear(x, self.model.embed_tokens.weight.to(x.dtype))
