from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vmsnap.config.credentials import guest_accounts_of, host_account_of
from vmsnap.config.settings import HypervSettings, load_settings
from vmsnap.errors import ConfigError

HOST = 'host = "hv1.example.org"\nexport_folder = "D:\\\\vmsnap"\nexport_mounted = "/srv/hv1"\n'


def settings(tmp_path: Path, text: str, *, first: str = 'hypervisor = "hyperv"\n') -> HypervSettings:
    file = tmp_path / "vmsnap.toml"
    file.write_text(f'{first}[store]\npath = "/srv/snapshots"\n{text}')
    loaded = load_settings(file)
    assert loaded.hyperv is not None
    return loaded.hyperv


def test_three_keys_are_enough(tmp_path: Path) -> None:
    made = settings(tmp_path, f"[hyperv]\n{HOST}")
    assert (made.port, made.tls, made.authentication) == (5986, True, "negotiate")
    assert made.export_folder == "D:\\vmsnap"


def test_a_share_may_hold_exports(tmp_path: Path) -> None:
    text = HOST.replace("D:\\\\vmsnap", "\\\\\\\\files\\\\vm$\\\\exports")
    assert settings(tmp_path, f"[hyperv]\n{text}").export_folder == "\\\\files\\vm$\\exports"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs a section"),
        (f'[hyperv]\n{HOST}tls = false\nauthentication = "basic"\ncredential = "hv"\n', "needs tls = true"),
        (f'[hyperv]\n{HOST}authentication = "certificate"\n', "needs the key certificate"),
        (f'[hyperv]\n{HOST}authentication = "ntlm"\n', "needs the key credential"),
        (f"[hyperv]\n{HOST.replace('D:', 'exports')}", "export_folder"),
        (f"[hyperv]\n{HOST.replace('/srv/hv1', 'hv1')}", "export_mounted"),
        (f"[hyperv]\n{HOST}verify = false\n", "verify"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, text)
    assert said in f"{caught.value.brief}\n{caught.value.details}"


def secret(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "secret.toml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_accounts_come_from_files_of_their_own(tmp_path: Path) -> None:
    file = secret(
        tmp_path, 'user = "HV1\\\\vmsnap"\npassword = "pa$$"\n[guests.db1]\nuser = "me"\npassword = "other"\n'
    )
    made = settings(tmp_path, f'[hyperv]\n{HOST}guest_credential = "{file}"\n')
    accounts = guest_accounts_of(made)
    db1, db2 = accounts.of("db1"), accounts.of("db2")
    assert db1 is not None
    assert db2 is not None
    assert (db1.user, db1.password, db2.user, db2.password) == ("me", "other", "HV1\\vmsnap", "pa$$")
    assert "pa$$" not in repr(accounts)
    assert host_account_of(made) is None


def test_an_account_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = secret(tmp_path, 'user = "u"\npassword = "p"\n')
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        host_account_of(settings(tmp_path, f'[hyperv]\n{HOST}credential = "{file}"\n'))


def test_the_operators_guide_names_every_key_with_its_default() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "operators-guide.md").read_text(encoding="utf-8")
    part = guide.partition("### A Hyper-V host")[2].partition("\n### ")[0]
    told = {
        key: default
        for names, default in re.findall(r"^\| (`.*?) \| (.*?) \|", part, re.MULTILINE)
        for key in re.findall(r"`([a-z_]+)`", names)
    }
    assert set(told) == set(HypervSettings.model_fields)
    needed = tomllib.loads(HOST)
    for key, field in HypervSettings.model_fields.items():
        if field.is_required() or field.default is None:
            assert told[key] == ("required" if field.is_required() else "not set"), key
        else:
            stated = tomllib.loads(f"x = {told[key].strip('`')}")["x"]
            assert HypervSettings(**{**needed, key: stated}) == HypervSettings(**needed), key
