"""From ``vmsnap.toml`` to a Hyper-V host over HTTPS: what ``vmsnap doctor`` finds, and what wrong settings come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.hyperv_hosts import EXPORTS, make_host
from vmsnap.config.settings import Settings, load_settings
from vmsnap.errors import HostUnreachableError, PreconditionError
from vmsnap.model.guest import Finding, Severity
from vmsnap.testing.hyperv import certificates
from vmsnap.testing.hyperv.endpoint import EVERY_MECHANISM, PASSWORD, USER, Endpoint, EndpointSettings, Tls, running
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.running import TwinDispatcher
from vmsnap.testing.hyperv.service import User
from vmsnap.testing.world import FakeClock
from vmsnap.virtual import open_virtual


@dataclass
class Site:
    """A simulated host, and the folder of a vmsnap that is to reach it."""

    folder: Path
    machine: HyperVHost
    authority: certificates.Authority

    @contextmanager
    def endpoint(self, *, certificate: Path | None = None, may_connect: bool = True) -> Iterator[Endpoint]:
        settings = EndpointSettings(
            users={USER: User(password=PASSWORD, may_connect=may_connect)},
            mechanisms=EVERY_MECHANISM,
            tls=Tls(certificate=certificate or self.authority.issue("127.0.0.1")),
        )
        with running(TwinDispatcher(self.machine), settings=settings) as endpoint:
            yield endpoint

    def settings(self, *, port: int, password: str = PASSWORD, more: str = "") -> Settings:
        credential = self.folder / "hyperv.toml"
        credential.write_text(f'user = "{USER}"\npassword = "{password}"\n')
        credential.chmod(0o600)
        file = self.folder / "vmsnap.toml"
        exports = EXPORTS.replace("\\", "\\\\")
        file.write_text(
            f'hypervisor = "hyperv"\n[store]\npath = "{self.folder}"\n[hyperv]\nhost = "127.0.0.1"\nport = {port}\n'
            f'credential = "{credential}"\nauthority = "{self.authority.path}"\nexport_folder = "{exports}"\n'
            f'export_mounted = "{self.machine.files.local(EXPORTS)}"\nconnect_timeout = "2s"\n{more}'
        )
        return load_settings(file)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(folder=tmp_path, machine=make_host(tmp_path / "host"), authority=certificates.authority(tmp_path))


def look(settings: Settings) -> tuple[Finding, ...]:
    return open_virtual(settings, clock=FakeClock()).hypervisor.host_findings()


@pytest.mark.parametrize("authentication", ["negotiate", "ntlm", "basic", "credssp"])
def test_a_host_that_is_as_it_should_be(site: Site, authentication: str) -> None:
    with site.endpoint() as endpoint:
        found = look(site.settings(port=endpoint.port, more=f'authentication = "{authentication}"\n'))
    assert [finding for finding in found if finding.severity is Severity.REFUSAL] == []
    assert found[0].check == "hyper-v"


def _expired(site: Site) -> AbstractContextManager[Endpoint]:
    return site.endpoint(certificate=site.authority.issue("127.0.0.1", days=-2))


def _without_rights(site: Site) -> AbstractContextManager[Endpoint]:
    return site.endpoint(may_connect=False)


@pytest.mark.parametrize(
    ("reach", "keys", "words"),
    [
        (Site.endpoint, {"password": "Wrong-1"}, "refuses the login"),
        (Site.endpoint, {"more": 'configuration = "vmsnap"\n'}, "no session configuration 'vmsnap'"),
        (_expired, {}, "has expired"),
        (_without_rights, {}, "refuses a session"),
    ],
    ids=["wrong password", "no such configuration", "expired certificate", "no right to log in"],
)
def test_a_host_that_cannot_be_used(
    site: Site, reach: Callable[[Site], AbstractContextManager[Endpoint]], keys: dict[str, str], words: str
) -> None:
    with reach(site) as endpoint, pytest.raises(PreconditionError, match=words) as caught:
        look(site.settings(port=endpoint.port, password=keys.get("password", PASSWORD), more=keys.get("more", "")))
    assert caught.value.remedy


def test_winrm_is_off(site: Site) -> None:
    with site.endpoint() as endpoint:
        port = endpoint.port
    with pytest.raises(HostUnreachableError, match="no WinRM answers") as caught:
        look(site.settings(port=port))
    assert "Enable-PSRemoting" in (caught.value.remedy or "")
