"""Values between psrpcore's types and plain ones."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime

from psrpcore import types

from vmsnap.testing.hyperv.dispatch import Call, Credential, Invocation, PlainValue, PowerShellError, Secret


def plain(value: object) -> PlainValue:
    """Return what a client sent as a plain value. Raises PowerShellError for what nobody here may send."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return _secret(value) if isinstance(value, types.PSSecureString | types.PSCredential) else _scalar(value)


def _scalar(value: object) -> PlainValue:
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        return str(value)
    raise PowerShellError(f"a value of type {type(value).__name__} cannot be sent", error_id="UnknownParameterType")


def _secret(value: types.PSSecureString | types.PSCredential) -> Secret | Credential:
    if isinstance(value, types.PSSecureString):
        return Secret(str(value.decrypt()))
    return Credential(user=str(value.UserName), secret=Secret(str(value.Password.decrypt())))


def remote(value: PlainValue) -> object:
    """Return a plain value as what PowerShell's serialiser would send for it."""
    if isinstance(value, Mapping):
        return types.PSCustomObject(**{name: remote(item) for name, item in value.items()})
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return types.PSInt(value) if -(1 << 31) <= value < 1 << 31 else types.PSInt64(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return types.PSList([remote(item) for item in value])
    if isinstance(value, str | bytes | float | datetime | uuid.UUID):
        return value
    raise TypeError(f"a script emits plain values, and this is a {type(value).__name__}")


def invocation(metadata: object, *, user: str, configuration: str) -> Invocation:
    """Return the pipeline that a client asked for."""
    commands = getattr(metadata, "commands", ())
    return Invocation(calls=tuple(_call(command) for command in commands), user=user, configuration=configuration)


def _call(command: object) -> Call:
    parameters: list[tuple[str | None, object]] = getattr(command, "parameters", [])
    return Call(
        text=str(getattr(command, "command_text", "")),
        is_script=bool(getattr(command, "is_script", False)),
        parameters={str(name): plain(value) for name, value in parameters if name},
        arguments=tuple(plain(value) for name, value in parameters if not name),
    )


def exception(error: PowerShellError) -> types.NETException:
    """Return the .NET exception of an error record."""
    made = types.NETException(Message=error.message, HResult=error.hresult)
    made.PSObject.type_names = [error.exception_type, "System.Exception", "System.Object"]
    return made


def category(error: PowerShellError) -> types.ErrorCategoryInfo:
    """Return the category of an error record."""
    return types.ErrorCategoryInfo(
        Category=types.ErrorCategory[error.category],
        Activity=error.error_id.rpartition(".")[2],
        Reason=error.exception_type.rpartition(".")[2],
        TargetName=error.target,
        TargetType="System.String" if error.target else None,
    )


def record(error: PowerShellError) -> types.ErrorRecord:
    """Return the whole error record."""
    made = types.ErrorRecord(
        Exception=exception(error),
        CategoryInfo=category(error),
        TargetObject=error.target,
        FullyQualifiedErrorId=error.error_id,
    )
    made.serialize_extended_info = False
    return made
