"""The Markdown that people read, and the blocks of code in it."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# shell blocks that are parsed, not run
MARKS = ("install", "GPU", "distributed")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    page: pathlib.Path
    line: int
    language: str
    mark: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page: pathlib.Path, text: str) -> list[Block]:
    return [
        Block(page, text[: found.start("language")].count("\n") + 1, *found.group(2, 1, 3))
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text())]


def written_in(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


# A few texts with labels, for pages that speak of a file of the reader's.
REVIEWS = "label,text\n" + "".join(
    f"{label},a {word} film number {i}\n"
    for i in range(30)
    for label, word in (("good", ("fine", "warm", "wise")[i % 3]), ("bad", ("dull", "flat")[i % 2]))
)
