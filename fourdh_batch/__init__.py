"""Every person in a video corpus, in 3D, with an identity over time, in a table."""

from __future__ import annotations

__version__ = "0.1.0"
