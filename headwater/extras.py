"""Optional dependencies: import them where they are used, and say how to install them."""

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: Name of the module, such as "transformers".
        extra: The extra of this package that installs it, such as "language".

    Returns:
        The imported module.

    Raises:
        ImportError: The module, or something it needs, is not installed.

    Example:
        >>> require("json", extra="language").loads("[1, 2]")
        [1, 2]
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        because = "" if missing == module else f" (it needs {missing!r})"
        raise ImportError(
            f"{module!r} is needed here but is not installed{because}; "
            f"run: pip install 'headwater[{extra}]'",
            name=missing,
        ) from error
