"""The folder of a run: complete checkpoints only, metrics line by line, and nothing half-written under its final name.

A checkpoint is written beside its place, sealed with a manifest of sizes and SHA-256 sums, flushed to the disk and
renamed: whatever kills the process in between, a folder called checkpoint-N is whole. What the disk does to it later
is found by its sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loract.errors import LoractError, reason

CONFIG, METRICS, SUMMARY, MANIFEST = "config.yaml", "metrics.jsonl", "summary.json", "manifest.json"
_STAGED = ".saving-"
_DROPPED = ".removing-"
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's folder."""

    folder: Path

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready, or refuse.

        Raises:
            LoractError: it holds something and neither flag is given, it holds no run to resume or to overwrite, or
                it cannot be written.
        """
        name = str(self.folder)
        is_run = (self.folder / CONFIG).is_file()
        if resume and overwrite:
            raise LoractError("both --resume and --overwrite", "one of them", "drop one")
        if resume and not is_run:
            raise LoractError(f"no run in {name!r} to resume", f"a folder with {CONFIG}", "train without --resume")
        filled = self.folder.is_dir() and any(self.folder.iterdir())
        if filled and not (resume or overwrite):
            raise LoractError(
                f"output_dir {name!r}, which is not empty",
                "a new folder",
                "--resume goes on, --overwrite starts again" if is_run else "choose another output_dir",
            )
        if filled and overwrite:
            if not is_run:
                raise LoractError(f"{name!r}, which is no run", "a run's folder to overwrite", "choose another one")
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            cause = error.strerror if isinstance(error, OSError) else error
            raise LoractError(f"output_dir {name!r} ({cause})", "a folder to write to", "change it") from None
        for path in self.folder.glob(".*-*"):  # what a killed process left
            if path.name.startswith((_STAGED, _DROPPED)):
                shutil.rmtree(path, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """Folders called checkpoint-N, by N."""
        return sorted((p for p in self.folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)), key=step_of)

    def last_good(self) -> tuple[Path | None, list[str]]:
        """The latest checkpoint that is whole, and what is wrong with each later one."""
        faults: list[str] = []
        for path in reversed(self.checkpoints()):
            if (fault := damage(path)) is None:
                return path, faults
            faults.append(f"{path.name}: {fault}")
        return None, faults

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of that name, whole.

        Raises:
            LoractError: the name leads out of the run's folder, or there is none, or it is damaged.
        """
        path = self.folder / name
        if not _CHECKPOINT.fullmatch(name) or path.resolve() != self.folder.resolve() / name:
            raise LoractError(f"checkpoint {name!r}, which is not in {str(self.folder)!r}", *self._there())
        if not path.is_dir():
            raise LoractError(f"no checkpoint {name!r} in {str(self.folder)!r}", *self._there())
        if (fault := damage(path)) is not None:
            raise LoractError(f"a damaged checkpoint, {name}: {fault}", "a whole one", "resume without a name")
        return path

    def _there(self) -> tuple[str, str]:
        names = ", ".join(path.name for path in self.checkpoints())
        return (f"one of {names}" if names else "a checkpoint, of which there is none"), "resume without a name"

    def going_on(self, act: str) -> str:
        """The next step after a fault: to act, and to go on from the last checkpoint where there is one."""
        kept = self.checkpoints()
        return f"{act}, then --resume goes on from {kept[-1].name}" if kept else f"{act} and start again"

    @contextmanager
    def saving(self, name: str, *, publish: bool = True) -> Generator[Path]:
        """A folder called `name`, out of sight, to write into; in its place afterwards.

        Of several processes one has `publish`, and the others have written before it leaves.

        Raises:
            LoractError: writing failed; what was saved before is untouched.
        """
        outer, target = self.folder / f"{_STAGED}{name}", self.folder / name
        staged = outer / name
        try:
            staged.mkdir(parents=True, exist_ok=True)
            yield staged
            if publish:
                seal(staged)
                if target.exists():
                    self._remove(target)
                staged.rename(target)
                outer.rmdir()
                _flush(self.folder)
        except BaseException as error:
            if publish:
                shutil.rmtree(outer, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError, RuntimeError)):
                raise LoractError(
                    f"an error while saving {name} ({reason(error)})",
                    "space and permission to write",
                    self.going_on("make room"),
                ) from error
            raise

    def rotate(self, limit: int) -> None:
        """Keep the `limit` latest checkpoints."""
        for path in self.checkpoints()[:-limit]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a folder so that a kill in between leaves nothing under its name."""
        doomed = path.with_name(f"{_DROPPED}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        path = self.folder / name
        partial = path.with_name(f"{name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def add_metrics(self, values: dict[str, Any]) -> None:
        """Append one line."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far, up to one that a kill cut short or that is none of a run's."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                values = json.loads(line)
                int(values["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            found.append(values)
        return found

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will be run again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write(METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(folder: Path) -> None:
    """Flush every file of the folder and write their sizes and sums."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sum(path)]
        _flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _flush(manifest)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None if it is as it was sealed."""
    if folder.is_symlink():
        return "is a link"
    try:
        files: dict[str, list[Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, expected) in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} leads out of it"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _sum(path) != expected:
                return f"{name} has changed"
        for path in folder.rglob("*"):
            if not path.is_dir() and (name := path.relative_to(folder).as_posix()) not in files and name != MANIFEST:
                return f"{name} was not saved with it"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or damaged"
    return None


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
