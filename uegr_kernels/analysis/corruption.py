"""Texts as people mistype them, to see what a model makes of them."""

import random
from collections.abc import Iterable

from ..core import checks

KINDS = ("typos", "keyboard", "swaps", "drops")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """Returns the letters beside each letter on a QWERTY keyboard, whose rows stand half a key
    apart.
    """
    places = {
        key: (row + 2 * i, y)
        for y, line in enumerate(_ROWS)
        for i, key in enumerate(line)
        for row in (y,)
    }
    return {
        key: "".join(
            other
            for other, (u, v) in places.items()
            if other != key and abs(u - x) <= 2 and abs(v - y) <= 1
        )
        for key, (x, y) in places.items()
    }


NEIGHBOURS = _neighbours()


def corrupted(
    texts: Iterable[str], kind: str = "typos", rate: float = 0.05, seed: int = 0
) -> list[str]:
    """Returns the texts with a share of their letters mistyped.

    texts  strings
    kind   "keyboard": a letter becomes a neighbour on a QWERTY keyboard (other alphabets' are
           swapped); "swaps": it changes places with the letter after it in the word; "drops": it is
           left out, a word's first letter never; "typos": one of those that can be, drawn for each
    rate   in [0, 1], the chance that a letter is mistyped; digits, signs and spaces stay
    seed   an integer; what is drawn depends on it, the kind and the text alone, so that the order
           of the texts does not matter, and a smaller rate draws a part of the same letters

    Raises ValueError for a kind or rate that is none, TypeError where `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of them")
    checks.choice("kind", kind, KINDS)
    rate, seed = checks.number("rate", rate, 0, 1), checks.integer("seed", seed)
    return [_mistyped(text, kind, rate, random.Random(f"{seed} {kind} {text}")) for text in texts]


def _mistyped(text: str, kind: str, rate: float, draw: random.Random) -> str:
    draws = [(draw.random(), draw.random(), draw.random()) for _ in text]
    typed = list(text)
    # where the last swap put a letter, which is left there
    moved = -1
    for i, (u, which_way, which_key) in enumerate(draws):
        if not text[i].isalpha() or u >= rate or i == moved:
            continue
        keys = NEIGHBOURS.get(text[i].lower(), "")
        can = {
            "keyboard": bool(keys),
            "swaps": text[i + 1 : i + 2].isalpha(),
            "drops": i > 0 and text[i - 1].isalpha(),
        }
        ways = [way for way in can if can[way] and kind in ("typos", way)]
        ways = ways or [way for way in ("swaps",) if can[way] and kind == "keyboard"]
        if not ways:
            continue
        way = ways[int(which_way * len(ways))]
        if way == "drops":
            typed[i] = ""
        elif way == "keyboard":
            key = keys[int(which_key * len(keys))]
            typed[i] = key.upper() if text[i].isupper() else key
        else:
            typed[i], typed[i + 1] = text[i + 1], text[i]
            moved = i + 1
    return "".join(typed)
