"""Triton's interpreter, made to round as a GPU does."""

import numpy as np
import torch


def round_to_nearest_bfloat16():
    """Has conversions from float32 to bfloat16 round to nearest; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(builder, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(builder, source, target)
        numbers = np.asarray(source.data)
        bits = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16).reshape(numbers.shape), target.scalar)

    InterpreterBuilder.cast_impl = rounded
