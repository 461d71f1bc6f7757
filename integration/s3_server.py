"""A real S3 server, SeaweedFS, on the loopback of whoever starts it, with keys that may write and keys that may only read."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from vmsnap.model.objects import S3Keys

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PATIENCE_SECONDS = 90.0
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
_OFF = ("webdav", "admin.ui", "s3.iam", "master.telemetry", "s3.autoCreateBucket")
_GRPC_DISTANCE = 10000
_BUCKET = "vmsnap-plain"
_LOCKED_BUCKET = "vmsnap-locked"


class S3Server:
    """One server with its data in ``folder``, which outlives it. It can be killed and started again on the same ports."""

    access_key, secret_key = "vmsnap-test", "secret-of-the-writer"
    reader_access_key, reader_secret_key = "vmsnap-reader", "secret-of-the-reader"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._buckets: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "identities.json").write_text(json.dumps(_identities()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def port(self) -> int:
        """Return the port of S3 on 127.0.0.1."""
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def keys(self) -> S3Keys:
        """Return the keys that may write."""
        return S3Keys(access_key=self.access_key, secret_key=self.secret_key)

    def reader_keys(self) -> S3Keys:
        """Return keys that may only read."""
        return S3Keys(access_key=self.reader_access_key, secret_key=self.reader_secret_key)

    def client(self, **settings: Any) -> S3Client:
        """Return an administrator's client. ``settings``: see botocore.config.Config."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, **settings),
        )

    def bucket(self, *, object_lock: bool = False) -> str:
        """Return a bucket for all tests, each of which has a prefix of its own: a bucket takes several files of the server."""
        return self._bucket(self.client(), object_lock=object_lock)

    def start(self) -> None:
        """Start the server and wait until it knows its keys and takes an object."""
        self._process = self._launch()
        until = time.monotonic() + _PATIENCE_SECONDS
        while not (self._answers() and self._takes_an_object()):
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"SeaweedFS did not start: {(self._folder / 'weed.log').read_text()[-4000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server at once, as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        for name, port in self._ports.items():
            # It makes these whatever it is told, and leaves them when it is killed.
            (Path("/tmp") / f"seaweedfs-{name.partition('.')[0]}-grpc-{port + _GRPC_DISTANCE}.sock").unlink(
                missing_ok=True
            )

    def _launch(self) -> subprocess.Popen[bytes]:
        weed = Path(sys.executable).with_name("weed")
        command = [
            str(weed),
            "-logdir",
            str(self._folder),
            "mini",
            f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self._folder / 'identities.json'}",
            f"-s3.localSocket={self._folder / 's3.sock'}",
            f"-filer.localSocket={self._folder / 'filer.sock'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            *(f"-{name}.grpc={port + _GRPC_DISTANCE}" for name, port in self._ports.items()),
            *(f"-{name}=false" for name in _OFF),
        ]
        # Keys of the environment would make a further identity.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with (self._folder / "weed.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, env=environment
            )

    def _answers(self) -> bool:
        """Tell whether S3 knows who asks: anonymous listing is refused, in S3's own words."""
        with suppress(OSError):
            try:
                urllib.request.urlopen(f"{self.endpoint}/", timeout=2).close()  # noqa: S310 - loopback
            except urllib.error.HTTPError as error:
                return b"AccessDenied" in error.read()
        return False

    def _bucket(self, client: S3Client, *, object_lock: bool = False) -> str:
        name = _LOCKED_BUCKET if object_lock else _BUCKET
        if name not in self._buckets:
            # A request that failed and is repeated may have made it.
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=object_lock)
            self._buckets.add(name)
        return name

    def _takes_an_object(self) -> bool:
        # The default waits for a minute and repeats by itself.
        client = self.client(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
        with suppress(ClientError, BotoCoreError):
            bucket = self._bucket(client)
            client.put_object(Bucket=bucket, Key="ready", Body=b"yes")
            client.delete_object(Bucket=bucket, Key="ready")
            return True
        return False


def _identities() -> dict[str, object]:
    def one(name: str, *, access_key: str, secret_key: str, actions: list[str]) -> dict[str, object]:
        credentials = [{"accessKey": access_key, "secretKey": secret_key}]
        return {"name": name, "credentials": credentials, "actions": actions}

    writer = one(
        "writer",
        access_key=S3Server.access_key,
        secret_key=S3Server.secret_key,
        actions=["Admin", "Read", "List", "Tagging", "Write"],
    )
    reader = one(
        "reader",
        access_key=S3Server.reader_access_key,
        secret_key=S3Server.reader_secret_key,
        actions=["Read", "List"],
    )
    return {"identities": [writer, reader]}


def _free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free, and so are those of gRPC that belong to them.

    They are drawn by lot: each server also makes sockets in `/tmp` that are named by its ports, and parts of a server in
    another network namespace would talk to this one's.
    """
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(12000)
        taken = [*found, *(other + _GRPC_DISTANCE for other in found)]
        if not {port, port + _GRPC_DISTANCE} & set(taken) and _is_free(port) and _is_free(port + _GRPC_DISTANCE):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    if list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock")):
        return False
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
