"""What the kernels raise."""

from __future__ import annotations


class KernelInputError(ValueError):
    """Tensors that do not fit together. The message says which."""
