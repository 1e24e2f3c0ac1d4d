"""Owns exporting on the torch side, in processes that `vlarl export` starts one after another: `write SOURCE OUT`, then `verify OUT`.

`write` copies a policy folder tensor by tensor and stores what the source gives on a probe batch; `verify`, a fresh process, loads the
result as anybody would and compares. A checkpoint of training holds what the live policy gave, before it was gathered and written: the
result is compared with that too. The last line of stdout is JSON: the manifest, or {message, hint}.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlarl.distributed.fsdp import acting
from vlarl.distributed.manifest import describe_files
from vlarl.errors import CheckpointError, VlarlError
from vlarl.launch.lifeline import die_with_parent
from vlarl.policies.adapter import Adapter, misfits, stored_weights
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import TRAINED, Live, companions, load_policy, write_json
from vlarl.policies.layout import EXTRAS, read_config, read_json, read_statistics, resolve_folder
from vlarl.policies.probe import SENTENCES, probe_logits
from vlarl.policies.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD, VALUE_HEAD_FILE, Stored, write_file
from vlarl.policies.weights import OPTIONAL, SIDE_FILES, merged_tensor, write_merged

if TYPE_CHECKING:
    from vlarl.plan.placement import Phase
    from vlarl.worker.context import Context
    from vlarl.worker.setup import Trainer

MANIFEST, PROBE = "export.json", "probe.safetensors"
SIDE_PARTS = (OPTIONAL, "action_head")  # what the OFT authors' code reads from files of their own
SPELLED = {"float32": "F32", "bfloat16": "BF16"}  # --dtype as safetensors spells it
ROUNDING = 1e-2  # of a logit (float32): adapters multiplied apart against merged weights, other kernels and orders of summation
# The same where weights are rounded to bfloat16, or the live policy computed in it: this share of the largest logit.
COARSE = 1 / 16


@dataclass(frozen=True)
class Wanted:
    """merge: adapters become part of the weights; else they are written by themselves. dtype: of the model's weights (None: as stored).
    stated: what the source's files do not say (see `read_config`), and perhaps unnorm_key. run: folder of the run that trained it."""

    merge: bool
    shard_bytes: int
    dtype: str | None
    stated: Mapping[str, Any]
    run: Path | None = None


@dataclass(frozen=True)
class Reference:
    """Logits to compare with; limit: what rounding may make of them."""

    what: str
    dtype: str
    logits: Tensor
    limit: float


def main(arguments: list[str]) -> int:
    """Run one step; the exit code is that of `vlarl`."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="vlarl.worker.export")
    parser.add_argument("step", choices=("write", "verify"))
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--merge-lora", action="store_true")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--dtype", choices=tuple(SPELLED))
    parser.add_argument("--stated", type=json.loads, default={})
    parser.add_argument("--run", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.step == "write":
            source, out = options.folders
            answer = write(source, Path(out), Wanted(options.merge_lora, options.shard_bytes, options.dtype, options.stated, options.run))
        else:
            answer = verify(Path(options.folders[0]))
    except VlarlError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


def training_logits(run: Context, trainer: Trainer) -> Live | None:
    """What the policy in training gives on the probe batch, on the main rank; to be kept with its checkpoint. Collective of the learners.

    None where the plan has no room for gathered weights on learners: they neither act nor evaluate.
    """
    learner = trainer.learner
    if learner is None or (run.plan.mode == "disaggregated" and not run.recipe.eval.every):
        return None
    phase: Phase = "evaluation" if run.plan.mode == "disaggregated" else "rollout"
    with trainer.offload.phase(phase) as away, acting(learner.policy.module, away):
        logits = probe_logits(learner.policy).cpu() if run.world.is_main else None
    return None if logits is None else Live(logits, run.compute_dtype)


def write(source: str, out: Path, wanted: Wanted) -> dict[str, Any]:
    """Fill the empty folder `out` from a policy folder. Returns the manifest so far."""
    folder, scratch = resolve_folder(source)
    if scratch:
        raise CheckpointError(f"{source} has random weights; there is nothing to export.", "Name a run, a checkpoint or a policy folder.")
    stored, base, adapter = stored_weights(source, None)
    alone = adapter is not None and not wanted.merge
    if alone and wanted.dtype is not None:
        raise CheckpointError(f"{source} holds adapters, which are exported as they are.", "Add --merge-lora, or leave --dtype away.")
    references = _references(folder, stored, adapter, wanted)  # first: it finds what is wrong with the source before anything is written
    if alone:
        beside = [folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD_FILE)]
    else:
        _write_model(stored, base, adapter, out, wanted)
        beside = list(base.glob("*.py"))  # older checkpoints with adapters hold some of the base's only
    write_json(out / "config.json", _settings(folder, wanted))
    for path in (*beside, *companions(folder), folder / TRAINED):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    save_file({str(number): reference.logits.contiguous() for number, reference in enumerate(references)}, out / PROBE)
    manifest = {
        "source": str(folder),
        "layout": "adapter" if alone else "model",
        "dtype": wanted.dtype or "as stored",
        "unnorm_key": _unnorm_key(folder, wanted.stated),
        **_training(folder, wanted.run),
        "comparisons": [{"with": r.what, "dtype": r.dtype, "limit": r.limit} for r in references],
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def verify(out: Path) -> dict[str, Any]:
    """Load the folder, compare its logits with the stored ones, and complete the manifest. CheckpointError where they are not the same."""
    manifest = read_json(out / MANIFEST)
    logits, references = probe_logits(_load(out, {"unnorm_key": manifest["unnorm_key"]})), load_file(out / PROBE)
    for number, comparison in enumerate(manifest["comparisons"]):
        difference = float((logits - references[str(number)]).abs().max())
        comparison["max_logit_difference"] = difference
        if not difference <= comparison["limit"]:
            message = f"The exported policy's logits differ by {difference:.3g} from those of {comparison['with']}"
            hint = "Nothing was exported; the checkpoint's files may have changed meanwhile, or since they were written."
            raise CheckpointError(f"{message}, at most {comparison['limit']:.3g} may be rounding.", hint)
    manifest |= {
        "probe": {"file": PROBE, "frames": "black, white, chequered", "sentences": [SENTENCES[0], *SENTENCES], "dtype": "float32"},
        "software": {"vlarl": importlib.metadata.version("vlarl"), "torch": torch.__version__},
        "files": {name: facts for name, facts in describe_files(out).items() if name != MANIFEST},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _references(folder: Path, stored: dict[str, Stored], adapter: Adapter | None, wanted: Wanted) -> list[Reference]:
    """What the export is compared with: the source's files, and, where they hold it, what the policy in training gave."""
    apart = adapter is not None
    logits = probe_logits(_load(folder, wanted.stated, apart=True))
    narrow = apart and wanted.merge and any(tensor.dtype in ("BF16", "F16") for tensor in stored.values())
    coarse = wanted.dtype == "bfloat16" or (wanted.dtype is None and narrow)
    what = "the base model with its adapters apart, as trained" if apart else "the checkpoint's weights"
    limit = COARSE * float(logits.abs().max()) if coarse else ROUNDING if apart else 0.0
    found = [Reference(what, "float32", logits, limit)]
    if (folder / TRAINED).is_file():
        live, dtype = load_file(folder / TRAINED)["logits"], _facts(folder)["compute_dtype"]
        limit = COARSE * float(live.abs().max()) if coarse or dtype in ("bfloat16", "float16") else ROUNDING
        found.insert(0, Reference("the policy in training, when the checkpoint was written", dtype, live, limit))
    return found


def _facts(folder: Path) -> dict[str, str]:
    """What a checkpoint's logits of training were computed with."""
    with safe_open(folder / TRAINED, "pt") as file:
        return dict(file.metadata())


def _unnorm_key(folder: Path, stated: Mapping[str, Any]) -> str | None:
    """The statistics that logits depend on, by way of the state; None: nobody said."""
    if stated.get("unnorm_key") is not None:
        return str(stated["unnorm_key"])
    return _facts(folder)["unnorm_key"] if (folder / TRAINED).is_file() else None


def _training(folder: Path, run: Path | None) -> dict[str, Any]:
    """The sections of the training recipe by which `vlarl eval` judges the export where it was trained; None where nobody knows them."""
    recipe = run / "recipe.json" if run is not None else folder / MANIFEST  # of what was exported before
    known = read_json(recipe) if recipe.is_file() else {}
    return {"env": None, "eval": None} | {section: known[section] for section in ("env", "eval") if section in known}


def _load(folder: Path, stated: Mapping[str, Any], apart: bool = False) -> VLAPolicy:
    """In float32. Where nobody said which statistics scale the state, the first will do: both sides take them."""
    key = _unnorm_key(folder, stated) or next(iter(read_statistics(folder, read_json(folder / "config.json"))))
    settings = {name: value for name, value in stated.items() if name != "unnorm_key"}
    return load_policy(str(folder), key, apart=apart, stated=settings)


def _write_model(stored: dict[str, Stored], base: Path, adapter: Adapter | None, out: Path, wanted: Wanted) -> None:
    """The published layout: weights under their original names, the value head and other parts in side files."""
    side = {path.name.split("--")[0]: path for path in sorted(base.glob(SIDE_FILES))}
    apart = {VALUE_HEAD.rstrip("."), *SIDE_PARTS, *side}
    parts: dict[str, dict[str, Stored]] = {part: {} for part in ("", *sorted(apart))}
    for part, path in side.items():
        parts[part] |= {f"{part}.{key.removeprefix('module.')}": tensor for key, tensor in _side_content(path).items()}
    for name, tensor in stored.items():  # what the weights hold of a part was trained, what lies beside them need not be
        prefix = name.split(".")[0]
        parts[prefix if prefix in apart else ""][name] = tensor
    shapes = {name: tensor.shape for part in parts.values() for name, tensor in part.items()}
    _check(adapter, shapes)
    write_merged(out, parts.pop(""), adapter, SPELLED[wanted.dtype] if wanted.dtype else None, wanted.shard_bytes)
    head = parts.pop(VALUE_HEAD.rstrip("."))
    if head:
        replaced = adapter.whole if adapter is not None else {}
        write_file(out / VALUE_HEAD_FILE, {name: replaced.get(name, tensor) for name, tensor in head.items()})
    adapted = {layer.split(".")[0] for layer in (*adapter.layers, *adapter.whole)} if adapter is not None else set()
    for part, tensors in parts.items():
        if part in side and part not in adapted and all(tensor.file == side[part] for tensor in tensors.values()):
            shutil.copyfile(side[part], out / side[part].name)
        elif tensors:
            content = {name.removeprefix(f"{part}."): merged_tensor(name, tensor, adapter) for name, tensor in tensors.items()}
            torch.save(content, out / (side[part].name if part in side else f"{part}--0_checkpoint.pt"))


def _side_content(path: Path) -> dict[str, Stored]:
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {key: Stored(path, key, str(tensor.dtype), tuple(tensor.shape), 0, 0) for key, tensor in state.items()}


def _check(adapter: Adapter | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """CheckpointError where an adapter changes what the base does not have: it would be lost. A value head may be the adapter's alone."""
    if adapter is None:
        return
    heads = {name: tensor.shape for name, tensor in adapter.whole.items() if name.startswith(VALUE_HEAD)}
    if wrong := misfits(adapter, heads | shapes):
        raise CheckpointError(f"{adapter.folder}: the adapter does not fit its base: {wrong[0]}.", f"Its base is {adapter.base}.")


def _settings(folder: Path, wanted: Wanted) -> dict[str, Any]:
    """config.json with its own fields; what was stated is written down beside them, so that nobody has to say it again."""
    raw = read_json(folder / "config.json")
    changed: dict[str, Any] = {} if "norm_stats" in raw else {"norm_stats": read_statistics(folder, raw)}
    if wanted.dtype is not None:
        changed["dtype" if "dtype" in raw else "torch_dtype"] = wanted.dtype  # transformers renamed it
    settings = {name: value for name, value in wanted.stated.items() if name != "unnorm_key"}
    if settings:
        config = read_config(folder, settings)
        changed["vlarl"] = {name: getattr(config, name) for name in EXTRAS}
    return raw | changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
