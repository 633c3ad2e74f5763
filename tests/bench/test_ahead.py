"""What one process compiled, another one finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import ahead

ROOT = Path(ahead.__file__).parent.parent


@pytest.mark.interfaces
@pytest.mark.slow
def test_compiled_code_is_found_by_another_process(tmp_path):
    """FlexAttention with a gain in its score function, as the peers call it."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    found = []
    for gain in (0.8, 0.8, 0.7):
        done = subprocess.run(
            [sys.executable, "-c", FLEX, str(gain)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout.strip().splitlines()[-1])
    assert found == ["fxgraph_cache_miss", "fxgraph_cache_hit", "fxgraph_cache_miss"]


FLEX = """
import sys
import torch
from torch._dynamo.utils import counters
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.peers import operators
from tokenmix_ops.testing import Case

case = Case(Mixing.released(cross_frame_gain=float(sys.argv[1])), num_tokens=33, head_dim=64)
with torch.no_grad():
    operators(case.plan)["flex"](*(t.detach() for t in case.inputs(torch.float32)))
print(*(name for name in counters["inductor"] if name.startswith("fxgraph_cache")))
"""
