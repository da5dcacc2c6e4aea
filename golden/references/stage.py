"""The mtp stage out of transformers' modules: transformers has none, but has every part of one.

Its decoder layer, norms and hyper-head are those of the backbone. This module joins the embedding with the streams, as
the published inference code does: x_j = e_proj(enorm(e)) + h_proj(hnorm(h_j)). NeMo Automodel's stage, which shares no
code with transformers', computes the same (``nox -s witnesses``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.golden.references.probes import HEAD_PROBES, Input, Output, Probe
from dsv4_convert.spec.names import Dialect
from dsv4_convert.spec.v4.names import RULES

#: The module that is a layer of the backbone.
_BLOCK = "block"
#: Name of a parameter within a layer, or of the model level -> its name in transformers' model.
_MODULES = {rule.path.removeprefix("layers.{}."): rule.template(Dialect.MODULE) for rule in RULES}


class Stage(nn.Module):
    """One stage. ``lm_head`` passes on the logits that its caller makes of what leaves ``norm``."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.enorm, self.hnorm, self.norm = (
            modeling.DeepseekV4RMSNorm(width, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.e_proj, self.h_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.block = modeling.DeepseekV4DecoderLayer(config, layer)
        self.hc_head = modeling.DeepseekV4HyperHead(config)
        self.lm_head = nn.Identity()

    def forward(self, streams: Tensor, embedded: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The streams ``[B, S, N, D]`` that leave the stage, and the output head's input ``[B, S, D]``."""
        joined = self.e_proj(self.enorm(embedded)).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        leaving = self.block(joined, **options)
        return leaving, self.norm(self.hc_head(leaving))


def module_name(own: str) -> str:
    """The parameter of :class:`Stage` that a parameter of the stage, named within it, fills."""
    module = _MODULES.get(own, f"{own}.weight")
    return module.replace("model.layers.{}", _BLOCK).removeprefix("model.")


def probes(layer: Mapping[str, Probe]) -> dict[str, Probe]:
    """The places of a stage's taps; ``layer`` has those of its layer's."""
    within = {
        tap: dataclasses.replace(probe, module=f"{_BLOCK}.{probe.module}".rstrip(".")) for tap, probe in layer.items()
    }
    own = {name: Output(name) for name in ("enorm", "hnorm", "e_proj", "h_proj")}
    return {"streams": Input(""), "embed": Input("enorm"), **own, **within, **HEAD_PROBES}
