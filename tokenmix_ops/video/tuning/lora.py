"""LoRA: low-rank updates of queries and values, through peft."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokenmix_ops.modules import TokenMixing
from tokenmix_ops.projections import SeparateProjections
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import Setting, Switches, TuningMethod, VideoModel
from tokenmix_ops.video.tuning.spec import Tuning

_ATTENTION = ("query", "value")
_FFN = ("fc1", "fc2")


class LoraTuning(TuningMethod):
    """Updates low-rank matrices at query and value; with ``ffn`` on, at the FFN as well.

    BLIP packs query, key and value into one projection, which a plain LoRA would change as a
    whole: it is split in three first, so keys stay as they are, and a layer that mixes goes on
    projecting the tokens in use alone. Source: Hu et al., LoRA, ICLR 2022; not in the paper's
    tables.
    """

    name = "lora"
    takes = ("layers", "rank")
    switches = Switches(ffn=False)
    settings = (Setting("lora", Tuning("lora"), note="not in the paper"),)

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        if tuning.rank < 1:
            raise ValueError(f"rank must be at least 1, got {tuning.rank}")
        targets: list[str] = []
        for index in layers:
            layer = encoder.layers[index]
            if tuning.attention is not False:
                split_projection(layer.self_attn)
                targets += [f"encoder.layers.{index}.self_attn.{name}" for name in _ATTENTION]
            if tuning.ffn:
                targets += [f"encoder.layers.{index}.mlp.{name}" for name in _FFN]
        if targets:
            config = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules=targets)
            inject_adapter_in_model(config, encoder.vision_model)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return [p for name, p in model.named_parameters() if "lora_" in name]

    def plain_weights(self, encoder: VideoEncoder) -> dict[str, Tensor]:
        return merged_projections(encoder)


def split_projection(attention: nn.Module) -> None:
    """Replaces the packed projection ``qkv`` of an attention layer by query, key and value."""
    if not isinstance(attention, TokenMixing):
        raise ValueError(f"{type(attention).__name__} is not an attention layer of this package")
    packed = attention.get_submodule("qkv")
    if not isinstance(packed, nn.Linear):
        raise ValueError(f"qkv must be a linear layer, got {type(packed).__name__}")
    dim = packed.in_features
    weights = packed.weight.detach().chunk(3)
    biases = packed.bias.detach().chunk(3)
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        part = nn.Linear(dim, weight.shape[0], device="meta", dtype=weight.dtype)
        part.weight, part.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        attention.add_module(name, part)
    del attention.qkv
    # The layer that this one was made of would keep the packed weights alive.
    if "original" in vars(attention):
        vars(attention)["original"].qkv = None
    attention.qkv_projection = SeparateProjections("query", "key", "value")


@torch.no_grad()
def merged_projections(encoder: VideoEncoder) -> dict[str, Tensor]:
    """The encoder's weights with LoRA added in and query, key and value packed again, by name."""
    weights = {
        name.replace(".base_layer.", "."): value.clone()
        for name, value in encoder.vision_model.state_dict().items()
        if "lora_" not in name
    }
    for name, module in encoder.vision_model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] += module.get_delta_weight("default")
    for name in [n for n in weights if ".self_attn.query." in n]:
        parts = [weights.pop(name.replace(".query.", f".{p}.")) for p in ("query", "key", "value")]
        weights[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return weights


METHOD = LoraTuning()
