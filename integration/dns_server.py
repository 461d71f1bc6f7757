"""A BIND of a test's own: a child process with its zone, its key and its configuration in a folder of the test."""

from __future__ import annotations

import base64
import secrets
import shutil
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rdatatype
import dns.tsig
import dns.update

from vmsnap.ports.names import DnsZone

ZONE = "test.example"
FOREIGN_ZONE = "production.example"
KEY = "vmsnap"
ADMINISTRATOR = "administrator"
_PORT = 5353
_START_SECONDS = 30.0
_CONFIGURATION = """
options {{
    directory "{folder}";
    pid-file none;
    session-keyfile none;
    listen-on port {port} {{ 127.0.0.1; }};
    listen-on-v6 {{ none; }};
    recursion no;
    dnssec-validation no;
    notify no;
}};
controls {{ }};
key "{key}" {{ algorithm hmac-sha256; secret "{secret}"; }};
key "{administrator}" {{ algorithm hmac-sha256; secret "{secret}"; }};
zone "{zone}" {{
    type primary;
    file "{zone}.zone";
    update-policy {{ grant {key} zonesub A TXT; grant {administrator} zonesub ANY; }};
}};
zone "{foreign}" {{ type primary; file "{foreign}.zone"; update-policy {{ grant {administrator} zonesub ANY; }}; }};
"""
_ZONE_FILE = "$TTL 60\n@ IN SOA ns.{zone}. admin.{zone}. 1 3600 600 86400 60\n@ IN NS ns.{zone}.\nns IN A 127.0.0.1\n"


class Bind:
    """Starts with the object, on loopback of the calling thread's network; ``close`` ends it."""

    def __init__(self, folder: Path) -> None:
        self._secret = base64.b64encode(secrets.token_bytes(32)).decode()
        self.key_file = self._key_file(folder / "dns.key", secret=self._secret)
        self._wrong_key_file = self._key_file(
            folder / "wrong.key", secret=base64.b64encode(secrets.token_bytes(32)).decode()
        )
        for zone in (ZONE, FOREIGN_ZONE):
            (folder / f"{zone}.zone").write_text(_ZONE_FILE.format(zone=zone))
        configuration = folder / "named.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                folder=folder, port=_PORT, key=KEY, administrator=ADMINISTRATOR, secret=self._secret,
                zone=ZONE, foreign=FOREIGN_ZONE,
            )
        )  # fmt: skip
        # A copy, because AppArmor's profile of the installed program does not let it read a test's folder.
        program = shutil.copy("/usr/sbin/named", folder)
        self._log = folder / "named.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-g", "-4", "-n", "1", "-c", str(configuration)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._wait()

    @property
    def zone(self) -> DnsZone:
        return DnsZone(
            zone=ZONE,
            server=IPv4Address("127.0.0.1"),
            port=_PORT,
            key_name=KEY,
            key_file=str(self.key_file),
            algorithm="hmac-sha256",
        )

    def wrong_key(self) -> DnsZone:
        return self.zone.model_copy(update={"key_file": str(self._wrong_key_file)})

    def unknown_key(self) -> DnsZone:
        return self.zone.model_copy(update={"key_name": "nobody"})

    def foreign_zone(self) -> DnsZone:
        return self.zone.model_copy(update={"zone": FOREIGN_ZONE})

    def records(self, name: str, kind: str = "A") -> tuple[str, ...]:
        """Return what the server itself says of a name."""
        answer = self._ask(name, kind)
        return tuple(sorted(record.to_text() for group in answer.answer for record in group))

    def ttl(self, name: str) -> int:
        return int(self._ask(name, "A").answer[0].ttl)

    def add(self, name: str, kind: str, text: str) -> None:
        """Add a record, as the zone's administrator."""
        update = dns.update.UpdateMessage(ZONE)
        update.add(f"{name}.", 60, kind, text)
        name_of_key = dns.name.from_text(ADMINISTRATOR)
        key = dns.tsig.Key(name_of_key, base64.b64decode(self._secret), dns.tsig.HMAC_SHA256)
        update.use_tsig({name_of_key: key})
        assert dns.query.tcp(update, "127.0.0.1", port=_PORT, timeout=5).rcode() == 0

    def stop(self) -> None:
        """End it. May be repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)

    def _ask(self, name: str, kind: str) -> dns.message.Message:
        return dns.query.udp(dns.message.make_query(f"{name}.", kind), "127.0.0.1", port=_PORT, timeout=5)

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                dns.query.udp(dns.message.make_query(f"{ZONE}.", "SOA"), "127.0.0.1", port=_PORT, timeout=0.3)
            except (dns.exception.DNSException, OSError):
                if self._process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    raise AssertionError(f"BIND does not answer:\n{self._log.read_text()}") from None
                time.sleep(0.05)
            else:
                return

    @staticmethod
    def _key_file(path: Path, *, secret: str) -> Path:
        path.write_text(f"{secret}\n")
        path.chmod(0o600)
        return path
