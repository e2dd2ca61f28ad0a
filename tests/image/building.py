"""
An image of the Dockerfile as it stands, without a daemon and without a registry.

buildah runs its steps in a chroot. The base is a clean Debian of the suite that the Dockerfile names, made by
debootstrap, and the wheels are fetched before, by this machine's pip with its own settings: nothing of those gets in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile"
COPIED = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "pdctl", "deploy")
UNWANTED = "docs a-secret.env deploy/notes"  # beside them, to see that no step takes more than it names
PIP = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
PYTHON = "3.11"
_SLIM = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")

Entry = tuple[str, int, int, int, str]


@dataclass(frozen=True, slots=True)
class Image:
    """`layers` are their digests, which times and order of files are part of; `config` is as runtimes read it."""

    layers: tuple[str, ...]
    config: dict[str, object]
    root: Path

    def tree(self) -> dict[str, Entry]:
        """Path -> kind, mode, user, group, and what it holds: a digest, or where a link leads."""
        return {str(path.relative_to(self.root)): _entry(path) for path in sorted(self.root.rglob("*"))}

    def nbytes(self) -> int:
        return sum(path.lstat().st_size for path in self.root.rglob("*") if not path.is_dir())


@dataclass(frozen=True, slots=True)
class Builder:
    """`cache` keeps the base and the wheels from one run to the next; all else is in `scratch`."""

    cache: Path
    scratch: Path

    @classmethod
    @contextmanager
    def at(cls, cache: Path, scratch: Path) -> Iterator[Builder]:
        cache.mkdir(parents=True, exist_ok=True)
        builder = cls(cache, scratch)
        try:
            builder._import_base()
            builder._copy_context("first")
            yield builder
        finally:
            builder._buildah("rm", "--all", check=False)
            builder._buildah("rmi", "--all", "--force", check=False)

    def build(self, wheel: str, name: str) -> Image:
        """Run every step anew."""
        context = self._copy_context(name)
        (self.scratch / "pip.conf").write_text(PIP)
        self._buildah(
            "build", "--isolation", "chroot", "--no-cache", "--pull-never", "--format", "docker", "--timestamp", "0",
            "--secret", f"id=pip,src={self.scratch / 'pip.conf'}", "--volume", f"{self._wheels(wheel)}:/wheels:ro",
            "--build-arg", "BASE=localhost/base", "--build-arg", f"WHEEL={wheel}", "--tag", name, str(context),
        )  # fmt: skip
        container = self._buildah("from", "--pull-never", f"localhost/{name}")
        about = json.loads(self._buildah("inspect", "--type", "image", f"localhost/{name}"))
        docker = about["Docker"]
        return Image(tuple(docker["rootfs"]["diff_ids"]), docker["config"], Path(self._buildah("mount", container)))

    def _copy_context(self, name: str) -> Path:
        """The files are copied once: who edits the checkout meanwhile does not make two images of one."""
        context = self.scratch / name
        if context.exists():
            return context
        source = ROOT if name == "first" else self.scratch / "first"
        for each in COPIED:
            (context / each).parent.mkdir(parents=True, exist_ok=True)
            if (source / each).is_dir():
                shutil.copytree(source / each, context / each)
            else:
                shutil.copy(source / each, context / each)
        for unwanted in UNWANTED.split():
            (context / unwanted).write_text("not for the image\n")
        return context

    def _import_base(self) -> None:
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, str(self._base()), "/")
        self._buildah("commit", "--quiet", "--timestamp", "0", container, "localhost/base")
        self._buildah("rm", container)

    def _base(self) -> Path:
        (suite,) = re.findall(r"^ARG BASE=debian:([a-z]+)-", DOCKERFILE.read_text(), re.MULTILINE)
        base = self.cache / str(suite)
        if not base.exists():
            scratch = self.scratch / "base"
            _run("debootstrap", "--variant=minbase", str(suite), str(scratch), *_mirror(str(suite)))
            for folder in _SLIM:  # as Debian's own slim images are
                shutil.rmtree(scratch / folder)
                (scratch / folder).mkdir()
            shutil.move(scratch, base)
        return base

    def _wheels(self, wheel: str) -> Path:
        folder = self.cache / f"wheels-{wheel}"
        for lock in ("build", f"image-{wheel}"):
            _run(
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                "--require-hashes", "--only-binary=:all:", "--python-version", PYTHON, "--dest", str(folder),
                "--find-links", str(folder), "--requirement", str(ROOT / f"deploy/lock/{lock}.txt"),
            )  # fmt: skip
        return folder

    def _buildah(self, *words: str, check: bool = True) -> str:
        places = ("--root", str(self.scratch / "storage"), "--runroot", str(self.scratch / "run"))
        return _run("buildah", *places, *words, check=check)


def _mirror(suite: str) -> list[str]:
    """Where this machine's apt takes that suite from; none: debootstrap's own."""
    if shutil.which("apt-get") is None:
        return []
    asked = ("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
    return [line.split()[1] for line in _run(*asked).splitlines() if line.startswith(f"{suite} ")][:1]


def _entry(path: Path) -> Entry:
    about = path.lstat()
    return (*_rights(about), _held(path, about))


def _rights(about: os.stat_result) -> tuple[str, int, int, int]:
    return stat.filemode(about.st_mode)[0], stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid


def _held(path: Path, about: os.stat_result) -> str:
    if stat.S_ISLNK(about.st_mode):
        return str(path.readlink())
    return sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(about.st_mode) else ""


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=900)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout.strip()
