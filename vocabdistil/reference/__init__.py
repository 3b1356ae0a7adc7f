"""Every loss in plain PyTorch, any dtype, with its formula and source: the ground truth for the kernels."""

from .span_loss import span_kl, span_loss
from .span_mean import span_mean

__all__ = ["span_kl", "span_loss", "span_mean"]
