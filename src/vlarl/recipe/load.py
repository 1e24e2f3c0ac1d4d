"""Owns the way from YAML to a checked Recipe. Every mistake is reported at once, with field, value, line, rule and remedy.

pydantic judges the values against `recipe.schema`; the sentences are ours. Control process only: workers read recipe.json by `serial`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import TypeAdapter, ValidationError

from vlarl.errors import RecipeError
from vlarl.policies.published import PUBLISHED, download_hint
from vlarl.recipe.document import Document, Key, dotted, merge, overrides, parse, read
from vlarl.recipe.rules import line_order, recipe_clashes, sentence, show
from vlarl.recipe.schema import Recipe

DEFAULT_KIND = {"algorithm": "ppo"}  # of sections that are one of several kinds
PLACEHOLDER = {"name": "unnamed", "policy": {"checkpoint": "scratch:tiny"}}  # stands in for what is missing while looking for more mistakes


@dataclass(frozen=True)
class LoadedRecipe:
    """origins: dotted field -> where it was written (`recipe line 4`, `override`, `quickstart.yaml line 7`); absent: a default."""

    recipe: Recipe
    origins: Mapping[str, str]


def load_recipe(path: Path, override_items: list[str], shipped: Mapping[str, Path] | None = None) -> Recipe:
    """The recipe file with overrides applied. Raises RecipeError holding every mistake found."""
    return load_with_origins(path, override_items, shipped).recipe


def load_with_origins(path: Path, override_items: list[str], shipped: Mapping[str, Path] | None = None) -> LoadedRecipe:
    """As `load_recipe`, keeping where each field was written, for the planner's messages. `shipped`: name -> file, for `extends`."""
    document = merge(read(path, shipped or {}), overrides(override_items))
    values = _with_default_kinds(document.values)
    problems = list(document.problems)
    wrong = _schema_problems(Document(values, document.origins), problems)
    origins = {dotted(key): where for key, where in document.origins.items()}
    try:
        recipe = _adapter().validate_json(json.dumps(_repaired(values, wrong)), strict=True)
    except ValidationError:  # a placeholder could not mend it; what was found so far is reported
        raise RecipeError(sorted(problems, key=line_order), str(path)) from None
    blamed = {dotted(key[:-1] if key[-1] == "kind" else key) for key in wrong}
    for clash in recipe_clashes(recipe):
        if not any(_touches(name, blamed) for name in (clash.field, *clash.others)):
            problems.append(sentence(clash, recipe, origins))
    if "policy.checkpoint" not in blamed and "policy" not in blamed:
        problems += _checkpoint_problems(recipe, origins)
    if problems:
        raise RecipeError(sorted(problems, key=line_order), str(path))
    return LoadedRecipe(recipe, origins)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (yaml-language-server)."""
    schema = _adapter().json_schema()
    extends = {
        "type": ["string", "null"],
        "default": None,
        "description": "Recipe to build on: a file beside this one, or a shipped recipe's name.",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    # What a recipe extends may supply the rest, so that fields are required of recipes that extend nothing alone.
    required = {"required": schema.pop("required"), "properties": {"policy": {"required": schema["$defs"]["Policy"].pop("required")}}}
    schema |= {"if": {"not": {"required": ["extends"]}}, "then": required}
    return schema


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _with_default_kinds(values: dict[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for name, kind in DEFAULT_KIND.items():
        if isinstance(filled.get(name), dict):
            filled[name] = {"kind": kind} | filled[name]
    return filled


def _touches(name: str, blamed: set[str]) -> bool:
    return any(name == b or name.startswith((f"{b}.", f"{b}[")) or b.startswith((f"{name}.", f"{name}[")) for b in blamed)


def _checkpoint_problems(recipe: Recipe, origins: Mapping[str, str]) -> list[str]:
    """The folder must be there, or what it would hold be known; built-in names are looked up by the policy's own reader."""
    name = recipe.policy.checkpoint
    if name.startswith(("bundled:", "scratch:")) or name in PUBLISHED or Path(name).is_dir():
        return []
    where = f"policy.checkpoint = {show(name)} ({origins.get('policy.checkpoint', 'default')})"
    if Path(name).exists():
        return [f"{where}: is a file; a policy is a folder with config.json and model weights. Name the folder."]
    return [f"{where}: no such folder. {download_hint(name, 'Give a folder, bundled:NAME or scratch:NAME.')}"]


# ---------------------------------------------------------------- schema mistakes


def _schema_problems(document: Document, problems: list[str]) -> set[Key]:
    """Append one sentence per field that breaks the schema; return the paths to blame."""
    try:
        _adapter().validate_json(json.dumps(document.values), strict=True)
        return set()
    except ValidationError as error:
        details = error.errors(include_url=False)
    wrong: dict[Key, str] = {}
    for detail in details:
        key, kind = _walk(document.values, detail["loc"])
        if key is None or any(key[: len(k)] == k for k in wrong):
            continue
        wrong[key] = _sentence(document, key, kind, detail["type"])
    problems.extend(wrong.values())
    return set(wrong)


def _walk(values: dict[str, Any], loc: tuple[int | str, ...]) -> tuple[Key | None, Any]:
    """pydantic's location -> (path in the recipe, declared type there). None: it speaks of a kind that the recipe did not choose.

    In a list of sections the section's field is blamed, in any other the list itself. An unknown key has type None.
    """
    kind: Any = Recipe
    data: Any = values
    key: Key = ()
    for part in loc:
        members = _section_members(kind)
        if isinstance(part, str) and len(members) > 1 and part in {m.__name__ for m in members}:
            chosen = _chosen(members, data)
            if chosen is None or chosen.__name__ != part:
                if chosen is None and part == members[0].__name__:  # report the unknown kind once
                    return (*key, "kind"), Literal[tuple(_kinds(members))]
                return None, None
            kind = chosen
            continue
        entry = _list_entry(kind)
        if isinstance(part, int) and is_dataclass(entry) and isinstance(data, list):
            key, kind, data = (*key, part), entry, data[part]
            continue
        section = _chosen(members, data)
        if section is None or not isinstance(part, str):
            break
        key = (*key, part)
        hints = _annotated_types(section)
        if part not in hints:
            return key, None
        kind = hints[part]
        data = data.get(part) if isinstance(data, dict) else None
    return key, kind


def _section_members(kind: Any) -> list[type]:
    """The dataclasses that a type admits: `Optional[Lora]` -> [Lora], `Union[Ppo, Grpo]` -> both, `int` -> none."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [o for o in options if isinstance(o, type) and is_dataclass(o)]


def _list_entry(kind: Any) -> Any:
    """What every entry of a list is: `tuple[Warmstart, ...]` -> Warmstart; None where the type is no such list."""
    members = get_args(kind)
    return members[0] if get_origin(kind) is tuple and members[-1] is Ellipsis else None


def _chosen(members: list[type], data: Any) -> type | None:
    """The dataclass that this data means."""
    if len(members) == 1:
        return members[0]
    wanted = data.get("kind") if isinstance(data, dict) else None
    return next((m for m in members if wanted in get_args(_annotated_types(m)["kind"])), None)


def _kinds(members: list[type]) -> list[str]:
    return [k for m in members for k in get_args(_annotated_types(m)["kind"])]


@cache
def _annotated_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _sentence(document: Document, key: Key, kind: Any, error_type: str) -> str:
    name = dotted(key)
    data: Any = document.values
    for part in key:
        if isinstance(part, int):
            data = data[part]
        else:
            data = data.get(part, MISSING) if isinstance(data, dict) else MISSING
    where = document.origins.get(key)
    if kind is None:
        return f"{name} ({where}): unknown field. {_nearest_field(document.values, key)}"
    if data is MISSING:
        return f"{name}: required, and not given. Add {describe(kind)}."
    shown = "a section" if isinstance(data, dict) else json.dumps(data) if _looks_otherwise(data) else show(data)
    fix = _fix(kind, data)
    return f"{name} = {shown} ({where or 'default'}): expected {describe(kind)}." + (f" {fix}" if fix else "")


def _looks_otherwise(data: Any) -> bool:
    """Whether this is text that reads as a number or as true and false once its quotes are gone."""
    return isinstance(data, str) and not isinstance(_unquoted(data), str)


def _unquoted(text: str) -> Any:
    try:
        return parse(f"value: {text}", "").values["value"]
    except RecipeError:
        return text


def _nearest_field(values: dict[str, Any], key: Key) -> str:
    section: Any = Recipe
    data: Any = values
    for part in key[:-1]:
        if isinstance(part, int):
            section = _list_entry(section)
        else:
            chosen = _chosen(_section_members(section), data)
            assert chosen is not None
            section = _annotated_types(chosen)[part]
        data = data[part]
    chosen = _chosen(_section_members(section), data)
    assert chosen is not None
    known = list(_annotated_types(chosen))
    name = str(key[-1])
    before, colon, after = name.partition(":")
    if colon:
        return f"Write `{before}: {after}`, with a space after the colon."
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {dotted((*key[:-1], close[0]))}?"
    elsewhere = [full for full in _all_fields(Recipe, ()) if full[-1] == name]
    if elsewhere:
        return f"It belongs to another section: {' or '.join(dotted(e) for e in elsewhere[-2:])}."
    return f"Known here: {', '.join(known)}."


def _all_fields(cls: type, key: Key) -> list[Key]:
    found: list[Key] = []
    for name, kind in _annotated_types(cls).items():
        found.append((*key, name))
        for member in _section_members(kind):
            found += _all_fields(member, (*key, name))
    return found


def describe(kind: Any) -> str:
    """What a field takes, in words: `a whole number of at least 1`, `ppo or grpo`, `a list of 2 numbers above 0`."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *rules = get_args(kind)
        return describe(base) + _bounds(rules)
    if origin is Literal:
        options = [str(a) for a in get_args(kind)]
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
    if origin in (Union, UnionType):
        parts = [m for m in get_args(kind) if m is not NoneType]
        sections = _section_members(kind)
        text = f"a section of kind {' or '.join(_kinds(sections))}" if len(sections) > 1 else ", or ".join(describe(p) for p in parts)
        return text + (" (or null)" if NoneType in get_args(kind) else "")
    if origin is tuple:
        members = get_args(kind)
        if members[-1] is Ellipsis:
            return f"a list, each entry {describe(members[0])}"
        return f"a list of {len(members)}, each {describe(members[0])}"
    if is_dataclass(kind):
        return f"a section (fields: {', '.join(list(_annotated_types(kind))[:6])}, ...)"  # type: ignore[arg-type]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _bounds(rules: list[Any]) -> str:
    low = next((r for r in rules if isinstance(r, Ge | Gt)), None)
    high = next((r for r in rules if isinstance(r, Le | Lt)), None)
    if any(isinstance(r, MinLen) for r in rules):
        return ", not empty"
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {low.ge} to {high.le}"
    words = []
    if low is not None:
        words.append(f"of at least {low.ge}" if isinstance(low, Ge) else f"above {low.gt}")
    if high is not None:
        words.append(f"of at most {high.le}" if isinstance(high, Le) else f"below {high.lt}")
    return " " + " and ".join(words) if words else ""


def _fix(kind: Any, data: Any) -> str:
    """A remedy where one can be guessed."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    bare = {get_args(o)[0] if get_origin(o) is Annotated else o for o in options}
    if _looks_otherwise(data) and {type(_unquoted(data)), float if isinstance(_unquoted(data), int) else None} & bare:
        return f"In quotes it is text; write {data}."
    if bool in bare and str(data).lower() in ("yes", "on", "1", "no", "off", "0"):
        return f"Write {'true' if str(data).lower() in ('yes', 'on', '1') else 'false'}."
    if int in bare and isinstance(data, float) and data.is_integer():
        return f"Write {int(data)}."
    if int in bare and isinstance(data, float):
        return f"Use {int(data)} or {int(data) + 1}."
    for option in options:
        if get_origin(option) is Literal and isinstance(data, str):
            close = get_close_matches({"gpu": "cuda"}.get(data, data), [str(a) for a in get_args(option)], n=1, cutoff=0.5)
            return f"Did you mean {close[0]}?" if close else ""
    if any(get_origin(b) is tuple for b in bare) and isinstance(data, str):
        return f"Write [{show(data)}]." if any(get_args(b)[-1] is Ellipsis for b in bare if get_origin(b) is tuple) else ""
    return ""


def _repaired(values: dict[str, Any], wrong: set[Key]) -> dict[str, Any]:
    """The values without what is wrong, required fields filled in: what can be checked further, is."""
    copy = json.loads(json.dumps(values))
    for key in wrong:
        key = key[: next((i for i, part in enumerate(key) if isinstance(part, int)), len(key))]  # lists go as a whole
        section = copy
        for part in key[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(key[-1], None)
            if key[-1] == "kind":
                copy.pop(key[0], None)
    copy = _with_default_kinds(copy)
    if "name" not in copy:
        copy["name"] = PLACEHOLDER["name"]
    copy["policy"] = PLACEHOLDER["policy"] | copy.get("policy", {})
    return copy
