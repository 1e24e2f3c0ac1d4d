"""Owns quick checks of a loaded policy: it sees, a batch is its rows, what its actions are un-normalised with, and whether faster ways to
act give the same log-probs here."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlarl.errors import CheckpointError
from vlarl.policies.actions import BINS
from vlarl.policies.base import VLAPolicy
from vlarl.policies.engine import Compiled, Engine, Graphs, padded_sizes
from vlarl.recipe.schema import Engine as EngineSettings
from vlarl.types import Observation

SENTENCES = ("touch the blue cube", "put the red cube on the green plate, then wait")  # prompts of two lengths: one row is padded
# Largest difference of a log-prob (nats) that the order of summation may make, by the forward pass's dtype.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 2.0, torch.float16: 0.5}
# A faster way to act is used if its mean gap is at most twice the plain way's and this (nats per token).
SLACK = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
BLIND = 1e-6  # nats: a smaller change is none


def probe_batch(policy: VLAPolicy) -> Observation:
    """Three rows: a black frame, a white one under the same sentence, and a chequered one under a longer sentence."""
    spec = policy.spec
    side = torch.arange(spec.image_size)
    chequered = ((side[:, None] // 8 + side[None] // 8) % 2).to(torch.uint8) * 255
    frames = torch.stack([torch.zeros_like(chequered), torch.full_like(chequered, 255), chequered])
    image_BVHWC = frames[:, None, :, :, None].expand(-1, spec.views, -1, -1, 3).contiguous()
    state_BD = torch.zeros(3, max(1, spec.proprio_dim))
    return Observation(image_BVHWC.to(policy.device), state_BD.to(policy.device), (SENTENCES[0], SENTENCES[0], SENTENCES[1]))


def probe_tokens(policy: VLAPolicy, rows: int) -> Tensor:
    """Bins (rows, N) spread over all of them, to be scored."""
    tokens = policy.spec.chunk * policy.spec.action_dim
    return (torch.arange(rows * tokens, device=policy.device) * 37 % BINS).view(rows, tokens)


@torch.no_grad()
def check_policy(policy: VLAPolicy, compute_dtype: torch.dtype) -> None:
    """CheckpointError unless log-probs are finite, depend on the frame, and are the same for a batch as for its rows.

    With gathered weights (inside `acting`). Four forward passes, seven rows; no random number is drawn.
    """
    obs = probe_batch(policy)
    rows = len(obs)
    token_BN = probe_tokens(policy, 1).expand(rows, -1)
    batch_BN = policy.evaluate(obs, token_BN, 1.0, 0).logprob_BN
    if not batch_BN.isfinite().all():
        message = f"{policy.folder}: the policy's log-probabilities are not finite."
        raise CheckpointError(message, "Its weights may be damaged; compare the files' hashes with those of the publisher.")
    seen = float((batch_BN[0] - batch_BN[1]).abs().max())
    if seen < BLIND:
        message = f"{policy.folder}: a black and a white frame give the same actions (log-probs differ by {seen:.1g} nats)."
        raise CheckpointError(message, "The vision towers or the projector are not those that the policy was trained with.")
    single_BN = torch.cat([policy.evaluate(obs.select(torch.tensor([i])), token_BN[:1], 1.0, 0).logprob_BN for i in range(rows)])
    gap, limit = float((batch_BN - single_BN).abs().max()), ROUNDING[compute_dtype]
    if gap > limit:
        message = f"{policy.folder}: a batch of {rows} and the same rows one by one differ by {gap:.2g} nats; {limit:g} could be rounding."
        raise CheckpointError(message, "Its padding token or tokenizer may be another model's; compare config.json with the publisher's.")


@torch.no_grad()
def probe_logits(policy: VLAPolicy) -> Tensor:
    """Unnormalised log-probabilities (3, N, 256) of the probe batch; of an L1 head, its actions."""
    obs = probe_batch(policy)
    return policy.logits(obs, probe_tokens(policy, len(obs)))


def equip(
    policy: VLAPolicy,
    settings: EngineSettings,
    slots: int,
    compute_dtype: torch.dtype,
    temperature: float = 1.0,
    top_k: int = 0,
    before_capture: Callable[[], None] = lambda: None,
) -> list[str]:
    """Let `policy.act` run as `settings` say, as far as its log-probs are right on this machine; one line for what is left out.

    With gathered weights (inside `acting`). slots: rows of a usual batch. before_capture: see `Graphs`. Every batch size is tried, twice
    (CUDA graphs are captured, then replayed), on the probe batch, sampled as the recipe says; what acting says of its tokens is compared
    with what the plain pass of learning says of them.
    """
    wanted = [name for name in ("compile", "cuda_graphs") if getattr(settings, name)]
    sizes = settings.batch_sizes if settings.batch_sizes is not None else padded_sizes(slots) if wanted else ()
    policy.engine = Engine(sizes)
    limit = 2 * action_gap(policy, temperature, top_k) + SLACK[compute_dtype]
    left_out = []
    for name in wanted:
        plain, problem = policy.engine, ""
        try:
            policy.engine = _with(policy, name, before_capture)
            gap = action_gap(policy, temperature, top_k)
            if not gap <= limit:
                problem = f"its log-probs differ by {gap:.2g} nats per token, {limit:.2g} could be rounding"
        except Exception as error:  # compilers and drivers raise what they like; none of it is a reason to stop
            problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if problem:
            policy.engine = plain
            left_out.append(f"policy.engine.{name} is left out: {problem}")
    return left_out


def _with(policy: VLAPolicy, name: str, before_capture: Callable[[], None]) -> Engine:
    """The policy's engine with one more part."""
    engine = policy.engine
    if name == "compile":
        return Engine(engine.sizes, Compiled(policy.module), engine.graphs)
    if policy.device.type != "cuda":
        raise CheckpointError(f"CUDA graphs need a CUDA device, this is {policy.device.type}")
    return Engine(engine.sizes, engine.compiled, Graphs(policy.module, before_capture))


@torch.no_grad()
def action_gap(policy: VLAPolicy, temperature: float = 1.0, top_k: int = 0) -> float:
    """Mean difference (nats per token) of what `act` and `evaluate` say of the tokens that `act` chose, the most of any batch size that
    the engine pads to; of an L1 head, of its actions (environment units). A gap that is no number is infinite."""
    three = probe_batch(policy)
    worst = 0.0
    for size in policy.engine.sizes or (len(three),):
        rows = torch.arange(size) % len(three)
        obs = three.select(rows)
        for turn in (0, 1):
            # Keyed by row and turn; any numbers in [0, 1) will do.
            noise_BN = (probe_tokens(policy, size) * 0.618 + 0.37 * turn).double() % 1
            chunk = policy.act(obs, noise_BN, temperature, top_k)
            if policy.config.head == "l1":
                difference = chunk.action_BKA - policy.codec.unnormalize(policy.logits(obs, chunk.token_BN))
            else:
                difference = chunk.logprob_BN - policy.evaluate(obs, chunk.token_BN, temperature, top_k).logprob_BN
            gap = float(difference.abs().double().mean())
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def action_range(policy: VLAPolicy) -> str:
    """One line: the statistics in use, and the range of each number of an action (those left in [-1, 1] are marked)."""
    codec = policy.codec
    columns = zip(codec.low_A.tolist(), codec.high_A.tolist(), codec.scaled_A.tolist(), strict=True)
    ranges = ", ".join(f"{low:.3g}..{high:.3g}" if scaled else "-1..1 (as it is)" for low, high, scaled in columns)
    return f"actions un-normalised with {policy.spec.unnorm_key}: {ranges}"
