"""How a server writes its log: lines for people, or one JSON object a line for machines. Both to standard error."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; what was given as `extra`; and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        content |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def set_up_logs(form: Format, level: Level) -> None:
    """Send this process's log to standard error, from a level on. Of other packages only warnings: we cannot vouch for more."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level="ERROR" if level == "error" else "WARNING", handlers=[handler])
    logging.getLogger("edgecloud").setLevel(level.upper())
