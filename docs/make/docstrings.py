"""Makes Markdown of the docstrings' plain text for the API's pages (a Griffe extension).

In a docstring a paragraph of lines "name  what it is" is a list, continued by indented lines; the
rest is text, in which no character is markup but backquotes.
"""

import ast
import inspect
import pathlib
import re

import griffe

ROOT = pathlib.Path(__file__).parents[2]
OPTION = re.compile(r"options\.(\w+)\((.*)\)", re.DOTALL)
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
        found += ["\n".join(_item(name, what) for name, what in entries)]
        found += [_escaped(" ".join(after))] if after else []
    return "\n\n".join(found)


def _item(name: str, what: str) -> str:
    """Returns an entry, and those that follow it on its line after a semicolon."""
    what, *more = re.split(r"; {2,}(?=\S+ {2,}\S)", what, maxsplit=1)
    others = [_item(*found.groups()) for each in more if (found := ENTRY.fullmatch(each))]
    return "\n".join([f"- **{_escaped(name)}**: {_escaped(what)}", *others])


def _escaped(text: str) -> str:
    """Returns text whose characters mean themselves, but what stands in backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([\\*_\[\]#])", r"\\\1", part).replace("<", "&lt;")
        for i, part in enumerate(parts)
    )


def defaults_of(file: pathlib.Path, name: str) -> dict[str, str]:
    """Returns the values of a class's attributes, as its file has them."""
    (found,) = (
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {
        f"{name}.{field.target.id}": ast.unparse(field.value)
        for field in found.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant)
    }


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is loaded, and shows defaults as values, wherever the code
    declares them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.defaults = defaults_of(ROOT / "uegr_kernels/selective/options.py", "Selection")

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites one docstring."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Shows the default of a recipe's option, `options.number(0.1)` or `Selection.scope`."""
        attr.value = self.defaults.get(str(attr.value), attr.value)
        called = OPTION.fullmatch(str(attr.value or ""))
        if called:
            first = called[2].split(",")[0]
            attr.value = '"auto"' if called[1] == "backend" else first.removeprefix("default=")

    def on_function_instance(self, *, func: griffe.Function, **kwargs: object) -> None:
        """Shows the defaults of the selection's options, `Selection.threshold`."""
        for parameter in func.parameters:
            parameter.default = self.defaults.get(str(parameter.default), parameter.default)
