"""A policy as TOML text with every key filled in. ``tomllib`` only reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vmsnap.model.policy import Policy


def policy_text(policy: Policy) -> str:
    """Return a policy as TOML. Reading it back gives the same policy; keys that are not set stand in comments."""
    return "\n".join(_table((), policy.model_dump(mode="json"))) + "\n"


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: its own keys, then the tables in it, as TOML wants them."""
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [_assignment(key, value) for key, value in values.items() if not _is_table(value)]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", *_table((*path, key), value)]
        elif _is_table(value):
            for entry in value:
                header, *rest = _table((*path, key), entry)
                lines += ["", f"[{header}]", *rest]
    return lines


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _assignment(key: str, value: object) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    # JSON's texts, numbers and booleans are TOML's as well, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
