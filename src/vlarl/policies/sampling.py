"""Owns the action distribution: temperature, top-k, sampling, log-prob, entropy. Pure functions, one code for rollout and training.

Legend: B batch, N tokens, M bins.
"""
from __future__ import annotations

import torch
from torch import Tensor


def log_distribution(logits_BNM: Tensor, temperature: float, top_k: int) -> Tensor:
    """Normalised log-probabilities, in the logits' dtype (float32 or float64). top_k 0: off; excluded bins are -inf."""
    logits = logits_BNM / temperature if temperature != 1 else logits_BNM
    if 0 < top_k < logits.shape[-1]:
        # Exactly k bins, ties included: the lower bins win, as argmax has it.
        kept = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    return logits.log_softmax(-1)


def sample(logp_BNM: Tensor, noise_BN: Tensor) -> Tensor:
    """Inverse CDF: the first bin whose cumulated probability exceeds the noise (uniform in [0, 1)). int64 (B,N).

    Summed in float64. Noise beyond the sum (rounding) falls on the last bin that has any probability.
    """
    cdf = logp_BNM.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, noise_BN.double()[..., None].contiguous(), right=True)
    return torch.minimum(drawn, torch.searchsorted(cdf, cdf[..., -1:].contiguous()))[..., 0]


def token_logprob(logp_BNM: Tensor, token_BN: Tensor) -> Tensor:
    """Log-probability of each token, (B,N)."""
    return logp_BNM.gather(-1, token_BN[..., None])[..., 0]


def entropy(logp_BNM: Tensor) -> Tensor:
    """Nats, (B,N). Excluded bins count as 0 and get no gradient."""
    finite = torch.isfinite(logp_BNM)
    logp = torch.where(finite, logp_BNM, torch.zeros((), dtype=logp_BNM.dtype, device=logp_BNM.device))
    return -(torch.where(finite, logp.exp(), torch.zeros_like(logp)) * logp).sum(-1)
