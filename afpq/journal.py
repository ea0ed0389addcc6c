"""What a run has finished so far, kept on disk: a run that was killed goes on from there, to the same bytes.

A journal is a folder. Every finished step is a file in it, written beside, flushed and renamed: whatever the moment a
process is killed at, a step is there as a whole or not at all. `identity.json` says what the steps belong to; with
other inputs or settings they are worth nothing, and going on is refused. One process at a time uses a journal.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from afpq.errors import JournalError

__all__ = ["Journal"]

T = TypeVar("T")

_IDENTITY = "identity.json"
_LOCK = "lock"
_PART = ".part"


@dataclass(frozen=True, eq=False)
class Journal:
    """The steps of one run by name. Without a folder nothing is kept, and every step is made; see `open`."""

    folder: Path | None = None
    _prefix: str = ""
    _lock: "_Lock | None" = None

    @staticmethod
    def open(folder: str | Path, identity: Mapping[str, Any]) -> "Journal":
        """Opens the journal of a run, or begins one.

        Args:
            folder: made if it is missing.
            identity: what the steps depend on, as JSON values; nested mappings are compared key by key.

        Raises:
            JournalError: it belongs to other inputs or settings, another process uses it, or it cannot be written.
        """
        folder = Path(folder)
        wanted = json.loads(json.dumps(identity))
        try:
            folder.mkdir(exist_ok=True)
            held = _Lock(folder)
            file = folder / _IDENTITY
            if file.exists():
                _check(folder, json.loads(file.read_text(encoding="utf-8")), wanted)
            else:
                text = json.dumps(wanted, indent=2)
                _write(file, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            if not (folder / _IDENTITY).exists():  # it was never one
                shutil.rmtree(folder, ignore_errors=True)
            raise JournalError(f"{folder}: cannot be written: {error.strerror or error}") from error
        except json.JSONDecodeError as error:
            raise JournalError(f"{folder}: {_IDENTITY} is damaged: {error}") from error
        return Journal(folder, _lock=held)

    def scoped(self, name: str) -> "Journal":
        """The same journal for a part of the run whose steps have names of their own."""
        return replace(self, _prefix=f"{self._prefix}{name}, ")

    def step(
        self,
        name: str,
        make: Callable[[], T],
        save: Callable[[T, Path], object],
        load: Callable[[Path], T],
    ) -> T:
        """What `make` gives, or gave when this step was finished before.

        Raises:
            JournalError: the file of the step cannot be read or written.
        """
        file = self.find(name)
        if file is None:
            value = make()
            self.keep(name, lambda part: save(value, part))
            return value
        try:
            return load(file)
        except Exception as error:  # whatever reads the file has errors of its own
            raise JournalError(f"{file}: damaged, start over without it: {error}") from error

    def find(self, name: str) -> Path | None:
        """The file of a finished step; None if there is none."""
        file = self._file(name)
        return file if file is not None and file.exists() else None

    def keep(self, name: str, save: Callable[[Path], object]) -> None:
        """Lets `save` write the file of a step, which replaces one of that name.

        Raises:
            JournalError: it cannot be written.
        """
        file = self._file(name)
        if file is None:
            return
        try:
            _write(file, save)
        except OSError as error:
            raise JournalError(f"{file}: cannot be written: {error.strerror or error}") from error

    def steps(self) -> list[str]:
        """Names of the files of finished steps, sorted."""
        if self.folder is None or not self.folder.exists():
            return []
        names = (file.name for file in self.folder.iterdir() if file.suffix != _PART)
        return sorted(name for name in names if name not in (_IDENTITY, _LOCK))

    @staticmethod
    def discard(folder: Path) -> None:
        """Deletes the journal of a run that nobody goes on with.

        Raises:
            JournalError: another process uses it, or the folder is something else.
        """
        try:
            known = (folder / _IDENTITY).exists() or (folder / _LOCK).exists()
            if not known and any(folder.iterdir()):
                raise JournalError(f"{folder} is in the way: not a journal")
            Journal(folder, _lock=_Lock(folder)).remove()
        except OSError as error:
            raise JournalError(f"{folder}: cannot be deleted: {error.strerror or error}") from error

    def remove(self) -> None:
        """Deletes the folder: the run is done."""
        if self.folder is not None:
            # Without its identity it is nothing that a run could go on from, should this be interrupted.
            (self.folder / _IDENTITY).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        # Names hold letters, digits, spaces, commas and dots.
        return self.folder / f"{self._prefix}{name}"


def _check(folder: Path, kept: Any, wanted: Any) -> None:
    changed = list(_differences(kept, wanted))
    if changed:
        raise JournalError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Start over without it, "
            "or give what it was begun with"
        )


def _differences(kept: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """In words what changed."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in [*kept, *(k for k in wanted if k not in kept)]:
            yield from _differences(kept.get(key), wanted.get(key), f"{where} {key}".strip())
    elif kept != wanted:
        yield f"{where} changed ({_short(kept)} -> {_short(wanted)})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _write(file: Path, save: Callable[[Path], object]) -> None:
    part = file.with_name(file.name + _PART)
    try:
        save(part)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


class _Lock:
    """Keeps other processes from a journal until it is dropped, or the process ends, however it ends.

    Raises:
        JournalError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # this system has no such locks
            pass
        except (BlockingIOError, PermissionError) as error:
            raise JournalError(f"{folder}: another process uses it") from error

    def __del__(self) -> None:
        os.close(self._file)
