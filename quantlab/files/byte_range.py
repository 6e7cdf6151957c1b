"""A stretch of bytes in a file, read with plain reads: no memory map, so that a vanished file raises instead of crashing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ByteRange"]


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` bytes of file `path` from `offset` on."""

    path: Path
    offset: int
    nbytes: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read bytes `start:stop` of the stretch.

        Returns
        -------
        np.ndarray [shape=(stop - start,), dtype=uint8]
            Freshly allocated.

        Raises
        ------
        ValueError
            If the range lies outside the stretch, or the file ends before it.
        """
        stop = self.nbytes if stop is None else stop
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"{self.path}: bytes {start}:{stop} lie outside the {self.nbytes} bytes of this tensor.")
        out = np.empty(stop - start, np.uint8)
        view, done = memoryview(out), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start)
            while done < len(out):
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(
                        f"{self.path}: file ends at byte {self.offset + start + done}, "
                        f"{len(out) - done} bytes early. Download or write it again."
                    )
                done += got
        return out
