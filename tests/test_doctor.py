"""What `wsgateway doctor` finds: nothing where all is well, and each fault with what mends it.

The command runs as a process, against a gateway that is one too, a real Redis and real files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from tests import services
from tests.conftest import Accounts, Process, RedisServer
from wsgateway import auth, store
from wsgateway.doctor import certificate, host
from wsgateway.doctor.host import Fault
from wsgateway.doctor.storage import file_system

pytestmark = pytest.mark.long

Cli = Callable[..., subprocess.CompletedProcess[str]]
Rows = dict[str, dict[str, str]]

CLOSED_PORT = 1
"""Nobody listens there."""


@dataclass
class Patient:
    """What is looked at: a database, and perhaps a gateway that runs."""

    cli: Cli
    accounts: Accounts
    key: str
    port: int = CLOSED_PORT
    api_port: int = CLOSED_PORT
    redis: str = ""

    def look(self, *arguments: str, stdin: str = "", **environ: str) -> tuple[int, Rows]:
        """The exit code, and the findings by name."""
        done = self.run("--json", *arguments, stdin=stdin, **environ)
        assert done.stderr == ""
        rows = json.loads(done.stdout)
        for row in rows:
            assert bool(row["fix"]) == (row["status"] in ("warn", "fail")), row
        found = {row["name"]: row for row in rows}
        assert len(found) == len(rows)
        return done.returncode, found

    def run(
        self, *arguments: str, stdin: str = "", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        values = {
            "server.port": self.port, "api.port": self.api_port,
            "auth.database": self.accounts.path, "redis.url": self.redis,
        }  # fmt: skip
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        return self.cli("doctor", *sets, *arguments, stdin=stdin, **environ)


def states(found: Rows, status: str) -> set[str]:
    return {name for name, row in found.items() if row["status"] == status}


@pytest.fixture
def patient(tmp_path: Path, cli: Cli) -> Patient:
    """A database of alice, her device's token and her key; no gateway runs."""
    tmp_path.chmod(0o700)
    accounts = Accounts(tmp_path / "wsgateway.db")

    async def fill() -> str:
        async with store.open_to_write(accounts.path, create=True) as db:
            await db.bind(await db.add_user("alice"), await db.add_device("speaker"))
        accounts.token = await accounts.add_token()
        return await accounts.add_token(scope="api")

    return Patient(cli, accounts, asyncio.run(fill()))


@pytest.fixture
def running(patient: Patient, serve: Callable[..., Process]) -> tuple[Patient, Process]:
    """A gateway that runs alone."""
    process = serve("--host", "127.0.0.1", "--database", str(patient.accounts.path))
    patient.port, patient.api_port = process.port, process.api_port
    return patient, process


@pytest.fixture
def together(patient: Patient, serve: Callable[..., Process], redis_server: RedisServer) -> Patient:
    """A gateway that runs with Redis."""
    process = serve(
        "--host", "127.0.0.1", "--database", str(patient.accounts.path),
        WSGATEWAY_REDIS_URL=redis_server.url,
    )  # fmt: skip
    patient.port, patient.api_port, patient.redis = process.port, process.api_port, redis_server.url
    return patient


LIVE = {"readiness", "http api", "clock of the gateway", "refusal"}
AS_A_DEVICE = {"api key", "version", "device", "ping", "http to device"}
HOST = {"descriptors", "libraries", "sqlite", "database", "journal", "integrity", "owner",
        "permissions", "file system"}  # fmt: skip
REDIS = {"redis", "redis commands", "redis memory", "redis clients", "redis buffers",
         "redis timeout", "clock of redis"}  # fmt: skip


def test_all_is_well_and_nothing_is_left_behind(
    together: Patient, redis_server: RedisServer
) -> None:
    code, found = together.look("--create", "--idle", "0.2")
    assert states(found, "fail") == states(found, "warn") == set()
    assert states(found, "pass") == {
        *LIVE, *AS_A_DEVICE, *HOST, *REDIS, "redis links", "redis to device", "silence",
    }  # fmt: skip
    assert states(found, "skipped") == {"weather", "chat"}
    assert code == 0
    users = together.cli("user", "list", "--set", f"auth.database={together.accounts.path}", "-q")
    assert users.stdout == "1\n"
    assert redis_server.call("KEYS", "*doctor*") == []


def test_a_person_gets_a_line_per_check_and_a_sum(running: tuple[Patient, Process]) -> None:
    patient, _ = running
    done = patient.run("--create")
    *lines, total = done.stdout.splitlines()
    assert done.returncode == 0
    assert {line.split()[0] for line in lines} == {"pass", "skipped"}
    assert f"{len(lines) - total_of(total, 'skipped')} pass, 0 warn, 0 fail, " in total


def total_of(line: str, word: str) -> int:
    return next(int(part.split()[0]) for part in line.split(", ") if part.endswith(word))


def test_a_device_of_ones_own_is_taken_from_standard_input(
    running: tuple[Patient, Process],
) -> None:
    patient, _ = running
    token = patient.accounts.token
    code, found = patient.look(
        "--token-file", "-", stdin=f"{token}\n", WSGATEWAY_API_KEY=patient.key
    )
    assert code == 0
    assert found["device"]["what"] == "connected as user 1"
    assert found["http to device"]["status"] == "pass"


def test_without_tokens_what_needs_one_is_skipped(running: tuple[Patient, Process]) -> None:
    patient, _ = running
    code, found = patient.look()
    assert code == 0
    assert states(found, "skipped") == {"weather", "chat", "redis", "api key", "device"}
    assert "--create" in found["device"]["what"]


def test_a_gateway_that_does_not_run_is_to_be_started(patient: Patient) -> None:
    code, found = patient.look("--create", WSGATEWAY_API_KEY=patient.key)
    assert code == 1
    assert states(found, "fail") == {"readiness", "http api", "refusal", "device"}
    for name in states(found, "fail"):
        assert "refused" in found[name]["what"] or "failed" in found[name]["what"]
        assert "start wsgateway" in found[name]["fix"]


def test_a_gateway_that_hangs_is_told_in_time(running: tuple[Patient, Process]) -> None:
    patient, process = running
    process.popen.send_signal(signal.SIGSTOP)
    code, found = patient.look("--timeout", "0.5", "--create")
    process.popen.send_signal(signal.SIGCONT)
    assert code == 1
    assert states(found, "fail") == {"readiness", "http api", "refusal", "device"}
    assert "no answer within 0.5 s" in found["readiness"]["what"]
    assert "no answer within 0.5 s" in found["device"]["what"]


def test_keys_and_tokens_that_are_no_good_are_said_so_and_never_shown(
    running: tuple[Patient, Process], tmp_path: Path
) -> None:
    patient, _ = running
    strange = auth.new_token()
    (tmp_path / "token").write_text(strange)
    for key, fix in ((strange, "token list"), (patient.accounts.token, "scope api or admin")):
        done = patient.run("--token-file", "token", "--json", WSGATEWAY_API_KEY=key)
        found = {row["name"]: row for row in json.loads(done.stdout)}
        assert done.returncode == 1
        assert states(found, "fail") == {"api key", "device"}
        assert fix in found["api key"]["fix"]
        assert "token check" in found["device"]["fix"]
        assert strange not in done.stdout + done.stderr


def test_a_token_that_nobody_has_is_refused_by_close_as_well(
    patient: Patient, serve: Callable[..., Process]
) -> None:
    process = serve("--database", str(patient.accounts.path), WSGATEWAY_AUTH_REFUSE="close")
    patient.port, patient.api_port = process.port, process.api_port
    assert patient.look()[1]["refusal"]["status"] == "pass"


# The database.


def in_delete_mode(accounts: Accounts) -> None:
    accounts.execute("PRAGMA journal_mode = DELETE")


def damaged(accounts: Accounts) -> None:
    accounts.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with accounts.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


DATABASES: list[tuple[Callable[[Accounts], object], str, str, str, str]] = [
    (in_delete_mode, "journal", "fail", "mode is delete", "PRAGMA journal_mode=WAL"),
    (lambda a: a.path.chmod(0o644), "permissions", "fail", "mode 0644", "chmod 600"),
    (lambda a: a.path.parent.chmod(0o755), "permissions", "warn", "mode 0755", "chmod 700"),
    (lambda a: a.path.unlink(), "database", "fail", "no such file", "db init"),
    (lambda a: a.path.write_text("x" * 9999), "database", "fail", "not an SQLite", "backup"),
    (lambda a: a.execute("PRAGMA user_version = 99"), "database", "fail", "newer", "gateway's user"),
    (damaged, "integrity", "fail", "damaged", "backup"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "name", "status", "what", "fix"), DATABASES)
def test_a_database_that_is_wrong_is_told_with_what_mends_it(
    patient: Patient,
    break_it: Callable[[Accounts], object],
    name: str,
    status: str,
    what: str,
    fix: str,
) -> None:
    break_it(patient.accounts)
    _, found = patient.look()
    assert found[name]["status"] == status
    assert what in found[name]["what"]
    assert fix in found[name]["fix"]


def test_a_database_of_another_user_than_the_gateways_is_told(
    running: tuple[Patient, Process],
) -> None:
    patient, _ = running
    os.chown(patient.accounts.path, 65534, -1)
    code, found = patient.look("--create")
    assert code == 1
    assert found["owner"]["status"] == "fail"
    assert f"chown {os.getuid()} " in found["owner"]["fix"]
    assert found["account"]["status"] == "fail"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/wsgateway.db", "ext4"),
        ("/srv/shared/wsgateway.db", "nfs4"),
        ("/srv/sharedness.db", "ext4"),
        ("/srv/a b/x.db", "cifs"),
        ("/srv/over/x.db", "xfs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_mount(path: str, kind: str) -> None:
    mounts = "\n".join(
        f"1 1 0:1 / {place} rw shared:1 - {kind} source rw"
        for place, kind in (
            ("/", "ext4"), ("/srv/shared", "nfs4"), ("/srv/a\\040b", "cifs"),
            ("/srv/over", "nfs"), ("/srv/over", "xfs"),
        )
    )  # fmt: skip
    assert file_system(path, f"{mounts}\nnonsense\n") == kind


# Redis.

ACL = ("ACL", "SETUSER", "default", "-publish", "-blmove")
SETTINGS: list[tuple[tuple[Any, ...], str, str, str, str]] = [
    (("CONFIG", "SET", "maxmemory", 1), "redis memory", "fail", "used up", "maxmemory"),
    (("CONFIG", "SET", "timeout", 3), "redis timeout", "warn", "after 3 s", "timeout 0"),
    (
        ("CONFIG", "SET", "client-output-buffer-limit", "pubsub 1048576 0 0"),
        "redis buffers", "warn", "only 1 MB", "33554432",
    ),
    (("REPLICAOF", "127.0.0.1", CLOSED_PORT), "redis", "fail", "replica", "master"),
    (ACL, "redis commands", "fail", "BLMOVE, PUBLISH", "ACL SETUSER"),
    (("SET", "device_messages", 1), "redis commands", "fail", "WRONGTYPE", "queue.name"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "status", "what", "fix"), SETTINGS)
def test_a_redis_that_is_wrong_is_told_with_what_mends_it(
    patient: Patient, redis_server: RedisServer, command: Any, name: str, status: str, what: str, fix: str,
) -> None:  # fmt: skip
    patient.redis = redis_server.url
    redis_server.call(*command)
    _, found = patient.look()
    assert found[name]["status"] == status
    assert what in found[name]["what"]
    assert fix in found[name]["fix"]


def test_a_redis_that_may_throw_the_queue_away_is_told(
    patient: Patient, redis_server: RedisServer
) -> None:
    patient.redis = redis_server.url
    redis_server.call("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
    assert "noeviction" in patient.look()[1]["redis memory"]["fix"]


def test_a_redis_that_tells_nothing_of_itself_is_used_all_the_same(
    patient: Patient, redis_server: RedisServer
) -> None:
    patient.redis = redis_server.url
    redis_server.call("ACL", "SETUSER", "default", "-info", "-config", "-time")
    _, found = patient.look()
    assert states(found, "skipped") >= REDIS - {"redis", "redis commands"}
    assert states(found, "pass") >= {"redis", "redis commands"}


def test_redis_that_is_down_is_told_of_both_sides(
    together: Patient, redis_server: RedisServer
) -> None:
    redis_server.stop()
    code, found = together.look("--create")
    assert code == 1
    assert states(found, "fail") == {"redis", "redis links", "redis to device"}
    assert "start Redis" in found["redis"]["fix"]
    assert found["http to device"]["status"] == "pass"


def test_a_password_of_redis_is_never_shown(patient: Patient, redis_server: RedisServer) -> None:
    patient.redis = f"redis://me:very-secret@127.0.0.1:{redis_server.port}/0"
    done = patient.run()
    assert "user and password" in done.stdout
    assert "very-secret" not in done.stdout + done.stderr


def test_a_gateway_that_uses_another_redis_is_told(
    running: tuple[Patient, Process], redis_server: RedisServer
) -> None:
    patient, _ = running
    patient.redis = redis_server.url
    code, found = patient.look("--create")
    assert code == 1
    assert "same redis.url" in found["redis to device"]["fix"]


# The host.


def test_too_few_descriptors_of_the_running_gateway_are_told(
    running: tuple[Patient, Process],
) -> None:
    patient, process = running
    resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (300, 300))
    _, found = patient.look()
    assert (found["descriptors"]["status"], found["descriptors"]["what"]) == (
        "warn", "only 172 connections fit under the gateway's limit of 300",
    )  # fmt: skip
    code, found = patient.look("--set", "limits.connections=5000")
    assert (code, found["descriptors"]["status"]) == (1, "fail")
    assert "LimitNOFILE" in found["descriptors"]["fix"]


def test_versions_with_known_faults_are_told() -> None:
    faults = (Fault("orjson", "999.0.1", "it is slow"), Fault("redis", "1.0", "it is old"))
    [finding] = host.libraries("uvloop", faults)
    assert (finding.status, finding.name) == ("warn", "orjson")
    assert finding.what.endswith(": it is slow")
    assert finding.fix == "pip install -U 'orjson>=999.0.1'"


@pytest.mark.parametrize(
    ("version", "has_fault"),
    [("3.40.1", True), ("3.44.6", False), ("3.45.0", True), ("3.50.6", True), ("3.50.7", False),
     ("3.51.2", True), ("3.51.3", False), ("3.52.0", False), ("4.0", False)],
)  # fmt: skip
def test_the_fault_of_sqlite_is_known_by_version(version: str, has_fault: bool) -> None:
    assert ("3.51.3)" in host.sqlite(version).what) == has_fault


@pytest.mark.parametrize(
    ("theirs", "status", "what"),
    [(1000.0, "pass", "agrees"), (994.0, "warn", "6 s behind"), (1900.0, "warn", "900 s ahead"),
     (None, "skipped", "does not say")],
)  # fmt: skip
def test_clocks_that_differ_are_told(theirs: float | None, status: str, what: str) -> None:
    finding = host.clock("clock", theirs, 1000.0)
    assert finding.status == status
    assert what in finding.what


# Services, and what stands before the gateway.


async def look(patient: Patient, *arguments: str, **environ: str) -> tuple[int, Rows]:
    return await asyncio.to_thread(patient.look, *arguments, **environ)


async def test_services_that_fail_are_told_without_their_keys(patient: Patient) -> None:
    weather, chat = services.Fake(services.qweather), services.Fake(services.openai)
    async with weather.running(), chat.running():
        flags = services.weather_flags(weather) | services.chat_flags(chat)
        sets = [
            word
            for key, value in flags.items()
            for word in ("--set", f"{key.replace('__', '.')}={value}")
        ]
        _, found = await look(patient, *sets)
        assert states(found, "pass") >= {"weather", "chat"}
        weather.next(services.answering("{}", 401))
        chat.next("failed")
        code, found = await look(patient, *sets)
        assert code == 1
        assert states(found, "fail") >= {"weather", "chat"}
        assert services.KEY not in json.dumps(found)
        chat.good = chat.hang
        _, found = await look(patient, *sets, "--timeout", "0.5")
        assert "--timeout" in found["chat"]["fix"]


async def test_a_clock_that_is_an_hour_late_is_told(patient: Patient) -> None:
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    date = f"{an_hour_ago:%a, %d %b %Y %H:%M:%S GMT}"
    fake = services.Fake(services.answering('{"status":"ok"}', Date=date))
    async with fake.running():
        _, found = await look(patient, "--url", fake.url)
    assert found["clock of the gateway"]["status"] == "warn"
    assert "behind" in found["clock of the gateway"]["what"]


@pytest.mark.parametrize(
    ("reply", "fix"),
    [
        (services.answering("no", 404), "the upgrade"),
        (services.answering("no", 502), "mend the proxy"),
        (services.answering("{}", 503), "readiness"),
        (services.answering("", 302, Location="/stolen"), "the upgrade"),
        (services.abort, "--device-url"),
    ],
)
async def test_what_is_no_gateway_is_told_by_its_answer(
    patient: Patient, reply: services.Reply, fix: str
) -> None:
    fake = services.Fake(reply)
    async with fake.running():
        url = fake.url.replace("http", "ws")
        code, found = await look(patient, "--device-url", url, "--url", fake.url, "--create")
    assert code == 1
    assert states(found, "fail") >= {"readiness", "http api", "refusal", "device"}
    assert fix in found["device"]["fix"]
    assert not [seen for seen in fake.seen if "stolen" in seen.path]  # nor the token, the key


@contextlib.asynccontextmanager
async def proxy(
    port: int, *, patience: float = 60, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A proxy before a port that cuts who is silent for so many seconds; its own port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            while data := await asyncio.wait_for(reader.read(65_536), patience):
                writer.write(data)
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_proxy_that_cuts_silent_devices_is_told(
    running: tuple[Patient, Process],
) -> None:
    patient, _ = running
    async with proxy(patient.port, patience=1.5) as port:
        url = f"ws://127.0.0.1:{port}/ws/device/"
        code, found = await look(patient, "--device-url", url, "--create", "--idle", "20")
    assert code == 1
    assert states(found, "fail") == {"silence"}
    assert " s of silence, by what stands before" in found["silence"]["what"]
    assert "proxy_read_timeout" in found["silence"]["fix"]


# Certificates.


def certificate_pem(first: datetime, last: datetime, folder: Path | None = None) -> bytes:
    """A certificate for 127.0.0.1; in a folder, also as a file with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    if folder is not None:
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / "gateway.pem").write_bytes(pem + secret)
    return pem


NOW = datetime(2031, 5, 4, 12, tzinfo=UTC)
PEM = certificate_pem(NOW, NOW + timedelta(days=1)).decode()


@pytest.mark.parametrize(
    ("first", "last", "status", "what"),
    [
        (-30, 60, "pass", "ends on 2031-07-03, in 60 days"),
        (-30, 10_000, "pass", "in 10000 days"),  # after 2050, where the date is written otherwise
        (-30, 13.5, "warn", "in 13 days"),
        (-30, -1, "fail", "ended on 2031-05-03"),
        (1, 60, "fail", "not valid yet"),
    ],
)
def test_a_certificate_is_judged_by_its_dates(
    tmp_path: Path, first: float, last: float, status: str, what: str
) -> None:
    good = certificate_pem(NOW - timedelta(days=30), NOW + timedelta(days=20_000))
    pem = certificate_pem(NOW + timedelta(days=first), NOW + timedelta(days=last))
    (tmp_path / "chain.pem").write_bytes(good + pem)
    finding = certificate.check_file("certificate", tmp_path / "chain.pem", NOW.timestamp())
    assert finding.status == status
    assert what in finding.what


@given(st.binary(max_size=64), st.integers(0, 300))
def test_bytes_that_are_no_certificate_are_a_finding(noise: bytes, at: int) -> None:
    der = ssl.PEM_cert_to_DER_cert(PEM)
    assert certificate.check("x", noise).status == "fail"
    assert certificate.check("x", der[:at]).status == "fail"
    certificate.check("x", der[:at] + noise + der[at + len(noise) :])


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----",
     "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----", "密"],
)  # fmt: skip
def test_a_file_without_a_certificate_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.pem").write_text(text)
    assert certificate.check_file("certificate", tmp_path / "x.pem").status == "fail"
    assert certificate.check_file("certificate", tmp_path / "none.pem").status == "fail"


async def test_the_certificate_that_devices_are_shown_is_judged(
    running: tuple[Patient, Process], tmp_path: Path
) -> None:
    patient, _ = running
    today = datetime.now(UTC)
    certificate_pem(today - timedelta(days=1), today + timedelta(days=5), tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "gateway.pem")
    async with proxy(patient.port, tls=tls) as port:
        url = f"wss://127.0.0.1:{port}"
        code, found = await look(patient, "--device-url", url, "--create")
        assert code == 1
        assert "not accepted" in found["device"]["what"]
        assert "not accepted" in found["readiness"]["what"]
        trusted = str(tmp_path / "gateway.pem")
        code, found = await look(patient, "--device-url", url, "--create", SSL_CERT_FILE=trusted)
    assert code == 0
    assert states(found, "warn") == {"certificate shown"}


# The command itself.


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--device-url", "ws://x/?token=secret"], 2, "--device-url: write ws://"),
        (["--device-url", "ws://user:secret@x/"], 2, "--device-url: write ws://"),
        (["--device-url", "ws://x:99999/"], 2, "--device-url: write ws://"),
        (["--device-url", "http://x/"], 2, "--device-url: write ws://"),
        (["--device-url", "ws://[::1"], 2, "--device-url: write ws://"),
        (["--url", "ftp://x"], 2, "--url: write http://"),
        (["--timeout", "0"], 2, "invalid number of seconds"),
        (["--create", "--token-file", "x"], 2, "not allowed with"),
        (["--token-file", "nowhere"], 1, "nowhere"),
        (["--set", "server.port=0"], 2, "--device-url"),
        (["--set", "limits.windw=1s"], 78, "did you mean limits.window"),
        (["--set", "handlers.modules=nowhere"], 78, "nowhere"),
        (["--set", "redis.url=redis://:secret@x:y/0"], 78, "redis.url"),
    ],
)
def test_a_wrong_call_is_one_line(
    patient: Patient, arguments: list[str], code: int, text: str
) -> None:
    done = patient.run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
