"""The modules of a pipeline as one, whose frozen parts stay in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import nn


class PipelineModule(nn.ModuleDict):
    """The modules of a pipeline. Frozen ones stay in eval mode whatever mode the others are put in."""

    def __init__(self, denoiser: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__({"denoiser": denoiser, **others})
        self.training = denoiser.training
        self._settle()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        from diffusers.models.embeddings import LabelEmbedding

        for part in self.values():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        for module in self.modules():
            if isinstance(module, LabelEmbedding):
                module.eval()  # in train mode it replaces labels at random: the score would not be that of the label
