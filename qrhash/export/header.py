"""What a snapshot says of its arrays: JSON in its header, and the hashes that it was made with.

Row numbers of keys go by the bijection that scrambles them, and keys of text by a hash. Another one
would give every key another's row without a word, so that a snapshot holds some numbers to try
both on.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrhash.strings import hash_strings
from qrhash.words import Keys, scramble

NAME = "qrhash"  # under which it stands in the header of the file

_FORMAT = 1

_TEXTS = ("", "qrhash", "quotient-remainder hash of a longer text")
_KEYS = (0, 1, 2**63, 2**64 - 1)
_SEEDS = (0, 7)


@dataclass(frozen=True)
class Header:
    """What a snapshot says of its arrays.

    Attributes:
      version: of the qrhash that wrote it.
      embeddings: name -> what is fixed about an embedding.
      checksums: name of an array -> CRC-32 of its bytes.
    """

    version: str
    embeddings: Mapping[str, Any]
    checksums: Mapping[str, int]

    def to_json(self) -> str:
        """The header as text."""
        return json.dumps({"format": _FORMAT, "hashes": _hashes()} | asdict(self))

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Header":
        """The header of which `to_json` made a text.

        Raises:
          OSError: it did not.
          ValueError: it is of another version.
        """
        try:
            said = json.loads(text)
            header = cls(said["version"], dict(said["embeddings"]), dict(said["checksums"]))
            number, hashes = said["format"], said["hashes"]
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"{path} is damaged: its header cannot be read, {error!r}.") from error
        if number != _FORMAT or hashes != _hashes():
            what = f"format {number}" if number != _FORMAT else "other hashes"
            raise ValueError(
                f"{path} is of qrhash {header.version}, with {what} than this one reads: save it "
                "anew."
            )
        return header


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _hashes() -> dict[str, list[int]]:
    """What the hashes make of some texts and keys."""
    keys = Keys.of(list(_KEYS))
    return {
        "texts": hash_strings(list(_TEXTS)).tolist(),
        "keys": [n for seed in _SEEDS for n in scramble(keys, seed).to_numpy().tolist()],
    }
