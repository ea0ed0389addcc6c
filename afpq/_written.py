"""Writes a model so that a bad one never takes the name of a good one: saved, checked, and only then renamed."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from afpq._probe import Feeds, random_feeds
from afpq.errors import ModelError
from afpq.rewrite import save
from afpq.runtime import session

__all__ = ["save_checked", "try_file"]


def save_checked(
    model: ir.Model, path: Path, check: Callable[[Path], dict[str, Any]]
) -> tuple[int, dict[str, Any]]:
    """Writes the file beside its place, lets `check` look at it, and gives it its name; its bytes, and what was found.

    Raises:
        ModelError: it cannot be written, or `check` raised. Nothing is left behind then.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        size = save(model, folder / path.name)
        found = check(folder / path.name)
        # External data first: the model's own file is what makes the result valid.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return size, found


def try_file(path: Path, probe: Feeds | None, *, ops: bool = True) -> dict[str, Any]:
    """Loads a written file, with afpq's operators if `ops`, and runs it once.

    Made-up inputs may not suit a model, real ones must.

    Raises:
        ModelError: onnxruntime cannot load the file, or cannot run it on `probe`.
    """
    loaded = session(path, ops=ops)
    try:
        loaded.run(None, random_feeds(loaded) if probe is None else probe)
    except Exception as error:  # onnxruntime has a kind of its own for every status
        if probe is None:
            return {"loaded": True, "run_once": "no: made-up inputs do not suit the model"}
        message = " ".join(str(error).split())
        raise ModelError(f"the packed model loads but does not run: {message}") from error
    return {"loaded": True, "run_once": "on made-up inputs" if probe is None else "on a sample"}
