"""What training saw: the contact sheet of a run and the names of its images."""

from __future__ import annotations

import base64
import io

from PIL import Image

from leoclr_fast.report.elements import Content, Markup, element
from leoclr_fast.report.run_record import RunRecord
from leoclr_fast.report.values import number
from leoclr_fast.run.folder import RunFolder

_SHEET_BYTES = 250_000
_MAX_SHEETS = 4
_MAX_LISTED = 50


def views_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section: of several runs, the first ones side by side."""
    shown = []
    for run, label in list(zip(runs, labels, strict=True))[:_MAX_SHEETS]:
        sheet, caption = _sheet(run), _views_caption(run)
        if sheet is None:
            shown.append(element("p", f"{label}: {caption}" if len(runs) > 1 else caption))
        else:
            name = element("h3", label) if len(runs) > 1 else None
            shown.append(element("figure", name, sheet, element("figcaption", caption)))
    if len(runs) > _MAX_SHEETS:
        shown.append(
            element("p", f"Of {len(runs)} runs, the views of the first {_MAX_SHEETS} are shown.", class_="soft")
        )
    return element("div", shown, class_="plots") if len(runs) > 1 else shown


def _sheet(run: RunRecord) -> Markup | None:
    """The contact sheet, as a JPEG of at most 250 kB inside the page."""
    path = RunFolder(run.path).preview_file
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.thumbnail((1400, 1400))
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        run.problems.append(f"{path} cannot be read: {error}")
        return None
    for quality in (85, 70, 50, 30):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= _SHEET_BYTES:
            break
    else:
        return None
    encoded = base64.b64encode(buffer.getvalue()).decode()
    described = (
        "Contact sheet. Each row is an image with the boxes of its random crops, then its augmented views: first the "
        "query's, then the keys'."
    )
    width, height = picture.size
    return element(
        "img",
        src=f"data:image/jpeg;base64,{encoded}",
        alt=described,
        width=str(width),
        height=str(height),
        class_="sheet",
    )


def _views_caption(run: RunRecord) -> Content:
    rows = run.data.get("preview")
    if run.synthetic:
        return "The images of this run were synthetic noise: there is nothing to see."
    if not isinstance(rows, list) or not rows:
        return "This run folder holds no views of its data."
    items = []
    for row in rows:
        if isinstance(row, dict):
            name = f" (class {row['class']})" if row.get("class") is not None else ""
            items.append(element("li", f"{row.get('name')}{name}"))
    classes = run.data.get("classes")
    listed: Content = None
    if isinstance(classes, list) and classes:
        more = number(run.data.get("num_classes", len(classes))) - min(len(classes), _MAX_LISTED)
        names = ", ".join(str(name) for name in classes[:_MAX_LISTED]) + (f" and {more:,.0f} more" if more > 0 else "")
        listed = element("p", f"Classes, of no use to pretraining: {names}.")
    return [element("p", "The first images that this run trains on, row by row:"), element("ol", items), listed]
