"""Pages: a step, a run, several runs compared, an autopsy. One self-contained HTML file each."""

import json
from pathlib import Path
from typing import Any


def write_step(found: dict[str, Any], out: Path) -> str:
    """Writes the page of an opened step; returns a line that says so."""
    raise NotImplementedError
