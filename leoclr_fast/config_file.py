"""A configuration as YAML, and back: strict, so that a misspelt or unknown field is an error.

PyYAML is imported where a file is read or written: a machine that only measures needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from dataset_tools.schema import FileContentError, convert

Config = TypeVar("Config")

RETIRED = {
    *("monitor.silence_limit_s", "monitor.hang_limit_s", "monitor.phase_limit_s", "monitor.keep_best"),
    "speed.gradient_compression",
}
"""Fields of earlier versions, which their runs and scripts still name: they are passed over."""


def to_yaml(config: Any) -> str:
    """A (nested) dataclass as YAML, fields in their order."""
    import yaml

    return yaml.safe_dump(as_plain(config), sort_keys=False)


def load_yaml(text: str | bytes, origin: str) -> Any:
    """YAML as plain values. Raises FileContentError; aliases are refused, with which few lines become any size."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"it holds the alias *{self.peek_event().anchor}, and none is allowed")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise FileContentError(f"{origin} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise FileContentError(f"{origin} is no YAML: {' '.join(str(error).split())}") from error


def from_yaml(config_type: type[Config], text: str | bytes, origin: str) -> Config:
    """The dataclass that `to_yaml` wrote. Raises ValueError, naming `origin` and the field, if it does not fit."""
    return from_plain(config_type, load_yaml(text, origin), origin)


def from_plain(config_type: type[Config], plain: Any, origin: str) -> Config:
    """The dataclass that `as_plain` took apart; fields that it did not have yet get their defaults.

    Raises ValueError, naming `origin` and the field, if it does not fit.
    """
    config = convert(plain, config_type, origin)
    known = flat(as_plain(config))
    unknown = sorted(flat(plain).keys() - known.keys() - RETIRED)
    if unknown:
        there = [name for name in known if name.rpartition(".")[0] == unknown[0].rpartition(".")[0]]
        raise FileContentError(f"{origin}: unknown field {unknown[0]}; known there: {', '.join(there)}")
    return config


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
