"""`worldmodel.load(folder)`: the one thing offered here, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from worldmodel.backbone import Backbone
    from worldmodel.trained import Trained


@overload
def load(folder: str | PathLike[str], which: str = "best", device: str = "cpu", *, features_only: Literal[False] = False) -> Trained: ...


@overload
def load(
    folder: str | PathLike[str], which: str = "best", device: str = "cpu", *, features_only: Literal[True], out_indices: Sequence[int] | None = None
) -> Backbone: ...


def load(
    folder: str | PathLike[str],
    which: str = "best",
    device: str = "cpu",
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> Trained | Backbone:
    """The model of a run folder, ready for `.forecast(clip)`. which: `best`, `latest` or a checkpoint's name.

    features_only: its encoder alone, an `nn.Module` for a training loop of your own (`worldmodel.backbone.Backbone`), out of a run folder or
    out of an export (`wm export --to torch`, `hf` or `features`); out_indices: which of its blocks' maps `forward` gives. An export holds the
    encoder alone, so that it gives that in any case."""
    from pathlib import Path

    from worldmodel import backbone
    from worldmodel.trained import Trained
    from worldmodel.validation import device_of

    path, where = Path(folder), device_of(device)
    if backbone.is_export(path):
        return backbone.of_export(path, out_indices).to(where)
    trained = Trained(path, which, where)
    return backbone.of_run(trained, out_indices).to(where) if features_only else trained
