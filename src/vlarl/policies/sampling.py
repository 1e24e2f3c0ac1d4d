"""Owns the action distribution: temperature, top-k, sampling, log-prob, entropy. Pure functions, one code for rollout and training.

Legend: B batch, N tokens, M bins.
"""
from __future__ import annotations

import torch
from torch import Tensor


def log_distribution(logits_BNM: Tensor, temperature: float, top_k: int, token_BN: Tensor | None = None) -> Tensor:
    """Normalised log-probabilities, in the logits' dtype (float32 or float64). top_k 0: off; excluded bins are -inf.

    token_BN: bins to be scored. One that is not among the k likeliest takes the last one's place: weights that have changed since it was
    sampled, or rounding, may rank it lower, but what happened is never impossible.
    """
    logits = logits_BNM / temperature if temperature != 1 else logits_BNM
    if 0 < top_k < logits.shape[-1]:
        # Exactly k bins, ties included: the lower bins win, as argmax has it.
        kept = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        if token_BN is not None:
            among = (kept == token_BN[..., None]).any(-1)
            kept = torch.cat([kept[..., :-1], torch.where(among, kept[..., -1], token_BN)[..., None]], dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    return logits.log_softmax(-1)


def sample(logp_BNM: Tensor, noise_BN: Tensor) -> Tensor:
    """Inverse CDF: the first bin whose cumulated probability exceeds the noise (uniform in [0, 1)). int64 (B,N).

    Summed in float64. Noise beyond the sum (rounding) falls on the last bin that has any probability.
    """
    cdf = logp_BNM.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, noise_BN.double()[..., None].contiguous(), right=True)
    return torch.minimum(drawn, torch.searchsorted(cdf, cdf[..., -1:].contiguous()))[..., 0]


class Draw:
    """Chooses tokens as their logits come (`Choose` in base.py), and keeps the choices with their log-probs.

    noise_BN: uniform in [0, 1), one number per token; None: the likeliest bins, whose log-probs are under temperature 1 without top-k.
    """

    def __init__(self, noise_BN: Tensor | None, temperature: float, top_k: int) -> None:
        self._noise_BN, self._temperature, self._top_k = noise_BN, temperature, top_k
        self._token: list[Tensor] = []
        self._logprob: list[Tensor] = []
        self._count = 0

    def __call__(self, logits_BNM: Tensor) -> Tensor:
        """Bins (B,N) of the next N tokens."""
        first, self._count = self._count, self._count + logits_BNM.shape[1]
        if self._noise_BN is None:
            token_BN = logits_BNM.argmax(-1)
            logp_BNM = log_distribution(logits_BNM, 1.0, 0)
        else:
            logp_BNM = log_distribution(logits_BNM, self._temperature, self._top_k)
            token_BN = sample(logp_BNM, self._noise_BN[:, first : self._count])
        self._token.append(token_BN)
        self._logprob.append(token_logprob(logp_BNM, token_BN))
        return token_BN

    def result(self) -> tuple[Tensor, Tensor]:
        """All tokens (B,N) and their log-probs (B,N)."""
        return torch.cat(self._token, dim=1), torch.cat(self._logprob, dim=1)


def token_logprob(logp_BNM: Tensor, token_BN: Tensor) -> Tensor:
    """Log-probability of each token, (B,N)."""
    return logp_BNM.gather(-1, token_BN[..., None])[..., 0]


def entropy(logp_BNM: Tensor) -> Tensor:
    """Nats, (B,N). Excluded bins count as 0 and get no gradient."""
    finite = torch.isfinite(logp_BNM)
    logp = torch.where(finite, logp_BNM, torch.zeros((), dtype=logp_BNM.dtype, device=logp_BNM.device))
    return -(torch.where(finite, logp.exp(), torch.zeros_like(logp)) * logp).sum(-1)
