"""README and docs/: every Python block runs, links lead somewhere, messages are the code's."""

import ast
import functools
import pathlib
import re
import shlex
import subprocess

import pytest
import torch
from documents import BLOCKS, MARKS, PAGES, REVIEWS, ROOT, blocks_of, written_in

import uegr_kernels as uk

MOST_MARKS = 10  # shell blocks that are parsed alone
README = (ROOT / "README.md").read_text()


def test_blocks_are_found_with_their_marks():
    text = "a\n<!-- install -->\n```sh\npip\n```\n\n```python\nx = 1\n```\n"
    found = blocks_of(ROOT / "README.md", text)
    assert [(b.line, b.language, b.mark, b.text) for b in found] == [
        (3, "sh", "install", "pip\n"),
        (7, "python", None, "x = 1\n"),
    ]
    assert str(found[1]) == "README.md:7" and len(written_in("python")) > 10


def test_readme_is_a_page():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


# ---- Code


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with a reader's texts in it, and a model that was trained on them."""
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    return tmp_path


def trained(folder: pathlib.Path) -> None:
    """Writes what `finetune` leaves of a model: a folder in Transformers' format."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "."]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=8, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # frameworks warn of their own affairs
@pytest.mark.parametrize("block", written_in("python"), ids=str)
def test_python_runs(reader, block):
    for package in ("transformers", "lightning", "matplotlib"):
        if re.search(rf"^(import|from) {package}\b", block.text, re.MULTILINE):
            pytest.importorskip(package)
    if '"reviews"' in block.text:
        trained(reader / "reviews")
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    exec(code, {"__name__": "block"})


def test_every_block_is_python_or_shell():
    """A language that no test knows is a block that no test runs; so is an indented command."""
    assert {str(block) for block in BLOCKS if block.language not in ("python", "sh")} == set()
    command = re.compile(r"^    (?:\w+=\S+ )*(?:make|pip|python3?|torchrun) .*", re.MULTILINE)
    spec = "    python -m uegr_kernels info | demo | finetune"  # a list of names
    found = [line for page in PAGES for line in command.findall(page.read_text())]
    assert [line for line in found if line != spec] == []


def test_marks_are_known_and_few():
    marked = {str(block): block.mark for block in BLOCKS if block.mark is not None}
    assert {mark for mark in marked.values() if mark not in MARKS} == set()
    assert len(marked) <= MOST_MARKS, marked
    assert all(block.language == "sh" for block in BLOCKS if block.mark)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark], ids=str)
def test_shell_that_is_not_run_parses(block):
    """As a shell reads it; what it calls is there, as far as that can be seen."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets += ["test"]
    for line in block.text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word]
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif "-m" in words:
            module = words[words.index("-m") + 1].replace(".", "/")
            assert (ROOT / f"{module}.py").exists() or (ROOT / module).is_dir(), line
        elif words:
            assert words[:2] == ["pip", "install"], line


# ---- Links


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(page: pathlib.Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists():
            found.append(target)
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            found.append(target)
    return found


def test_a_broken_link_is_found():
    text = "# A b\n[x](README.md) [y](#a-b) [z](https://a.b/c)\n[u](none.md) [v](README.md#none)"
    page = ROOT / "CONTRIBUTING.md"
    assert broken_links(page, text.replace("(#a-b)", "(README.md)")) == [
        "none.md",
        "README.md#none",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page, page.read_text()) == []


# ---- What pages say of the code


@functools.cache
def messages() -> tuple[str, ...]:
    """Every string of the package, with `…` for what is put into it."""
    found = set()
    for file in (ROOT / "uegr_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.add(re.sub("…+", "…", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return tuple(found)


def is_said(message: str) -> bool:
    return any(message.rstrip("…") in text for text in messages())


ERRORS = re.findall(r"^### `(.*)`$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)


def test_a_message_that_no_code_has_is_found_out():
    assert is_said("backend=… is not a backend") and not is_said("backend=… is no backend")
    assert len(ERRORS) > 40


@pytest.mark.parametrize("message", ERRORS)
def test_the_page_of_errors_has_the_codes_messages(message):
    assert is_said(message)
    assert len(message.replace("…", "")) > 20  # else it is said anywhere


def test_the_page_of_departures_has_every_recipe():
    headings = re.findall(r"^### (.*)$", (ROOT / "docs/departures.md").read_text(), re.MULTILINE)
    assert headings == list(uk.recipes.NAMES)


def test_the_api_has_every_public_name():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    assert len(documented) == len(set(documented))
    names = {f"uegr_kernels.{name}" for name in uk.__all__ if name not in ("recipes", "analysis")}
    names |= {f"uegr_kernels.recipes.{name}" for name in uk.recipes.NAMES}
    names |= {f"uegr_kernels.analysis.{name}" for name in uk.analysis.__all__}
    assert names <= set(documented), sorted(names - set(documented))


def test_no_committed_table_has_a_row_that_was_in_doubt():
    tables = [*PAGES, ROOT / "bench/README.md", *(ROOT / "bench/results").rglob("*.md")]
    found = [page.name for page in tables if re.search("disturbed|WARNING", page.read_text())]
    assert found == []
