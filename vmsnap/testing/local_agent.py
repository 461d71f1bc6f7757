"""A QEMU guest agent that runs its programs as processes of this machine, for tests of ``AgentControl``.

Requests and answers are those of QEMU's ``qga/qapi-schema.json``; errors come as a hypervisor's driver raises them.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from datetime import timedelta
from itertools import count
from typing import IO

from pydantic import BaseModel, ConfigDict, Field

from vmsnap.errors import GuestCommandError, GuestUnreachableError

_CAPTURED_BYTES = 16 << 20  # GUEST_EXEC_MAX_OUTPUT of QEMU's qga/commands.c


class _Exec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    arg: list[str] = []
    input_data: str = Field(default="", alias="input-data")
    capture_output: bool = Field(default=False, alias="capture-output")


class _Program:
    def __init__(self, wish: _Exec, *, prefix: tuple[str, ...]) -> None:
        self.captures = wish.capture_output
        self.stdout: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(base64.b64decode(wish.input_data))
            stdin.seek(0)
            self.process = subprocess.Popen(
                [*prefix, wish.path, *wish.arg], stdin=stdin, stdout=self.stdout, stderr=self.stderr, cwd="/"
            )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        self.stderr.close()


class LocalAgent:
    """An ``AgentChannel``. Close it to end its programs.

    ``answers`` False: nobody answers. ``prefix`` stands before each program's argument list (``nsenter ... --``).
    """

    def __init__(self, *, answers: bool = True, prefix: tuple[str, ...] = ()) -> None:
        self.answers = answers
        self._prefix = prefix
        self._programs: dict[int, _Program] = {}
        self._pids = count(1000)

    def send(self, request: str, *, timeout: timedelta) -> str:
        """Answer one request. Raises GuestUnreachableError, GuestCommandError as ``AgentChannel.send``."""
        if not self.answers:
            raise GuestUnreachableError("the guest agent does not answer", details=f"waited {timeout}")
        asked = json.loads(request)
        arguments = asked.get("arguments", {})
        if asked["execute"] == "guest-ping":
            return json.dumps({"return": {}})
        if asked["execute"] == "guest-exec":
            return json.dumps({"return": {"pid": self._start(_Exec.model_validate(arguments))}})
        if asked["execute"] == "guest-exec-status":
            return json.dumps({"return": self._status(arguments["pid"])})
        raise GuestCommandError(f"The command {asked['execute']} has not been found")

    def restart(self) -> None:
        """Forget all programs, as an agent that is started again does. They run on."""
        for program in self._programs.values():
            program.end()
        self._programs.clear()

    def close(self) -> None:
        """End all programs."""
        self.restart()

    def _start(self, wish: _Exec) -> int:
        if shutil.which(wish.path) is None:
            raise GuestCommandError(
                "the guest agent refused guest-exec",
                details="Guest agent command failed, reason: "
                f"Failed to execute child process \u201c{wish.path}\u201d (No such file or directory)",
            )
        pid = next(self._pids)
        self._programs[pid] = _Program(wish, prefix=self._prefix)
        return pid

    def _status(self, pid: int) -> dict[str, object]:
        if pid not in self._programs:
            raise GuestCommandError("the guest agent refused", details="Invalid parameter 'pid'")
        program = self._programs[pid]
        code = program.process.poll()
        if code is None:
            return {"exited": False}
        answer: dict[str, object] = {"exited": True}
        answer["exitcode" if code >= 0 else "signal"] = abs(code)
        if program.captures:
            for name, stream in (("out", program.stdout), ("err", program.stderr)):
                stream.seek(0)
                data = stream.read(_CAPTURED_BYTES)
                if data:
                    answer[f"{name}-data"] = base64.b64encode(data).decode("ascii")
                if stream.read(1):
                    answer[f"{name}-truncated"] = True
        del self._programs[pid]
        program.end()
        return answer
