"""Turn the formulas of a page into MathML when the site is built, so that no script is needed."""

import re
from html import unescape

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves behind: \( inline \) in a span, \[ displayed \] in a div.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(formula: re.Match) -> str:
    display = "block" if formula[1] == "div" else "inline"
    return convert(unescape(formula[2]).strip(), display=display)
