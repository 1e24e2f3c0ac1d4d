"""Owns the recipe's shape: every field, type, range and default. Plain frozen dataclasses, so that worker ranks need no pydantic.

`recipe.load` validates YAML against these (through pydantic, which reads the annotations and the strings under the fields);
a recipe states intent only: everything derivable is derived in `plan`.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from vlarl.policies.families import POLICIES
from vlarl.recipe.fields import STRICT, Count, Fraction, NonNegative, Positive, Rate
from vlarl.recipe.simulators import Env

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(POLICIES)]  # a new family is a row there, and nothing here
Part = Literal["optimizer", "reference", "weights", "gradients"]  # of a learner, that its device can do without for a while


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (peft)."""

    __pydantic_config__ = STRICT
    rank: Count = 32
    alpha: Count | None = None
    """null: the rank; where an adapter is trained on, its own."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get adapters: all linear ones that are trained (lm_head apart), or those of these names. Where an adapter is trained on,
    all-linear is whatever it has, names must be its."""
    start: Literal["zero", "adapter"] = "zero"
    """zero: fresh adapters, which change nothing at first; policy.adapter, if any, is merged into the weights. adapter: policy.adapter (or
    the checkpoint, where that is an adapter itself) is trained on, with its rank and alpha."""

    @property
    def scale(self) -> float:
        """Of the adapters' product: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How actions are generated. What is asked for is tried at set-up, and left out with a line in the log where it fails or its
    log-probs differ from those of the plain forward pass."""

    __pydantic_config__ = STRICT
    compile: bool = False
    """Compile the transformer blocks (torch.compile; on a CPU it needs a C++ compiler)."""
    cuda_graphs: bool = False
    """Replay whole forward passes from CUDA graphs."""
    batch_sizes: tuple[Count, ...] | None = None
    """Batches are padded to the next of these sizes. null: to a few sizes around the slots of a stage where something above is on; as they
    come where nothing is."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy to train."""

    __pydantic_config__ = STRICT
    kind: Kind | None = None
    """Family; null: as the checkpoint's files say. Needed where they do not: both families publish the same weights and configuration."""
    checkpoint: str
    """Folder; `bundled:NAME` (shipped with vlarl) or `scratch:NAME` (random weights of a shipped configuration); or the Hub id of a
    published checkpoint, which is planned for without its files, and trained in a folder of that name."""
    adapter: str | None = None
    """Folder of a PEFT LoRA adapter, merged into the checkpoint's weights when they are read, or trained on (lora.start)."""
    unnorm_key: str | None = None
    """Which action statistics of the checkpoint to use; needed when it has several."""
    lora: Lora | None = None
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts whose weights do not change."""
    value: Literal["chunk", "action"] | None = None
    """One value per chunk, or one per action of the chunk; null: as the checkpoint's value head has it, or per chunk where it has none."""
    chunk: Count | None = None
    """Actions per forward pass. This and what follows: null is as the checkpoint's files say, or the family's usual (OFT: 8)."""
    views: Count | None = None
    """Camera images per observation: the main one, then the wrist's."""
    proprio: bool | None = None
    """Whether the robot's state is read; false does without, though the checkpoint could."""
    stop_token: bool | None = None
    """OFT: whether a stop token ends the sequence, as it did when the checkpoint was trained."""
    normalization: Literal["quantiles", "bounds"] | None = None
    """Actions and state were scaled by the 1 % and 99 % quantiles, or by minimum and maximum."""
    resize: Literal["pil", "tensor", "lanczos"] | None = None
    """How frames come to the policy's size: as its image processor does (pil), on float tensors, or as TensorFlow's lanczos3."""
    crop: bool | None = None
    """Take the middle 90 % of the area of every frame: for checkpoints trained with random crops."""
    engine: Engine = field(default_factory=Engine)


@dataclass(frozen=True, kw_only=True)
class Warmstart:
    """One phase of behaviour cloning before RL (`vlarl sft` runs the phases alone): on recorded episodes, or on those that the simulator's
    scripted expert plays meanwhile (tabletop)."""

    __pydantic_config__ = STRICT
    steps: Count
    """Optimiser steps."""
    tasks: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Task families of this phase; null: env.tasks."""
    data: str | None = None
    """Folder of a LeRobot v3 dataset (`vlarl record` writes one) to clone; its statistics become the policy's. null: the expert plays."""
    batch: Count = 64
    learning_rate: Positive = 1.5e-3
    lr_warmup: NonNegative = 100
    weight_decay: Rate = 0.01
    grad_clip: Positive = 1.0
    pool: Count = 40000
    """Samples kept; the oldest are renewed as training goes."""
    action_noise: Rate = 0.5
    """Standard deviation of the noise added to the executed (not the learnt) actions, in a third of the chunks. This, pool and clumsiness
    are for an expert that plays; recorded episodes are as they are."""
    clumsiness: Fraction = 0.0
    """Share of demonstrations whose expert misses its aim: the clone is as mediocre as its teachers."""
    bin_smoothing: Rate = 0.0
    """Width (bins) of the Gaussian over neighbouring action bins used as the target; 0: one-hot."""
    log_every: Count = 100


@dataclass(frozen=True, kw_only=True)
class Record:
    """Episodes that `vlarl record` writes as a LeRobot v3 dataset."""

    __pydantic_config__ = STRICT
    player: Literal["expert", "policy"] = "expert"
    """The simulator's scripted expert, or the recipe's policy (`vlarl record --policy` sets it)."""
    episodes: Count = 100
    """Episodes to keep."""
    keep: Literal["successes", "all"] = "successes"
    clumsiness: Fraction = 0.0
    """Share of episodes whose expert misses its aim."""
    noise: Rate = 0.0
    """Standard deviation of the noise on the executed actions, gripper apart; what is recorded is what the player meant to do."""
    images: Literal["image", "video"] = "image"
    """image: PNG in the data files, exact. video: one MP4 per camera, a tenth of the size, not exact."""
    temperature: Rate = 0.0
    """Of a policy that plays; 0: greedy."""


@dataclass(frozen=True, kw_only=True)
class Ppo:
    """Proximal policy optimisation with a learnt value."""

    __pydantic_config__ = STRICT
    kind: Literal["ppo"] = "ppo"
    gamma: Fraction = 0.99
    gae_lambda: Fraction = 0.95
    clip: tuple[Positive, Positive] = (0.2, 0.28)
    """Ratio is clipped to [1 - low, 1 + high]."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    logprob: Literal["token", "action", "chunk"] = "action"
    """Granularity of the probability ratio."""
    bootstrap: Literal["truncation", "always"] = "truncation"
    """Where V(final observation) replaces the missing future."""
    normalize_advantage: bool = True
    value_clip: Positive | None = 0.2
    huber: Positive | None = 10.0
    value_coef: Rate = 1.0
    entropy_coef: Rate = 0.0
    kl_coef: Rate = 0.0
    """Weight of the KL to the reference policy (the policy before RL)."""
    chunks_per_update: Count = 12
    """Chunks each slot plays per update."""
    critic_warmup: NonNegative = 4
    """Updates that train the value head alone, at most."""
    critic_warmup_until: Fraction = 1.0
    """Explained variance that ends the critic's warm-up early."""


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """Group-relative policy optimisation: no critic; an episode is judged against others of the same start."""

    __pydantic_config__ = STRICT
    kind: Literal["grpo"] = "grpo"
    group_size: Annotated[int, Ge(2)] = 8
    episodes_per_update: Count = 256
    clip: tuple[Positive, Positive] = (0.2, 0.28)
    dual_clip: Annotated[float, Gt(1)] | None = None
    logprob: Literal["token", "action", "chunk"] = "token"
    filter: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Groups whose success rate lies outside are dropped before the forward pass."""
    length_norm: bool = True
    """Weigh every trajectory alike whatever its length."""
    resample_rounds: NonNegative = 0
    """Dynamic sampling: at most this many extra rounds of episodes to replace groups without signal."""
    entropy_coef: Rate = 0.0
    kl_coef: Rate = 0.0


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How actions are sampled while training."""

    __pydantic_config__ = STRICT
    temperature: Positive = 1.0
    top_k: NonNegative = 0
    """0: off."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """The optimiser."""

    __pydantic_config__ = STRICT
    updates: NonNegative = 100
    epochs: Count = 1
    minibatches: Count = 4
    """Optimiser steps per epoch."""
    microbatch: Count = 128
    """Samples per forward pass on one rank; gradients are accumulated over as many as needed."""
    learning_rate: Positive = 1e-4
    value_learning_rate: Positive = 1e-3
    vision_scale: Positive = 1.0
    """The vision towers' learning rate, relative to the policy's. Pre-trained features like smaller steps than what reads them."""
    lr_warmup: NonNegative = 10
    """Updates over which the policy's learning rate rises (after the critic's warm-up)."""
    lr_decay: bool = False
    """Linear decay to a tenth over the run."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-5
    weight_decay: Rate = 0.0
    grad_clip: Positive = 1.0
    activation_checkpointing: bool = False
    features: Literal["auto", "reuse", "recompute"] = "auto"
    """What frozen vision towers (policy.freeze: [vision]) make of a frame: kept from the rollout and reused by the update, or computed anew
    in every forward pass. auto: reused where the kept features fit into memory (7B: 1.1 MB a sample, frames 0.15 MB)."""
    logprob_gap_limit: Positive = 0.05
    """The run stops before the first optimiser step if rollout and training log-probs differ by more (mean, nats per token)."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which ranks simulate, act and learn."""

    __pydantic_config__ = STRICT
    mode: Literal["auto", "collocated", "disaggregated", "hybrid"] = "auto"
    stages: Count = 1
    """Independent sub-batches, pipelined. With mode auto, 1 leaves the choice to the planner."""
    env: Count | str | None = None
    rollout: Count | str | None = None
    learner: Count | str | None = None
    """Number of ranks, or which: `0-3`, `0,2,4-7`. null: what the other roles leave."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether a rank that simulates and acts does both at once, with one stage each: a simulator in the rank then works in a thread (on a
    GPU, a stream) of its own. Needs 2 stages. auto: where simulators live in processes of their own, or measured costs show a gain."""
    offload: Literal["auto", "none"] | Annotated[tuple[Part, ...], MinLen(1)] = "auto"
    """What the device does without while it idles. While acting, in pinned host memory: optimizer (Adam's moments), reference (the policy
    before RL), weights (the float32 shards, where a gathered copy acts). gradients: between the forward passes of one optimiser step they
    and the gathered weights are not kept whole but sharded anew. auto: as little as makes every phase fit."""
    profile: str | None = None
    """Measured costs that mode auto chooses by: a file, or the name of a shipped profile."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation during and after training."""

    __pydantic_config__ = STRICT
    every: NonNegative = 0
    """Updates between evaluations; 0: none during training. The last update is always evaluated when this is not 0."""
    episodes: Count = 400
    parallel: Count | None = None
    """Episodes at once; null: as in training."""
    temperature: Rate = 0.0
    """0: greedy."""
    videos: NonNegative = 4
    """Videos of successes and of failures to keep, each."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept on disk."""

    __pydantic_config__ = STRICT
    every: NonNegative = 25
    """Updates between checkpoints; 0: only the last."""
    keep: Count = 2
    """Latest checkpoints kept; the best one is kept besides."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is recorded."""

    __pydantic_config__ = STRICT
    tensorboard: bool = True
    wandb: bool = False
    histograms_every: NonNegative = 10
    video_every: NonNegative = 25
    """Updates between videos of training episodes; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of vlarl."""

    __pydantic_config__ = STRICT
    name: str
    summary: str = ""
    """One line for `vlarl recipes`."""
    seed: NonNegative = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """auto: float32 on CPU; on GPU bfloat16, with float32 masters of what is trained."""
    ranks: Count | None = None
    """Processes; null: one per GPU; on a CPU machine as the placement says, else the most of 1, 2, 4, 8 that have a core each and split
    the slots."""
    threads: Count | None = None
    """CPU threads per rank; null: the cores shared out evenly."""
    stall_seconds: Positive = 600.0
    """A rank that reports nothing for so long ends the run."""
    env: Env = field(default_factory=Env)
    policy: Policy
    warmstart: tuple[Warmstart, ...] = ()
    """Phases of cloning, in order; each with a fresh optimiser and episodes of its own."""
    record: Record = field(default_factory=Record)
    algorithm: Ppo | Grpo = field(default_factory=Ppo)
    rollout: Rollout = field(default_factory=Rollout)
    update: Update = field(default_factory=Update)
    placement: Placement = field(default_factory=Placement)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
