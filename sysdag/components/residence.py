"""Frozen weights on the device only while their model works; otherwise on the host.

What trains stays: its gradient and the optimizer's state are beside it anyway. Frozen weights hardly ever change, so
the host keeps its copy and leaving the device costs nothing; coming back is one copy (from pinned memory to a GPU).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sysdag.components.component import Component
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)


class Residence:
    """Moves the frozen weights of several components.

    Args:
        components: policies and references; those that share weights share their stay.

    Raises:
        PlanError: for quantised weights, whose numbers are not all in the tensor that would move.
    """

    def __init__(self, components: Iterable[Component]) -> None:
        self._weights: dict[int, list[nn.Parameter]] = {}
        self._hosted: dict[nn.Parameter, Tensor] = {}
        self._devices: dict[nn.Parameter, torch.device] = {}
        self._versions: dict[nn.Parameter, int] = {}
        for component in components:
            if component.module is None:
                continue
            frozen = [p for p in component.module.parameters() if not p.requires_grad]
            if any(not p.is_floating_point() for p in frozen):
                raise PlanError(f"offload_idle: {component!r} has quantised weights, which cannot move to the host.")
            self._weights[id(component)] = frozen
            for parameter in frozen:
                if parameter not in self._hosted:
                    self._devices[parameter] = parameter.device
                    self._hosted[parameter] = _on_host(parameter)
            component.residence = self
        if all(device.type == "cpu" for device in self._devices.values()):
            logger.warning("offload_idle=True only takes time here: every model works on the host.")
        self.admit()

    def admit(self, *components: Component) -> None:
        """Brings the components' weights to where they work, after all others have left."""
        wanted = dict.fromkeys(p for each in components for p in self._weights.get(id(each), ()))
        for parameter, host in self._hosted.items():
            if parameter not in wanted and not self._is_idle(parameter):
                if parameter._version != self._versions.get(parameter, parameter._version):
                    host.copy_(parameter.detach())
                parameter.data = host
        for parameter in wanted:
            if self._is_idle(parameter):
                host = self._hosted[parameter]
                parameter.data = host.to(self._devices[parameter], non_blocking=True, copy=True)
                self._versions[parameter] = parameter._version

    def _is_idle(self, parameter: nn.Parameter) -> bool:
        return parameter.data_ptr() == self._hosted[parameter].data_ptr()


def _on_host(parameter: nn.Parameter) -> Tensor:
    host = torch.empty_like(parameter, device="cpu", pin_memory=parameter.device.type == "cuda", requires_grad=False)
    return host.copy_(parameter.detach())


def admit(*components: Component | None) -> None:
    """Has the components' weights be where they work, if an engine offloads idle ones."""
    present = [component for component in components if component is not None and component.residence is not None]
    if present:
        residence = present[0].residence
        assert residence is not None
        residence.admit(*present)
