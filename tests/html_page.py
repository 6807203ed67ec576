"""A strict reading of an HTML page, for the tests that judge one."""

import base64
import binascii
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

_VOID = {"meta", "img", "br", "hr", "link", "input"}
_FETCHING = {"src", "href", "srcset", "data", "action", "formaction", "poster", "background", "xlink:href", "cite"}


class Page(HTMLParser):
    """What is on a page; raises AssertionError where tags are not closed in order.

    Attributes:
        tags: (name, attributes) of all elements, in order.
        text: everything that is read, without the style sheet, white space made single.
        css: the style sheets.
    """

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self._open, self._text, self.css = [], [], [], ""
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"
        self.text = " ".join("".join(self._text).split())

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(path.read_text(encoding="ascii"))

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is there twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open}"
        self._open.pop()
        self._text.append(" " if tag in ("p", "td", "th", "tr", "li", "h1", "h2", "h3", "dt", "dd", "div") else "")

    def handle_data(self, data):
        if "style" in self._open:
            self.css += data
        else:
            self._text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        """The images, decoded."""
        found = []
        for attributes in self.all("img"):
            head, _, data = attributes["src"].partition(",")
            assert head == "data:image/png;base64"
            try:
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"])
            except binascii.Error as error:
                raise AssertionError("an image is not base64") from error
            image.load()
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            found.append(image)
        return found

    def assert_self_contained(self) -> None:
        """Nothing is loaded from elsewhere, and nothing runs."""
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in _FETCHING:
                    assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
                assert "url(" not in (value or "") and "javascript:" not in (value or ""), (tag, name)
        assert "url(" not in self.css and "@import" not in self.css

    def assert_accessible(self) -> None:
        """A language, a title, headings without gaps, headers that say of what, and words for every picture."""
        assert self.all("html")[0]["lang"] and self.all("title") and self.all("meta")[0] == {"charset": "utf-8"}
        levels = [int(tag[1]) for tag, _ in self.tags if tag in ("h1", "h2", "h3", "h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
        assert all(attributes.get("scope") in ("col", "row") for attributes in self.all("th"))
        for attributes in self.all("img"):
            assert len(attributes["alt"]) > 20
        for attributes in self.all("svg"):
            assert attributes.get("aria-hidden") == "true" or (
                attributes["role"] == "img" and len(attributes["aria-label"]) > 20
            )
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(set(ids)) == len(ids)
        for attributes in self.all("a"):
            assert attributes["href"][1:] in ids
