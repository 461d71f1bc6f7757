"""A Windows guest behind PowerShell Direct, played by this machine: programs run here, as the script would run them there."""

from __future__ import annotations

import base64
import errno
import hashlib
import subprocess
from dataclasses import dataclass

from vmsnap.testing.hyperv.dispatch import Credential, Invocation, PlainValue, PowerShellError, Streams

SCRIPT_SHA256 = "113c5a01e1e5183d250f237a6950b5c45dc2591e144221ce52e35bf154207b2c"
"""Of ``run_in_guest.ps1``, whose twin this is: an edited script fails until its twin was looked at."""

_SIGNALLED = 128
_BAD_CREDENTIAL = "Die Anmeldeinformationen sind ungültig."
_NO_SESSION = "Der virtuelle Computer antwortet nicht."


@dataclass(kw_only=True)
class DirectGuest:
    """One guest: who may log in, and whether it answers at all."""

    id: str
    user: str
    password: str
    answers: bool = True

    def dispatch(self, invocation: Invocation, streams: Streams) -> None:
        """Act as the script would (``vmsnap.testing.hyperv.dispatch.Dispatcher``)."""
        call = invocation.call
        if call.is_script and hashlib.sha256(call.text.encode()).hexdigest() != SCRIPT_SHA256:
            raise PowerShellError("the script was edited after its twin was written", error_id="UnknownScript")
        self.run(call.parameters, streams)

    def run(self, parameters: object, streams: Streams) -> None:
        """Run a program with the script's parameters."""
        if not isinstance(parameters, dict):
            raise TypeError(parameters)
        credential = parameters["Credential"]
        if not self.answers or parameters["Id"] != self.id:
            raise PowerShellError(_NO_SESSION, error_id="PSSessionStateBroken", category="OpenError")
        if not isinstance(credential, Credential) or (credential.user, credential.secret.text) != (
            self.user,
            self.password,
        ):
            raise PowerShellError(_BAD_CREDENTIAL, error_id="InvalidCredential", category="AuthenticationError")
        argv = (str(parameters["Program"]), *split_command_line(str(parameters["Arguments"])))
        streams.write(
            _run(
                argv,
                stdin=base64.b64decode(str(parameters["InputBase64"])),
                output_bytes=_number(parameters["OutputBytes"]),
                timeout_seconds=_number(parameters["TimeoutMs"]) / 1000,
            )
        )


def _number(value: PlainValue) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value


def _run(argv: tuple[str, ...], *, stdin: bytes, output_bytes: int, timeout_seconds: float) -> dict[str, PlainValue]:
    answer: dict[str, PlainValue] = {
        "Outcome": "ended",
        "Code": 0,
        "Words": "",
        "Output": "",
        "Error": "",
        "Truncated": False,
    }
    try:
        process = subprocess.Popen(argv, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        return {**answer, "Outcome": "not started", "Code": error.errno or errno.EIO, "Words": str(error)}
    with process:
        try:
            output, words = process.communicate(stdin, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return {**answer, "Outcome": "late"}
    code = process.returncode if process.returncode >= 0 else _SIGNALLED - process.returncode
    return {
        **answer,
        "Code": code,
        "Output": base64.b64encode(output[:output_bytes]).decode("ascii"),
        "Error": base64.b64encode(words[:output_bytes]).decode("ascii"),
        "Truncated": max(len(output), len(words)) > output_bytes,
    }


def split_command_line(text: str) -> tuple[str, ...]:
    """Take a command line apart as ``CommandLineToArgvW`` does, which is not how it was put together here."""
    arguments: list[str] = []
    current: list[str] | None = None
    quoted = False
    place = 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            run = len(text) - place - len(text[place:].lstrip("\\"))
            place += run
            marks = place < len(text) and text[place] == '"'
            current = [*(current or []), "\\" * (run // 2 if marks else run)]
            if marks and run % 2:
                current.append('"')
                place += 1
            continue
        place += 1
        if character == '"':
            quoted, current = not quoted, current or []
        elif character in " \t\n\r\v\f" and not quoted:
            if current is not None:
                arguments.append("".join(current))
            current = None
        else:
            current = [*(current or []), character] if len(current or []) < 64 else ["".join(current or []), character]
    if current is not None:
        arguments.append("".join(current))
    return tuple(arguments)
