"""Owns: the layers that get adapters compute what peft's own do, forward and backward."""
from __future__ import annotations

import peft.tuners.lora.layer as lora_layers
import pytest
import torch
from torch import Tensor

from vlarl.policies.checkpoint import load_policy
from vlarl.policies.lora import inject_lora
from vlarl.recipe.schema import Lora


@pytest.mark.parametrize("alpha", [4, 1])
def test_adapters_products_are_added_as_peft_adds_them(alpha: int) -> None:
    module = load_policy("scratch:tiny", seed=1).module.double()
    inject_lora(module, Lora(rank=4, alpha=alpha), (), ())
    layers = [layer for layer in module.modules() if isinstance(layer, lora_layers.Linear)]
    assert len(layers) > 20 and {layer.base_layer.bias is None for layer in layers} == {True, False}
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)

        def run(forward: object, layer: lora_layers.Linear = layer, x: Tensor = x) -> list[Tensor]:
            output = forward(layer, x)  # type: ignore[operator]
            wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            return [output, *torch.autograd.grad(output.square().sum(), wanted)]

        theirs, ours = run(lora_layers.Linear.forward), run(type(layer).forward)
        assert type(layer).forward is not lora_layers.Linear.forward
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
