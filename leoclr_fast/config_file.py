"""A configuration as YAML, and back: strict, so that a misspelt or unknown field is an error.

PyYAML is imported where a file is read or written: a machine that only measures needs none.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

_RETIRED = {"monitor.silence_limit_s", "monitor.hang_limit_s", "monitor.phase_limit_s"}
"""Fields of earlier versions, which their runs still name: they are passed over."""


def to_yaml(config: Any) -> str:
    """A (nested) dataclass as YAML, fields in their order."""
    import yaml

    return yaml.safe_dump(as_plain(config), sort_keys=False)


def from_yaml(config_type: type[Config], text: str, origin: str) -> Config:
    """The dataclass that `to_yaml` wrote. Raises ValueError, naming `origin` and the field, if it does not fit."""
    import yaml

    try:
        document = yaml.safe_load(text)
        return _build(config_type, document, "")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{origin} cannot be read as a {config_type.__name__}: {error}") from error


def from_plain(config_type: type[Config], plain: Any, origin: str) -> Config:
    """The dataclass that `as_plain` took apart; fields that it did not have yet get their defaults.

    Raises ValueError, naming `origin` and the field, if it does not fit.
    """
    try:
        return _build(config_type, plain, "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin} cannot be read as a {config_type.__name__}: {error}") from error


def as_plain(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as dicts, lists and scalars."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def differences(documents: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted name → its value in each of the nested mappings, where these are not all equal; None where it is missing.

    The names are in the order of the documents.
    """
    flats = [flat(document) for document in documents]
    names = dict.fromkeys(name for values in flats for name in values)
    rows = {name: [values.get(name) for values in flats] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def differing_fields(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each field in which two plain configurations differ: `method.queue_size: 4096 there, 8 here`."""
    found = sorted(differences([saved, wanted]).items())
    return [f"{name}: {there} there, {here} here" for name, (there, here) in found]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _build(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{path or 'the document'} must be a mapping, not {value!r}")
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        value = {key: item for key, item in value.items() if f"{path}{key}" not in _RETIRED}
        unknown = sorted(value.keys() - set(names))
        if unknown:
            raise ValueError(f"unknown field {path}{unknown[0]}; known here: {', '.join(names)}")
        return kind(**{key: _build(hints[key], item, f"{path}{key}.") for key, item in value.items()})
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return tuple(_build(item_kind, item, path) for item_kind, item in zip(kinds, value, strict=True))
    if get_origin(kind) in (Union, types.UnionType):
        inner = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None else _build(inner[0], value, path)
    if kind is float and isinstance(value, int | float):
        return float(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise ValueError(f"{path.rstrip('.')} must be {kind.__name__}, not {value!r}")
    if get_args(kind) and value not in get_args(kind):
        raise ValueError(f"{path.rstrip('.')} must be one of {', '.join(map(str, get_args(kind)))}, not {value!r}")
    return value
