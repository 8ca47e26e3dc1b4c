"""Files and objects behind one door: local paths, `s3://`, `gs://`, `memory://`, any fsspec.

No other module imports fsspec. An address is a plain local path or `<protocol>://…`; chained
fsspec addresses (``zip://…::s3://…``) are not supported, so `::` may occur in any name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

READ_BLOCK_BYTES = 8 * 2**20  # read ahead of remote streams; a chunk of 1080p video is a few MB


def is_local(uri: str) -> bool:
    """Whether the address is a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> Path:
    """The path behind a local address."""
    return Path(uri.split("://", 1)[1] if "://" in uri else uri)


def _filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a remote address and the path in it."""
    cls = fsspec.get_filesystem_class(uri.split("://", 1)[0])
    options = {"use_listings_cache": False, **cls._get_kwargs_from_urls(uri)}
    return cls(**options), cls._strip_protocol(uri)


def open_read(uri: str) -> BinaryIO:
    """Open a file or object for reading, seekable.

    Raises:
        FileNotFoundError: there is nothing at this address.
    """
    if is_local(uri):
        return local_path(uri).open("rb")
    filesystem, path = _filesystem(uri)
    return cast(BinaryIO, filesystem.open(path, "rb", block_size=READ_BLOCK_BYTES))
