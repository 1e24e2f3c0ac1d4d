"""Owns the JSON form of the frozen dataclasses that cross processes (Recipe, PlacementPlan): complete, strict, and stdlib only.

A value is written in full (defaults included), so a file means the same whatever the defaults are when it is read back.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vlarl.errors import VlarlError

T = TypeVar("T")


class _Mismatch(Exception):
    """Internal: the JSON does not have the shape that the type asks for."""


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, `Annotated` stripped, in order of declaration."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def to_dict(value: Any) -> Any:
    """Dataclasses become dicts, tuples become lists; numbers, strings, booleans and None stay."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_dict(getattr(value, name)) for name in field_types(type(value))}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value).__name__} has no JSON form"
    return value


def from_dict(cls: type[T], data: Any) -> T:
    """The dataclass that `to_dict` made `data` from. Raises VlarlError naming the first field that does not fit."""
    try:
        return _read(cls, data, "")
    except _Mismatch as error:
        raise VlarlError(f"This is not a {cls.__name__} as this version of vlarl writes it: {error}.") from None


def dumps(value: Any) -> str:
    """Indented JSON text of a dataclass, ending in a newline."""
    return json.dumps(to_dict(value), indent=2, allow_nan=False) + "\n"


def load(cls: type[T], path: Path) -> T:
    """Read a dataclass from a JSON file. Raises VlarlError where the file is missing, cut short or of another version."""
    hint = "The file is written by vlarl when a run starts; start the run anew if it was damaged."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VlarlError(f"{path} does not exist.", hint) from None
    except (OSError, ValueError) as error:
        raise VlarlError(f"{path} cannot be read: {error}.", hint) from None
    try:
        return from_dict(cls, data)
    except VlarlError as error:
        raise VlarlError(f"{path}: {error.message}", hint) from None


def _read(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _read_dataclass(kind, data, where)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _read_union(get_args(kind), data, where)
    if origin is Literal:
        if data not in get_args(kind) or isinstance(data, bool):
            raise _Mismatch(f"{where} is {data!r}, expected one of {', '.join(map(str, get_args(kind)))}")
        return data
    if origin is tuple:
        return _read_tuple(get_args(kind), data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is NoneType:
        kind_ok = data is None
    else:
        assert kind in (bool, int, float, str), f"{where}: no JSON form for {kind}"
        kind_ok = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    if not kind_ok:
        raise _Mismatch(f"{where} is {data!r}, expected {getattr(kind, '__name__', kind)}")
    return data


def _read_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _Mismatch(f"{where or 'the file'} is {type(data).__name__}, expected the fields of {cls.__name__}")
    types = field_types(cls)
    prefix = f"{where}." if where else ""
    for name in data:
        if name not in types:
            raise _Mismatch(f"{prefix}{name} is unknown")
    for name in types:
        if name not in data:
            raise _Mismatch(f"{prefix}{name} is missing")
    return cls(**{name: _read(kind, data[name], prefix + name) for name, kind in types.items()})


def _read_union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    """The member named by `kind` among dataclasses; else the first member that fits."""
    sections = [m for m in members if isinstance(m, type) and is_dataclass(m)]
    if isinstance(data, dict) and len(sections) > 1:
        known = {kind: member for member in sections for kind in get_args(field_types(member)["kind"])}
        if data.get("kind") not in known:
            raise _Mismatch(f"{where}.kind is {data.get('kind')!r}, expected one of {', '.join(known)}")
        return _read(known[data["kind"]], data, where)
    problems = []
    for member in members:
        try:
            return _read(member, data, where)
        except _Mismatch as error:
            problems.append(error)
    raise problems[0]


def _read_tuple(members: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _Mismatch(f"{where} is {data!r}, expected a list")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(data)
    if len(members) != len(data):
        raise _Mismatch(f"{where} has {len(data)} entries, expected {len(members)}")
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(members, data, strict=True)))
