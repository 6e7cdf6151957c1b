"""Numbers and foreign texts as a page shows them. All text that comes from files goes through `escaped`."""

import math
import re
from html import escape

# what HTML forbids or a reader would not see: control characters, and marks that turn the direction of text around
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def escaped(text: object) -> str:
    """Return a text that is safe in HTML, in attributes too.

    Examples
    --------
    >>> escaped('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    return escape(_UNSEEN.sub("\ufffd", str(text)), quote=True)


def name(text: object) -> str:
    """Return a name that neither tags nor the direction of its letters change what stands around it."""
    return f"<bdi>{escaped(text)}</bdi>"


def number(value: float | None) -> str:
    """Return three significant digits.

    Examples
    --------
    >>> number(0.012345), number(1.5e-7), number(None), number(0), number(12345.6)
    ('0.0123', '1.5e-7', '–', '0', '12,346')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_error(value: float | None, error: float | None) -> str:
    """Return a number and its standard error, rounded alike."""
    if value is None:
        return "–"
    if not error:
        return number(value)
    if abs(value) < 1e-5:
        return f'{number(value)} <span class="se">± {number(error)}</span>'
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f'{value:,.{digits}f} <span class="se">± {error:.{digits}f}</span>'


def percent(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Return a fraction in percent.

    Examples
    --------
    >>> percent(0.1234), percent(-0.05, signed=True), percent(None)
    ('12.3 %', '−5.0 %', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:{'+' if signed else ''}.{digits}f} %".replace("-", "−")


def probability(p: float | None) -> str:
    """Return the p of a test.

    Examples
    --------
    >>> probability(0.0001), probability(0.043), probability(0.5)
    ('p < 0.001', 'p = 0.043', 'p = 0.50')
    """
    if p is None:
        return "–"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def size(nbytes: float | None) -> str:
    """Return a size in MiB or GiB.

    Examples
    --------
    >>> size(3 << 20), size(5 << 30)
    ('3.0 MiB', '5.00 GiB')
    """
    if nbytes is None:
        return "–"
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"
