"""The vectors of a snapshot, its deltas applied as they come, and the file itself replaced."""

from pathlib import Path
from typing import Any

import numpy as np

from qrhash.ctr.errors import UserError
from qrhash.delta_files import load_delta
from qrhash.export.snapshot import Snapshot
from qrhash.serving.limits import Refused
from qrhash.serving.replaced import signature_of


class Vectors:
    """Looks vectors up.

    Args:
      path: of a snapshot.
      deltas: the directory of its deltas, files ending in .npz; None: there are none.
      max_ids: the most that a request may have.

    Attributes:
      snapshot: the one that serves now.

    Raises:
      UserError: there is no such file, or it cannot be used; or no such directory.
    """

    def __init__(self, path: Path, deltas: Path | None, *, max_ids: int) -> None:
        self._path, self._deltas, self._max_ids = path, deltas, max_ids
        if deltas is not None and not deltas.is_dir():
            raise UserError(f"There is no directory {deltas} for --deltas.")
        self._file = signature_of(path)
        try:
            self.snapshot = Snapshot(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None)  # of the system, which has no sentence for it
            said = f"--embeddings {path} cannot be read: {why}." if why else str(error)
            raise UserError(said) from error
        self._seen: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        """Of the embeddings."""
        return list(self.snapshot.names)

    def lookup(self, said: Any) -> np.ndarray:
        """The vectors that a request asks for.

        Args:
          said: {"name": of the embedding, "ids": [...], "offsets": [...] for bags}.

        Returns:
          As `Snapshot.lookup`.

        Raises:
          Refused: it asks for what there is not.
        """
        if not isinstance(said, dict) or not isinstance(said.get("ids"), list):
            raise Refused(400, 'The body must be {"name": "column", "ids": [...]}.')
        name, ids, offsets = said.get("name", ""), said["ids"], said.get("offsets")
        if not isinstance(name, str) or name not in self.names:
            names = ", ".join(map(repr, self.names))
            raise Refused(422, f"name must be one of {names}, got {str(name)[:40]!r}.")
        if len(ids) > self._max_ids:
            raise Refused(
                413, f"The request has {len(ids):,} ids, more than {self._max_ids:,}: send several."
            )
        kinds = set(map(type, ids))
        if kinds not in (set(), {int}, {str}):
            raise Refused(422, "ids must be integers, or all of them text.")
        if kinds != {str} and not all(-(2**63) <= each < 2**64 for each in ids):
            raise Refused(422, "ids must be integers of 64 bits.")
        bags = None
        if offsets is not None:
            if not isinstance(offsets, list) or set(map(type, offsets)) != {int}:
                raise Refused(422, "offsets must be integers: where each bag begins, and the end.")
            if len(offsets) > self._max_ids + 1:
                raise Refused(413, f"There are more bags than {self._max_ids:,}: send several.")
            if not all(0 <= each <= len(ids) for each in offsets):
                raise Refused(422, f"offsets must be from 0 to {len(ids)}, the number of ids.")
            bags = np.array(offsets, np.int64)
        try:
            return self.snapshot.lookup(_array(ids), name, offsets=bags)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(422, str(error)) from error

    def refresh(self) -> list[str]:
        """Takes over a file that was replaced, and new deltas; returns what to tell of them.

        Raises:
          UserError: the file cannot be used; the one that serves goes on.
        """
        told = []
        now = signature_of(self._path)
        if now is not None and now != self._file:
            self._file = now
            try:
                snapshot = Snapshot(self._path, verify=True)
            except (OSError, ValueError) as error:
                raise UserError(f"{self._path} is not taken over: {error}") from error
            self._seen = {}
            # What has come since it was written is on it before anybody looks it up.
            told = [f"{self._path}: a new snapshot", *self._apply(snapshot)]
            self.snapshot = snapshot
            return told
        return self._apply(self.snapshot)

    def _apply(self, snapshot: Snapshot) -> list[str]:
        """Applies the deltas that are new, in the order of their versions."""
        if self._deltas is None:
            return []
        told, found = [], []
        for path in sorted(self._deltas.glob("*.npz")):
            signature = signature_of(path)
            if signature is None or self._seen.get(path) == signature:
                continue
            try:
                found.append((load_delta(path), path, signature))
            except OSError as error:
                self._seen[path] = signature
                told.append(f"Warning: {error}")
        for delta, path, signature in sorted(found, key=lambda each: int(each[0].to_version)):
            try:
                before = snapshot.version(delta.name)
                version = snapshot.apply(delta)
            except ValueError as error:
                # It may be that one before it is still on its way: then this one is tried again.
                is_told = self._seen.get(path) == ("waits", signature)
                told += [] if is_told else [f"Warning: {path} is not applied: {error}"]
                self._seen[path] = ("waits", signature)
                continue
            self._seen[path] = signature
            if version != before:
                told.append(f"{delta.name}: version {version}, by {path.name}")
        self._seen = {path: each for path, each in self._seen.items() if path.exists()}
        return told


def _array(ids: list[Any]) -> np.ndarray:
    """Ids as a snapshot takes them: integers of 64 bits, signed if they can be, or text."""
    if ids and isinstance(ids[0], str):
        return np.array(ids, object)
    is_large = any(each >= 2**63 for each in ids)
    if is_large:
        return np.array([each % 2**64 for each in ids], np.uint64)
    return np.array(ids, np.int64)
