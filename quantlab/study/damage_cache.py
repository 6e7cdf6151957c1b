"""A cache of measurements on disk, each under a digest of everything that it depends on.

One small file per entry, written whole or not at all, so that any number of processes may share the folder, and a
process that is killed loses what it was measuring and nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from quantlab.files.model import Model
from quantlab.files.output import replacing


class DamageCache:
    """A folder of entries, each a JSON file `<2 digits>/<62 digits>.json` with its key and its value.

    The folder is made when the first entry is written; None remembers nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, key: dict) -> dict | None:
        """Return the value under `key` (None: missing or damaged)."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            return entry["value"] if entry["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def prepare(self) -> None:
        """Make the folder and check that it is writable, before a long measurement.

        Raises
        ------
        OSError
            If it cannot be made or written.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise OSError(f"cache={self.folder}: is not writable ({reason}). Choose another folder.") from error

    def put(self, key: dict, value: dict) -> None:
        """Keep `value` under `key`."""
        if self.folder is None:
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, overwrite=True) as part:
            part.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")

    def _path(self, key: dict) -> Path:
        digest = json_digest(key)
        return self.folder / digest[:2] / f"{digest[2:]}.json"  # pyright: ignore[reportOptionalOperand]


def json_digest(value) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_digest(model: Model) -> str:
    """Return the SHA-256 of a model's hyper-parameters, and of name, shape, type and bytes of all tensors.

    Two files of the same tensors have the same digest, whatever their metadata says beside.
    """
    sha = hashlib.sha256(repr(model.hparams).encode())
    for tensor in model:
        sha.update(f"{tensor.name} {tensor.shape} {tensor.qtype}\n".encode())
        step = max(1, (1 << 26) // max(1, tensor.nbytes // max(1, tensor.nrows)))  # rows of 64 MiB
        for start in range(0, tensor.nrows, step):
            rows = tensor.rows(start, min(start + step, tensor.nrows))
            sha.update(np.ascontiguousarray(rows).view(np.uint8))
    return sha.hexdigest()


def matrix_digests(imatrix: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the SHA-256 of each tensor's weights per column."""
    return {name: hashlib.sha256(np.ascontiguousarray(w).tobytes()).hexdigest() for name, w in imatrix.items()}
