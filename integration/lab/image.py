"""The guest image: a Debian system with PostgreSQL, built from packages and cached by a hash of its recipe.

Everything that makes the image what it is lies in `recipe/`; this module runs it. A built image is a folder

    root.raw, root.qcow2   the root disk, ext4 on the whole device, 3 GiB, sparse
    data.raw               a data disk (label `labdata`) with a second PostgreSQL cluster
    vmlinuz, initrd        for direct kernel boot
    id_ed25519[.pub]       the key pair that root accepts
    ssh_host_*.pub         the guest's host keys
    image.json             package versions, build time, recipe hash

in the cache folder: `$VMSNAP_LAB_CACHE`, else `$XDG_CACHE_HOME/vmsnap-lab`, else `~/.cache/vmsnap-lab`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration.lab.commands import LabError, run

RECIPE = Path(__file__).parent / "recipe"
SUITE = "bookworm"
ROOT_SIZE = "3G"
DATA_SIZE = "512M"
# What no lab guest reads or runs, to have less to unpack, to copy and to boot: documentation, and PostgreSQL's compiler for
# expressions with LLVM (without its module, PostgreSQL finds that out and goes on).
LEFT_OUT = (
    *(f"/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "i18n", "bash-completion", "lintian")),
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/x86_64-linux-gnu/libz3*",
    "/usr/lib/postgresql/15/lib/llvmjit*",
    "/usr/lib/postgresql/15/lib/bitcode/*",
)


@dataclass(frozen=True)
class Image:
    """A built guest image; `folder` is read-only for everyone but the builder."""

    folder: Path

    @property
    def root_raw(self) -> Path:
        return self.folder / "root.raw"

    @property
    def root_qcow2(self) -> Path:
        return self.folder / "root.qcow2"

    @property
    def data_raw(self) -> Path:
        return self.folder / "data.raw"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def private_key(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> str:
        """The guest's ed25519 host key as `ssh-ed25519 BASE64`."""
        return " ".join((self.folder / "ssh_host_ed25519_key.pub").read_text().split()[:2])


def cache_folder() -> Path:
    """Where images are kept between runs; created if missing."""
    named = os.environ.get("VMSNAP_LAB_CACHE")
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else general / "vmsnap-lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recipe_hash() -> str:
    """Changes whenever anything that goes into an image changes: the recipe's files and modes, and this module."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in RECIPE.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(RECIPE)}\0{path.stat().st_mode & 0o111}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def get_image() -> Image:
    """The image of the present recipe, built first if the cache does not hold it (about a minute and a half).

    Any number of processes may call this at once: one builds, the others wait. A build that dies leaves nothing that
    could be taken for an image. Must run outside the lab, where the package archive can be reached, as root.
    """
    cache = cache_folder()
    folder = cache / f"postgresql-{recipe_hash()}"
    if (folder / "image.json").exists():
        return Image(folder)
    with _lock(cache / "build.lock"):
        if not (folder / "image.json").exists():
            _build_into(folder)
    return Image(folder)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_into(folder: Path) -> None:
    if os.geteuid() != 0:
        raise LabError("building the guest image needs root: run with sudo")
    work = folder.with_name("building")
    shutil.rmtree(work, ignore_errors=True)  # whoever left it is dead: the lock is ours
    work.mkdir()
    try:
        _build(work)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for old in folder.parent.glob("postgresql-*"):
        if old != folder and time.time() - old.stat().st_mtime > 7 * 86400:
            shutil.rmtree(old, ignore_errors=True)


def _build(work: Path) -> None:
    began = time.monotonic()
    tree = work / "tree"
    _bootstrap(tree)
    run(["cp", "-a", "--no-preserve=ownership", f"{RECIPE}/tree/.", tree])
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmsnap-lab", "-f", work / "id_ed25519"])
    ssh = tree / "root" / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_text((work / "id_ed25519.pub").read_text())
    _set_up(tree)
    shutil.move(tree / "lab-data", work / "data")
    for key in (tree / "etc" / "ssh").glob("ssh_host_*.pub"):
        shutil.copy(key, work)
    shutil.copy(next((tree / "boot").glob("vmlinuz-*")), work / "vmlinuz")
    shutil.copy(tree / "boot" / "initrd-lab", work / "initrd")
    packages = run(["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--show", "--showformat=${Package}=${Version}\n"])
    _make_disk(work / "root.raw", tree=tree, label="labroot", size=ROOT_SIZE)
    _make_disk(work / "data.raw", tree=work / "data", label="labdata", size=DATA_SIZE)
    run(
        ["qemu-img", "convert", "-t", "none", "-T", "none", "-O", "qcow2", work / "root.raw", work / "root.qcow2"],
        timeout_s=300,
    )
    shutil.rmtree(tree)
    shutil.rmtree(work / "data")
    facts = {
        "recipe": recipe_hash(),
        "build_seconds": round(time.monotonic() - began, 1),
        "packages": packages.split(),
    }
    (work / "image.json").write_text(json.dumps(facts, indent=1) + "\n")


def _bootstrap(tree: Path) -> None:
    lines = (RECIPE / "guest-packages.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    base = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}"]
    run([*base, *left_out, SUITE, tree], timeout_s=900)


def _set_up(tree: Path) -> None:
    """Run the recipe's `setup.sh` in the tree: no network, no process left behind."""
    script = tree / "lab-setup.sh"
    shutil.copy(RECIPE / "setup.sh", script)
    alone = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    run([*alone, "sh", RECIPE / "enter.sh", tree, "sh", "/lab-setup.sh"], timeout_s=300)
    script.unlink()


def _make_disk(disk: Path, *, tree: Path, label: str, size: str) -> None:
    # Tables are initialised here: left to the guest, its kernel would write them in the background of every test.
    options = "lazy_itable_init=0,lazy_journal_init=0"
    run(["mkfs.ext4", "-q", "-m", "0", "-L", label, "-E", options, "-d", tree, disk, size], timeout_s=300)
