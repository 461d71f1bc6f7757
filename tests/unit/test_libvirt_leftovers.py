"""What runs left is found by tags and names alone, and given to the guest it belongs to."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from tests.unit.libvirt_domains import RUN
from tests.unit.libvirt_fakes import FakeConnection, FakeDomain, disk_xml, domain_of
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.leftovers import image_resources, jobs_on
from vmsnap.hypervisors.libvirt.overlays import OverlaysDetail
from vmsnap.hypervisors.libvirt.xml import Tag, parse, set_tag, unparse
from vmsnap.model.ids import RunId
from vmsnap.model.journal import ResourceKind

MIB = 1 << 20


def overlay(folder: Path, *, base: Path, run: str = RUN, target: str = "vda", role: str = "source") -> Path:
    path = folder / f"vmsnap-{run}-{target}.{role}.qcow2"
    overlays.create_overlay(path, base=str(base), base_format="raw", size_bytes=MIB)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "db1.raw"
    path.write_bytes(bytes(MIB))
    return path


def on(path: Path, *, name: str = "db1") -> FakeDomain:
    xml = domain_of(disk_xml("vda", str(path)), name=name)
    return FakeDomain(live=xml, definition=xml)


def found(*domains: FakeDomain) -> dict[tuple[ResourceKind, RunId, str], list[str]]:
    return {
        (resource.kind, resource.run, resource.guest): [
            disk.overlay for disk in OverlaysDetail.model_validate_json(resource.detail).disks
        ]
        for resource in image_resources(FakeConnection(*domains))
    }


def test_finds_overlays_of_a_guest_that_is_on_one_of_them(tmp_path: Path, base: Path) -> None:
    source, clone = overlay(tmp_path, base=base), overlay(tmp_path, base=base, role="clone")
    assert found(on(source)) == {
        (ResourceKind.SOURCE_OVERLAYS, RUN, "db1"): [str(source)],
        (ResourceKind.CLONE_OVERLAYS, RUN, "db1"): [str(clone)],
    }


def test_finds_overlays_of_a_guest_that_never_used_them(tmp_path: Path, base: Path) -> None:
    source = overlay(tmp_path, base=base)
    older = overlay(tmp_path, base=base, run="aaaaaaaaaa")
    assert found(on(base)) == {
        (ResourceKind.SOURCE_OVERLAYS, RUN, "db1"): [str(source)],
        (ResourceKind.SOURCE_OVERLAYS, "aaaaaaaaaa", "db1"): [str(older)],
    }


def test_finds_them_in_another_folder_while_they_are_in_use(tmp_path: Path, base: Path) -> None:
    elsewhere = tmp_path / "overlays"
    elsewhere.mkdir()
    source, clone = overlay(elsewhere, base=base), overlay(elsewhere, base=base, role="clone")
    assert sorted(path for paths in found(on(source)).values() for path in paths) == sorted([str(source), str(clone)])


def test_guests_that_share_a_folder_are_told_apart(tmp_path: Path, base: Path) -> None:
    other = tmp_path / "db2.raw"
    other.write_bytes(bytes(MIB))
    one, two = overlay(tmp_path, base=base), overlay(tmp_path, base=other, run="bbbbbbbbbb")
    assert found(on(base), on(other, name="db2")) == {
        (ResourceKind.SOURCE_OVERLAYS, RUN, "db1"): [str(one)],
        (ResourceKind.SOURCE_OVERLAYS, "bbbbbbbbbb", "db2"): [str(two)],
    }


def test_other_files_are_left_alone(tmp_path: Path, base: Path) -> None:
    source = overlay(tmp_path, base=base)
    source.rename(tmp_path / f"my-{source.name}")
    # Half made: no header yet.
    (tmp_path / f"vmsnap-{RUN}-vdb.source.qcow2").touch()
    foreign = tmp_path / "theirs.qcow2"
    overlays.create_overlay(foreign, base=str(base), base_format="raw", size_bytes=MIB)
    assert found(on(base)) == {}


def test_clones_are_no_guests(tmp_path: Path, base: Path) -> None:
    clone = on(overlay(tmp_path, base=base, role="clone"))
    assert clone.live is not None
    root = parse(clone.live)
    set_tag(root, Tag(run=RUN, kind="clone", guest="db1"))
    clone.live = clone.definition = unparse(root)
    assert found(clone) == {}


class Vanishing(FakeDomain):
    """A domain that answers with an error of libvirt."""

    def __init__(self, *, code: int) -> None:
        super().__init__(live=None, definition=None)
        self._code = code

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        error = libvirt.libvirtError("gone")
        error.err = (self._code, 10, "Domain not found", 2, "", None, None, -1, -1)
        raise error


def test_a_domain_that_ends_meanwhile_does_not_stop_the_search(tmp_path: Path, base: Path) -> None:
    source = overlay(tmp_path, base=base)
    listed = found(Vanishing(code=libvirt.VIR_ERR_NO_DOMAIN), on(source))
    assert listed == {(ResourceKind.SOURCE_OVERLAYS, RUN, "db1"): [str(source)]}
    with pytest.raises(DriverError, match="describe a guest"):
        found(Vanishing(code=libvirt.VIR_ERR_INTERNAL_ERROR))


def test_a_job_on_a_guest_is_told(base: Path) -> None:
    domain = on(base)
    connection = FakeConnection(domain)
    assert jobs_on(connection, "db1") == ()
    assert jobs_on(connection, "") == ()
    domain.job = libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT
    (job,) = jobs_on(connection, "db1")
    assert "virsh domjobinfo db1" in job
    domain.live = None
    assert jobs_on(connection, "db1") == ()
