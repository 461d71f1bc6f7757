from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.config.keylines import KeyPath, key_lines
from vmsnap.config.settings import load_settings, settings_path
from vmsnap.errors import ConfigError

REPLICA = '[store]\npath = "/a"\n[replica]\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "vmsnap.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path | None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert caught.value.remedy
    return caught.value


def test_two_lines_are_enough(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, '[store]\npath = "/srv/vmsnap"\n'))
    assert settings.store.path == Path("/srv/vmsnap")
    assert not settings.store.allow_copies
    assert settings.state.path == Path("/var/lib/vmsnap")
    assert settings.runtime.path == Path("/run/vmsnap")
    assert settings.libvirt.uri == "qemu:///system"
    assert settings.policies == tmp_path / "policies"


def test_every_key_can_be_set(tmp_path: Path) -> None:
    text = """
        policies = "/elsewhere"
        hypervisor = "hyperv"
        [hyperv]
        host = "hv1"
        port = 5985
        tls = false
        authentication = "kerberos"
        credential = "hv1"
        guest_credential = "/h"
        authority = "/i"
        certificate = "/j"
        key = "/k"
        configuration = "vmsnap"
        connect_timeout = "5s"
        operation_timeout = "30s"
        export_folder = 'E:\\exports'
        export_mounted = "/l"
        responder_vm = "clones-dhcp"
        [store]
        path = "/a"
        allow_copies = true
        [state]
        path = "/b"
        [runtime]
        path = "/c"
        [libvirt]
        uri = "qemu+unix:///system?socket=/d"
        [isolation]
        service_network = "100.64.0.0/24"
        [limits]
        runs_per_host = 3
        runs_per_storage = 2
        clones_per_host = 6
        [daemon]
        tick = "10s"
        reconcile_every = "1m"
        prune_every = "2h"
        collect_every = "2d"
        stop_deadline = "3m"
        [metrics]
        listen = "[::1]:9642"
        textfile = "/e/vmsnap.prom"
        [notifications]
        urls = ["json://user:secret@192.0.2.1/x"]
        credential = "notifications"
        dead_man_url = "https://ping.example/secret"
        dead_man_method = "POST"
        remind_after = "never"
        at_most_every = "10m"
        timeout = "5s"
        [replica]
        kind = "s3"
        bucket = "backups.example"
        prefix = "site-a/x"
        endpoint = "https://s3.example.org:9000"
        region = "eu-central-1"
        ca_file = "/f/ca.pem"
        path_style = false
        checksums = true
        storage_class = "STANDARD_IA"
        kms_key = "arn:aws:kms:x"
        object_lock = "compliance"
        credential = "s3"
        encryption_credential = "/g"
        bandwidth_mib_s = 50
        connections = 4
        timeout = "30s"
        retry_for = "1h"
        """
    settings = load_settings(write(tmp_path, text))
    assert settings.model_dump(mode="json") == {
        "policies": "/elsewhere",
        "store": {"path": "/a", "allow_copies": True},
        "state": {"path": "/b"},
        "runtime": {"path": "/c"},
        "libvirt": {"uri": "qemu+unix:///system?socket=/d"},
        "isolation": {"service_network": "100.64.0.0/24"},
        "limits": {"runs_per_host": 3, "runs_per_storage": 2, "clones_per_host": 6},
        "daemon": {
            "tick": "10s",
            "reconcile_every": "1m",
            "prune_every": "2h",
            "collect_every": "2d",
            "stop_deadline": "3m",
        },
        "metrics": {"listen": "[::1]:9642", "textfile": "/e/vmsnap.prom"},
        "notifications": {
            "urls": ["**********"],
            "credential": "notifications",
            "dead_man_url": "**********",
            "dead_man_method": "POST",
            "remind_after": None,
            "at_most_every": "10m",
            "timeout": "5s",
        },
        "replica": {
            "kind": "s3",
            "path": None,
            "bucket": "backups.example",
            "prefix": "site-a/x",
            "endpoint": "https://s3.example.org:9000",
            "region": "eu-central-1",
            "ca_file": "/f/ca.pem",
            "path_style": False,
            "checksums": True,
            "storage_class": "STANDARD_IA",
            "kms_key": "arn:aws:kms:x",
            "object_lock": "compliance",
            "credential": "s3",
            "encryption_credential": "/g",
            "bandwidth_mib_s": 50,
            "connections": 4,
            "timeout": "30s",
            "retry_for": "1h",
        },
        "hypervisor": "hyperv",
        "hyperv": {
            "host": "hv1",
            "port": 5985,
            "tls": False,
            "authentication": "kerberos",
            "credential": "hv1",
            "guest_credential": "/h",
            "authority": "/i",
            "certificate": "/j",
            "key": "/k",
            "configuration": "vmsnap",
            "connect_timeout": "5s",
            "operation_timeout": "30s",
            "export_folder": "E:\\exports",
            "export_mounted": "/l",
            "responder_vm": "clones-dhcp",
        },
    }
    assert "secret" not in repr(settings)


def test_a_folder_is_a_replica_in_two_lines(tmp_path: Path) -> None:
    replica = load_settings(write(tmp_path, REPLICA + 'kind = "directory"\npath = "/mnt/nas"\n')).replica
    assert replica is not None
    assert replica.path == Path("/mnt/nas")


def test_the_file_is_named_by_option_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMSNAP_CONFIG", raising=False)
    assert settings_path(None) == Path("/etc/vmsnap/vmsnap.toml")
    monkeypatch.setenv("VMSNAP_CONFIG", "/from/environment.toml")
    assert settings_path(None) == Path("/from/environment.toml")
    assert settings_path(Path("/from/option.toml")) == Path("/from/option.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": store: this key is required"),
        ("[store]\n", ":1: store.path: this key is required"),
        (
            '\n[store]\npth = "/a"\npath = "/b"\n',
            ":3: store.pth: unknown key; did you mean 'path'? (allowed here: path,",
        ),
        ('[store]\npath = "relative/x"\n', ':2: store.path: given "relative/x"; an absolute path is allowed'),
        ('[store]\npath = "/a"\nallow_copies = "yes"\n', ':3: store.allow_copies: given "yes"; allowed: true or false'),
        ("[store]\npath = 5\n", ":2: store.path: given 5; a text in quotes is allowed"),
        ('store = "/a"\n', ':1: store: given "/a"; a section with keys of its own is allowed'),
        ('[store]\npath = "/a"\n[libvrt]\nuri = "x"\n', ":3: libvrt: unknown key; did you mean 'libvirt'?"),
        ('[store]\npath = "/a"\n[libvirt]\nuri = ""\n', ':4: libvirt.uri: given ""; the text must not be empty'),
        (
            '[store]\npath = "/a"\n[isolation]\nservice_network = "198.18.0.1/32"\n',
            ':4: isolation.service_network: given "198.18.0.1/32"; a network with room for pairs of addresses',
        ),
        (
            '[store]\npath = "/a"\n[isolation]\nservice_network = "198.18.0.1/15"\n',
            ':4: isolation.service_network: given "198.18.0.1/15"',
        ),
        ('[store]\npath = "/a\n', ":2:11: not valid TOML: "),
        ("[store\n", ":1:7: not valid TOML: "),
        ("a = 1\na = 2\n", ":2:6: not valid TOML: cannot overwrite a value"),
        ("[store]\npath =", ":2:7: not valid TOML: invalid value"),
        (b'[store]\npath = "/\xff"\n', ":2: not UTF-8 (byte 0xff at offset 17)"),
        ('[store]\npath = "/a"\n[metrics]\nlisten = "localhost:9"\n', ':4: metrics.listen: given "localhost:9"; an IP'),
        ('[store]\npath = "/a"\n[metrics]\nlisten = "127.0.0.1:0"\n', ':4: metrics.listen: given "127.0.0.1:0"; an IP'),
        ('[store]\npath = "/a"\n[metrics]\nlisten = "::1:9642"\n', ':4: metrics.listen: given "::1:9642"; an IP'),
        (
            '[store]\npath = "/a"\n[metrics]\ntextfile = "/a/b.txt"\n',
            ':4: metrics.textfile: given "/a/b.txt"; node_exporter reads files whose names end in .prom',
        ),
        (
            '[store]\npath = "/a"\n[notifications]\nat_most_every = "1s"\n',
            ':4: notifications.at_most_every: given "1s"; must be at least 1m',
        ),
        (REPLICA + 'kind = "nfs"\n', ":4: replica.kind: given \"nfs\"; allowed: 's3' or 'directory'"),
        (REPLICA + 'kind = "s3"\n', ':3: replica: kind = "s3" needs the key bucket'),
        (REPLICA + 'kind = "directory"\n', ':3: replica: kind = "directory" needs the key path'),
        (REPLICA + 'kind = "s3"\nbucket = "abc"\npath = "/a"\n', ':3: replica: kind = "s3" has no path'),
        (
            REPLICA + 'kind = "directory"\npath = "/a"\nbucket = "abc"\ncredential = "/b"\n',
            ':3: replica: kind = "directory" has no bucket, credential',
        ),
        (REPLICA + 'kind = "s3"\nbucket = "No"\n', ':5: replica.bucket: given "No"; the name of a bucket is allowed: '),
        (REPLICA + 'kind = "s3"\nprefix = "a//b"\n', ':5: replica.prefix: given "a//b"; letters, digits, '),
        (REPLICA + 'kind = "s3"\nprefix = "../a"\n', ':5: replica.prefix: given "../a"; letters, digits, '),
        (REPLICA + 'kind = "s3"\nendpoint = "host"\n', ':5: replica.endpoint: given "host"; an URL without a path is'),
        (
            REPLICA + 'kind = "s3"\nbucket = "abc"\nendpoint = "http://h"\nca_file = "/a"\n',
            ":3: replica: ca_file is of no use with an endpoint that begins with http:",
        ),
        (
            REPLICA + 'kind = "s3"\nstorage_class = "DEEP_ARCHIVE"\n',
            ':5: replica.storage_class: given "DEEP_ARCHIVE"; a cl',
        ),
        (REPLICA + 'kind = "s3"\nretry_for = "2d"\n', ':5: replica.retry_for: given "2d"; must be at most 1d'),
        (REPLICA + 'kind = "s3"\nsecret_key = "x"\n', ":5: replica.secret_key: unknown key"),
    ],
)
def test_an_error_names_file_line_key_and_what_is_allowed(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write(tmp_path, text)
    assert refused(path).brief.startswith(f"{path}{said}")


def test_several_errors_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, '[store]\npath = 5\n[state]\npath = "x"\n')
    error = refused(path)
    assert error.brief == f"{path} has 2 errors"
    assert [line.split(": ")[0] for line in (error.details or "").splitlines()] == [f"{path}:2", f"{path}:4"]


def test_a_syntax_error_shows_the_place(tmp_path: Path) -> None:
    assert refused(write(tmp_path, "[store]\npath = oops\n")).details == "path = oops\n       ^"


def test_a_missing_file_says_how_to_begin(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.toml")
    assert error.brief == f"there is no file '{tmp_path}/none.toml'"
    assert "[store]" in (error.remedy or "")


def test_a_folder_a_pipe_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path).brief
    os.mkfifo(tmp_path / "pipe")
    assert "is no plain file" in refused(tmp_path / "pipe").brief
    assert "larger than 1 MiB" in refused(write(tmp_path, b"#" * (1 << 20) + b"\n")).brief


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '[store]\npath = "/a"\n')
    path.chmod(0o666)
    error = refused(path)
    assert "everybody may write" in error.brief
    assert error.remedy == f"run: chmod o-w '{path}'"


def test_a_byte_order_mark_and_dos_lines_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf[store]\r\npath = "/a"\r\nx = 1\r\n')
    assert refused(path).brief.startswith(f"{path}:3: store.x: unknown key")


TRICKY = """\
a = 1
"quoted.key" = \"\"\"multi
line ""quote"" # no comment
[not a section]\"\"\"
'single' = '''
[x]
'''
[capture]   # comment with [brackets]
max_pause = "x # y"
list = [ # [
  1, "]",
  { k = "}" },
]
b . c . "d e" = 3
[[database.clusters]]
port = 1

[[ database . clusters ]]
port = { x = 1, y = "}" }
[database.clusters.sub]
k = "escaped \\" [quote]"
[ x . "y z" ]
'lit\\' = 5
last = 1979-05-27T07:32:00Z"""


def test_lines_of_keys_in_a_tricky_file() -> None:
    tomllib.loads(TRICKY)
    assert key_lines(TRICKY).lines == {
        ("a",): 1,
        ("quoted.key",): 2,
        ("single",): 5,
        ("capture",): 8,
        ("capture", "max_pause"): 9,
        ("capture", "list"): 10,
        ("capture", "b"): 14,
        ("capture", "b", "c"): 14,
        ("capture", "b", "c", "d e"): 14,
        ("database",): 15,
        ("database", "clusters"): 15,
        ("database", "clusters", 0): 15,
        ("database", "clusters", 0, "port"): 16,
        ("database", "clusters", 1): 18,
        ("database", "clusters", 1, "port"): 19,
        ("database", "clusters", 1, "sub"): 20,
        ("database", "clusters", 1, "sub", "k"): 21,
        ("x",): 22,
        ("x", "y z"): 22,
        ("x", "y z", "lit\\"): 23,
        ("x", "y z", "last"): 24,
    }


def test_a_key_inside_a_value_has_the_line_of_the_value() -> None:
    lines = key_lines(TRICKY)
    assert lines.find(("database", "clusters", 1, "port", "y")) == 19
    assert lines.find(("capture", "list", 2, "k")) == 10
    assert lines.find(("nowhere",)) is None


names = st.text(alphabet="abc-_019", min_size=1, max_size=6)
values = st.sampled_from(
    ["1", '"x"', "'#'", '"[a]"', "[1, [2], 3]", "[\n1, # ]\n2\n]", '"""\na = 1\n[b]\n"""', "{ a = 1, b = [1] }", "true"]
)


@given(st.lists(st.tuples(st.booleans(), names, values), max_size=15, unique_by=lambda item: item[1]))
def test_every_key_of_any_file_has_the_line_it_stands_on(items: list[tuple[bool, str, str]]) -> None:
    text = ""
    expected: dict[KeyPath, int] = {}
    section: KeyPath = ()
    for is_section, name, value in items:
        line = text.count("\n") + 1
        if is_section:
            section = (f"s-{name}",)
            text += f"[s-{name}] # note\n\n"
            expected[section] = line
        else:
            text += f"  {name} = {value} # note = 1\n"
            expected[(*section, name)] = line
    tomllib.loads(text)
    assert key_lines(text).lines == expected


@pytest.mark.parametrize(
    "line",
    [
        'urls = "slack://t0ken"',
        'urls = [5, "slack://t0ken"]',
        'dead_man_url = ["https://ping.example/t0ken"]',
        'url = ["slack://t0ken"]',
        'urls = ["slack://t0ken]',
        'urls = ["slack://user:t0ken@host/t0ken", ',
        'dead_man_url = "https://ping.example/t0ken" "x"',
    ],
)
def test_no_message_shows_what_stands_in_a_notification_url(tmp_path: Path, line: str) -> None:
    error = refused(write(tmp_path, f'[store]\npath = "/a"\n[notifications]\n{line}\n'))
    assert "t0ken" not in f"{error.brief}{error.details}{error.remedy}"
