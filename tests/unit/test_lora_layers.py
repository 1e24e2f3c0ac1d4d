"""Owns: the layers with adapters compute what peft's own do, forward and backward."""
from __future__ import annotations

import copy

import peft.tuners.lora.layer as lora_layers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vlarl.policies.lora import AddedLinear


@pytest.mark.parametrize("bias", [True, False])
def test_the_adapters_product_is_added_as_peft_adds_it(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(6, 8, bias), nn.Tanh(), nn.Linear(8, 5, bias))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)  # type: ignore[arg-type]
    inject_adapter_in_model(config, theirs)
    theirs.double()
    ours = copy.deepcopy(theirs)
    changed = [layer for layer in ours.modules() if type(layer) is lora_layers.Linear]
    for layer in changed:
        layer.__class__ = AddedLinear
    assert len(changed) == 2
    inputs = [torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((theirs, ours), inputs, strict=True)]
    assert outputs[0].shape == outputs[1].shape == (2, 4, 5)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-14)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-13)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is not None, b.grad is not None) == (".lora_" in name,) * 2
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-13)
