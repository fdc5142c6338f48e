"""What every Python process of a test run does first: this folder is on their PYTHONPATH.

A run starts hundreds of them, and most of what each does is to import Ray, torch and transformers. Python looks through
all that is there for garbage after every 700 new objects, of which none is garbage: a tenth of the run's CPU time. By
`gc.freeze` flashsloth and Serve say that all is loaded: from then on a process searches as those of users do. Otherwise
a service would collect a hundred megabytes of what streams leave behind.

And transformers reads each of its 1,600 model files, twice, to see which names they define: a quarter of what it takes
to import the model. Here the first process writes down what that gives, and the others read it.
"""

import contextlib
import gc
import importlib.util
import marshal
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_SCANNER = "transformers.utils.import_utils"
_FOUND = Path(__file__).parents[2] / ".cache"


class _KeptScans(MetaPathFinder):
    """Finds the module that scans transformers, and lets its results be kept; no other."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _SCANNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            module.define_import_structure = _kept(module.define_import_structure)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _kept(scan: Callable[..., Any]) -> Callable[..., Any]:
    def read_or_scan(module_path: Any, prefix: str | None = None) -> Any:
        """As `define_import_structure`, which is given a folder of models or a file in it."""
        place = Path(module_path)
        folder = place if place.is_dir() else place.parent
        if folder.name != "models":
            return scan(module_path, prefix)
        # Another version of transformers has another time of this, to the nanosecond.
        file = _FOUND / f"transformers-{folder.stat().st_mtime_ns}-{prefix}.marshal"
        try:
            return marshal.loads(file.read_bytes())
        except (OSError, EOFError, ValueError, TypeError):
            found = scan(module_path, prefix)
        with contextlib.suppress(OSError):  # a working copy that may not be written to only costs time
            file.parent.mkdir(exist_ok=True)
            own = file.with_suffix(f".{os.getpid()}")
            own.write_bytes(marshal.dumps(found))
            own.replace(file)
        return found

    return read_or_scan


def _search_once_loaded() -> None:
    freeze, thresholds = gc.freeze, gc.get_threshold()

    def freeze_and_search() -> None:
        freeze()
        gc.set_threshold(*thresholds)

    gc.freeze = freeze_and_search
    gc.set_threshold(100_000, 50, 1000)


_search_once_loaded()
sys.meta_path.insert(0, _KeptScans())
