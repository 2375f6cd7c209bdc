"""`worldmodel.load(run)`: the one thing offered here, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from worldmodel.trained import Trained


def load(run: str | PathLike[str], which: str = "best", device: str = "cpu") -> Trained:
    """The model of a run folder, ready for `.forecast(clip)`. which: `best`, `latest` or a checkpoint's name."""
    from pathlib import Path

    from worldmodel.trained import Trained

    return Trained(Path(run), which, device)
