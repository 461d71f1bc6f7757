"""Parts of a server's answers (RFC 2131 section 4.3.1, table 3), and who a message is from."""

from __future__ import annotations

from ipaddress import IPv4Address

from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MessageType, Op, Option, OptionCode


def client_of(message: DhcpMessage) -> bytes:
    """Return what identifies a client: its id where it sends one, else its MAC (RFC 2131 section 4.2)."""
    return message.option(OptionCode.CLIENT_ID) or bytes([message.htype]) + message.chaddr


def answer_to(
    message: DhcpMessage,
    *,
    ciaddr: IPv4Address,
    options: tuple[Option, ...],
    yiaddr: IPv4Address = UNSPECIFIED,
    flags: int | None = None,
) -> DhcpMessage:
    """Return a server's message in the exchange of ``message``, with its flags unless others are given."""
    return DhcpMessage(
        op=Op.REPLY,
        xid=message.xid,
        chaddr=message.chaddr,
        flags=message.flags if flags is None else flags,
        ciaddr=ciaddr,
        yiaddr=yiaddr,
        options=options,
    )


def identity_options(message: DhcpMessage, *, kind: MessageType, server: IPv4Address) -> tuple[Option, ...]:
    """Return the options that every answer begins with: its kind, the server's id, the client's (RFC 6842)."""
    client = message.option(OptionCode.CLIENT_ID)
    echoed = () if client is None else (Option(OptionCode.CLIENT_ID, client),)
    return (
        Option(OptionCode.MESSAGE_TYPE, bytes([kind])),
        Option(OptionCode.SERVER_ID, server.packed),
        *echoed,
    )


def seconds_option(code: OptionCode, seconds: int) -> Option:
    """Return an option that holds a time of 32 bits. Raises OverflowError for a longer one."""
    return Option(code, seconds.to_bytes(4, "big"))
