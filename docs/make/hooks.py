"""Fits the repository's Markdown to the site, and fails where the API lacks a docstring.

A link that leads out of docs/ works in the repository; the site has the pictures that lie there,
and names other files.
"""

import logging
import pathlib
import posixpath
import re

import griffe
from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.plugins.uegr_kernels")  # strict counts what it warns of
# `__all__ = ["NAMES", ..., *NAMES]` says more than Griffe reads
logging.getLogger("griffe").addFilter(lambda record: "Unsupported item" not in record.getMessage())
logging.getLogger("mkdocs.plugins.griffe").addFilter(
    lambda record: "Unsupported item" not in record.getMessage()
)
ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s]+)\)")
DOCUMENTED = re.compile(r"^::: (\S+)", re.MULTILINE)


def on_files(files, config):
    """Adds the pictures outside of docs/ that pages show."""
    for page in files.documentation_pages():
        for picture, _, target in LINK.findall(page.content_string):
            place = posixpath.normpath(
                posixpath.join("docs", posixpath.dirname(page.src_uri), target)
            )
            if picture and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links that leave docs/ to what the site has of them."""
    here = posixpath.dirname(page.file.src_uri)

    def link(found):
        picture, text, target = found.groups()
        place = posixpath.normpath(posixpath.join("docs", here, target))
        if place.startswith("docs/"):
            return found[0]
        if not (ROOT / place.split("#")[0]).exists():
            LOG.warning(f"{page.file.src_uri}: {target} leads to no file")
        if picture:
            return f"![{text}]({posixpath.relpath(place, here or '.')})"
        return text if text == f"`{place}`" else f"{text} (`{place}` in the repository)"

    return LINK.sub(link, markdown)


def on_config(config):
    """Looks for public names without a docstring."""
    package = griffe.load("uegr_kernels", search_paths=[ROOT])
    pages = pathlib.Path(config.docs_dir, "api").glob("*.md")
    names = [name for page in pages for name in DOCUMENTED.findall(page.read_text())]
    for name in names:
        for missing in without_docstring(package[name.removeprefix("uegr_kernels.")]):
            LOG.warning(f"{missing} is public and has no docstring")
    return config


def without_docstring(found: griffe.Object | griffe.Alias) -> list[str]:
    """Returns the paths of a name, and of its methods, that say nothing of themselves."""
    if found.is_attribute:
        return []
    members = found.members.values() if found.is_class else ()
    public = [each for each in members if each.is_function and not each.name.startswith("_")]
    return [each.path for each in (found, *public) if not each.has_docstring]
