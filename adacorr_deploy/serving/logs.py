"""Structured logs: one JSON object a line, each with the request's id, so that any collector can join them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from typing import TextIO

from adacorr_deploy.serving.results import JsonValue


class Level(str, Enum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class JsonLog:
    """Writes lines to a stream, whole ones only, from any thread."""

    def __init__(self, model: str, stream: TextIO | None = None) -> None:
        self._model = model
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def write(self, level: Level, event: str, values: Mapping[str, JsonValue]) -> None:
        """Write one line; values that are None are left out."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level.value, "event": event, "model": self._model, **values}
        text = json.dumps({key: value for key, value in line.items() if value is not None}, allow_nan=False)
        with self._lock:
            self._stream.write(f"{text}\n")
            self._stream.flush()
