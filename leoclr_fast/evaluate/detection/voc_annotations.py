"""Pascal VOC's layout on disk: `VOC2007/{Annotations,ImageSets/Main,JPEGImages}`, and other years beside it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from leoclr_fast.evaluate.detection.annotations import AnnotatedImage, AnnotatedImages, annotated_image

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(root: Path, sets: Sequence[str]) -> AnnotatedImages:
    """The images of one or several sets, as `VOC2007/trainval`, in the order of their lists.

    root: the VOCdevkit folder, with a folder for each year. VOC counts pixels from 1 and boxes include both ends, so a
    box from 1 to the width covers the image: 1 is taken from its left and upper edge.
    Raises FileNotFoundError for a missing folder or file; ValueError for an annotation that cannot be understood.
    """
    images: list[AnnotatedImage] = []
    for name in sets:
        folder, _, image_set = name.partition("/")
        year = root / folder
        image_list = year / "ImageSets" / "Main" / f"{image_set}.txt"
        if not image_list.is_file():
            raise FileNotFoundError(
                f"there is no list of images {image_list}; --data must be the VOCdevkit folder, which holds VOC2007 "
                "(and VOC2012) with Annotations, ImageSets and JPEGImages each"
            )
        names = [line.split()[0] for line in image_list.read_text().splitlines() if line.strip()]
        if not names:
            raise ValueError(f"the list of images {image_list} is empty")
        images += [_read_image(year, image_name) for image_name in names]
    return AnnotatedImages(classes=VOC_CLASSES, images=tuple(images))


def _read_image(year: Path, name: str) -> AnnotatedImage:
    annotation, path = year / "Annotations" / f"{name}.xml", year / "JPEGImages" / f"{name}.jpg"
    for file in (annotation, path):
        if not file.is_file():
            raise FileNotFoundError(f"{year.name} lists the image {name}, but there is no {file}")
    try:
        root = ElementTree.parse(annotation).getroot()
        boxes, labels, difficult = [], [], []
        for item in root.findall("object"):
            x1, y1, x2, y2 = (float(_text(item, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            if x2 < x1 or y2 < y1:
                raise ValueError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} ends before it begins")
            boxes.append((x1 - 1, y1 - 1, x2, y2))
            labels.append(_label(_text(item, "name")))
            difficult.append(item.findtext("difficult", "0").strip() == "1")
        size = root.find("size")
        if size is None:
            with Image.open(path) as image:
                width, height = image.size
        else:
            width, height = int(_text(size, "width")), int(_text(size, "height"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"the annotation {annotation} cannot be understood: {error}") from error
    return annotated_image(f"{year.name}/{name}", path, (width, height), boxes, labels, difficult)


def _label(class_name: str) -> int:
    if class_name not in VOC_CLASSES:
        raise ValueError(f"{class_name!r} is none of VOC's classes ({', '.join(VOC_CLASSES)})")
    return VOC_CLASSES.index(class_name)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"an {element.tag} has no {path}")
    return text.strip()
