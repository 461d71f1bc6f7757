from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vmsnap.config.policies import PolicyBook
from vmsnap.config.problems import allowed_keys, nearest
from vmsnap.config.render import policy_text
from vmsnap.errors import ConfigError, PreconditionError
from vmsnap.model.capture import OnNoConvergence
from vmsnap.model.isolation import Rung
from vmsnap.model.policy import (
    CapturePolicy,
    ClusterPolicy,
    ControlPolicy,
    DatabasePolicy,
    EnvironmentPolicy,
    IsolationPolicy,
    Policy,
    ReplicaPolicy,
    SshPolicy,
    VerifyPolicy,
)
from vmsnap.model.retention_policy import Counting, RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy

CLUSTER = "[[database.clusters]]\ndata_directory = '/x'\nprograms = '/y'\n"
EXAMPLES = Path(__file__).parents[2] / "policies"


def book(folder: Path, **files: str) -> PolicyBook:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return PolicyBook(folder)


def refused(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        book(folder, db=text).get("db")
    assert caught.value.remedy
    return caught.value


def test_an_empty_file_takes_every_default(tmp_path: Path) -> None:
    assert book(tmp_path, db1="").get("db1") == Policy(guest="db1")


def test_the_guest_may_be_named_in_the_file(tmp_path: Path) -> None:
    policies = book(tmp_path, anything="guest = \"a/b <&> 'c'\"\n")
    assert policies.get("a/b <&> 'c'").guest == "a/b <&> 'c'"
    with pytest.raises(PreconditionError):
        policies.get("anything")


@pytest.mark.parametrize("stem", ["a%2Fb", " db", "db ", "d\x07b"])
def test_a_file_name_that_cannot_be_a_guest_needs_the_key(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.toml"
    path.write_text("")
    (check,) = PolicyBook(tmp_path).check()
    assert check.guest is None
    assert check.error is not None
    assert "guest = " in (check.error.remedy or "")
    path.write_text('guest = "real"')
    assert PolicyBook(tmp_path).get("real").guest == "real"


@pytest.mark.parametrize("stem", ["two words", "datenbänk", "a.b", "x'y\"z", "<&>"])
def test_other_file_names_are_the_guest(tmp_path: Path, stem: str) -> None:
    (tmp_path / f"{stem}.toml").write_text("")
    assert PolicyBook(tmp_path).get(stem).guest == stem


def test_two_files_for_one_guest_are_wrong_both(tmp_path: Path) -> None:
    policies = book(tmp_path, a='guest = "db"', db="", other="")
    with pytest.raises(ConfigError, match=r"two files are for guest 'db': .*a\.toml' and .*db\.toml'"):
        policies.get("db")
    assert [check.error is None for check in policies.check()] == [False, False, True]
    assert policies.get("other").guest == "other"


def test_an_unknown_guest_names_the_nearest_and_all(tmp_path: Path) -> None:
    policies = book(tmp_path, orders="", billing="", broken="x = ")
    with pytest.raises(PreconditionError) as caught:
        policies.get("ordres")
    assert caught.value.brief == "guest 'ordres' has no policy"
    assert "did you mean 'orders'?" in (caught.value.remedy or "")
    assert "billing, broken, orders" in (caught.value.details or "")


def test_a_broken_file_stops_its_own_guest_only(tmp_path: Path) -> None:
    policies = book(tmp_path, good="", broken="x = ", named='guest = "n"\nx = 1\n')
    assert policies.get("good").guest == "good"
    for guest in ("broken", "n"):
        with pytest.raises(ConfigError):
            policies.get(guest)
    assert [check.guest for check in policies.check() if check.error is not None] == ["broken", "n"]


def test_files_are_looked_at_by_name_and_other_files_left_alone(tmp_path: Path) -> None:
    policies = book(tmp_path, b='guest = "z"', c="")
    for name in (".hidden.toml", "notes.txt", "old.toml~"):
        (tmp_path / name).write_text("not = toml = at all")
    assert [check.guest for check in policies.check()] == ["z", "c"]


def test_a_change_counts_at_once(tmp_path: Path) -> None:
    policies = book(tmp_path, db="")
    assert policies.get("db").enabled
    book(tmp_path, db="enabled = false")
    assert not policies.get("db").enabled


def test_a_missing_or_open_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no policy folder") as caught:
        PolicyBook(tmp_path / "none").check()
    assert "mkdir" in (caught.value.remedy or "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        PolicyBook(tmp_path / "file").check()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="everybody may write"):
        PolicyBook(tmp_path / "open").check()


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    policies = book(tmp_path, db="")
    (tmp_path / "db.toml").chmod(0o646)
    with pytest.raises(ConfigError, match="everybody may write"):
        policies.get("db")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enabld = true", "1: enabld: unknown key; did you mean 'enabled'?"),
        ('enabled = "yes"', '1: enabled: given "yes"; allowed: true or false, without quotes'),
        ("[capture]\nmax_pause = 500", "2: capture.max_pause: given 500; a duration is a text"),
        ('[capture]\nmax_pause = "5 parsecs"', '2: capture.max_pause: given "5 parsecs"; a duration is a text'),
        ('[capture]\ntimeout = "0s"', '2: capture.timeout: given "0s"; must be more than 0'),
        (
            '[capture]\nmode = "lve"',
            "2: capture.mode: given \"lve\"; allowed: 'live', 'instant', 'boot' or 'auto'; did you mean 'live'?",
        ),
        (
            '[capture]\non_no_convergence = "supsend"',
            (
                "2: capture.on_no_convergence: given \"supsend\"; allowed: 'abort', 'suspend', 'instant' or 'throttle'; "
                "did you mean 'suspend'?"
            ),
        ),
        ("[capture]\nmin_overlay_free_mib = 0", "2: capture.min_overlay_free_mib: given 0; must be at least 1"),
        ("[clone]\ncpu_shares = 300000", "2: clone.cpu_shares: given 300000; must be at most 262144"),
        ('[clone]\ncpu_shares = "64"', '2: clone.cpu_shares: given "64"; a whole number is allowed, without quotes'),
        ("[retention]\nkeep_last = 7.5", "2: retention.keep_last: given 7.5; a whole number is allowed"),
        ("[retention]\nkeep_daily = -1", "2: retention.keep_daily: given -1; must be at least 0"),
        ("[retention]\nkeep_daily = '7'", '2: retention.keep_daily: given "7"; a whole number is allowed'),
        ("[retention]\nkeep_last = 0", "1: retention: every keep_* is 0, so each snapshot would go as soon as"),
        ("[retention]\nkeep_last = 0\nkeep_daily = 0", "1: retention: every keep_* is 0"),
        (
            "[retention]\nkeep_last = 2\nkeep_weekly = 4\nreplace_on_next = true",
            "1: retention: replace_on_next = true contradicts keep_last = 2, keep_weekly = 4: keep one of the two",
        ),
        (
            "[retention]\nmax_age = '30d'",
            "1: retention: max_age says what goes, and nothing says what stays: add keep_last",
        ),
        ("[retention]\nmax_age = '0s'\nkeep_last = 1", '2: retention.max_age: given "0s"; must be more than 0'),
        (
            "[retention]\nkeep_last = 1\nmin_age = '2w'\nmax_age = '1w'",
            "1: retention: min_age 14d is longer than max_age 7d",
        ),
        (
            "[retention]\nkeep_monthly = 12\nmax_age = '30d'",
            "1: retention: keep_monthly = 12 cannot be had with max_age 30d: make max_age longer, or keep_monthly smaller",
        ),
        ("[retention]\nmin_age = '99999999999999w'", '2: retention.min_age: given "99999999999999w"; a duration may'),
        ("[retention]\ncounting = 'inturn'", '2: retention.counting: given "inturn"; allowed: '),
        ("[verify]\nshare_per_day = 1.5", "2: verify.share_per_day: given 1.5; must be at most 1"),
        ("[verify]\nshare_per_day = 0.0001", "1: verify: share_per_day: must be 0 or at least 0.001"),
        ("[replica]\nenabled = 1", "2: replica.enabled: given 1; allowed: true or false"),
        (
            "[replica.retention]\nkeep_last = 0",
            "1: replica.retention: every keep_* is 0, so each snapshot would go as soon as",
        ),
        ("time_zone = 'Europe/Berlim'", '1: time_zone: given "Europe/Berlim"; this system knows no such time zone; '),
        (
            "time_zone = '../../etc/passwd'",
            '1: time_zone: given "../../etc/passwd"; this system knows no such time zone',
        ),
        ("time_zone = 'Europe'", '1: time_zone: given "Europe"; this system knows no such time zone'),
        ("time_zone = ''", '1: time_zone: given ""; this system knows no such time zone'),
        ('[control]\nvia = "ssh"', '1: control: via = "ssh" needs a section [control.ssh] with key_file'),
        ("[control.ssh]\nuser = 'x'", "1: control.ssh.key_file: this key is required"),
        (
            '[control.ssh]\nkey_file = "x"\nhost_ky = "x"',
            "3: control.ssh.host_ky: unknown key; did you mean 'host_key'?",
        ),
        ("[isolation]\nladder = ['none']", "1: isolation: ladder: none is no rung; the rungs are forcerenew, "),
        ("[isolation]\ndeadlines = { by-itself = '2s' }", "1: isolation: deadlines: by-itself is no rung"),
        ("[isolation]\nladder = ['agent', 'agent']", "1: isolation: ladder: a rung is named twice"),
        ("[isolation.deadlines]\nlink-flap = 'soon'", '2: isolation.deadlines.link-flap: given "soon"; '),
        ("[isolation]\nladder = 'link-flap'", '2: isolation.ladder: given "link-flap"; a list in square brackets'),
        ("[isolation]\nladder = ['link-flip']", '2: isolation.ladder[1]: given "link-flip"; allowed: '),
        ("[isolation]\nold_gateway = '1.2.3'", '2: isolation.old_gateway: given "1.2.3"; '),
        (
            f"{CLUSTER}{CLUSTER}port = 70000",
            "7: database.clusters[2].port: given 70000; must be at most 65535",
        ),
        (f"{CLUSTER}prots = 1", "4: database.clusters[1].prots: unknown key; did you mean 'port'?"),
        ("[database]\nbefore_drain = ['systemctl stop x']", '2: database.before_drain[1]: given "systemctl stop x"; '),
        ("[schedule]\nevery = '0s'", '2: schedule.every: given "0s"; must be more than 0'),
        ("[schedule]\nevery = '11000d'", '2: schedule.every: given "11000d"; must be at most 3660d'),
        ("[schedule]\njitter = '25h'", '2: schedule.jitter: given "25h"; must be at most 1d'),
        ("[schedule]\nat = ['2:00']", '2: schedule.at[1]: given "2:00"; a time of day such as "02:00" is allowed'),
        ("[schedule]\nat = ['24:00']", '2: schedule.at[1]: given "24:00"; a time of day such as "02:00" is allowed'),
        ("[schedule]\nat = '02:00'", '2: schedule.at: given "02:00"; a list in square brackets'),
        (
            "[schedule]\nevery = '1d'\nat = ['02:00']",
            "1: schedule: every counts from the newest snapshot, at and calendar",
        ),
        (
            "[schedule]\ncalendar = ['Fri..Mon 1:00']",
            "2: schedule.calendar[1]: given \"Fri..Mon 1:00\"; 'Fri..Mon' goes",
        ),
        (
            "[schedule]\nwindows = ['13-10']",
            "2: schedule.windows[1]: given \"13-10\"; '13': months are from 1 to 12",
        ),
        (
            "[schedule]\nblackouts = ['25:00-26:00']",
            "2: schedule.blackouts[1]: given \"25:00-26:00\"; '25:00-26:00': times go",
        ),
        ("[schedule]\nretry_at_most = '1m'", "1: schedule: retry_at_most must not be less than retry_after"),
        ("[environment]\nttl = 5", "2: environment.ttl: given 5; a duration is a text"),
        ("[environment]\nnetwork = 7", "2: environment.network: given 7; a text in quotes is allowed"),
        ("capture = 5", "1: capture: given 5; a section with keys of its own is allowed"),
    ],
)
def test_an_error_names_line_key_what_was_given_and_what_is_allowed(tmp_path: Path, text: str, said: str) -> None:
    error = refused(tmp_path, text)
    assert error.brief.startswith(f"{tmp_path}/db.toml:{said}")


def test_an_empty_guest_is_refused(tmp_path: Path) -> None:
    (check,) = book(tmp_path, db="guest = ''").check()
    assert check.error is not None
    assert check.error.brief == f'{tmp_path}/db.toml:1: guest: given ""; the text must not be empty'


def test_every_error_of_a_file_is_told(tmp_path: Path) -> None:
    error = refused(tmp_path, "a = 1\nb = 2\n[capture]\nmode = 1\n")
    assert error.brief == f"{tmp_path}/db.toml has 3 errors"
    assert len((error.details or "").splitlines()) == 3


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    assert len(refused(tmp_path, f"[capture]\nmode = '{'x' * 500}'").brief) < len(str(tmp_path)) + 200


def test_nearest_ignores_case_and_knows_when_nothing_is_near() -> None:
    assert nearest("KEEP_LAST", known=["keep_last", "x"]) == "keep_last"
    assert nearest("zebra", known=["keep_last", "x"]) is None


rungs = [rung for rung in Rung if rung not in {Rung.NONE, Rung.BY_ITSELF}]
durations = st.integers(1, 10**9).map(lambda count: timedelta(milliseconds=count))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
paths = texts.map(lambda text: f"/{text}")
policies = st.builds(
    Policy,
    guest=texts,
    enabled=st.booleans(),
    capture=st.builds(
        CapturePolicy,
        max_pause=durations,
        on_no_convergence=st.sampled_from(OnNoConvergence),
        overlay_dir=st.none() | texts,
    ),
    isolation=st.builds(
        IsolationPolicy,
        ladder=st.lists(st.sampled_from(rungs), unique=True).map(tuple),
        deadlines=st.dictionaries(st.sampled_from(rungs), durations),
        static=st.sampled_from(["auto", True, False]),
        old_address=st.none() | st.just(IPv4Interface("192.0.2.1/24")),
        old_gateway=st.none() | st.just(IPv4Address("192.0.2.254")),
    ),
    control=st.builds(ControlPolicy, ssh=st.none() | st.builds(SshPolicy, key_file=texts, host_key=st.none() | texts)),
    database=st.builds(
        DatabasePolicy,
        clusters=st.lists(st.builds(ClusterPolicy, data_directory=paths, programs=paths), max_size=2).map(tuple),
        before_drain=st.lists(st.lists(texts, max_size=3).map(tuple), max_size=2).map(tuple),
    ),
    schedule=st.builds(SchedulePolicy, every=durations)
    | st.builds(
        SchedulePolicy,
        at=st.sampled_from([(), ("02:00", "23:59")]),
        calendar=st.sampled_from([(), ("Mon..Fri 02:00 Europe/Berlin",)]),
        windows=st.sampled_from([(), ("Sat,Sun", "22:00-06:00")]),
        storage=st.none() | texts,
    ),
    time_zone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu"]),
    retention=st.builds(
        RetentionPolicy,
        keep_last=st.integers(1, 99),
        keep_hourly=st.integers(0, 99),
        keep_yearly=st.integers(0, 2),
        counting=st.sampled_from(Counting),
        min_age=st.none().map(lambda _: timedelta(0)) | durations,
    )
    | st.builds(
        RetentionPolicy,
        keep_daily=st.integers(1, 9),
        max_age=st.none() | durations.map(lambda one: one + timedelta(days=9)),
    )
    | st.builds(RetentionPolicy, replace_on_next=st.just(True)),
    replica=st.builds(
        ReplicaPolicy,
        enabled=st.booleans(),
        retention=st.none() | st.builds(RetentionPolicy, keep_daily=st.integers(1, 9)),
    ),
    verify=st.builds(VerifyPolicy, every=durations, share_per_day=st.sampled_from([0.0, 0.001, 0.05, 1.0])),
    environment=st.builds(EnvironmentPolicy, ttl=durations, vcpus=st.none() | st.integers(1, 64)),
)


@given(policies)
def test_a_policy_printed_and_read_again_is_the_same(policy: Policy) -> None:
    assert Policy.model_validate(tomllib.loads(policy_text(policy))) == policy


def test_the_nearest_time_zone_is_named(tmp_path: Path) -> None:
    for name in ("europe/berlin", "Europe/Berlni", "Berlin/Europe/Berlin"):
        assert refused(tmp_path, f"time_zone = '{name}'").brief.endswith("; did you mean 'Europe/Berlin'?")


@pytest.mark.parametrize(
    ("text", "keep_last"),
    [
        ("", 7),
        ("keep_last = 3", 3),
        ("min_age = '30d'", 7),
        ("min_age = '30d'\nmax_age = '30d'", 7),
        ("keep_daily = 7", 0),
        ("keep_daily = 0", 7),
        ("keep_yearly = 1\nkeep_last = 2", 2),
        ("replace_on_next = true", 0),
        ("replace_on_next = true\nkeep_last = 0", 0),
    ],
)
def test_keep_last_gives_way_to_other_rules(tmp_path: Path, text: str, keep_last: int) -> None:
    assert book(tmp_path, db=f"[retention]\n{text}").get("db").retention.keep_last == keep_last


# The examples.


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_is_valid_and_begins_with_an_explanation(path: Path) -> None:
    assert PolicyBook(EXAMPLES).get(path.stem).guest == path.stem
    assert path.read_text().startswith("# ")


def test_all_examples_are_there() -> None:
    assert [check.guest for check in PolicyBook(EXAMPLES).check()] == [
        "big-busy",
        "example-db",
        "postgres-agent",
        "postgres-ssh",
        "windows-hyperv",
    ]


def test_the_full_example_shows_the_real_defaults() -> None:
    assert PolicyBook(EXAMPLES).get("example-db") == Policy(guest="example-db")


def _leaf_keys(model: type[BaseModel], path: tuple[str, ...]) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for name, info in model.model_fields.items():
        inner = allowed_keys(model, (name,))
        if inner:
            section = next(part for part in _models(info.annotation))
            keys += _leaf_keys(section, (*path, name))
        else:
            keys.append((*path, name))
    return keys


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _uncommented() -> str:
    """Return the full example with the keys and sections in its comments made real."""
    text = (EXAMPLES / "example-db.toml").read_text().replace("clusters = []\n", "")
    return re.sub(r"^# (?=\[|[a-z_]+ = )", "", text, flags=re.MULTILINE)


def test_the_full_example_has_every_key_there_is() -> None:
    data = tomllib.loads(_uncommented())
    Policy.model_validate(data)

    def has(path: tuple[str, ...]) -> bool:
        value: Any = data
        for part in path:
            value = value[0] if isinstance(value, list) else value
            if part not in value:
                return False
            value = value[part]
        return True

    keys = _leaf_keys(Policy, ())
    assert len(keys) > 35
    assert [path for path in keys if not has(path)] == []


def test_every_key_of_the_full_example_is_explained() -> None:
    # A key is explained by a comment above it, or by the section's for those that explain themselves.
    plain = {"port", "engine", "data_directory", "keep_last", "vcpus", "clusters"}
    lines = (EXAMPLES / "example-db.toml").read_text().splitlines()
    for number, line in enumerate(lines):
        key = re.match(r"(?:# )?([a-z_]+) = ", line)
        if key and key[1] not in plain:
            above = lines[number - 1]
            assert above.startswith("# "), f"nothing explains {key[1]}"
            assert not re.match(r"# [a-z_]+ = ", above), f"nothing explains {key[1]}"


def test_commented_defaults_of_sections_are_the_real_ones() -> None:
    data = tomllib.loads(_uncommented())
    ssh = SshPolicy(key_file=data["control"]["ssh"]["key_file"])
    assert {name: data["control"]["ssh"][name] for name in ("user", "port")} == {"user": ssh.user, "port": ssh.port}
    cluster = ClusterPolicy(data_directory="/x", programs="/y")
    shown = data["database"]["clusters"][0]
    assert (shown["user"], shown["port"]) == (cluster.user, cluster.port)


def test_the_operators_guide_names_every_key_with_its_default() -> None:
    guide = (EXAMPLES.parent / "docs" / "operators-guide.md").read_text().split("## Policies", maxsplit=1)[1]
    shown: dict[tuple[str, ...], str] = {}
    section_shown: tuple[str, ...] = ()
    for header, names, default in re.findall(
        r"^\| (?:\*\*`\[([a-z.]+)\]`\*\* \||(`.*?) \| (.*?) \|)", guide, re.MULTILINE
    ):
        section_shown = tuple(header.split(".")) if header else section_shown
        shown |= {(*section_shown, key): default for key in re.findall(r"`([a-z_]+)`", names)}
    data = Policy(guest="x").model_dump(mode="json")
    for *sections, key in _leaf_keys(Policy, ()):
        told = shown.get((*sections, key), "")
        # Some keys of [environment.dns] are told in passing.
        in_passing = "dns" in sections and f"`{key}`" in guide
        assert told or in_passing or "clusters" in sections, f"the guide does not name {key}"
        value: Any = data
        for part in sections:
            value = (value or {}).get(part) if isinstance(value, dict) else None
        if not isinstance(value, dict) or key == "guest":
            continue  # the keys of sections that are not there by default
        default = value[key]
        if default is None:
            assert told.startswith("not set"), key
        else:
            stated = tomllib.loads(f"x = {told.strip('`')}")["x"]
            section = dict(Policy(guest="x"))[sections[0]] if sections else Policy(guest="x")
            same = type(section).model_validate({**section.model_dump(), key: stated})
            assert same == section, key
