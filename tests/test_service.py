"""The units of systemd: that they are sound, and that installing them harms nothing of an admin's."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from wsgateway.cli.service import PLACES
from wsgateway.config import Config
from wsgateway.errors import EXIT_CONFIG, EXIT_USAGE

Cli = Callable[..., subprocess.CompletedProcess[str]]
UNITS = [name for name in PLACES if not name.endswith(".conf")]


@pytest.fixture
def host(tmp_path: Path, cli: Cli) -> Path:
    """A folder with everything installed."""
    assert cli("service", "install", "--root", "host").returncode == 0
    return tmp_path / "host"


def files(folder: Path) -> dict[str, str]:
    """What is in a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def unit(host: Path, name: str) -> list[tuple[str, str]]:
    """The settings of a unit."""
    text = (host / PLACES[name]).read_text()
    return [(name, value) for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)]


# The units.


@pytest.mark.systemd
def test_systemd_finds_no_fault_in_the_units(host: Path) -> None:
    paths = [str(host / PLACES[name]) for name in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.systemd
@pytest.mark.parametrize("name", ["wsgateway.service", "wsgateway@.service"])
def test_a_gateway_that_is_broken_into_can_do_little(host: Path, name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=15", host / PLACES[name]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Overall exposure level for .*: (\d\.\d) OK", done.stdout)
    assert found
    assert float(found[1]) <= 1.5


def test_the_units_fit_the_program(host: Path) -> None:
    settings = dict(unit(host, "wsgateway.service"))
    program, *arguments = settings["ExecStart"].split()
    assert os.access(program, os.X_OK)
    assert arguments == ["serve", "--config", "/etc/wsgateway/config.toml"]
    assert settings["RestartPreventExitStatus"] == f"{EXIT_USAGE} {EXIT_CONFIG}"
    assert float(settings["TimeoutStopSec"]) > Config().drain.delay + Config().drain.window + 10
    assert settings["Type"] == "notify"


def test_an_instance_differs_from_the_only_one_in_its_name_alone(host: Path) -> None:
    one, several = (set(unit(host, f"wsgateway{which}.service")) for which in ("", "@"))
    assert {name for name, _ in one ^ several} == {
        "Description", "ExecStart", "Environment", "PartOf", "ReloadPropagatedFrom", "WantedBy",
    }  # fmt: skip
    assert ("Environment", "WSGATEWAY_SERVER_INSTANCE=%i") in several
    assert dict(several)["ExecStart"].endswith(" --config /etc/wsgateway/%i.toml")


@pytest.mark.systemd
@pytest.mark.faults
def test_the_user_and_the_folders_are_made(host: Path) -> None:
    (host / "etc/wsgateway/north.toml").write_text("")
    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create"]):
        done = subprocess.run(
            [*command, f"--root={host}", "wsgateway.conf"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    passwd = dict(
        line.split(":", 1) for line in (host / "etc/passwd").read_text().splitlines() if line
    )
    uid, gid = map(int, passwd["wsgateway"].split(":")[1:3])
    assert passwd["wsgateway"].endswith(":/var/lib/wsgateway:/usr/sbin/nologin")
    found = {
        name: ((status := (host / name).stat()).st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
        for name in ("etc/wsgateway", "etc/wsgateway/config.toml", "etc/wsgateway/north.toml",
                     "var/lib/wsgateway")
    }  # fmt: skip
    assert found == {
        "etc/wsgateway": (0, gid, 0o750),
        "etc/wsgateway/config.toml": (0, gid, 0o640),
        "etc/wsgateway/north.toml": (0, gid, 0o640),
        "var/lib/wsgateway": (uid, gid, 0o700),
    }


# Installing.


def test_installing_says_what_it_wrote_and_what_to_type_next(cli: Cli, tmp_path: Path) -> None:
    host = tmp_path / "host"
    done = cli("service", "install", "--root", str(host))
    assert done.returncode == 0
    wrote = re.findall(r"^wrote (.*)$", done.stdout, re.MULTILINE)
    assert {str(Path(path).relative_to(host)) for path in wrote} == set(files(host))
    assert set(files(host)) == {*PLACES.values(), "etc/wsgateway/config.toml"}
    program = dict(unit(host, "wsgateway.service"))["ExecStart"].split()[0]
    for line in ("systemd-sysusers wsgateway.conf", f"sudo -u wsgateway {program} db init",
                 "systemctl enable --now wsgateway"):  # fmt: skip
        assert f"    {line}\n" in done.stdout
    for path in host.rglob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0


def test_the_first_configuration_can_be_used(cli: Cli, host: Path) -> None:
    config = host / "etc/wsgateway/config.toml"
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    assert cli("config", "check", "-c", str(config)).returncode == 0
    shown = cli("config", "show", "-c", str(config)).stdout
    assert 'runtime.state_dir = "/var/lib/wsgateway"' in shown


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_a_dry_run_changes_nothing(cli: Cli, host: Path, verb: str) -> None:
    (host / PLACES["wsgateway.target"]).unlink()
    before = files(host)
    done = cli("service", verb, "--root", str(host), "--dry-run")
    assert done.returncode == 0
    assert "would " in done.stdout
    assert files(host) == before


def test_what_an_admin_changed_is_kept(cli: Cli, host: Path) -> None:
    service, target = host / PLACES["wsgateway.service"], host / PLACES["wsgateway.target"]
    config = host / "etc/wsgateway/config.toml"
    before = service.read_text()
    changed = before.replace("LimitNOFILE=65536", "LimitNOFILE=1048576")
    service.write_text(changed)
    config.write_text("[server]\nport = 80\n")
    target.unlink()
    target.symlink_to("/dev/null")  # as `systemctl mask` does
    for verb in ("install", "uninstall"):
        done = cli("service", verb, "--root", str(host))
        assert f"kept {service}, which was changed here; --force " in done.stdout
        assert f"kept {target}, which was changed here; --force " in done.stdout
        assert service.read_text() == changed
        assert target.is_symlink()
    assert cli("service", "install", "--root", str(host), "--force").returncode == 0
    assert service.read_text() == before
    assert not target.is_symlink()
    assert config.read_text() == "[server]\nport = 80\n"


def test_what_an_earlier_version_wrote_is_brought_up_to_date(cli: Cli, host: Path) -> None:
    service = host / PLACES["wsgateway.service"]
    now = service.read_text()
    service.write_text("# wsgateway 0.0.1 de7c57cc4cfc2e3a\n[Unit]\nDescription=as it was\n")
    done = cli("service", "install", "--root", str(host))
    assert f"wrote {service}\n" in done.stdout
    assert done.stdout.count("unchanged ") == len(PLACES) - 1
    assert service.read_text() == now


def test_removing_leaves_what_is_the_admins(cli: Cli, host: Path) -> None:
    done = cli("service", "uninstall", "--root", str(host))
    assert done.returncode == 0
    assert set(files(host)) == {"etc/wsgateway/config.toml"}
    assert cli("service", "uninstall", "--root", str(host)).returncode == 0


def test_what_is_enabled_is_not_removed(cli: Cli, host: Path) -> None:
    wants = host / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "wsgateway@north.service").symlink_to(f"/{PLACES['wsgateway@.service']}")
    before = files(host)
    done = cli("service", "uninstall", "--root", str(host))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "wsgateway: still enabled: systemctl disable --now wsgateway@north.service\n"
    )
    assert files(host) == before


@pytest.mark.parametrize("place", ["etc", "etc/systemd/system/wsgateway.service"])
def test_what_is_in_the_way_is_one_line(cli: Cli, tmp_path: Path, place: str) -> None:
    way = tmp_path / "host" / place
    if place == "etc":
        way.parent.mkdir()
        way.write_text("a file")
    else:
        way.mkdir(parents=True)
    done = cli("service", "install", "--root", "host")
    assert done.returncode == 1
    complaint = done.stderr.splitlines()[-1]
    assert complaint.startswith(f"wsgateway: host/{place}")
    assert "Traceback" not in done.stderr
