"""A matrix product that is added to what is there already, without a copy of either."""

import torch


@torch.library.custom_op("bareloop::addmm_", mutates_args=("total",))
def addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in place and in the dtype of total; (m, n) += (m, k) (k, n).

    `a` and `b` have one dtype: that of total, or 16 bits where total is float32. To the compiler
    it is one operator that changes `total`; of PyTorch's own it makes one that copies it first.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # in parts, as += makes a float32 copy of what it adds
        for part, rows in zip(a.split(2**13), total.split(2**13)):
            rows += part @ b


@addmm_.register_fake
def _(total, a, b):
    return None


class _AddProduct(torch.autograd.Function):
    """y += u Bᵀ, in place: `addmm_` with its gradients."""

    @staticmethod
    def forward(ctx, y, u, B):
        ctx.save_for_backward(u, B)
        ctx.mark_dirty(y)
        addmm_(y, u, B.t())
        return y

    @staticmethod
    def backward(ctx, gradient):
        u, B = ctx.saved_tensors
        return gradient, gradient @ B, gradient.t() @ u


def add_low_rank(y, x, A, B):
    """`lora.add_low_rank` for layers that are compiled: y += x Aᵀ Bᵀ, really in place."""
    u, B = torch.nn.functional.linear(x, A.to(x.dtype)), B.to(x.dtype)
    if torch.is_grad_enabled():
        return _AddProduct.apply(y, u, B)
    addmm_(y, u, B.t())
    return y


def plus_low_rank(y, x, A, B):
    """The same as a new tensor, for layers that are computed again in the backward: of those
    PyTorch 2.11's compiler keeps, all the same, what is to be changed in place."""
    return torch.addmm(y, torch.nn.functional.linear(x, A.to(x.dtype)), B.to(x.dtype).t())
