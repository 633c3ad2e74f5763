"""A program: compiles the kernels of some calls for an H100 that need not be there.

Prints a JSON object for each kernel: its parameters, layout and PTX, and what Triton's hooks are
told of it. Runs on its own, because a process that interprets kernels cannot compile them.
"""

import json

import torch
from triton import knobs
from triton.runtime.driver import driver

import tokenmix_ops as tm
from bench.pretence import Driver
from tokenmix_ops import ops
from tokenmix_ops.backends.triton import launch
from tokenmix_ops.testing import Case

told = []


def hear(*, compile, **_):
    told.append(json.loads(compile["specialization_data"]))


def compile_only(self, programs, *arguments):
    told.clear()
    compiled = self.kernel.warmup(*arguments, grid=(programs,), **self.constants, **self.options)
    row = {
        "parameters": self.kernel.arg_names,
        "layout": self.constants["L"],
        "ptx": compiled.asm["ptx"],
        "told": told,
    }
    print(json.dumps(row))


def call(padding, backward=True):
    """Compiles the kernels of rows of 72 numbers, a multiple of 16 bytes, ``padding`` apart."""
    case = Case(tm.Mixing.released(), batch=1, num_frames=2, num_tokens=40, head_dim=72)
    plan, shape = case.plan, (1, 2, 40, 3)
    tensors = [torch.empty(*shape, 72 + padding).half()[..., :72] for _ in range(5)]
    query, key, value, output, output_grad = tensors
    tables = (plan.key_index, plan.key_frame)
    numbers = ops.numbers_of(plan, 0.25)
    launch.forward(query, key, value, *tables, *numbers)
    if backward:
        tables += (plan.token_order, plan.use_start, plan.uses)
        lse = torch.empty(1, 3, 2, 40)
        launch.backward(output_grad, query, key, value, output, lse, *tables, *numbers)


if __name__ == "__main__":
    driver.set_active(Driver())
    knobs.runtime.jit_cache_hook = knobs.runtime.jit_post_compile_hook = hear
    launch.Launch.__call__ = compile_only
    launch._name = lambda device: "sm_90"
    call(padding=0)
    call(padding=8, backward=False)
    call(padding=1, backward=False)
