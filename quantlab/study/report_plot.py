"""The size and the divergence of a report's variants as a picture in SVG, which needs no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.study.report_text import escaped, number, size

_LETTER = 7.7  # width of a letter of a label, at most, in the picture's units
_LINE = 15.0  # height of a line of labels


@dataclass(frozen=True)
class _Frame:
    """The places of a picture's parts."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]  # bytes at the left and right end
    y: tuple[float, float]  # powers of ten at the lower and upper end

    def at(self, nbytes: float, kld: float) -> tuple[float, float]:
        """Return the place of a size and a divergence."""
        x = (nbytes - self.x[0]) / (self.x[1] - self.x[0])
        y = (math.log10(kld) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)


def size_kld(rows: Sequence[dict], *, width: float, height: float, name: str) -> str:
    """Draw the divergence of variants against their size, with error bars and the front.

    Parameters
    ----------
    rows : sequence of dict
        Variants on one text, without the base.
    width, height : float
        Units of the picture; text is 12 of them high.
    name : str
        Class of the picture.

    Returns
    -------
    str
        `<svg>…</svg>`; empty if no variant diverges.
    """
    rows = sorted((row for row in rows if row["kld_mean"] > 0), key=lambda row: row["bytes"])
    if not rows:
        return ""
    frame = _frame(rows, width, height)
    floor = max(row["kld_floor"] for row in rows)
    parts = [*_grid(frame), *_floor(frame, floor), *_front(frame, rows)]
    taken = [_box(*frame.at(row["bytes"], row["kld_mean"]), 0, "middle") for row in rows]
    for row in rows:
        parts += _point(frame, row)
    for row in sorted(rows, key=lambda row: not row["on_front"]):
        parts += _label(frame, row, taken)
    label = f"KL divergence against size of {len(rows)} files"
    return (
        f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _frame(rows: Sequence[dict], width: float, height: float) -> _Frame:
    sizes, klds = [row["bytes"] for row in rows], [row["kld_mean"] for row in rows]
    margin = 0.08 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    low, high = math.log10(min(klds)) - 0.15, math.log10(max(klds)) + 0.15
    if high - low < 0.8:
        low, high = (low + high) / 2 - 0.4, (low + high) / 2 + 0.4
    x = (min(sizes) - margin, max(sizes) + margin)
    return _Frame(width, height, 58, width - 12, 26, height - 40, x, (low, high))


def _grid(frame: _Frame) -> list[str]:
    """Lines, and what they stand for."""
    parts = ['<text x="2" y="14">KL divergence (nats per token)</text>']
    for kld in _decades(*frame.y):
        y = frame.at(frame.x[0], kld)[1]
        parts.append(f'<line class="grid" x1="{frame.left:g}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{frame.left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{kld:g}</text>')
    unit, factor = ("GiB", 1 << 30) if frame.x[1] >= 1 << 30 else ("MiB", 1 << 20)
    for value in _ticks(frame.x[0] / factor, frame.x[1] / factor, (frame.right - frame.left) / 70):
        x = frame.at(value * factor, 10 ** frame.y[0])[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:g}" y2="{frame.bottom:g}"/>')
        parts.append(f'<text x="{x:.1f}" y="{frame.bottom + 17:g}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{frame.right:g}" y="{frame.height - 6:g}" text-anchor="end">size ({unit})</text>')
    ends = f'x1="{frame.left:g}" x2="{frame.right:g}" y1="{frame.bottom:g}" y2="{frame.bottom:g}"'
    return [*parts, f'<line class="axis" {ends}/>']


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within two powers of ten; over more than two decades powers alone."""
    factors = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 3.2 else (1,)
    every = [f * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for f in factors]
    return [value for value in every if low <= math.log10(value) <= high]


def _ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers from low to high, at most about as many as fit."""
    rough = (high - low) / max(2.0, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _floor(frame: _Frame, floor: float) -> list[str]:
    """The noise floor, where it lies in the picture."""
    if floor <= 0 or not frame.y[0] <= math.log10(floor) <= frame.y[1]:
        return []
    y = frame.at(frame.x[0], floor)[1]
    line = f'<line class="floor" x1="{frame.left:g}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return [line, f'<text class="floor" x="{frame.left + 4:g}" y="{y - 5:.1f}">noise floor</text>']


def _front(frame: _Frame, rows: Sequence[dict]) -> list[str]:
    points = [frame.at(row["bytes"], row["kld_mean"]) for row in rows if row["on_front"]]
    return [f'<polyline class="front" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>']


def _point(frame: _Frame, row: dict) -> list[str]:
    """A dot with its error bar, and what a pointer over it reads."""
    (x, y), off = frame.at(row["bytes"], row["kld_mean"]), "" if row["on_front"] else " off"
    lowest = 10 ** frame.y[0]
    ends = [frame.at(row["bytes"], max(row["kld_mean"] + s * (row["kld_se"] or 0), lowest))[1] for s in (-1, 1)]
    said = f"{row['variant']}: {size(row['bytes'])}, KLD {number(row['kld_mean'])} ± {number(row['kld_se'])}"
    return [
        f'<line class="error{off}" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>',
        f'<circle class="dot{off}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escaped(said)}</title></circle>',
    ]


def _label(frame: _Frame, row: dict, taken: list[tuple]) -> list[str]:
    """Return the name at a free place (empty text: none is free)."""
    x, y = frame.at(row["bytes"], row["kld_mean"])
    text = row["variant"] if len(row["variant"]) <= 22 else row["variant"][:10] + "…" + row["variant"][-11:]
    width = _LETTER * len(text)
    for dx, dy, anchor in _PLACES:
        box = _box(x + dx, y + dy, width, anchor)
        inside = box[0] >= 2 and box[2] <= frame.width - 2 and box[1] >= 2 and box[3] <= frame.bottom
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            kind = "name" if row["on_front"] else "off"
            leader = ""
            if abs(dy) > 20:
                leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{x + dx:.1f}" y2="{y + dy:.1f}"/>'
            place = f'x="{x + dx:.1f}" y="{y + dy + 4:.1f}" text-anchor="{anchor}"'
            return [f'{leader}<text class="{kind}" {place}>{escaped(text)}</text>']
    return []


# above and to the right no front passes, as it falls
_PLACES = [(8, -11, "start"), (9, 0, "start"), (-9, 0, "end"), (-8, 12, "end"), (-8, -11, "end"), (8, 12, "start")]
_PLACES += [(0, -17, "middle"), (0, 18, "middle")]
_PLACES += [(s * 14, t * d, a) for d in (26, 40, 54) for t in (-1, 1) for s, a in ((1, "start"), (-1, "end"))]


def _box(x: float, y: float, width: float, anchor: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a label; of a dot without one."""
    if not width:
        return x - 6, y - 6, x + 6, y + 6
    start = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return start, y - _LINE / 2, start + width, y + _LINE / 2


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
