"""Numbers and names as people read them."""

import re

# Control characters and lone surrogates: allowed in JSON and in names of files, not in a page.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

ABSENT = "–"


def plain(text: str) -> str:
    """Replace the characters that a page cannot hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def grouped(value: int) -> str:
    """Group digits: 1437 -> 1,437."""
    return f"{value:,}"


def percent(value: float | None) -> str:
    """Format a share: 0.98611 -> 98.61 %."""
    return ABSENT if value is None else f"{100 * value:.2f} %"


def rate(value: float | None) -> str:
    """Format samples per second with three digits, or all before the point."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Format a duration: 4210.0 -> 1 h 10 min."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def clock(seconds: float | None) -> str:
    """Format the time since a run's beginning: 4210.0 -> 1:10:10."""
    if seconds is None:
        return ABSENT
    sign, whole = ("-" if seconds < 0 else ""), abs(round(seconds))
    return f"{sign}{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def shorten(name: str, most: int) -> str:
    """Cut a long dotted name to its end, which is where names differ."""
    return name if len(name) <= most else "…" + name[1 - most :]
