"""The WinRM endpoint of the tests against what real Windows said, as pypsrp's source distribution recorded it.

``setup.sh tests`` fetches the distribution into build/oracle. Its transcripts hold requests and answers of Windows Server
2016 and later; nothing of them is copied into this repository.
"""

from __future__ import annotations

import base64
import tarfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from pypsrp.powershell import Fragmenter
from pypsrp.serializer import Serializer

from vmsnap.testing.hyperv import soap
from vmsnap.testing.hyperv.dispatch import Invocation, PowerShellError, Streams
from vmsnap.testing.hyperv.service import Quotas, Service, User
from vmsnap.testing.hyperv.soap import SHELL

ORACLE = Path(__file__).parents[1] / "build" / "oracle"
# Not asked for by vmsnap: sessions that are left and found again, and other shells.
NOT_SPOKEN = frozenset({"Disconnect", "Reconnect", "Connect", "Enumerate", "Pull", "Put"})
# PowerShell 2 names shells itself; pools of vmsnap have one runspace, whose number it does not change.
NOT_FOLLOWED = frozenset({"test_psrp_run_protocol_version_2.1", "test_psrp_set_runspaces"})
POWERSHELL = "http://schemas.microsoft.com/powershell/Microsoft.PowerShell"


@dataclass(frozen=True)
class Exchange:
    """A request that a client sent to Windows, and the answer."""

    transcript: str
    request: str
    answer: str


def recorded() -> Iterator[tuple[str, list[Exchange]]]:
    archives = sorted(ORACLE.glob("pypsrp-*.tar.gz"))
    assert archives, "no transcripts in build/oracle: run integration/setup.sh tests"
    with tarfile.open(archives[-1]) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            content = archive.extractfile(member)
            if path.parent.name != "responses" or not path.name.startswith("test_psrp_") or content is None:
                continue
            messages = yaml.safe_load(content.read())["messages"]
            exchanges = [Exchange(path.stem, item["request"], item["response"] or "") for item in messages]
            spoken = all(POWERSHELL in item.request and operation(item.request) not in NOT_SPOKEN for item in exchanges)
            if spoken and path.stem not in NOT_FOLLOWED:
                yield path.stem, exchanges


@pytest.fixture(scope="module")
def transcripts() -> dict[str, list[Exchange]]:
    return dict(recorded())


def dispatch(invocation: Invocation, streams: Streams) -> None:
    streams.error(PowerShellError("oh", error_id="Some,Thing"))
    streams.write("text")


def service() -> Service:
    return Service(
        dispatch,
        users={"vagrant": User(password="x")},
        quotas=Quotas(),
        configurations=frozenset({"Microsoft.PowerShell"}),
    )


def shape(answer: str) -> set[str]:
    """Return the paths of an envelope's elements, and their attributes' names."""
    found: set[str] = set()

    def walk(element: ET.Element, path: str) -> None:
        path = f"{path}/{element.tag.rpartition('}')[2]}"
        found.add(path)
        found.update(f"{path}@{name.rpartition('}')[2]}" for name in element.attrib)
        for child in element:
            walk(child, path)

    walk(ET.fromstring(answer), "")  # noqa: S314 - from a distribution whose digest pip checked
    return found


def operation(request: str) -> str:
    return parsed(request).operation


def parsed(request: str) -> soap.Request:
    return replace(soap.parse(request.encode()), timeout_seconds=0.05)


def messages(answer: str) -> list[int]:
    """Return the types of the PSRP messages in an answer."""
    streams = ET.fromstring(answer).iter(f"{{{SHELL}}}Stream")  # noqa: S314
    data = b"".join(base64.b64decode(stream.text or "") for stream in streams)
    return [message.message_type for message in Fragmenter(1 << 20, Serializer()).defragment(data)] if data else []


def test_there_are_transcripts_enough(transcripts: dict[str, list[Exchange]]) -> None:
    assert len(transcripts) > 15
    spoken = {operation(item.request) for exchanges in transcripts.values() for item in exchanges}
    assert spoken >= {"Create", "Command", "Send", "Receive", "Signal", "Delete"}


def test_what_windows_took_is_taken_here(transcripts: dict[str, list[Exchange]]) -> None:
    replayed = 0
    for name, exchanges in transcripts.items():
        here = service()
        for item in exchanges:
            request = parsed(item.request)
            if request.operation == "Receive" or "Fault>" in item.answer or not item.answer:
                continue  # what there is to receive, and when, is the dispatcher's business
            status, said = here.handle(request, user="vagrant")
            assert status == 200, f"{name}: {request.operation}: {said.decode()}"
            replayed += 1
    assert replayed > 60


def test_answers_have_the_shape_of_windows_answers(transcripts: dict[str, list[Exchange]]) -> None:
    theirs: dict[str, set[str]] = defaultdict(set)
    always: dict[str, set[str]] = {}
    for exchanges in transcripts.values():
        for item in exchanges:
            if item.answer:
                kind = "Fault" if "Fault>" in item.answer else operation(item.request)
                theirs[kind] |= shape(item.answer)
                always[kind] = always.get(kind, shape(item.answer)) & shape(item.answer)
    ours: dict[str, set[str]] = defaultdict(set)
    for exchanges in transcripts.values():
        here = service()
        for item in exchanges:
            request = parsed(item.request)
            status, said = here.handle(request, user="vagrant")
            ours["Fault" if status != 200 else request.operation] |= shape(said.decode())
    for kind, paths in ours.items():
        if kind == "Get":
            continue  # Windows answers it with more than anybody asks for
        assert paths <= theirs[kind], f"{kind}: Windows says nothing of {sorted(paths - theirs[kind])}"
        missing = {path for path in always[kind] - paths if not path.startswith("/Envelope/Header")}
        assert not missing, f"{kind}: Windows always says {sorted(missing)}"


def test_a_pool_opens_as_on_windows(transcripts: dict[str, list[Exchange]]) -> None:
    exchanges = transcripts["test_psrp_error_failed"]
    theirs = []
    for item in exchanges:
        if operation(item.request) == "Command":
            break
        theirs += messages(item.answer)
    here = service()
    here.handle(parsed(exchanges[0].request), user="vagrant")
    ours: list[int] = []
    for item in exchanges[1:]:
        if operation(item.request) != "Receive" or len(ours) >= len(theirs):
            break
        ours += messages(here.handle(parsed(item.request), user="vagrant")[1].decode())
    assert ours == theirs


def test_a_pipeline_that_fails_ends_as_on_windows(transcripts: dict[str, list[Exchange]]) -> None:
    """The last message says that it failed, and carries the error record."""
    theirs = [types for item in transcripts["test_psrp_error_failed"] for types in messages(item.answer)]
    assert theirs[-1] == 0x00041006
    exchanges = transcripts["test_psrp_error_failed"]

    def fail(invocation: Invocation, streams: Streams) -> None:
        raise PowerShellError("no", error_id="No")

    here = Service(
        fail,
        users={"vagrant": User(password="x")},
        quotas=Quotas(),
        configurations=frozenset({"Microsoft.PowerShell"}),
    )
    ours: list[int] = []
    for item in exchanges:
        request = parsed(item.request)
        if request.operation == "Receive" and ours[-1:] == [0x00041006]:
            continue
        ours += messages(here.handle(request, user="vagrant")[1].decode())
    assert ours[-1] == 0x00041006
