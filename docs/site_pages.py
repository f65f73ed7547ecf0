"""Pages of the site that lie outside docs/: README.md as its first page, CONTRIBUTING.md and the others beside it."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "kernels_tested.md": "pallas_kernels/README.md",
         "changelog.md": "CHANGELOG.md"}  # fmt: skip


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown, **_):
    return _moved(markdown)


def _moved(text):
    """Links to the files of PAGES, and from them into docs/, as the site has them."""
    for page, source in PAGES.items():
        text = re.sub(rf"\]\((\.\./)*{re.escape(source)}\)", f"]({page})", text)
    return text.replace("](docs/", "](")
