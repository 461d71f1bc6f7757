"""Validation errors as an operator wants them: file, line, key, what was given, what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from ipaddress import AddressValueError, NetmaskValueError
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vmsnap.config.toml import TomlFile
from vmsnap.errors import ConfigError
from vmsnap.model.durations import format_duration

_LONGEST_GIVEN = 60
ModelT = TypeVar("ModelT", bound=BaseModel)
SECRET_KEYS = frozenset({"urls", "dead_man_url", "access_key", "secret_key", "session_token", "encryption_key"})
"""Keys whose values are secrets: no message shows them."""


def validate(model: type[ModelT], file: TomlFile, *, data: dict[str, Any]) -> ModelT:
    """Return the model that ``data``, read from ``file``, describes. Raises ConfigError that names every problem.

    Values are taken as TOML types them: a text is no number, and "yes" is not true.
    """
    try:
        # JSON mode is strict about numbers and booleans, and still reads enums, addresses and tuples from texts and lists.
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise _error(error, model=model, file=file) from error


def nearest(given: str, *, known: Sequence[str]) -> str | None:
    """Return the known name that was probably meant, if there is one."""
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(given.casefold(), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def _error(error: ValidationError, *, model: type[BaseModel], file: TomlFile) -> ConfigError:
    problems = [_problem(item, model=model, file=file) for item in error.errors(include_url=False)]
    problems.sort(key=lambda problem: problem[0])
    lines = [text for _, text in problems]
    if len(lines) == 1:
        return ConfigError(lines[0], remedy=_REMEDY)
    return ConfigError(f"{file.path} has {len(lines)} errors", details="\n".join(lines), remedy=_REMEDY)


_REMEDY = "correct the file; 'vmsnap policy check' looks at all of them, the examples in policies/ explain every key"


def _problem(item: ErrorDetails, *, model: type[BaseModel], file: TomlFile) -> tuple[int, str]:
    path = _without_union_tags(item["loc"], data=file.data)
    line = file.lines.find(path)
    where = f"{file.path}:{line}" if line else str(file.path)
    said = (
        f"{_key_text(path)}: {_explain(item, path=path, model=model)}" if path else _explain(item, path=(), model=model)
    )
    return line or 0, f"{where}: {said}"


def _without_union_tags(location: tuple[int | str, ...], *, data: object) -> tuple[int | str, ...]:
    """Return a location without the parts that name a member of a union and no key of the file."""
    path: list[int | str] = []
    for position, part in enumerate(location):
        if isinstance(data, dict) and (part in data or position == len(location) - 1):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _key_text(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        else:
            text += f".{part}" if text else part
    return text


def _explain(item: ErrorDetails, *, path: tuple[int | str, ...], model: type[BaseModel]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), allowed=allowed_keys(model, path[:-1]))
    if kind == "missing":
        return "this key is required"
    context = item.get("ctx", {})
    explain = _ALLOWED.get(kind)
    if explain is not None:
        allowed = explain(context)
    elif kind == "value_error":
        error = context.get("error", item["msg"])
        # The standard library's words for an address say what it is not.
        known = isinstance(error, AddressValueError | NetmaskValueError)
        allowed = f"{error}; {_ADDRESS}" if known else str(error)
    else:
        allowed = item["msg"][:1].lower() + item["msg"][1:]
    given = item["input"]
    if kind == "value_error" and isinstance(given, dict):
        return allowed  # a rule about several keys of a section speaks for itself
    meant = _meant_value(given, context=context)
    told = "what is not shown here" if SECRET_KEYS & set(path) else _given_text(given)
    return f"given {told}; {allowed}{meant}"


def _unknown_key(key: str, *, allowed: Sequence[str]) -> str:
    meant = nearest(key, known=allowed)
    hint = f"; did you mean '{meant}'?" if meant else ""
    return f"unknown key{hint} (allowed here: {', '.join(allowed)})"


def _meant_value(given: object, *, context: dict[str, Any]) -> str:
    expected = context.get("expected")
    if not isinstance(given, str) or not isinstance(expected, str):
        return ""
    meant = nearest(given, known=expected.replace(" or ", ", ").replace("'", "").split(", "))
    return f"; did you mean '{meant}'?" if meant else ""


def _given_text(given: object) -> str:
    if isinstance(given, dict):
        return "a section"
    text = json.dumps(given, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_GIVEN else f"{text[: _LONGEST_GIVEN - 3]}..."


_ADDRESS = 'an IPv4 address such as "192.0.2.1" is allowed, with its prefix in old_address: "192.0.2.10/24"'
_ALLOWED: dict[str, Callable[[dict[str, Any]], str]] = {
    "enum": lambda context: f"allowed: {context['expected']}",
    "literal_error": lambda context: f"allowed: {context['expected']}",
    "greater_than_equal": lambda context: f"must be at least {_plain(context['ge'])}",
    "less_than_equal": lambda context: f"must be at most {_plain(context['le'])}",
    "greater_than": lambda context: f"must be more than {_plain(context['gt'])}",
    "int_type": lambda _: "a whole number is allowed, without quotes",
    "int_from_float": lambda _: "a whole number is allowed",
    "float_type": lambda _: "a number is allowed, without quotes",
    "bool_type": lambda _: "allowed: true or false, without quotes",
    "string_type": lambda _: "a text in quotes is allowed",
    "string_too_short": lambda _: "the text must not be empty",
    "string_too_long": lambda context: f"at most {context['max_length']} characters are allowed",
    "tuple_type": lambda _: "a list in square brackets is allowed",
    "model_type": lambda _: "a section with keys of its own is allowed",
}


_TIMEDELTA = re.compile(r"datetime\.timedelta\((?:days=(?P<days>\d+))?(?:, )?(?:seconds=(?P<seconds>\d+))?0?\)")


def _plain(value: object) -> str:
    """Return a bound as a policy would have it: pydantic gives durations as Python writes them."""
    found = _TIMEDELTA.fullmatch(str(value))
    if found is None:
        return str(value)
    span = timedelta(days=int(found["days"] or 0), seconds=int(found["seconds"] or 0))
    return format_duration(span) if span else "0"


def allowed_keys(model: type[BaseModel], path: Sequence[int | str]) -> tuple[str, ...]:
    """Return the keys that the section at ``path`` may have."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field is not None else None
    return tuple(current.model_fields) if current is not None else ()


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model that an annotation is, or holds: ``Model | None``, ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {Union, UnionType, tuple}:
        for part in get_args(annotation):
            found = _model_in(part)
            if found is not None:
                return found
    return None
