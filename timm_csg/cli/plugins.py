"""``--plugin``: the user's own modules, imported before a command runs, for what they register."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def import_plugins(plugins: Sequence[str]) -> None:
    """Import Python files (``nets/mine.py``) or modules (``package.nets``), for what they register.

    Raises:
        ValueError: If the file or module does not exist, has the name of another module, or fails; with its line.
    """
    for plugin in plugins:
        path = Path(plugin).expanduser()
        is_file = path.suffix == ".py"
        if is_file and not path.is_file():
            raise ValueError(f"--plugin {plugin}: the file does not exist.")
        try:
            _import_file(path) if is_file else importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise ValueError(f"--plugin {plugin} is not a module that can be imported: {error}.") from error
        except Exception as error:  # it is the user's own code, which may raise anything
            lines = traceback.extract_tb(error.__traceback__)
            place = (
                "" if isinstance(error, SyntaxError) else f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})"
            )
            raise ValueError(f"--plugin {plugin} fails: {type(error).__name__}: {error}{place}.") from error


def _import_file(path: Path) -> None:
    """Import a file as the module of its name, unless it was imported before."""
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) is None or Path(str(known.__file__)).resolve() != path.resolve():
            raise ImportError(f"there is another module named {path.stem!r}; rename the file")
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses and pickling look it up
    try:
        spec.loader.exec_module(sys.modules[path.stem])
    except BaseException:
        del sys.modules[path.stem]
        raise
