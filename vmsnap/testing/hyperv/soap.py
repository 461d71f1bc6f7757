"""Envelopes and faults of WS-Management as WinRM speaks it ([MS-WSMV], DMTF DSP0226)."""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from xml.sax.saxutils import escape

SOAP = "http://www.w3.org/2003/05/soap-envelope"
ADDRESSING = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
TRANSFER = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
WSMAN = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
SHELL = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
FAULT = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
POWERSHELL = "http://schemas.microsoft.com/powershell"
_FAULT_ACTION = "http://schemas.dmtf.org/wbem/wsman/1/wsman/fault"

# wsmerror.h and winerror.h
ACCESS_DENIED = 5
OPERATION_TIMED_OUT = 2150858793
UNEXPECTED_SELECTORS = 2150858843
RESOURCE_NOT_FOUND = 2150858752
MAX_SHELLS = 2150859173
MAX_COMMANDS = 2150859241
INTERNAL_ERROR = 2150858801

_SENDER = frozenset({UNEXPECTED_SELECTORS, RESOURCE_NOT_FOUND, ACCESS_DENIED})
_SUBCODES = {
    OPERATION_TIMED_OUT: "w:TimedOut",
    UNEXPECTED_SELECTORS: "w:InvalidSelectors",
    RESOURCE_NOT_FOUND: "a:DestinationUnreachable",
    ACCESS_DENIED: "w:AccessDenied",
    MAX_SHELLS: "w:QuotaLimit",
    MAX_COMMANDS: "w:QuotaLimit",
}
_SECONDS = re.compile(r"PT([0-9.]+)S")


class WsmanFaultError(Exception):
    """A fault that the service answers with. Its text is in the language of the Windows that it stands for."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text

    def body(self) -> str:
        """Return the content of a SOAP body."""
        who = "s:Sender" if self.code in _SENDER else "s:Receiver"
        subcode = _SUBCODES.get(self.code, "w:InternalError")
        text = escape(self.text)
        return (
            f"<s:Fault><s:Code><s:Value>{who}</s:Value><s:Subcode><s:Value>{subcode}</s:Value></s:Subcode></s:Code>"
            f'<s:Reason><s:Text xml:lang="">{text}</s:Text></s:Reason><s:Detail>'
            f'<f:WSManFault xmlns:f="{FAULT}" Code="{self.code}" Machine="127.0.0.1">'
            f"<f:Message>{text}</f:Message></f:WSManFault></s:Detail></s:Fault>"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of WS-Management, as far as a shell needs it. ``operation`` is the last part of its action."""

    operation: str
    action: str
    message_id: str
    resource: str
    timeout_seconds: float
    selectors: dict[str, str]
    body: ET.Element

    def element(self, path: str) -> ET.Element:
        """Return an element of the body. Raises WsmanFaultError where it is missing."""
        found = self.body.find(path)
        if found is None:
            raise WsmanFaultError(INTERNAL_ERROR, f"the request has no {path}")
        return found

    @property
    def command_id(self) -> str | None:
        """Return the id of the command that the request is about."""
        for element in self.body.iter():
            if "CommandId" in element.attrib:
                return element.attrib["CommandId"].upper()
        return None


def parse(content: bytes) -> Request:
    """Read a request. Raises ValueError for what is none."""
    envelope = ET.fromstring(content)  # noqa: S314 - what a test sends to itself
    header, body = envelope.find(f"{{{SOAP}}}Header"), envelope.find(f"{{{SOAP}}}Body")
    if header is None or body is None:
        raise ValueError("no SOAP envelope")
    action = header.findtext(f"{{{ADDRESSING}}}Action") or ""
    timeout = _SECONDS.fullmatch(header.findtext(f"{{{WSMAN}}}OperationTimeout") or "")
    return Request(
        operation=action.rsplit("/", 1)[-1],
        action=action,
        message_id=header.findtext(f"{{{ADDRESSING}}}MessageID") or "",
        resource=header.findtext(f"{{{WSMAN}}}ResourceURI") or "",
        timeout_seconds=float(timeout.group(1)) if timeout else 60.0,
        selectors={e.attrib["Name"]: e.text or "" for e in header.iter(f"{{{WSMAN}}}Selector")},
        body=body,
    )


def answer(request: Request, *, body: str) -> bytes:
    """Return the envelope of an answer."""
    return _envelope(f"{request.action}Response", relates_to=request.message_id, body=body)


def fault(request: Request, *, error: WsmanFaultError) -> bytes:
    """Return the envelope of a fault."""
    return _envelope(_FAULT_ACTION, relates_to=request.message_id, body=error.body())


def _envelope(action: str, *, relates_to: str, body: str) -> bytes:
    return (
        f'<s:Envelope xml:lang="en-US" xmlns:s="{SOAP}" xmlns:a="{ADDRESSING}" xmlns:x="{TRANSFER}" xmlns:w="{WSMAN}" '
        f'xmlns:rsp="{SHELL}" xmlns:p="http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd"><s:Header>'
        f"<a:Action>{escape(action)}</a:Action><a:MessageID>uuid:{str(uuid.uuid4()).upper()}</a:MessageID>"
        f"<p:ActivityId>{str(uuid.uuid4()).upper()}</p:ActivityId>"
        f"<a:To>{ADDRESSING}/role/anonymous</a:To><a:RelatesTo>{escape(relates_to)}</a:RelatesTo></s:Header>"
        f"<s:Body>{body}</s:Body></s:Envelope>"
    ).encode()
