"""Elements of the page. Whatever text goes in comes out as text: nothing here reads markup."""

import re
import xml.etree.ElementTree as ET

# Control characters and lone surrogates: allowed in JSON and in names of files, not in a page.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def plain(text: str) -> str:
    """Replace the characters that a page cannot hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def element(tag: str, *children: ET.Element | str | None, **attributes: str) -> ET.Element:
    """Make an element.

    Args:
        tag: its name.
        children: elements, texts, or None for nothing.
        attributes: `class_` stands for class, `aria_label` for aria-label, and so on.
    """
    made = ET.Element(
        tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    )
    last = None
    for child in children:
        if isinstance(child, ET.Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + child
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + child
    return made


def document(head: ET.Element, body: ET.Element) -> str:
    """Write the page."""
    page = element("html", head, body, lang="en")
    return "<!DOCTYPE html>\n" + plain(ET.tostring(page, encoding="unicode", method="html")) + "\n"
