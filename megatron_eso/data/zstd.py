"""The decompressed bytes of a .zst file, whose frames follow each other.

Zstandard's own reader takes the end of a file within a frame for the end of the data, so a truncated file
would silently lose text.
"""

import io
from typing import Any, BinaryIO

from megatron_eso.errors import DataError

# Compressed bytes read at a time: their decompressed text is held in memory.
READ_BYTES = 1 << 16


def open_zstd(file: BinaryIO, path: str) -> BinaryIO:
    """Return the decompressed bytes of an open file; ``path`` is for messages.

    Reading raises EOFError if the file ends within a frame, and OSError if it is damaged.

    Raises:
        DataError: if the zstandard package is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} needs the zstandard package: pip install zstandard") from None
    return io.BufferedReader(_Frames(file, zstandard), 1 << 20)


class _Frames(io.RawIOBase):
    """The data of all of a file's frames."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None  # the frame that is being read
        self._compressed = b""
        self._data = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            self._compressed = self._compressed or self._file.read(READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame: it was cut short")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self) -> None:
        frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._data = memoryview(frame.decompress(self._compressed))
        except self._zstandard.ZstdError as error:
            raise OSError(f"it is damaged: {error}") from error
        self._compressed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
