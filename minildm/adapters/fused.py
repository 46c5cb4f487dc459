"""LoRA's three lines as one autograd function: `LoRALinear.forward` in less memory, the same result up to rounding.

Autograd would keep x A^T and hold every term of the sum as a tensor of its own. Here the products accumulate in one
output, and only x is kept (q, k and v share it, so it is kept once). The backward computes x A^T again, which costs
rank / out of the layer. The base's weight gets no gradient: it is frozen.
"""

import torch


class LoRAFunction(torch.autograd.Function):
    """base(x) + scale sum over blocks of (x A^T) B^T."""

    @staticmethod
    def forward(ctx, x, base, scale, *factors):
        """x (..., in), base: the frozen nn.Linear, factors: A, B, A, B, ... -> (..., out)."""
        wide = hasattr(base, "wide")  # kernels.products_in_float32: y is float32 although x is not
        y = base.wide(x) if wide else base(x)
        ctx.save_for_backward(x, *factors)
        ctx.base, ctx.scale, ctx.dtype = base, scale, y.dtype
        rows, out = x.reshape(-1, x.shape[-1]).to(y.dtype), y.reshape(-1, y.shape[-1])  # (tokens, in), (tokens, out)
        for A, B in zip(factors[::2], factors[1::2]):
            out.addmm_(rows @ A.to(y.dtype).t(), B.to(y.dtype).t(), alpha=scale)
        return out.view(y.shape).to(x.dtype if wide else y.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)  # (tokens, in)
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)  # (tokens, out)
        scaled = dy_rows if ctx.scale == 1 else dy_rows * ctx.scale
        dx = dy_rows @ ctx.base.weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None  # (tokens, in)
        gradients = []
        for A, B in zip(factors[::2], factors[1::2]):
            dh = scaled @ B.to(ctx.dtype)  # (tokens, rows of the block)
            if dx is not None:
                dx.addmm_(dh, A.to(ctx.dtype))
            gradients += [(dh.t() @ rows).to(A.dtype), (scaled.t() @ (rows @ A.to(ctx.dtype).t())).to(B.dtype)]
        return None if dx is None else dx.view(x.shape).to(x.dtype), None, None, *gradients
