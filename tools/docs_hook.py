"""Hook of mkdocs: files of the checkout that pages link to become part of the site, under source/."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files, config):
    named = {path for file in files.documentation_pages() for path in OUTSIDE.findall(file.content_string)}
    for path in named:
        # Also folders, as lists of what is in them; Markdown as text, for its links are those of another place.
        source = ROOT / path
        content = "\n".join(sorted(p.name for p in source.iterdir())) if source.is_dir() else source.read_text("utf-8")
        files.append(File.generated(config, target(path), content=content))
    return files


def on_page_markdown(markdown, **_):
    return OUTSIDE.sub(lambda match: f"]({target(match[1])}", markdown)


def target(path: str) -> str:
    return f"source/{PurePosixPath(path)}.txt"
