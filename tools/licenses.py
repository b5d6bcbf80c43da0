"""List the licenses of all packages that syncnorm brings, by their own metadata.

`python -m tools.licenses [EXTRA ...]` prints a table for these extras, for `all` if none is named, as
they are installed in this environment. The exit status is 1 if a package names no license.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from email.message import Message
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_CLASSIFIER = "License :: "


def closure(extras: Collection[str], root: str = "syncnorm") -> dict[str, Distribution]:
    """All distributions that a package with extras needs on this system, itself left out, by name.

    Raises:
        ValueError: there is no such extra.
        PackageNotFoundError: one is not installed.
    """
    known = distribution(root).metadata.get_all("Provides-Extra") or []
    if unknown := set(extras) - set(known):
        raise ValueError(f"extras must be among {', '.join(known)}, got {', '.join(unknown)}")
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(canonicalize_name(root), extra) for extra in ("", *extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = distribution(name)
        for text in found[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    del found[canonicalize_name(root)]
    return dict(sorted(found.items()))


def license_of(metadata: Message) -> str:
    """What a package's metadata say of its license, in the field that says it best; or nothing."""
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = metadata.get_all("Classifier") or []
    named = [each.split(" :: ")[-1] for each in classifiers if each.startswith(_CLASSIFIER)]
    if named := [each for each in named if each != "OSI Approved"]:
        return "; ".join(named)
    # Some have the whole text there.
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def table(extras: Collection[str], root: str = "syncnorm") -> tuple[str, list[str]]:
    """A table of packages, versions and licenses; and the packages that name no license."""
    rows, silent = ["| package | version | license |", "|---|---|---|"], []
    for name, found in closure(extras, root).items():
        said = license_of(found.metadata)  # pyright: ignore[reportArgumentType] it is a Message
        rows.append(f"| {name} | {found.version} | {said or 'none named'} |")
        if not said:
            silent.append(name)
    return "\n".join(rows) + "\n", silent


def main(extras: list[str]) -> int:
    """Print the table."""
    text, silent = table(extras or ["all"])
    print(text, end="")
    if silent:
        print(f"No license is named by {', '.join(silent)}: look at their files.", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
