"""Makes Markdown of the docstrings' plain text for the API's pages (a Griffe extension).

In a docstring a paragraph of lines "name  what it is" is a list, continued by indented lines; the
rest is text, in which no character is markup but backquotes.
"""

import inspect
import re

import griffe

ENTRY = re.compile(r"(\S.*?) {2,}(\S.*)")


def markdown(text: str) -> str:
    """Returns the Markdown of a docstring."""
    found = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = paragraph.splitlines()
        if not ENTRY.fullmatch(lines[0]) or lines[0][0] == " ":
            found.append(_escaped(" ".join(map(str.strip, lines))))
            continue
        entries, after = [], []
        for line in lines:
            entry = ENTRY.fullmatch(line)
            if after or not (entry or line[0] == " "):
                after.append(line.strip())
            elif entry and line[0] != " ":
                entries.append([entry[1], entry[2]])
            else:
                entries[-1][1] += f" {line.strip()}"
        found += ["\n".join(f"- {_name(name)}: {_escaped(what)}" for name, what in entries)]
        found += [_escaped(" ".join(after))] if after else []
    return "\n\n".join(found)


def _name(text: str) -> str:
    return f"**{_escaped(text)}**"


def _escaped(text: str) -> str:
    """Returns text whose characters mean themselves, but what stands in backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([\\*_\[\]<>~|#])", r"\\\1", part)
        for i, part in enumerate(parts)
    )


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites one."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
