"""Token-mixing attention for video transformers.

Every frame's queries attend to one mixed set of keys and values drawn from all frames, so that an
image ViT sees across frames with no new parameters (Token Mixing, AAAI 2023).
"""

from tokenmix_ops.backends import available as available_backends
from tokenmix_ops.backends import use_backend
from tokenmix_ops.convert import mix_tokens, unmix_tokens
from tokenmix_ops.families import VisionFamily, register_family
from tokenmix_ops.functional import attention_weights, explain, token_mix_attention
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention, set_num_frames
from tokenmix_ops.plan import Plan
from tokenmix_ops.projections import PackedParameters, PackedProjection, SeparateProjections

__version__ = "0.1.0"

__all__ = [
    "Mixing",
    "PackedParameters",
    "PackedProjection",
    "Plan",
    "SeparateProjections",
    "TokenMixAttention",
    "VisionFamily",
    "attention_weights",
    "available_backends",
    "explain",
    "mix_tokens",
    "register_family",
    "set_num_frames",
    "token_mix_attention",
    "unmix_tokens",
    "use_backend",
]
