"""Owns a recipe's text: YAML with line numbers, one level of `extends`, `key.sub=value` overrides. Knows nothing of the schema.

Numbers and booleans follow YAML 1.2, not 1.1: `1e-4` is a number, `no` and `on` are words, `12:30` is a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlarl.errors import RecipeError

Key = tuple[str | int, ...]

REPLACED_WITH_KIND: frozenset[Key] = frozenset({("algorithm",)})  # sections that are one of several kinds, with other fields each
MAX_DEPTH = 8  # a recipe is three levels deep; deeper means an alias that contains itself


@dataclass(frozen=True)
class Document:
    """values: plain dicts, lists and scalars. origins: path of every key and list item -> where it was written, e.g. `recipe line 4`.
    problems: mistakes found in the text itself (duplicate keys, ...), one sentence each."""

    values: dict[str, Any]
    origins: dict[Key, str]
    problems: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def dotted(key: Key) -> str:
    """`("update", "betas", 1)` -> `update.betas[1]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse(text: str, label: str) -> Document:
    """YAML text -> Document. `label` goes before `line N` in origins. Raises RecipeError where it is not YAML or not a mapping."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document({}, {})
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError([f"{label} line 1: expected `key: value` lines, got {_kind(node)}."], label)
        reader = _Reader(loader, label)
        values = reader.value(node, ())
        return Document(values, reader.origins, tuple(reader.problems))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError([f"{label}{line}: not valid YAML: {error.problem}. Check the indentation, colons and quotes."], label) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an explicit tag such as `!!int x`
        raise RecipeError([f"{label}: not valid YAML: {error}."], label) from None
    finally:
        loader.dispose()


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a section"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


@dataclass
class _Reader:
    """Turns nodes into values; notes where each key stands, and what is wrong on the way."""

    loader: _Loader
    label: str
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, node: yaml.Node, key: Key) -> Any:
        if len(key) > MAX_DEPTH:
            raise RecipeError(
                [f"{self.label} line {node.start_mark.line + 1}: nested too deep (an alias that contains itself?)."], self.label
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.origins[(*key, i)] = self._where(item)
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        value = self.loader.construct_object(node)
        return value if value is None or isinstance(value, bool | int | float | str) else node.value  # explicit tags such as !!timestamp

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            here = (*key, name)
            if name in values:
                first = self.origins[here]
                self.problems.append(f"{dotted(here)} ({self._where(name_node)}): written twice, first in {first}. Keep one of them.")
                continue
            self.origins[here] = self._where(name_node)
            values[name] = self.value(value_node, here)
        return values

    def _where(self, node: yaml.Node) -> str:
        return f"{self.label} line {node.start_mark.line + 1}"


def merge(base: Document, top: Document) -> Document:
    """`top` over `base`: sections are merged key by key, everything else is replaced.

    An algorithm whose `kind` changes is replaced as a whole: the settings of one mean nothing to another.
    """
    origins = dict(base.origins)
    values = _merge(base.values, top.values, (), origins)
    return Document(values, origins | top.origins, base.problems + top.problems)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any], key: Key, origins: dict[Key, str]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        here = (*key, name)
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and not (here in REPLACED_WITH_KIND and _other_kind(old, value)):
            merged[name] = _merge(old, value, here, origins)
            continue
        for stale in [k for k in origins if k[: len(here)] == here]:
            del origins[stale]
        merged[name] = value
    return merged


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in new and "kind" in old and new["kind"] != old["kind"]


def read(path: Path, shipped: Mapping[str, Path]) -> Document:
    """The recipe file with what it `extends` (a file relative to it, or the name of a shipped recipe) below it."""
    top = _parse_file(path, "recipe")
    values = dict(top.values)
    parent = values.pop("extends", None)
    top = Document(values, top.origins, top.problems)
    if parent is None:
        return top
    where = top.origins[("extends",)]
    base_path = _find(str(parent), path.parent, shipped)
    if base_path is None:
        known = ", ".join(sorted(shipped)) or "none"
        problem = f"extends = {parent!r} ({where}): no such file beside the recipe and no shipped recipe of this name. Shipped: {known}."
        return Document(values, top.origins, (*top.problems, problem))
    base = _parse_file(base_path, base_path.name)
    if base.values.pop("extends", None) is not None:
        problem = f"extends = {parent!r} ({where}): {base_path.name} extends another recipe itself; one level is allowed. Extend that one."
        return Document(values, top.origins, (*top.problems, problem))
    base.values.pop("summary", None)  # says what the base is for, not this recipe
    return merge(base, top)


def _parse_file(path: Path, label: str) -> Document:
    """As `parse`; an error names the whole path, for a recipe may be read by its name or through `extends`."""
    try:
        return parse(_text(path), label)
    except RecipeError as error:
        raise RecipeError(error.problems, str(path)) from None


def _find(name: str, folder: Path, shipped: Mapping[str, Path]) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    return shipped.get(name.removesuffix(".yaml"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(["the file does not exist."], str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError([f"the file is not UTF-8 text (byte {error.start})."], str(path)) from None
    except OSError as error:
        raise RecipeError([f"the file cannot be read: {error.strerror}."], str(path)) from None


def overrides(items: list[str]) -> Document:
    """`["update.updates=3", "env.tasks=[put]"]` -> Document; values are YAML. Later ones win."""
    result = Document({}, {})
    for item in items:
        name, equals, text = item.partition("=")
        parts = tuple(name.strip().split("."))
        if not equals or not all(parts):
            problem = f"override {item!r}: expected key.sub=value, such as update.updates=10."
            result = Document(result.values, result.origins, (*result.problems, problem))
            continue
        try:
            wrapped = parse(f"value: {text}" if text.strip() else "value: null", "override")
        except RecipeError:
            problem = f"override {item!r}: the value is not valid YAML. Put quotes around text with special characters."
            result = Document(result.values, result.origins, (*result.problems, problem))
            continue
        value: Any = wrapped.values["value"]
        for part in reversed(parts):
            value = {part: value}
        origins: dict[Key, str] = {parts[: i + 1]: "override" for i in range(len(parts))}
        origins |= {(*parts, *key[1:]): "override" for key in wrapped.origins}
        result = merge(result, Document(value, origins))
    return result
