"""Owns the policy folder's JSON files: config.json, dataset_statistics.json, where a policy is found. Torch-free; the planner reads it."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from vlarl.errors import CheckpointError
from vlarl.policies.families import family, usual_settings
from vlarl.policies.published import OPENVLA_7B, PUBLISHED, download_hint
from vlarl.policies.spec import PolicySpec
from vlarl.policies.towers import TowerShape, tower_shape
from vlarl.policies.value_heads import stored_outputs
from vlarl.policies.weight_files import INDEX, WEIGHTS, read_weights

if TYPE_CHECKING:
    from vlarl.recipe.schema import Policy

Normalization = Literal["quantiles", "bounds"]
Resize = Literal["pil", "tensor", "lanczos"]
ResizeStrategy = Literal["resize-naive", "letterbox", "resize-crop"]
PROMPT_TOKENS = 24  # of a usual prompt with Llama's tokenizer, for estimates only
# LlamaConfig's own defaults: published config.json files name four fields only.
LLAMA_DEFAULTS = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
NEEDED = ("timm_model_ids", "image_sizes", "image_resize_strategy", "text_config", "pad_to_multiple_of", "n_action_bins", "pad_token_id")
EXTRAS = (
    *("kind", "chunk", "action_dim", "views", "proprio_dim", "stop_token", "normalization", "epsilon", "blank_id", "value_outputs"),
    *("resize", "crop", "head", "towers"),
)
# What folders mean that were written before these settings existed.
FORMER: dict[str, Any] = {"resize": "pil", "crop": False, "head": "tokens", "towers": {}}
# A recipe's `policy` may state these; null: as the files say.
STATED = ("chunk", "views", "proprio", "stop_token", "normalization", "resize", "crop")
SIDE_FILE = "{}--*_checkpoint.pt"
REFUSED = {"noisy_action_projector": "a diffusion head", "vision_backbone": "FiLM-conditioned towers"}


@dataclass(frozen=True)
class OpenVLAConfig:
    """config.json, read as data.

    tower_ids, image_sizes: one or two (DINOv2, SigLIP). text: LlamaConfig fields, as written. chunk (K), action_dim (A), views,
    proprio_dim: as in PolicySpec. stop_token: whether the sequence ends with the stop token. normalization: actions scaled by q01/q99
    or min/max; epsilon: whether un-normalising adds 1e-8 to the range. blank_id: token that ends every prompt. value_outputs: of the
    stored value head, 0 where there is none. resize, crop: of frames, see pixels.py. head: tokens, or l1 (regression, from a side file).
    towers: shapes of towers that are not in the table of towers.py, by id, as in the file. raw: the file as it is, for saving.
    """

    kind: str
    tower_ids: tuple[str, ...]
    image_sizes: tuple[int, ...]
    text: dict[str, Any]
    pad_to_multiple_of: int
    action_bins: int
    pad_id: int
    bos_id: int
    eos_id: int
    chunk: int
    action_dim: int
    views: int
    proprio_dim: int
    stop_token: bool
    normalization: Normalization
    epsilon: bool
    blank_id: int
    value_outputs: int
    resize: Resize
    crop: bool
    head: Literal["tokens", "l1"]
    towers: dict[str, Any]
    raw: dict[str, Any]

    @property
    def shapes(self) -> tuple[TowerShape, ...]:
        """Of the towers."""
        return tuple(tower_shape(name, self.towers) for name in self.tower_ids)

    @property
    def resize_strategy(self) -> ResizeStrategy:
        return cast("ResizeStrategy", self.raw["image_resize_strategy"])

    @property
    def vocab_size(self) -> int:
        return int(self.text["vocab_size"])

    @property
    def action_low(self) -> int:
        """Id of the first action token; the last is action_low + action_bins - 1 = vocab_size - pad_to_multiple_of - 1."""
        return self.vocab_size - self.pad_to_multiple_of - self.action_bins

    @property
    def patches(self) -> int:
        """Of all views."""
        return self.shapes[0].patches(self.image_sizes[0]) * self.views

    @property
    def vision_width(self) -> int:
        """Features of one patch."""
        return sum(shape.width for shape in self.shapes)

    @property
    def vision_parameters(self) -> int:
        return sum(shape.parameters(size) for shape, size in zip(self.shapes, self.image_sizes, strict=True))

    @property
    def projector_parameters(self) -> int:
        vision, hidden = self.vision_width, int({**LLAMA_DEFAULTS, **self.text}["hidden_size"])
        if len(self.tower_ids) == 2:
            return (vision * 4 * vision + 4 * vision) + (4 * vision * hidden + hidden) + (hidden * hidden + hidden)
        return (vision * hidden + hidden) + (hidden * hidden + hidden)

    @property
    def sequence_length(self) -> int:
        """Positions of one forward pass with a usual prompt."""
        return self.patches + int(self.proprio_dim > 0) + PROMPT_TOKENS + self.chunk * self.action_dim + int(self.stop_token)

    @property
    def parameters(self) -> int:
        """Number of stored parameters, value head apart."""
        text = {**LLAMA_DEFAULTS, **self.text}
        hidden, mlp = text["hidden_size"], text["intermediate_size"]
        kv_heads = text["num_key_value_heads"] if "num_key_value_heads" in text else text["num_attention_heads"]
        key_value = 2 * hidden * (hidden // text["num_attention_heads"]) * kv_heads
        llama = text["num_hidden_layers"] * (2 * hidden * hidden + key_value + 3 * hidden * mlp + 2 * hidden) + hidden
        llama += 2 * self.vocab_size * hidden
        proprio = self.proprio_dim * hidden + hidden + (hidden * hidden + hidden) if self.proprio_dim else 0
        wide, head = self.action_dim * hidden, 0
        if self.head == "l1":
            blocks = 2 * (2 * hidden + hidden * hidden + hidden)
            head = 2 * wide + (wide * hidden + hidden) + blocks + 2 * hidden + (hidden * self.action_dim + self.action_dim)
        return llama + self.projector_parameters + proprio + head + self.vision_parameters


def resolve_folder(source: str) -> tuple[Path, bool]:
    """Where a policy lies, and whether its weights are to be drawn afresh.

    `bundled:NAME`: shipped with vlarl. `scratch:NAME`: a shipped configuration with random weights. Else a folder.
    """
    for prefix in ("bundled:", "scratch:"):
        if source.startswith(prefix):
            assets = Path(str(resources.files("vlarl"))) / "assets"
            folder = assets / source.removeprefix(prefix)
            if not (folder / "config.json").is_file():
                shipped = sorted(p.parent for p in assets.glob("*/config.json"))
                trained = [f"bundled:{p.name}" for p in shipped if (p / "model.safetensors").is_file()]
                known = ", ".join([*trained, *(f"scratch:{p.name}" for p in shipped)])
                raise CheckpointError(f"{source}: no such policy is shipped.", f"Shipped: {known} (scratch: random weights).")
            return folder, prefix == "scratch:"
    folder = Path(source).expanduser()
    if not folder.is_dir():
        hint = download_hint(source, "Give a folder, bundled:NAME or scratch:NAME.")
        raise CheckpointError(f"{source}: there is no such policy folder.", hint)
    return folder, False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError where the file is missing, cut short or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the policy folder lacks this file.", "Is it a policy in the Hub layout?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.", "The file may have been cut short; copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_statistics(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Normalisation statistics by dataset: dataset_statistics.json replaces config.json's norm_stats."""
    path = folder / "dataset_statistics.json"
    statistics = read_json(path) if path.is_file() else raw.get("norm_stats", {})
    if not statistics:
        raise CheckpointError(f"{folder}: neither dataset_statistics.json nor norm_stats in config.json: actions cannot be un-normalised.")
    return cast("dict[str, Any]", statistics)


def choose_unnorm_key(statistics: dict[str, Any], wanted: str | None, where: str) -> str:
    """The named key (or its `_no_noops` form), or the only one. Several without a choice are an error that lists them."""
    if wanted is None:
        if len(statistics) == 1:
            return next(iter(statistics))
        raise CheckpointError(
            f"{where}: {len(statistics)} sets of action statistics and none chosen: {', '.join(sorted(statistics))}.",
            "Set policy.unnorm_key to one of them.",
        )
    for key in (wanted, f"{wanted}_no_noops"):
        if key in statistics:
            return key
    known = ", ".join(sorted(statistics))
    raise CheckpointError(f"{where}: policy.unnorm_key = {wanted!r} is not among its action statistics.", f"Known: {known}.")


def stated_settings(policy: Policy) -> dict[str, Any]:
    """What a recipe says about a checkpoint where its files do not (or other than they do), for `read_config`."""
    return {name: getattr(policy, name) for name in ("kind", *STATED) if getattr(policy, name) is not None}


def read_config(folder: Path, stated: Mapping[str, Any] | None = None) -> OpenVLAConfig:
    """config.json of a policy folder; vlarl's own settings lie under its key "vlarl", published checkpoints get the usual ones.

    stated: settings that take precedence (`stated_settings`), but for the kind where the file itself names it.
    """
    path = folder / "config.json"
    raw = read_json(path)
    missing = [key for key in NEEDED if key not in raw]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}.", "Is it an OpenVLA checkpoint?")
    strategy, sizes = raw["image_resize_strategy"], raw["image_sizes"]
    if strategy not in get_args(ResizeStrategy):
        known = ", ".join(get_args(ResizeStrategy))
        raise CheckpointError(f"{path}: image_resize_strategy is {strategy!r}, which is not known.", f"Known: {known}.")
    if len(set(sizes)) != 1:
        raise CheckpointError(f"{path}: image_sizes is {sizes}; both towers must take frames of one size.")
    for name, what in REFUSED.items():
        found = next(folder.glob(SIDE_FILE.format(name)), None)
        if found is not None:
            raise refusal(found, what)
    stated = dict(stated or {})
    usual = FORMER if is_ours(raw) else _published_extras(folder, raw, stated)
    return _build(raw, usual | raw.get("vlarl", {}), stated, str(path))


def is_ours(raw: dict[str, Any]) -> bool:
    """Whether config.json was written here; one of others may describe its towers under the same key, and nothing else."""
    return "vlarl" in raw and set(raw["vlarl"]) != {"towers"}


def refusal(path: Path, what: str) -> CheckpointError:
    """The error for a side file of a kind that is not supported."""
    return CheckpointError(f"{path}: a checkpoint with {what} is not supported.", "Use one with action tokens or an L1 head.")


def _build(raw: dict[str, Any], extras: dict[str, Any], stated: Mapping[str, Any], where: str) -> OpenVLAConfig:
    """config.json's facts (raw) with the settings around them (extras), of which a recipe may state some."""
    wrong = sorted(set(EXTRAS) ^ set(extras))
    if wrong:
        raise CheckpointError(f'{where}: "vlarl" must hold exactly {", ".join(EXTRAS)}; differs in {", ".join(wrong)}.')
    if not isinstance(extras["towers"], dict):
        raise CheckpointError(f'{where}: "towers" under "vlarl" is {extras["towers"]!r}, expected an object of shapes by id.')
    extras = extras | {name: value for name, value in stated.items() if name not in ("kind", "proprio")}
    if stated.get("proprio") is False:
        extras["proprio_dim"] = 0
    elif stated.get("proprio") and not extras["proprio_dim"]:
        message = f"{where}: policy.proprio = true, and the checkpoint holds nothing that reads a state."
        raise CheckpointError(message, "Leave policy.proprio out, or choose a checkpoint with a proprio_projector.")
    if family(extras["kind"], where).one_action and extras["chunk"] != 1:
        message = f"{where}: a policy of kind {extras['kind']} decodes one action at a time, not {extras['chunk']}."
        raise CheckpointError(message, "Set policy.chunk to 1.")
    text = dict(raw["text_config"])
    text["vocab_size"] = {**LLAMA_DEFAULTS, **text}["vocab_size"]
    config = OpenVLAConfig(
        tower_ids=tuple(raw["timm_model_ids"]),
        image_sizes=tuple(raw["image_sizes"]),
        text=text,
        pad_to_multiple_of=raw["pad_to_multiple_of"],
        action_bins=raw["n_action_bins"],
        pad_id=raw["pad_token_id"],
        bos_id=text.get("bos_token_id", 1),
        eos_id=text.get("eos_token_id", 2),
        raw=raw,
        **extras,
    )
    patches = {shape.patches(size) for shape, size in zip(config.shapes, config.image_sizes, strict=True)}
    if len(patches) != 1:
        raise CheckpointError(f"{where}: its towers make {' and '.join(map(str, sorted(patches)))} patches of a frame, expected as many.")
    return config


def value_count(config: OpenVLAConfig, value: Literal["chunk", "action"] | None) -> int:
    """Outputs of a policy's value head. value: the recipe's; None: as stored, where that fits the chunk, else one per chunk."""
    if value is None:
        return config.value_outputs if config.value_outputs in (1, config.chunk) else 1
    return config.chunk if value == "action" else 1


def _published_extras(folder: Path, raw: dict[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' usual settings: of OpenVLA, or of OpenVLA-OFT (chunk of 8, stop token). The statistics give lengths.

    Both families have the same config and weights. OFT alone has side files; only what was never fine-tuned lacks statistics of its own.
    """
    entry = next(iter(read_statistics(folder, raw).values()))
    regression = any(folder.glob(SIDE_FILE.format("action_head")))
    stored = read_weights(folder) if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else {}
    proprio = any(folder.glob(SIDE_FILE.format("proprio_projector"))) or "proprio_projector.fc1.weight" in stored
    kind: str | None = stated.get("kind")
    if kind is None and (regression or proprio):
        kind = "openvla-oft"
    elif kind is None and not (folder / "dataset_statistics.json").is_file():
        kind = "openvla"
    elif kind is None:
        message = f"{folder}: its files do not tell whether it was trained as OpenVLA or as OpenVLA-OFT."
        raise CheckpointError(message, "Set policy.kind to openvla or openvla-oft (vlarl eval: --policy kind=openvla-oft).")
    proprio = proprio and stated.get("proprio") is not False
    if proprio and "proprio" not in entry:
        message = f"{folder}: it reads a state (proprio_projector), and its statistics do not say how one is scaled: they hold no proprio."
        hint = "Copy the dataset_statistics.json that it was trained with beside it, or set policy.proprio to false to do without the state"
        raise CheckpointError(message, f"{hint} (vlarl eval: --policy proprio=false).")
    length = len(entry["action"]["q01"])
    usual = usual_settings(kind, length, len(entry["proprio"]["q01"]) if proprio else 0, "l1" if regression else "tokens", str(folder))
    return usual | {"value_outputs": stored_outputs(stored)}


def switches(config: OpenVLAConfig) -> str:
    """One line: what a policy is run with that its files may not say. A wrong crop, say, gives worse actions and no other sign."""
    frames = f"{config.resize} resize, {'centre crop' if config.crop else 'no crop'}, {config.views} view{'s' * (config.views > 1)}"
    stop = f"{'a' if config.stop_token else 'no'} stop token"
    state = f"a state of {config.proprio_dim}" if config.proprio_dim else "no state"
    return f"policy runs with {frames}, {stop}, {config.normalization} normalisation, {state}"


def spec_from(config: OpenVLAConfig, unnorm_key: str, values: int = 1) -> PolicySpec:
    """The planner's view of a policy. values: outputs of its value head, see `value_count`."""
    text = {**LLAMA_DEFAULTS, **config.text}
    return PolicySpec(
        kind=config.kind,
        image_size=config.image_sizes[0],
        views=config.views,
        chunk=config.chunk,
        action_dim=config.action_dim,
        proprio_dim=config.proprio_dim,
        unnorm_key=unnorm_key,
        parameters=config.parameters,
        hidden_size=text["hidden_size"],
        layers=text["num_hidden_layers"],
        sequence_length=config.sequence_length,
        head=config.head,
        kv_cache=family(config.kind, "config.json").kv_cache,
        vision_parameters=config.vision_parameters,
        projector_parameters=config.projector_parameters,
        patches=config.patches,
        vision_width=config.vision_width,
        values=values,
    )


def read_policy_spec(
    source: str,
    unnorm_key: str | None = None,
    stated: Mapping[str, Any] | None = None,
    value: Literal["chunk", "action"] | None = None,
) -> PolicySpec:
    """PolicySpec of a folder, `bundled:NAME` or `scratch:NAME`, from its JSON files alone. CheckpointError as in `load_policy`.

    value: the recipe's, see `value_count`. A published checkpoint that is not on this machine is known by its Hub id.
    """
    if source in PUBLISHED and not Path(source).is_dir():
        known = PUBLISHED[source]
        config = _build(OPENVLA_7B, usual_settings(known.kind, known.action_dim, known.proprio_dim, "tokens", source), stated or {}, source)
        return spec_from(config, choose_unnorm_key({known.unnorm_key: {}}, unnorm_key, source), value_count(config, value))
    folder, _ = resolve_folder(source)
    config = read_config(folder, stated)
    return spec_from(config, choose_unnorm_key(read_statistics(folder, config.raw), unnorm_key, str(folder)), value_count(config, value))
