"""`wsgateway service ...`: the units of systemd, written and removed."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import sysconfig
from pathlib import Path

from wsgateway import __version__
from wsgateway.errors import GatewayError, StartError

PLACES = {
    "wsgateway.service": "etc/systemd/system/wsgateway.service",
    "wsgateway@.service": "etc/systemd/system/wsgateway@.service",
    "wsgateway.target": "etc/systemd/system/wsgateway.target",
    "wsgateway.socket": "etc/systemd/system/wsgateway.socket",
    "wsgateway-http.socket": "etc/systemd/system/wsgateway-http.socket",
    "wsgateway.sysusers.conf": "etc/sysusers.d/wsgateway.conf",
    "wsgateway.tmpfiles.conf": "etc/tmpfiles.d/wsgateway.conf",
}
"""Where each file of `scripts/deploy/systemd` goes: where systemd looks, and what survives a
system's upgrade."""

PROGRAM = "/usr/local/bin/wsgateway"
"""The program's path in those files."""

CONFIG = "etc/wsgateway/config.toml"

STATE = "/var/lib/wsgateway"
"""StateDirectory=; named in the configuration so that commands find the service's database."""

HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
"""Folders that the service cannot see (ProtectHome=, PrivateTmp=)."""


def install(arguments: argparse.Namespace) -> None:
    """Write the units and say what to type next; what an admin changed stays as it is."""
    program = _program()
    for target, text in _files(Path(arguments.root), program).items():
        if _is_changed(target) and not arguments.force:
            print(f"kept {target}, which was changed here; --force overwrites it")
        elif target.exists() and target.read_text() == text:
            print(f"unchanged {target}")
        else:
            _write(target, text, 0o644, arguments.dry_run)
    config = Path(arguments.root, CONFIG)
    if config.exists():
        print(f"kept {config}")
    else:
        _write(config, _configuration(), 0o640, arguments.dry_run)
    print(
        f"""
Next, as root:

    systemd-sysusers wsgateway.conf
    systemd-tmpfiles --create wsgateway.conf
    sudo -u wsgateway {program} db init
    systemctl daemon-reload
    systemctl enable --now wsgateway
"""
    )
    hidden = tuple(f"{folder}/" for folder in HIDDEN)
    unseen = [folder for folder in (sys.prefix, sys.base_prefix) if f"{folder}/".startswith(hidden)]
    if unseen:
        print(
            f"wsgateway: a service cannot see {unseen[0]}: install the gateway to /opt with a "
            "Python of the system",
            file=sys.stderr,
        )


def uninstall(arguments: argparse.Namespace) -> None:
    """Remove the units; the configuration and the database stay."""
    root = Path(arguments.root)
    enabled = sorted(root.glob("etc/systemd/system/*.wants/wsgateway[.@-]*"))
    if enabled:
        names = " ".join(path.name for path in enabled)
        raise GatewayError(f"still enabled: systemctl disable --now {names}")
    for place in PLACES.values():
        target = root / place
        if not os.path.lexists(target):
            continue
        if _is_changed(target) and not arguments.force:
            print(f"kept {target}, which was changed here; --force removes it")
        elif arguments.dry_run:
            print(f"would remove {target}")
        else:
            target.unlink()
            print(f"removed {target}")
    print(f"\nNext, as root: systemctl daemon-reload. {root / CONFIG} and {STATE} are left.")


def _files(root: Path, program: Path) -> dict[Path, str]:
    """What to write where: each file begins with a checksum, by which a change shows."""
    here = Path(__file__).parent.parent
    # In a wheel the files are in the package, in a source tree beside it.
    folder = next(
        (
            each
            for each in (here / "deploy/systemd", here.parent / "scripts/deploy/systemd")
            if each.is_dir()
        ),
        None,
    )
    if folder is None:
        raise StartError("the units are missing from this installation: install it again")
    files = {}
    for name, place in PLACES.items():
        text = (folder / name).read_text().replace(PROGRAM, str(program))
        files[root / place] = f"# wsgateway {__version__} {_checksum(text)}\n{text}"
    return files


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_changed(target: Path) -> bool:
    """Whether a file is there that is not as some version of this command wrote it."""
    if not os.path.lexists(target):
        return False
    first, _, rest = target.read_text(errors="replace").partition("\n")
    return not (first.startswith("# wsgateway ") and first.endswith(f" {_checksum(rest)}"))


def _write(target: Path, text: str, mode: int, dry_run: bool) -> None:
    """Write a whole file or nothing: systemd may read it at any moment."""
    if dry_run:
        print(f"would write {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 - with a mode
        os.fchmod(file.fileno(), mode)
        file.write(text)
    new.replace(target)
    print(f"wrote {target}")


def _program() -> Path:
    """The console script, by the path under which systemd can start it."""
    program = Path(sysconfig.get_path("scripts"), "wsgateway")
    if not os.access(program, os.X_OK):
        raise StartError(f"{program} is not there: install the package with pip")
    if not re.fullmatch(r"[\w/.+@-]+", str(program), re.ASCII):
        raise StartError(f"{program}: a unit cannot name such a path: install it to /opt")
    return program


def _configuration() -> str:
    return f"""\
# wsgateway configuration. Every key is optional; `wsgateway config init -o all.toml` writes them all
# with their defaults and what they are for.

[runtime]
state_dir = "{STATE}"
"""
