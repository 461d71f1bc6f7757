"""The transport against an endpoint that speaks WinRM, with unmodified pypsrp between them."""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import spnego.exceptions

from tests.unit.hyperv_endpoint import ECHO, FAIL, GRUMBLE, LINGER, SOON, Host, connection
from vmsnap.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    DriverError,
    HostUnreachableError,
    PreconditionError,
    UnknownOutcomeError,
)
from vmsnap.hypervisors.hyperv import transport as transport_module
from vmsnap.hypervisors.hyperv.connection import Authentication, HostConnection, Login, Parameter
from vmsnap.hypervisors.hyperv.refusals import Stage, translate
from vmsnap.hypervisors.hyperv.transport import Outcome, Script, Transport
from vmsnap.testing.cancels import CancelledAtOnce
from vmsnap.testing.hyperv import certificates
from vmsnap.testing.hyperv.endpoint import EVERY_MECHANISM, PASSWORD, USER, Endpoint, EndpointSettings, Tls, running
from vmsnap.testing.hyperv.service import Quotas, User
from vmsnap.testing.hyperv.wirefaults import Harm, WireFault

HOSTILE = 'it\'s "$(Remove-VM *)`n" ${x} ; | & % \u201equoted\u201c\r\n\ttab \N{SNOWMAN} _x000A_ <&>'


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def endpoint(host: Host) -> Iterator[Endpoint]:
    with running(host.dispatch) as endpoint:
        yield endpoint


@pytest.fixture
def transport(endpoint: Endpoint) -> Iterator[Transport]:
    transport = Transport(connection(endpoint))
    yield transport
    transport.close()


@contextmanager
def reached(settings: HostConnection) -> Iterator[Transport]:
    transport = Transport(settings)
    try:
        yield transport
    finally:
        transport.close()


def ask(settings: HostConnection, **parameters: Parameter) -> Outcome:
    transport = Transport(settings)
    try:
        return transport.run(ECHO, parameters=parameters, timeout=SOON)
    finally:
        transport.close()


def _refusal(settings: HostConnection) -> str:
    """Return what is said of a login that is refused. requests-credssp leaves its socket to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(PreconditionError) as caught:
            ask(settings)
        said = f"{caught.value.brief} {caught.value.details} {caught.value.remedy}"
        del caught
        gc.collect()
    return said


class TestScripts:
    def test_a_script_gets_its_parameters_as_they_are(self, host: Host, transport: Transport) -> None:
        parameters: dict[str, Parameter] = {
            "Text": HOSTILE,
            "Number": 1 << 40,
            "Truth": False,
            "List": ["a", HOSTILE],
            "Nothing": "",
        }
        outcome = transport.run(ECHO, parameters=parameters, timeout=SOON)
        assert outcome.errors == ()
        assert dict(host.asked[0].call.parameters) == {**parameters, "List": ("a", HOSTILE)}
        assert host.asked[0].call.is_script

    def test_a_long_script_arrives_whole(self, host: Host, transport: Transport) -> None:
        text = "# " + "\N{LATIN SMALL LETTER O WITH DIAERESIS}x" * 350_000
        assert transport.run(Script(text=text), parameters={}, timeout=SOON).rows[0]["Text"] == text

    def test_a_function_is_called_by_its_name(self, host: Host, transport: Transport) -> None:
        transport.run(Script(text="Invoke-It", is_name=True), parameters={"A": 1}, timeout=SOON)
        assert not host.asked[0].call.is_script

    def test_an_error_that_ends_the_script_is_a_result(self, transport: Transport) -> None:
        outcome = transport.run(FAIL, parameters={}, timeout=SOON)
        (record,) = outcome.errors
        assert (record.reason, record.cmdlet, set(record.codes)) == ("OperationFailed", "ExportVM", {0x80131500})
        assert record.message == "Der Vorgang ist fehlgeschlagen."

    def test_an_error_that_does_not_end_the_script_is_seen_too(self, transport: Transport) -> None:
        outcome = transport.run(GRUMBLE, parameters={}, timeout=SOON)
        assert outcome.rows == ({"Done": True},)
        assert 0x80070070 in outcome.errors[0].codes

    def test_a_password_crosses_sealed(self, host: Host, transport: Transport) -> None:
        login = Login(user="guest\\me", password="pass:wörd")
        transport.run(ECHO, parameters={"Credential": login}, timeout=SOON)
        sent = host.asked[0].call.parameters["Credential"]
        assert repr(sent) == "Credential(user='guest\\\\me', secret=Secret())"
        assert sent.secret.text == "pass:wörd"  # type: ignore[union-attr]

    def test_many_scripts_use_one_session_and_leave_none(self, host: Host) -> None:
        with running(host.dispatch, settings=EndpointSettings(quotas=Quotas(max_shells=1, max_commands=2))) as endpoint:
            with reached(connection(endpoint)) as transport:
                for _ in range(8):
                    transport.run(ECHO, parameters={}, timeout=SOON)
                assert endpoint.log.count("Create") == 1
            assert endpoint.service.open_shells == 0

    def test_threads_have_a_session_each(self, host: Host, endpoint: Endpoint, transport: Transport) -> None:
        threads = [
            threading.Thread(target=transport.run, args=(ECHO,), kwargs={"parameters": {}, "timeout": SOON})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(host.asked) == 4
        transport.close()
        assert endpoint.service.open_shells == 0


class TestEnding:
    def test_a_script_that_takes_too_long_is_stopped(self, host: Host, transport: Transport) -> None:
        with pytest.raises(DeadlineError):
            transport.run(LINGER, parameters={}, timeout=timedelta(seconds=1))
        _until(lambda: host.stopped == ["linger"])
        assert transport.run(ECHO, parameters={}, timeout=SOON).rows

    def test_a_script_is_stopped_when_the_run_is_cancelled(self, host: Host, transport: Transport) -> None:
        with pytest.raises(CancelledError):
            transport.run(LINGER, parameters={}, timeout=SOON, cancel=CancelledAtOnce())
        _until(lambda: host.stopped == ["linger"])

    def test_nothing_is_left_of_scripts_that_were_stopped(self, endpoint: Endpoint, transport: Transport) -> None:
        with pytest.raises(DeadlineError):
            transport.run(LINGER, parameters={}, timeout=timedelta(seconds=1))
        assert endpoint.service.open_shells == 0


def _until(true: object) -> None:
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    assert true()  # type: ignore[operator]


class TestLines:
    @pytest.mark.parametrize("operation", ["Create", "Command"])
    @pytest.mark.parametrize(
        "fault", [WireFault(harm=Harm.UNAVAILABLE), WireFault(harm=Harm.FAULT, code=2150859173)], ids=["503", "quota"]
    )
    def test_what_was_refused_was_not_done(
        self, host: Host, endpoint: Endpoint, operation: str, fault: WireFault
    ) -> None:
        endpoint.faults.add(WireFault(harm=fault.harm, code=fault.code, operation=operation, times=9))
        with reached(connection(endpoint)) as transport, pytest.raises(HostUnreachableError) as caught:
            transport.run(ECHO, parameters={}, timeout=SOON)
        assert caught.value.transient
        assert host.asked == []

    def test_a_session_that_the_host_dropped_is_opened_again(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        transport.run(ECHO, parameters={}, timeout=SOON)
        endpoint.service.drop_shells()
        transport.run(ECHO, parameters={}, timeout=SOON)
        assert len(host.asked) == 2

    def test_a_connection_that_broke_in_silence_is_made_again(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        transport.run(ECHO, parameters={}, timeout=SOON)
        endpoint.cut_connections()
        time.sleep(0.05)
        transport.run(ECHO, parameters={}, timeout=SOON)
        assert len(host.asked) == 2

    def test_a_session_that_was_idle_for_long_is_not_used_again(
        self, host: Host, endpoint: Endpoint, transport: Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transport.run(ECHO, parameters={}, timeout=SOON)
        monkeypatch.setattr(transport_module, "_IDLE", timedelta(seconds=-1))
        transport.run(ECHO, parameters={}, timeout=SOON)
        assert endpoint.log.count("Create") == 2
        assert endpoint.service.open_shells == 1

    @pytest.mark.parametrize("harm", [Harm.CUT_BEFORE, Harm.CUT_AFTER])
    def test_a_lost_reply_leaves_it_open_what_was_done(
        self, host: Host, endpoint: Endpoint, transport: Transport, harm: Harm
    ) -> None:
        endpoint.faults.add(WireFault(harm=harm, containing="export of a guest"))
        with pytest.raises(UnknownOutcomeError) as caught:
            transport.run(Script(text="# export of a guest"), parameters={}, timeout=SOON)
        assert not caught.value.transient
        assert "reconcile" in (caught.value.remedy or "")
        _until(lambda: len(host.asked) == (1 if harm is Harm.CUT_AFTER else 0))
        assert endpoint.service.open_shells == 0

    @pytest.mark.parametrize("harm", [Harm.CUT_BEFORE, Harm.CUT_AFTER])
    def test_a_reply_lost_within_tls_leaves_it_open_as_well(self, host: Host, tmp_path: Path, harm: Harm) -> None:
        authority = certificates.authority(tmp_path)
        settings = EndpointSettings(tls=Tls(certificate=authority.issue("127.0.0.1")))
        with running(host.dispatch, settings=settings) as endpoint:
            endpoint.faults.add(WireFault(harm=harm))
            with pytest.raises(UnknownOutcomeError):
                ask(connection(endpoint, authority=str(authority.path)))
        assert len(host.asked) == (1 if harm is Harm.CUT_AFTER else 0)

    def test_a_host_that_is_too_slow_to_say_so_may_begin_yet(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        endpoint.faults.add(WireFault(harm=Harm.FAULT, code=2150858793))
        with pytest.raises(UnknownOutcomeError):
            transport.run(ECHO, parameters={}, timeout=SOON)

    @pytest.mark.parametrize("stage", [Stage.ASKING, Stage.LISTENING])
    def test_an_answer_that_cannot_be_unsealed_is_an_answer_to_something(
        self, endpoint: Endpoint, stage: Stage
    ) -> None:
        error = translate(spnego.exceptions.BadMICError(), stage=stage, connection=connection(endpoint))
        assert isinstance(error, UnknownOutcomeError)

    def test_a_second_attempt_is_judged_by_what_happened_to_it(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        """The first was certainly not run, the second may have been: it is not made a third time."""
        transport.run(ECHO, parameters={}, timeout=SOON)
        endpoint.service.drop_shells()
        endpoint.faults.add(WireFault(harm=Harm.CUT_AFTER, skip=1))
        with pytest.raises(UnknownOutcomeError):
            transport.run(ECHO, parameters={}, timeout=SOON)
        assert len(host.asked) == 2

    def test_a_session_whose_login_is_no_longer_good_is_opened_again(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        transport.run(ECHO, parameters={}, timeout=SOON)
        endpoint.faults.add(WireFault(harm=Harm.FAULT, code=5))
        transport.run(ECHO, parameters={}, timeout=SOON)
        assert len(host.asked) == 2

    @pytest.mark.parametrize("harm", [Harm.CUT_BEFORE, Harm.CUT_AFTER])
    def test_output_that_was_lost_leaves_it_open_what_was_done(
        self, host: Host, endpoint: Endpoint, transport: Transport, harm: Harm
    ) -> None:
        transport.run(ECHO, parameters={}, timeout=SOON)
        endpoint.faults.add(WireFault(harm=harm, operation="Receive"))
        with pytest.raises(UnknownOutcomeError):
            transport.run(ECHO, parameters={}, timeout=SOON)
        assert len(host.asked) == 2

    def test_a_lost_goodbye_is_no_failure(self, endpoint: Endpoint, transport: Transport) -> None:
        endpoint.faults.add(WireFault(harm=Harm.CUT_BEFORE, operation="Signal"))
        assert transport.run(ECHO, parameters={}, timeout=SOON).rows
        assert transport.run(ECHO, parameters={}, timeout=SOON).rows

    def test_a_restarted_service_leaves_it_open_what_was_done(
        self, host: Host, endpoint: Endpoint, transport: Transport
    ) -> None:
        def restart() -> None:
            end = time.monotonic() + SOON.total_seconds()
            while not host.asked and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3)  # so that the answer is waited for; it would be the same before
            endpoint.service.drop_shells()

        restarting = threading.Thread(target=restart)
        restarting.start()
        with pytest.raises(UnknownOutcomeError):
            transport.run(LINGER, parameters={}, timeout=SOON)
        restarting.join()

    def test_a_slow_answer_is_waited_for(self, endpoint: Endpoint, transport: Transport) -> None:
        endpoint.faults.add(WireFault(harm=Harm.SLOW, operation="Receive", seconds=1.2))
        assert transport.run(ECHO, parameters={}, timeout=SOON).rows


class TestLogins:
    @pytest.mark.parametrize("authentication", [Authentication.NEGOTIATE, Authentication.NTLM])
    def test_messages_are_sealed_without_tls(
        self, host: Host, endpoint: Endpoint, authentication: Authentication
    ) -> None:
        # The endpoint refuses what is not sealed.
        with reached(connection(endpoint, authentication=authentication)) as transport:
            assert transport.run(ECHO, parameters={}, timeout=SOON).rows[0]["User"] == USER

    def test_credssp(self, host: Host) -> None:
        settings = EndpointSettings(mechanisms=frozenset({"CredSSP"}))
        with running(host.dispatch, settings=settings) as endpoint:
            assert ask(connection(endpoint, authentication=Authentication.CREDSSP), Text="x" * 100_000).rows

    @pytest.mark.parametrize("authentication", [Authentication.NEGOTIATE, Authentication.NTLM, Authentication.CREDSSP])
    def test_a_wrong_password(self, host: Host, authentication: Authentication) -> None:
        with running(host.dispatch, settings=EndpointSettings(mechanisms=EVERY_MECHANISM)) as endpoint:
            said = _refusal(connection(endpoint, authentication=authentication, password="Wrong-1"))
        assert "refuses the login" in said
        assert "Wrong-1" not in said
        assert host.asked == []

    def test_an_account_without_the_right_to_log_in(self, host: Host) -> None:
        users = {USER: User(password=PASSWORD, may_connect=False)}
        with running(host.dispatch, settings=EndpointSettings(users=users)) as endpoint:
            settings = connection(endpoint)
            with pytest.raises(PreconditionError, match="refuses a session"):
                ask(settings)

    def test_a_login_that_the_host_does_not_allow(self, host: Host, endpoint: Endpoint) -> None:
        with pytest.raises(PreconditionError, match="credssp"):
            ask(connection(endpoint, authentication=Authentication.CREDSSP))

    def test_a_session_configuration_that_is_not_there(self, endpoint: Endpoint) -> None:
        with pytest.raises(PreconditionError, match="no session configuration 'vmsnap'"):
            ask(connection(endpoint, configuration="vmsnap"))

    def test_nobody_listens(self, host: Host) -> None:
        with running(host.dispatch) as endpoint:
            settings = connection(endpoint)
        with reached(settings) as transport, pytest.raises(HostUnreachableError, match="no WinRM answers"):
            transport.run(ECHO, parameters={}, timeout=SOON)

    @pytest.mark.parametrize("authentication", [Authentication.BASIC, Authentication.CERTIFICATE])
    def test_no_password_in_clear_text(self, authentication: Authentication) -> None:
        with pytest.raises(ConfigError, match="HTTPS"):
            HostConnection(host="hv1", tls=False, authentication=authentication, login=Login(user="u", password="p"))

    def test_nothing_secret_is_logged(
        self, endpoint: Endpoint, transport: Transport, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        transport.run(ECHO, parameters={"A": Login(user="u", password="Other-2"), "B": "parameter-3"}, timeout=SOON)
        # psrpcore is the endpoint's.
        ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("psrpcore"))
        assert "POST /wsman" in ours
        for secret in (PASSWORD, "Other-2", "parameter-3"):
            assert secret not in ours


class TestCertificates:
    @pytest.fixture(scope="class")
    @classmethod
    def authority(cls, tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
        return certificates.authority(tmp_path_factory.mktemp("authority"))

    def test_basic_within_tls(self, host: Host, authority: certificates.Authority) -> None:
        tls = Tls(certificate=authority.issue("127.0.0.1"))
        with running(host.dispatch, settings=EndpointSettings(tls=tls, mechanisms=EVERY_MECHANISM)) as endpoint:
            settings = connection(endpoint, authentication=Authentication.BASIC, authority=str(authority.path))
            with reached(settings) as transport:
                assert transport.run(ECHO, parameters={}, timeout=SOON).rows

    def test_a_certificate_to_log_in_with(self, host: Host, authority: certificates.Authority) -> None:
        own = authority.issue("backup", client=True)
        tls = Tls(
            certificate=authority.issue("127.0.0.1"), client_authority=authority.path, client_users={"backup": USER}
        )
        with running(host.dispatch, settings=EndpointSettings(tls=tls, mechanisms=EVERY_MECHANISM)) as endpoint:
            settings = HostConnection(
                host="127.0.0.1",
                port=endpoint.port,
                authentication=Authentication.CERTIFICATE,
                authority=str(authority.path),
                certificate=str(own),
            )
            with reached(settings) as transport:
                assert transport.run(ECHO, parameters={}, timeout=SOON).rows[0]["User"] == USER

    @pytest.mark.parametrize(
        ("kind", "problem"),
        [("expired", "has expired"), ("other name", "is for another"), ("self-signed", "is signed by itself")],
    )
    def test_a_certificate_that_proves_nothing(
        self, host: Host, authority: certificates.Authority, kind: str, problem: str
    ) -> None:
        made: Path = {
            "expired": lambda: authority.issue("127.0.0.1", days=-3),
            "other name": lambda: authority.issue("127.0.0.9"),
            "self-signed": lambda: certificates.self_signed(authority.folder, name="127.0.0.1"),
        }[kind]()
        with running(
            host.dispatch, settings=EndpointSettings(tls=Tls(certificate=made), mechanisms=EVERY_MECHANISM)
        ) as endpoint:
            settings = connection(endpoint, authentication=Authentication.BASIC, authority=str(authority.path))
            with reached(settings) as transport, pytest.raises(PreconditionError, match=problem):
                transport.run(ECHO, parameters={}, timeout=SOON)
        assert endpoint.log == []


def test_an_object_that_is_not_flat_is_refused() -> None:
    with (
        running(lambda _, streams: streams.write({"State": {"Value": 2}})) as endpoint,
        pytest.raises(DriverError, match="State"),
    ):
        ask(connection(endpoint))
