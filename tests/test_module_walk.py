"""A model's modules and parameters in the order of torch's own walks: `named_modules`, `named_parameters`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama
from torch import nn

from sysdag.components.module_walk import modules_of, parameters_of


class Shared(nn.Module):
    """Tied weights, a module in two places, and places without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.nothing = None
        self.register_module("absent", None)
        self.register_parameter("missing", None)
        self.parts = nn.ModuleList([nn.Sequential(self.first, nn.Dropout()), nn.Linear(3, 3)])
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(2))


def adapted() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("make", [Shared, lambda: nn.MultiheadAttention(4, 2), lambda: nn.Linear(2, 2), adapted])
def test_the_walks_are_those_of_torch(make):
    module = make()
    assert [id(part) for part in modules_of(module)] == [id(part) for part in module.modules()]
    assert [id(each) for each in parameters_of(module)] == [id(each) for each in module.parameters()]
