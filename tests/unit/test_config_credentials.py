from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.config.credentials import encryption_key_of, s3_keys_of
from vmsnap.config.settings import ReplicaSettings
from vmsnap.errors import ConfigError
from vmsnap.model.objects import S3Keys

KEY = "00112233445566778899aabbccddeeff" * 2


def settings(**keys: str) -> ReplicaSettings:
    return ReplicaSettings.model_validate({"kind": "s3", "bucket": "abc", **keys})


def secret(folder: Path, text: str, *, mode: int = 0o600) -> str:
    path = folder / "secret"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_are_read_anew_each_time_and_shown_by_nothing(tmp_path: Path) -> None:
    path = secret(tmp_path, 'access_key = "AAAA"\nsecret_key = "SSSS"\n')
    first = s3_keys_of(settings(credential=path))
    assert first == S3Keys(access_key="AAAA", secret_key="SSSS")
    assert "AAAA" not in repr(first)
    assert "SSSS" not in repr(first)
    secret(tmp_path, 'access_key = "BBBB"\nsecret_key = "TTTT"\nsession_token = "UUUU"\n')
    second = s3_keys_of(settings(credential=path))
    assert second == S3Keys(access_key="BBBB", secret_key="TTTT", session_token="UUUU")
    assert "UUUU" not in repr(second)


def test_without_a_credential_boto3_looks_for_keys_itself() -> None:
    assert s3_keys_of(settings()) is None
    assert encryption_key_of(settings()) is None


def test_the_key_of_the_packs_is_64_digits(tmp_path: Path) -> None:
    path = secret(tmp_path, f'encryption_key = "{KEY}"\n')
    assert encryption_key_of(settings(encryption_credential=path)) == bytes.fromhex(KEY)


@pytest.mark.parametrize("wrong", [KEY[:-1], KEY + "0", KEY[:-2] + "xy", "", " " * 64])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, wrong: str) -> None:
    path = secret(tmp_path, f'encryption_key = "{wrong}"\n')
    with pytest.raises(ConfigError) as caught:
        encryption_key_of(settings(encryption_credential=path))
    assert "openssl rand -hex 32" in (caught.value.remedy or "")
    assert not wrong.strip() or wrong not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path, 'access_key = "a"\nsecret_key = "b"\n', mode=mode)
    with pytest.raises(ConfigError, match="holds secrets, and others may read it"):
        s3_keys_of(settings(credential=path))


def test_a_wrong_file_is_told_without_its_secrets(tmp_path: Path) -> None:
    path = secret(tmp_path, 'access_key = 5\nsecret_key = "hush-hush"\nsession_tokn = "quiet"\n')
    with pytest.raises(ConfigError) as caught:
        s3_keys_of(settings(credential=path))
    told = f"{caught.value.brief} {caught.value.details}"
    assert "access_key" in told
    assert "did you mean 'session_token'?" in told
    assert "hush" not in told
    assert "quiet" not in told


def test_a_missing_file_and_a_credential_that_nobody_handed_over_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        s3_keys_of(settings(credential=str(tmp_path / "none")))
    assert "secret_key" in (caught.value.remedy or "")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match=r"replica\.credential: this process was given no systemd credential 's3'"):
        s3_keys_of(settings(credential="s3"))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "s3").write_text('access_key = "a"\nsecret_key = "b"\n')
    assert s3_keys_of(settings(credential="s3")) is not None
