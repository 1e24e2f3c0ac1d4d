"""Action codec, by hand."""
from __future__ import annotations

import pytest
import torch

from vlarl.errors import CheckpointError
from vlarl.policies.actions import bin_values, build_codec, encode_bins

CPU = torch.device("cpu")
STATISTICS = {"toy": {"action": {"q01": [-2.0, 0.0], "q99": [2.0, 10.0], "min": [-4.0, 0.0], "max": [4.0, 20.0], "mask": [True, False]}}}


def test_bins_are_reversed_and_the_two_highest_values_coincide() -> None:
    values = bin_values(CPU)
    # 256 edges 2/255 apart: the first centre lies 1/255 above -1.
    assert values[255].item() == pytest.approx(-1 + 1 / 255, abs=1e-15)
    assert values[1].item() == pytest.approx(1 - 1 / 255, abs=1e-15)
    assert values[0] == values[1]
    assert (values[1:].diff() < 0).all()
    assert values[128].item() == pytest.approx(0, abs=1e-15)  # centre 127 of 0..254


def test_encode() -> None:
    # digitize counts edges at or below the value: -1 -> 1 -> bin 255; 1 (and above) -> 256 -> bin 0; 0 lies over 128 edges -> bin 128.
    assert encode_bins(torch.tensor([-5.0, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [255, 255, 128, 1, 0, 0]
    bins = torch.arange(1, 256)
    assert torch.equal(encode_bins(bin_values(CPU)[bins]), bins)


def test_unnormalising_with_quantiles_bounds_mask_and_epsilon() -> None:
    token = torch.tensor([[128, 128, 255, 255]])  # two actions of two numbers: 0, 0 and -254/255, -254/255
    low = -254 / 255
    codec = build_codec(STATISTICS, "toy", "quantiles", False, 2, CPU)
    torch.testing.assert_close(codec.decode(token), torch.tensor([[[0.0, 0.0], [0.5 * (low + 1) * 4 - 2, low]]]))
    codec = build_codec(STATISTICS, "toy", "bounds", False, 2, CPU)
    torch.testing.assert_close(codec.decode(token), torch.tensor([[[0.0, 0.0], [0.5 * (low + 1) * 8 - 4, low]]]))
    flat = {"toy": {"action": {"q01": [3.0], "q99": [3.0]}}}
    wide = build_codec(flat, "toy", "quantiles", True, 1, CPU)
    assert wide.epsilon == 1e-8
    assert wide.decode(torch.tensor([[0]])).item() == 3.0


def test_round_trip_within_half_a_bin() -> None:
    codec = build_codec(STATISTICS, "toy", "quantiles", True, 2, CPU)
    action = torch.tensor([[[1.3, -0.4], [-1.9, 0.7]]])
    error = (codec.decode(codec.encode(action)) - action).abs()
    assert (error <= torch.tensor([2.0, 1.0]) / 255 + 1e-6).all()


def test_wrong_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="2 numbers, config.json says 7"):
        build_codec(STATISTICS, "toy", "quantiles", True, 7, CPU)
