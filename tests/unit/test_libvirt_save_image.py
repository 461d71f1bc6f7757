"""The header of libvirt's save image: what is read from it, what is written, and what is refused."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.save_image import make_header, read_header, replace_xml

HEADER_BYTES = 92
FINISHED = b"LibvirtQemudSave"
UNFINISHED = b"LibvirtQemudPart"
STREAM = b"QEVM\0\0\0\3 and the pages of the guest"

# XML never holds a zero byte; surrogates cannot be encoded.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)
cookies = st.none() | st.binary(max_size=80).map(lambda raw: raw.replace(b"\0", b"x"))


def image(
    xml: str = "<domain/>",
    *,
    cookie: bytes | None = None,
    room: int = 0,
    magic: bytes = FINISHED,
    version: int = 2,
    image_format: int = 0,
) -> bytes:
    """A save image as libvirt writes it: 19 numbers after the magic, of which five are in use."""
    data = xml.encode() + b"\0"
    cookie_offset = 0
    if cookie is not None:
        cookie_offset = len(data)
        data += cookie + b"\0"
    data += bytes(room)
    numbers = (version, len(data), 1, image_format, cookie_offset, *range(14))
    return struct.pack("=16s19I", magic, *numbers) + data + STREAM


@given(xml=texts, cookie=cookies, room=st.integers(0, 64))
def test_reads_what_libvirt_wrote(xml: str, cookie: bytes | None, room: int) -> None:
    header = read_header(io.BytesIO(image(xml, cookie=cookie, room=room)))
    assert (header.xml, header.cookie, header.was_running) == (xml, cookie, True)


@given(old=texts, new=texts, cookie=cookies)
def test_replaces_the_xml_and_nothing_else(old: str, new: str, cookie: bytes | None) -> None:
    before = image(old, cookie=cookie, room=1000)
    file = io.BytesIO(before)
    replace_xml(file, xml=new)
    after = file.getvalue()

    header = read_header(io.BytesIO(after))
    assert (header.xml, header.cookie) == (new, cookie)
    assert len(after) == len(before)
    assert after.endswith(STREAM)
    # Only the offset of the cookie, the fifth number, may differ among the numbers.
    assert after[:32] == before[:32]
    assert after[36:HEADER_BYTES] == before[36:HEADER_BYTES]


def test_replacing_may_be_repeated() -> None:
    file = io.BytesIO(image("<domain>old</domain>", cookie=b"<cookie/>", room=100))
    replace_xml(file, xml="<domain>a longer one</domain>")
    replace_xml(file, xml="<a/>")
    header = read_header(io.BytesIO(file.getvalue()))
    assert (header.xml, header.cookie) == ("<a/>", b"<cookie/>")
    assert b"longer" not in file.getvalue()


@given(room=st.integers(0, 50), cookie=cookies)
def test_xml_that_fits_to_the_last_byte_is_taken_and_one_byte_more_is_not(room: int, cookie: bytes | None) -> None:
    whole = image("<domain/>", cookie=cookie, room=room)
    longest = "x" * (len("<domain/>") + room)
    file = io.BytesIO(whole)
    replace_xml(file, xml=longest)
    assert read_header(io.BytesIO(file.getvalue())).xml == longest

    file = io.BytesIO(whole)
    with pytest.raises(DriverError, match="room for"):
        replace_xml(file, xml=longest + "x")
    assert file.getvalue() == whole


@pytest.mark.parametrize("length", range(len(image("<domain/>", cookie=b"<c/>", room=20)) - len(STREAM)))
def test_an_image_cut_anywhere_before_its_stream_is_refused(length: int) -> None:
    whole = image("<domain/>", cookie=b"<c/>", room=20)
    with pytest.raises(DriverError, match="memory image"):
        read_header(io.BytesIO(whole[:length]))


def test_an_unfinished_image_is_refused_as_such() -> None:
    with pytest.raises(DriverError, match="unfinished"):
        read_header(io.BytesIO(image(magic=UNFINISHED)))


@pytest.mark.parametrize("image_format", [1, 2, 3, 4, 7])
def test_a_compressed_image_is_refused_with_the_setting_to_change(image_format: int) -> None:
    with pytest.raises(DriverError, match="compressed") as caught:
        read_header(io.BytesIO(image(image_format=image_format)))
    assert caught.value.remedy is not None
    assert "snapshot_image_format" in caught.value.remedy


@pytest.mark.parametrize("magic", [b"LibvirtQemudDump", b"\0" * 16, b"QFI\xfb".ljust(16, b"\0")])
def test_other_files_are_refused(magic: bytes) -> None:
    with pytest.raises(DriverError, match="does not begin"):
        read_header(io.BytesIO(image(magic=magic)))


@pytest.mark.parametrize("version", [0, 1, 3])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(DriverError, match="version"):
        read_header(io.BytesIO(image(version=version)))


@given(data_len=st.integers(0, 300), cookie_offset=st.integers(0, 300), garbage=st.binary(max_size=300))
def test_garbage_behind_a_good_beginning_never_raises_anything_else(
    data_len: int, cookie_offset: int, garbage: bytes
) -> None:
    numbers = struct.pack("=5I", 2, data_len, 0, 0, cookie_offset)
    try:
        header = read_header(io.BytesIO(FINISHED + numbers + bytes(56) + garbage))
    except DriverError:
        return
    assert header.xml.encode() == garbage.partition(b"\0")[0]


def test_xml_that_is_no_text_is_refused() -> None:
    numbers = struct.pack("=5I", 2, 4, 0, 0, 0)
    with pytest.raises(DriverError, match="UTF-8"):
        read_header(io.BytesIO(FINISHED + numbers + bytes(56) + b"<\xff>\0"))


def test_a_header_made_here_is_read_as_libvirts_own() -> None:
    made = make_header(xml="<domain>ä</domain>", cookie="<cookie><cpu/></cookie>")
    header = read_header(io.BytesIO(made))
    assert (header.xml, header.cookie, header.was_running) == ("<domain>ä</domain>", b"<cookie><cpu/></cookie>", True)
    assert len(made) == 92 + header.data_len
