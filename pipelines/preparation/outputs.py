"""Can an output be written at all? Asked before the planning, which may take hours."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel

from pipelines import storage
from pipelines.preparation.settings import CONFIG_NAME
from pipelines.preparation.sources import PlanError
from pipelines.settings import dump_settings


def check_writable(output: str, settings: BaseModel) -> None:
    """Raise PlanError where nothing can be written into `output`, a folder that need not exist or a URI.

    A disk tells it unasked. A store only answers a write, so there the `settings` are put, as they are once the plan is
    made, unless some lie there.
    """
    try:
        if storage.is_local(output):
            _check_folder(Path(storage.resolve(output)))
        else:
            storage.put_if_absent(storage.join(output, CONFIG_NAME), dump_settings(settings).encode())
    except FileNotFoundError as error:
        raise PlanError(f"output: {output}: there is no such bucket; create it, or choose another output") from error
    except OSError as error:
        remedy = "" if isinstance(error, NotADirectoryError) else "open it to this user, or "
        raise PlanError(
            f"output: {output}: nothing can be written there ({error.strerror}); {remedy}choose another output"
        ) from error


def _check_folder(folder: Path) -> None:
    place = next(each for each in (folder, *folder.parents) if each.exists())
    if not place.is_dir():
        raise NotADirectoryError(None, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):  # False for root too, on a disk that is mounted to be read
        raise PermissionError(None, f"{place} may not be written")
