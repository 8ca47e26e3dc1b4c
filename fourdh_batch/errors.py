"""Everything this package raises on purpose.

    FourdhError
    ├── ConfigError          stop: wrong or missing settings; all problems listed at once
    ├── ManifestError        stop: the corpus cannot be read; all problems listed at once
    ├── CheckpointError      stop: weights missing, or keys and shapes that do not fit
    ├── TrainingError        stop: a loss is not finite, or there is nothing to train on
    ├── SchemaError          stop: a table that does not fit its schema
    ├── MotionError          stop: a file of motion capture that cannot be used
    ├── OutputInUseError     stop: another driver holds the output
    ├── StorageError         retry: the store failed; the same call may succeed later
    │   └── LostRowsError        redo: a published object is not the one that was committed
    └── VideoError           record and go on: one row in `failures`, the job continues
        ├── EmptyFileError          EMPTY            no bytes at all
        ├── NotAVideoError          NOT_A_VIDEO      not one of the containers we read
        ├── NoVideoStreamError      NO_VIDEO_STREAM  a container without pictures
        ├── NoIndexError            NO_INDEX         sample table missing or cut off
        ├── TooLargeError           TOO_LARGE        more pixels than the configured limit
        ├── UndecodableError        UNDECODABLE      opens, but no frame decodes
        ├── CorruptVideoError       CORRUPT          damaged in the middle; the rest was read
        ├── TruncatedVideoError     TRUNCATED        ends before its headers say
        ├── BadTimestampsError      BAD_TIMESTAMPS   presentation times do not increase
        ├── EmptyWindowError        EMPTY_WINDOW     no frame in the window asked for
        ├── DecoderRefusedError     DECODER_REFUSED  the chosen decoder would be wrong here
        ├── BadBoxesError           BAD_BOXES        boxes given for it cannot be used
        ├── BadPosesError           BAD_POSES        bodies given for it cannot be used
        ├── DecodeStalledError      STALLED          no frame within the time limit
        └── WorkerDiedError         WORKER_DIED      a process died while it held this video

Three fates, three branches: *retry*, *record and go on*, *stop*. A message names the video and,
where there is one, the shard and the frame, what was expected and what came.
"""

from __future__ import annotations

import zipfile
import zlib
from typing import ClassVar


class FourdhError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(FourdhError, ValueError):
    """Settings are wrong or missing."""


class ManifestError(FourdhError, ValueError):
    """The corpus cannot be planned; the message lists every problem."""


class CheckpointError(FourdhError, ValueError):
    """Weights are missing or do not fit the model."""


class TrainingError(FourdhError, RuntimeError):
    """Training cannot go on."""


class SchemaError(FourdhError, ValueError):
    """A table does not fit its schema; the message says expected and got."""


class MotionError(FourdhError, ValueError):
    """A file of motion capture is not of a known form; the message says the file and the line."""


class OutputInUseError(FourdhError, RuntimeError):
    """Another driver holds the lease of this output root."""


class StorageError(FourdhError, OSError):
    """The store failed; the same call may succeed later."""


class LostRowsError(StorageError):
    """A published object is gone, or is not the one that was committed."""


class VideoError(FourdhError):
    """One video cannot be (fully) processed.

    Args:
        message: what was expected and what came.
        video: id or path of the video.
        frame_index: frame reached when it happened, 0-based, None where no frame was reached.
        stage: ``open``, ``decode``, ``detect``, ``reconstruct``, ``track`` or ``write``.
    """

    code: ClassVar[str] = "VIDEO_ERROR"

    def __init__(
        self, message: str, *, video: str = "", frame_index: int | None = None, stage: str = "open"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.video = video
        self.frame_index = frame_index
        self.stage = stage

    def __str__(self) -> str:
        where = f"video {self.video}" if self.video else "video"
        if self.frame_index is not None:
            where += f", frame {self.frame_index}"
        return f"{where}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive the default reduction, and errors cross processes.
        return (_rebuild, (type(self), self.message, self.video, self.frame_index, self.stage))


def _rebuild(
    cls: type[VideoError], message: str, video: str, frame_index: int | None, stage: str
) -> VideoError:
    return cls(message, video=video, frame_index=frame_index, stage=stage)


class EmptyFileError(VideoError):
    code = "EMPTY"


class NotAVideoError(VideoError):
    code = "NOT_A_VIDEO"


class NoVideoStreamError(VideoError):
    code = "NO_VIDEO_STREAM"


class NoIndexError(VideoError):
    code = "NO_INDEX"


class TooLargeError(VideoError):
    code = "TOO_LARGE"


class UndecodableError(VideoError):
    code = "UNDECODABLE"


class CorruptVideoError(VideoError):
    code = "CORRUPT"


class TruncatedVideoError(VideoError):
    code = "TRUNCATED"


class BadTimestampsError(VideoError):
    code = "BAD_TIMESTAMPS"


class EmptyWindowError(VideoError):
    code = "EMPTY_WINDOW"


class DecoderRefusedError(VideoError):
    code = "DECODER_REFUSED"


class BadBoxesError(VideoError):
    code = "BAD_BOXES"


class BadPosesError(VideoError):
    code = "BAD_POSES"


class DecodeStalledError(VideoError):
    code = "STALLED"


class WorkerDiedError(VideoError):
    code = "WORKER_DIED"


# Of Python's readers of npz: a damaged member; packed in an unknown way; encrypted; a header that
# claims more than there is memory.
DAMAGED_NPZ = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, MemoryError)
