"""Frozen dataclasses to plain records (YAML, JSON) and back, and not one key more."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class BadRecord(ValueError):
    """A plan, package or configuration does not say what it must, or says something nobody knows."""


def encode(value: Any) -> Any:
    """Dataclasses to dicts (a step names its kind first), tuples to lists; what is plain stays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": vars(type(value))["kind"]} if "kind" in vars(type(value)) else {}
        return kind | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], record: Any, *, where: str) -> T:
    """The record as a value of that type. `where` names the file or the part, for the message."""
    return typing.cast(T, _decode(kind, record, where))


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _decode(kind: Any, record: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(inner, record, where)
    if origin is typing.Literal:
        return record if record in inner else _refuse(where, record, f"one of {', '.join(map(repr, inner))}")
    if origin is tuple:
        return _decode_tuple(inner, record, where)
    if origin is dict:
        items = record if isinstance(record, Mapping) else _refuse(where, record, "a mapping")
        return {_decode(inner[0], k, where): _decode(inner[1], v, f"{where}.{k}") for k, v in items.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, record, where)
    if kind is Any:
        return record
    if kind is Path and isinstance(record, str):
        return Path(record)
    if kind is float and isinstance(record, int) and not isinstance(record, bool):
        return float(record)
    if isinstance(record, kind) and (kind is bool or not isinstance(record, bool)):
        return record
    return _refuse(where, record, f"a value of type {kind.__name__}")


def _decode_union(kinds: tuple[Any, ...], record: Any, where: str) -> Any:
    if record is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _decode(kinds[0], record, where)
    if not all(dataclasses.is_dataclass(kind) for kind in kinds):
        return _decode_any(kinds, record, where)
    by_name = {kind.kind: kind for kind in kinds}
    name = record.get("kind") if isinstance(record, Mapping) else None
    if not isinstance(name, str) or name not in by_name:
        known = list(by_name)
        raise BadRecord(f"{where}: kind {name!r} is not known{nearest(str(name), known)} Known: {', '.join(known)}.")
    return _decode(by_name[name], {k: v for k, v in record.items() if k != "kind"}, f"{where} ({name})")


def _decode_any(kinds: tuple[Any, ...], record: Any, where: str) -> Any:
    """Plain values of several types: the first that fits."""
    for kind in kinds:
        try:
            return _decode(kind, record, where)
        except BadRecord as reason:
            refused = reason
    raise refused


def _decode_tuple(inner: tuple[Any, ...], record: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(record, list | tuple):
        return _refuse(where, record, "a list")
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(record)
    if len(record) != len(inner):
        return _refuse(where, record, f"a list of {len(inner)} values")
    return tuple(_decode(kind, item, f"{where}[{n}]") for n, (kind, item) in enumerate(zip(inner, record, strict=True)))


def _decode_dataclass(kind: Any, record: Any, where: str) -> Any:
    if not isinstance(record, Mapping):
        return _refuse(where, record, "a mapping of settings")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in record:
        if key not in known:
            hint = nearest(str(key), known)
            raise BadRecord(f"{where}: {key!r} is not a setting of {kind.__name__}{hint} Known: {', '.join(known)}.")
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in record
    ]
    if needed:
        raise BadRecord(f"{where}: {', '.join(needed)} missing; {kind.__name__} needs it. Add it.")
    return kind(**{key: _decode(hints[key], value, f"{where}.{key}") for key, value in record.items()})


def _refuse(where: str, record: Any, needed: str) -> Any:
    raise BadRecord(f"{where}: {record!r} was met; {needed} is needed. Correct it there.")
