"""Reads back what Weights & Biases has written about an offline run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WandbLog:
    """One call's part of a run.

    Attributes:
        identity: Id of the run.
        config: Configuration.
        history: What was logged, a dict for each step.
    """

    identity: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def media(self, kind: str) -> set[str]:
        """Names of what was logged as a kind, such as ``image`` or ``table``."""
        return {
            name
            for row in self.history
            for name, value in row.items()
            if isinstance(value, dict) and kind in str(value.get("_type"))
        }


def read_log(file: Path) -> WandbLog:
    """Read the log of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    log = WandbLog()
    for data in _log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        log.identity = record.run.run_id or log.identity
        for update in [*record.run.config.update, *record.config.update]:
            log.config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        row: dict[str, Any] = {}
        for item in record.history.item:
            *parents, name = item.nested_key or [item.key]
            place = row
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = json.loads(item.value_json)
        if row:
            log.history.append(row)
    return log


def _log_records(log: bytes) -> Iterator[bytes]:
    """Split a log in LevelDB's format, with a header of 7 bytes, into its records."""
    block, header = 32768, 7
    position, record = header, b""
    while position + header <= len(log):
        if block - position % block < header:  # too little room for a header: padding
            position += block - position % block
            continue
        length = int.from_bytes(log[position + 4 : position + 6], "little")
        kind = log[position + 6]  # 1: whole; 2, 3, 4: first, middle, last part
        record += log[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):
            yield record
            record = b""
