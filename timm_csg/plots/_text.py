"""Names and titles in figures: taken as they are, as ``$`` and ``%`` in them are no mathematics."""

from typing import Any

AS_IT_IS: dict[str, Any] = {"parse_math": False}


def drawable(text: str, most: int = 90) -> str:
    """Text that a font can draw (no half characters, as in names of files that are not UTF-8), cut to a length.

    Example:
        >>> drawable("caf" + chr(0xDCE9)), drawable("abcdef", 4)
        ('caf?', 'abc…')
    """
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else text[: most - 1] + "…"
