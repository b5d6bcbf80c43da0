"""Docstrings as they are written here, in the form that Sphinx reads.

They are Markdown: code in single backticks, equations indented. Sphinx takes reStructuredText, where
the former would be a reference and the latter a quotation.
"""

import re
from typing import Any

import syncnorm

# Names that a docstring may use bare, and where they are in the reference.
BARE = {name: f"syncnorm.{name}" for name in (*syncnorm.__all__, "Callback", "fit", "load")}
BARE |= {name: f"syncnorm.functional.{name}" for name in syncnorm.functional.__all__}
del BARE["functional"], BARE["groups"]

CODE = re.compile(r"`([^`]+)`")
EMPHASIS = re.compile(r"\*[A-Z][A-Za-z, ]+\*")
# What reST takes for marks: of emphasis, of substitutions, and of references, at a word's end.
MARK = re.compile(r"[*|]|(?<=\w)_(?!\w)")
# A colon in an attribute's first line, before which napoleon would look for a type.
HIDDEN = "\ue000"
BEGIN, END = "\ue001", "\ue002"  # of code
SECTION = re.compile(r"[A-Z]\w+:$")


def as_rst(lines: list[str]) -> list[str]:
    """Rewrite a docstring: its code, what reST would take for marks, and its equations."""
    out: list[str] = []
    words: list[str] = []  # of the paragraph so far: code may begin in one line and end in the next
    is_section = False
    for line in [*lines, ""]:
        if line and not line.startswith(" "):
            is_section = SECTION.match(line) is not None
        is_equation = line.startswith("    ") and not is_section
        if line.strip() and not is_equation and not line.lstrip().startswith((">>>", "...")):
            words.append(line)
            continue
        out += _inline("\n".join(words)).split("\n") if words else []
        words = []
        if is_equation and not out[-1].strip():
            out += ["::", ""]
        out.append(line)
    return out


def _inline(text: str) -> str:
    parts = CODE.split(text)
    plain, code = map(_escape, parts[::2]), map(_code, parts[1::2])
    joined = "".join(piece for pair in zip(plain, [*code, ""]) for piece in pair)
    # A mark must not touch a word: an escaped space parts them, and is not shown.
    return re.sub(rf"(?<=\w){BEGIN}", r"\\ ", re.sub(rf"{END}(?=\w)", r"\\ ", joined)).translate(
        {ord(BEGIN): None, ord(END): None}
    )


def _code(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    if text in BARE:
        return f"{BEGIN}:py:obj:`{text} <{BARE[text]}>`{END}"
    return f"{BEGIN}``{text}``{END}"


def _escape(text: str) -> str:
    kept = EMPHASIS.findall(text)
    pieces = [MARK.sub(r"\\\g<0>", each) for each in EMPHASIS.split(text)]
    return "".join(piece + mark for piece, mark in zip(pieces, [*kept, ""]))


def rewrite(app: Any, what: str, name: str, object_: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon takes its sections."""
    lines[:] = as_rst(lines)
    if what in ("attribute", "data", "property"):
        lines[0] = lines[0].replace(":", HIDDEN)


def restore(app: Any, what: str, name: str, object_: Any, options: Any, lines: list[str]) -> None:
    """Undo what was hidden from napoleon, and what it writes between a name and its words."""
    lines[:] = [line.replace(HIDDEN, ":").replace("** -- ", "** \N{EN DASH} ") for line in lines]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", rewrite, priority=100)
    app.connect("autodoc-process-docstring", restore, priority=900)
    return {"parallel_read_safe": True}
