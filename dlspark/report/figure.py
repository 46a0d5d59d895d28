"""Figures that draw the names in data as they are written, whatever their characters."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

from dlspark._require import extra, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

INSTALL = extra("report")
_LONGEST = 32  # characters of a name; a longer one leaves a picture no room
_TURNS = ("LRE", "RLE", "LRO", "RLO", "LRI", "RLI", "FSI")
_MARK = "\u200e"  # left to right; it has no width


def new_figure(width: float, height: float) -> Figure:
    """A figure with a size in inches, outside pyplot, so that it needs no closing.

    It draws no formulas: a ``$`` is a ``$``. A character that Matplotlib's font lacks is drawn with an installed font that
    has it; pass names through `shown` for characters that no font has.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    figure: Figure = _figure_type()(figsize=(width, height), layout="constrained")
    return figure


def shown(name: str) -> str:
    """A name from data as the text of a picture: short, and with codes for characters that no installed font has.

    So are marks that change the direction of the text after them, which would turn numbers around.

    Logs a warning of such characters, once.
    """
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    families = {character: _family_of(character) for character in set(name) - {"\n"}}
    lacking = "".join(sorted(character for character, family in families.items() if family is None))
    if lacking:
        _warn(lacking)
    coded = {*lacking, *(each for each in name if unicodedata.bidirectional(each) in _TURNS)}
    text = "".join(_code(character) if character in coded else character for character in name)
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in text):
        return f"{_MARK}{text}{_MARK}"  # or numbers beside a name in Arabic or Hebrew would change places
    return f"{_MARK}{text}" if text.startswith("_") else text  # Matplotlib leaves labels with a leading "_" out of legends


@cache
def _figure_type() -> Any:
    figure = require("matplotlib.figure", install=INSTALL, purpose="Drawing a picture").Figure
    from matplotlib import rc_context
    from matplotlib.text import Text

    class PlainFigure(figure):  # type: ignore[misc,valid-type]
        def draw(self, renderer: Any) -> None:
            with rc_context({"text.parse_math": False, "text.usetex": False}):  # for ticks, which are made while drawing
                for axes in self.axes:
                    for axis in (axes.xaxis, axes.yaxis):
                        axis.get_ticklabels()  # gives them their texts
                texts = self.findobj(Text)
                characters = set().union(*(text.get_text() for text in texts)) - {"\n"}
                others = sorted({family for each in characters if (family := _family_of(each))})
                for text in texts:
                    text.set_parse_math(False)
                    text.set_usetex(False)
                    text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *others])))
                super().draw(renderer)

    return PlainFigure


@cache
def _family_of(character: str) -> str | None:
    """The first font that has a character: "" for Matplotlib's own, the family of an installed one, or None."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    code = ord(character)
    if code in get_font(findfont(FontProperties())).get_charmap():
        return ""
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.weight != 400, entry.name)):
        if "lastresort" in entry.name.replace(" ", "").lower():  # has a box for every character
            continue
        try:
            font = get_font(entry.fname)
            if code in font.get_charmap():
                font.set_size(12, 72)
                font.load_char(code)  # fails for bitmaps, as in fonts of coloured emoji
                return str(entry.name)
        except (OSError, RuntimeError):  # another file that cannot be read must not matter
            continue
    return None


@cache
def _warn(characters: str) -> None:
    logger.warning(
        "No installed font has %s: pictures show %s instead. Install a font that has them, such as Noto Sans.",
        " ".join(character if character.isprintable() else repr(character) for character in characters),
        " ".join(map(_code, characters)),
    )


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()
