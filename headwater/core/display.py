"""How results show themselves: what an example is called, and cards in a notebook."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

_TITLES = ("title", "name", "headline", "subject")
_CARDS = "headwater.report.notebook"  # by name, as it lies above


def title_of(example_id: str, metadata: Mapping[str, Any]) -> str:
    """What to call an example: its title where the metadata has one, otherwise its id.

    Example:
        >>> title_of("a1", {"Title": "Basalt"}), title_of("a1", {})
        ('Basalt', 'a1')
    """
    by_name = {name.lower(): value for name, value in metadata.items()}
    found = (by_name.get(name) for name in _TITLES)
    return next((str(value) for value in found if value not in (None, "")), example_id)


def plain_text(text: str, width: int) -> str:
    r"""The text on one line, cut to a width; what is not to be printed is escaped.

    Example:
        >>> plain_text("a\nb\x1b c", 20), plain_text("abcdef", 4)
        ('a b\\x1b c', 'abc…')
    """
    text = text[: 4 * width]
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return line if len(line) <= width else f"{line[: width - 1]}…"


class Shown:
    """A result that shows the cards of the evidence page in a notebook, where jinja2 is installed."""

    def _repr_html_(self) -> str | None:
        try:
            return import_module(_CARDS).html(self)
        except ImportError:
            return None
