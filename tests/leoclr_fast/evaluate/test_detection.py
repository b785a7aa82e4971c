"""The detector is the published one, its data are read as they are meant, its AP is what one computes by hand."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from leoclr_fast.config import BackboneConfig
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage, ImageDetections
from leoclr_fast.evaluate.detection.coco import coco_average_precisions, read_coco
from leoclr_fast.evaluate.detection.config import DetectionProtocol
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4, region_losses
from leoclr_fast.evaluate.detection.image_batches import BatchReader, ImageRequest, resized_size, training_batches
from leoclr_fast.evaluate.detection.voc import (
    VOC_CLASSES,
    eleven_point_average,
    published_rounding,
    read_voc,
    voc_average_precisions,
)
from leoclr_fast.method.backbone import build_backbone
from tests.leoclr_fast.evaluated import killed, same_files
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import refused
from tests.leoclr_fast.voc_files import SHAPES, annotation, write_coco, write_voc
from tests.leoclr_fast.weights_files import drawn_backbone, write_weights

TINY = ["--train-sets", "VOC2007/trainval", "--batch-size=4", "--warmup-iterations=2", "--max-side=160", "--workers=1"]
TINY += ["--train-sides", "48", "64", "--test-side=64", "--anchor-sizes", "16", "24", "--regions-per-image=8"]
TINY += ["--precise-bn-batches=2", "--device=cpu"]
NARROW = BackboneConfig(arch="resnet18", width_multiplier=0.125)


def small_detector(num_classes: int = 3) -> FasterRCNNC4:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FasterRCNNC4(build_backbone(NARROW), num_classes, anchor_sizes=(16, 24), regions_per_image=8)


@pytest.fixture(scope="module")
def detector() -> FasterRCNNC4:
    """The published one, without values."""
    config = DetectionProtocol(dataset="voc").config()
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig())
        return FasterRCNNC4(backbone, 20, anchor_sizes=config.anchor_sizes, regions_per_image=config.regions_per_image)


class TestPublishedDetector:
    """facebookresearch/moco, detection/configs/pascal_voc_R_50_C4_24k_moco.yaml, and detectron2's defaults."""

    def test_parameters(self, detector: FasterRCNNC4) -> None:
        """By hand. ResNet-50 without classifier: 25,557,032 - 2,049,000 = 23,508,032 (res5 is in the box head). RPN:
        3x3 1024 -> 1024, then 15 scores and 60 deltas. Batch-norm after res5: 2 x 2048. Predictor: 21 and 80 rows."""
        rpn = (1024 * 1024 * 9 + 1024) + (1024 * 15 + 15) + (1024 * 60 + 60)
        predictor = (2048 * 21 + 21) + (2048 * 80 + 80)
        expected = 23_508_032 + rpn + 2 * 2048 + predictor
        assert expected == 33_234_160
        assert sum(parameter.numel() for parameter in detector.parameters()) == expected
        assert all(parameter.requires_grad for parameter in detector.parameters())  # FREEZE_AT 0

    def test_pooling_and_sampling(self, detector: FasterRCNNC4) -> None:
        pool = detector.regions.box_roi_pool
        assert (pool.output_size, pool.spatial_scale, pool.sampling_ratio, pool.aligned) == (14, 1 / 16, 0, True)
        rpn, regions = detector.rpn, detector.regions
        assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
        assert (regions.fg_bg_sampler.batch_size_per_image, regions.fg_bg_sampler.positive_fraction) == (512, 0.25)
        assert rpn._pre_nms_top_n == {"training": 12_000, "testing": 6_000}
        assert rpn._post_nms_top_n == {"training": 2_000, "testing": 1_000}
        assert (regions.score_thresh, regions.nms_thresh, regions.detections_per_img) == (0.05, 0.5, 100)
        assert regions.box_coder.weights == (10.0, 10.0, 5.0, 5.0)

    def test_schedule(self) -> None:
        config = DetectionProtocol(dataset="voc").config()
        assert (config.iterations, config.batch_size, config.lr_steps) == (24_000, 16, (18_000, 22_000))
        assert (config.train_sides, config.test_side, config.max_side) == (tuple(range(480, 801, 32)), 800, 1333)
        rates = {step: config.learning_rate(step) for step in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)}
        assert rates == pytest.approx({
            0: 2e-5, 50: 0.02 * 0.5005, 100: 0.02, 17_999: 0.02,
            18_000: 0.002, 21_999: 0.002, 22_000: 0.0002, 23_999: 0.0002,
        })  # fmt: skip
        coco = DetectionProtocol(dataset="coco").config()
        assert (coco.iterations, coco.lr_steps, coco.warmup_iterations) == (180_000, (120_000, 160_000), 1000)
        assert coco.train_sides == (640, 672, 704, 736, 768, 800)


def test_anchors_are_detectron2s(detector: FasterRCNNC4) -> None:
    """DefaultAnchorGenerator: w = sqrt(area / ratio), h = ratio * w, unrounded, around multiples of 16 from 0 on."""
    features = torch.zeros(1, 1024, 50, 68)  # of 800 x 1077 pixels, which 16 does not divide
    images = type("Images", (), {"image_sizes": [(800, 1077)]})()
    (anchors,) = detector.rpn.anchor_generator(images, [features])
    assert anchors.shape == (50 * 68 * 15, 4)
    expected = []
    for ratio in (0.5, 1.0, 2.0):
        for size in (32, 64, 128, 256, 512):
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            expected.append([-width / 2, -height / 2, width / 2, height / 2])
    torch.testing.assert_close(anchors[:15], torch.tensor(expected), rtol=0, atol=5e-5)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[-1].tolist() == [67 * 16, 49 * 16]


def test_region_losses_by_hand() -> None:
    """Two foreground regions of classes 2 and 1, and two of background: the box loss is over all four."""
    logits = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([2, 1, 0, 0])
    deltas = torch.zeros(4, 2, 4, dtype=torch.float64)
    deltas[0, 1] = torch.tensor([1.0, 0.0, -1.0, 0.5])  # class 2 of the first region
    deltas[1, 0] = 0.25  # class 1 of the second
    deltas[0, 0] = 99.0  # of another class than the region's: no loss
    losses = region_losses(logits, deltas, labels, torch.zeros(4, 4, dtype=torch.float64))
    assert losses["loss_box"].item() == pytest.approx((2.5 + 1.0) / 4)
    rows = [math.log(2 + math.e**2) - 2, math.log(2 + math.e) - 1, math.log(2 + math.e**3) - 3, math.log(3)]
    assert losses["loss_classifier"].item() == pytest.approx(sum(rows) / 4)


def test_proposal_losses_by_hand() -> None:
    """One right anchor, two wrong ones and one between, of two images: sums over 256 anchors an image, box loss L1."""
    network = small_detector().rpn
    objectness = torch.tensor([[2.0], [0.0], [-1.0], [5.0]], dtype=torch.float64)
    labels = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])]
    deltas = torch.tensor([[0.5, -0.5, 0.0, 1.0], *[[9.0] * 4] * 3], dtype=torch.float64)
    targets = [torch.zeros(2, 4, dtype=torch.float64)] * 2
    objectness_loss, box_loss = network.compute_loss(objectness, deltas, labels, targets)
    expected = math.log(1 + math.e**-2) + math.log(2) + math.log(1 + math.e**-1)
    assert objectness_loss.item() == pytest.approx(expected / 512)
    assert box_loss.item() == pytest.approx(2 / 512)


def test_detections_take_the_box_of_their_class() -> None:
    regions = small_detector(num_classes=2).eval().regions
    proposals = [torch.tensor([[10.0, 10.0, 30.0, 30.0], [40.0, 10.0, 60.0, 30.0]])]
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 1] = torch.tensor([5.0, 0.0, 0.0, 0.0])  # class 2: dx 5 / weight 10 * width 20 = 10 pixels to the right
    logits = torch.tensor([[0.0, -9.0, 4.0], [9.0, 0.0, 0.0]])
    (found,) = regions.detections(logits, deltas, proposals, [(35, 38)])
    assert found["labels"].tolist() == [2]
    assert found["boxes"].tolist() == [[20.0, 10.0, 38.0, 30.0]]  # cut off at the width of 38
    assert found["scores"].item() == pytest.approx(math.e**4 / (1 + math.e**-9 + math.e**4))


def test_half_precision_does_not_round_boxes() -> None:
    """bfloat16 knows 1000 and 1004, and nothing between."""
    regions = small_detector().regions
    features = torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))  # of 640 x 1024 pixels
    boxes = [torch.tensor([[1001.3, 600.9, 1017.6, 620.2]])]
    exact = regions.pooled(features, boxes)
    half = regions.pooled(features.bfloat16(), boxes)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)
    moved = regions.pooled(features, [boxes[0].bfloat16().float()])
    assert (moved - exact).abs().max() > 0.1


def test_nothing_may_be_found() -> None:
    detector = small_detector().eval()
    detector.regions.score_thresh = 1.0
    _, (found,) = detector(torch.randn(1, 3, 64, 80), [(64, 80)])
    assert found["boxes"].shape == (0, 4)


def one_object(name: str, box: tuple[int, int, int, int]) -> str:
    return annotation(80, 64, [(name, box, False)])


class TestVocAnnotations:
    def test_boxes_and_difficult_objects(self, tmp_path: Path) -> None:
        write_voc(tmp_path, num_train=2, num_test=1, empty=1)
        file = tmp_path / "VOC2007" / "Annotations" / "000001.xml"
        file.write_text(annotation(80, 64, [("cat", (1, 1, 80, 64), False), ("dog", (11, 21, 20, 40), True)]))
        images = read_voc(tmp_path, ["VOC2007/trainval", "VOC2007/test"]).images
        assert [image.name for image in images] == [f"VOC2007/{number:06}" for number in range(4)]
        assert images[1].boxes.tolist() == [[0, 0, 80, 64], [10, 20, 20, 40]]  # the whole image; 10 x 20 pixels
        assert [VOC_CLASSES[label] for label in images[1].labels] == ["cat", "dog"]
        assert images[1].ignored.tolist() == [False, True]
        assert images[1].areas.tolist() == [80 * 64, 200]
        assert images[2].boxes.shape == (0, 4)
        file.write_text("<annotation/>")  # without a size, it is the image's own
        bare = read_voc(tmp_path, ["VOC2007/trainval"]).images[1]
        assert (bare.width, bare.height) == (80, 64)

    @pytest.mark.parametrize(
        ("file", "content", "expected"),
        [
            ("Annotations/000000.xml", None, "lists the image 000000, but there is no"),
            ("JPEGImages/000001.jpg", None, "lists the image 000001, but there is no"),
            ("ImageSets/Main/trainval.txt", None, "must be the VOCdevkit folder"),
            ("ImageSets/Main/trainval.txt", "\n", "is empty"),
            ("Annotations/000000.xml", "<annotation>", "cannot be understood"),
            ("Annotations/000000.xml", one_object("unicorn", (1, 1, 2, 2)), "'unicorn' is none of VOC's classes"),
            ("Annotations/000000.xml", one_object("cat", (9, 1, 2, 2)), "ends before it begins"),
            ("Annotations/000000.xml", one_object("cat", (1, 1, 2, 10**300)), "000000.jpg: the box of an object"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, file: str, content: str | None, expected: str) -> None:
        write_voc(tmp_path, num_train=2, num_test=1)
        path = tmp_path / "VOC2007" / file
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            read_voc(tmp_path, ["VOC2007/trainval"])


class TestCocoAnnotations:
    def test_the_same_images_in_both_layouts(self, tmp_path: Path) -> None:
        voc = write_voc(tmp_path / "voc", num_train=3, num_test=2)
        coco = read_coco(write_coco(tmp_path / "coco", voc), "train2017")
        assert coco.classes == SHAPES
        for ours, theirs in zip(coco.images, read_voc(voc, ["VOC2007/trainval"]).images, strict=True):
            assert ours.boxes.tolist() == theirs.boxes.tolist()
            assert [SHAPES[label] for label in ours.labels] == [VOC_CLASSES[label] for label in theirs.labels]
            assert (ours.width, ours.height) == (theirs.width, theirs.height)

    def test_crowds_and_damage(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path / "coco", write_voc(tmp_path / "voc", num_train=2, num_test=1))
        file = root / "annotations" / "instances_train2017.json"
        document = json.loads(file.read_text())
        kept = [note for note in document["annotations"] if note["image_id"] == 1]
        crowd = {"id": 90, "image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 4], "iscrowd": 1, "area": 11.5}
        flat = {"id": 91, "image_id": 1, "category_id": 7, "bbox": [3, 3, 0, 4], "iscrowd": 0, "area": 0}
        file.write_text(json.dumps({**document, "annotations": [*document["annotations"], crowd, flat]}))
        image = read_coco(root, "train2017").images[0]
        assert image.ignored.tolist() == [False] * len(kept) + [True]  # the one without width is left out
        assert image.areas.tolist()[-1] == 11.5
        for change, expected in (
            ({"image_id": 77}, "has boxes of 1 images that it does not list, as 77"),
            ({"category_id": 5}, "has a box of category 5, which it does not list"),
            ({"bbox": [0, 0, 5, 1e300]}, "000000.jpg: the box of an object, or its area, is infinite"),
            ({"bbox": [0, 0, 5]}, r"annotations.0.bbox is .0, 0, 5.: Expected `array` of length 4, got 3"),
        ):
            file.write_text(json.dumps({**document, "annotations": [crowd | change]}))
            with pytest.raises(ValueError, match=expected):
                read_coco(root, "train2017")
        file.write_text(json.dumps(document))
        (root / "train2017" / "000001.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"lists an image that is not there: .*000001\.jpg"):
            read_coco(root, "train2017")
        with pytest.raises(FileNotFoundError, match="must be the COCO folder"):
            read_coco(tmp_path, "train2017")


def truth(boxes: list[list[float]], ignored: list[bool] | None = None) -> AnnotatedImage:
    """Objects of the first class."""
    return AnnotatedImage("x", Path("x.jpg"), (100, 100), boxes, [0] * len(boxes), ignored or [False] * len(boxes))


def found(*items: tuple[list[float], float]) -> ImageDetections:
    """Boxes of the first class, each with its score."""
    boxes, scores = (np.array(values) for values in zip(*items, strict=True))
    return ImageDetections(boxes=boxes, scores=scores, labels=np.zeros(len(items), dtype=int))


A, B, C = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [50.0, 50.0, 60.0, 60.0]
FAR = [80.0, 80.0, 90.0, 90.0]


class TestAveragePrecision:
    """Three objects in two images. Detections by score: right, wrong, right; one object is never found."""

    images = (truth([A, B]), truth([C]))
    detections = (found((A, 0.9), (FAR, 0.8)), found((C, 0.7)))

    def test_voc_by_hand(self) -> None:
        """Recall 1/3 at precision 1 (points 0 to 0.3), 2/3 at 2/3 (0.4 to 0.6), 0 beyond: (4 + 3 * 2/3) / 11."""
        precisions = voc_average_precisions(self.images, self.detections, 2, [0.5])
        assert precisions[0, 0] == pytest.approx(6 / 11)
        assert np.isnan(precisions[0, 1])  # there is no object of the second class

    def test_coco_by_hand(self) -> None:
        """101 recalls: 0 to 0.33 at precision 1 (34 of them), 0.34 to 0.66 at 2/3 (33), 0 beyond."""
        precisions = coco_average_precisions(self.images, self.detections, ("a", "b"))
        expected = (34 + 33 * 2 / 3) / 101
        assert precisions["AP50"] == pytest.approx(expected)
        assert precisions["AP"] == pytest.approx(expected)  # the boxes are exact

    def test_difficult_objects_are_neither_missed_nor_found(self) -> None:
        """B is difficult and found twice: it is as if neither it nor what found it were there."""
        images = (truth([A, B], [False, True]), truth([C]))
        detections = (found((B, 0.95), (B, 0.92), (A, 0.9), (FAR, 0.8)), found((C, 0.7)))
        # Two objects: recall 1/2 at precision 1 (points 0 to 0.5), 1 at 2/3 (0.6 to 1).
        assert voc_average_precisions(images, detections, 1, [0.5])[0, 0] == pytest.approx((6 + 5 * 2 / 3) / 11)

    def test_a_part_of_a_difficult_object_is_a_mistake_and_of_a_crowd_is_not(self) -> None:
        images = (truth([A, B], [False, True]),)
        detections = (found(([20.0, 20.0, 28.0, 28.0], 0.95), (A, 0.9)),)
        assert voc_average_precisions(images, detections, 1, [0.5])[0, 0] == pytest.approx(0.5)
        assert coco_average_precisions(images, detections, ("a",))["AP50"] == pytest.approx(1.0)

    def test_a_second_detection_of_an_object_is_wrong(self) -> None:
        images, detections = (truth([A]),), (found((A, 0.9), ([0.0, 0.0, 10.0, 9.0], 0.95)),)
        # The worse box comes first and is right up to IoU 0.85 (its IoU is 0.9); then the better one, at precision 1/2.
        precisions = voc_average_precisions(images, detections, 1, [0.5, 0.85, 0.95])
        assert precisions[:, 0].tolist() == pytest.approx([1.0, 1.0, 0.5])

    @pytest.mark.parametrize(("shift", "expected"), [(4.0, 0.0), (3.0, 1.0)])
    def test_overlap_decides(self, shift: float, expected: float) -> None:
        """A shift of 4 of 10 pixels: IoU 60 / 140; of 3: 70 / 130."""
        images, detections = (truth([A]),), (found(([shift, 0.0, 10.0 + shift, 10.0], 0.9)),)
        assert voc_average_precisions(images, detections, 1, [0.5])[0, 0] == expected

    def test_eleven_points(self) -> None:
        """A recall of 3 / 10 reaches the point 0.3, whatever floating point makes of either."""
        recall, precision = np.array([1, 2, 3]) / 10, np.array([1.0, 1.0, 1.0])
        assert eleven_point_average(recall, precision) == pytest.approx(4 / 11)
        assert eleven_point_average(np.array([]), np.array([])) == 0


def test_sizes_are_detectron2s() -> None:
    """ResizeShortestEdge: the shorter side as asked, the longer one 1333 at most, rounded half up."""
    assert resized_size(500, 375, 800, 1333) == (1067, 800)
    assert resized_size(375, 500, 480, 1333) == (480, 640)
    assert resized_size(1000, 300, 800, 1333) == (1333, 400)
    assert resized_size(333, 500, 800, 1333) == (800, 1201)


@pytest.mark.parametrize("flipped", [False, True])
def test_pixels_and_boxes_stay_together(tmp_path: Path, flipped: bool) -> None:
    """A white rectangle in a black image, enlarged and flipped, is where its box is; the smaller image is padded."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[8:20, 12:36] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = AnnotatedImage("a", tmp_path / "a.png", (60, 40), [[12, 8, 36, 20], [0, 0, 5, 5]], [4, 2], [False, True])
    reader = BatchReader(
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), max_side=1000, with_ignored=False,
        workers=1, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    requests = [ImageRequest(image=image, side=80, flipped=flipped), ImageRequest(image=image, side=40)]
    (batch,) = reader.read(iter([requests]))
    assert batch.images.shape == (2, 3, 80, 120)
    assert batch.sizes == [(80, 120), (40, 60)]
    assert batch.images[1, :, 40:].abs().max() == batch.images[1, :, :, 60:].abs().max() == 0
    (x1, y1, x2, y2) = batch.targets[0]["boxes"][0].tolist()
    assert (x1, y1, x2, y2) == ((48, 16, 96, 40) if flipped else (24, 16, 72, 40))
    assert batch.targets[0]["labels"].tolist() == [5]
    inside = batch.images[0, 0, int(y1) + 2 : int(y2) - 2, int(x1) + 2 : int(x2) - 2]
    assert inside.min() > 0.99
    assert float(batch.images[0, 0].sum()) == pytest.approx(48 * 24, rel=0.02)

    wrong = AnnotatedImage("a", tmp_path / "a.png", (40, 60), [], [], [])
    with pytest.raises(ValueError, match="has 60 x 40 pixels, but its annotation is for 40 x 60"):
        list(reader.read(iter([[ImageRequest(image=wrong, side=40)]])))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        list(reader.read(iter([[ImageRequest(image=image, side=40)]])))


def test_batches_have_one_orientation_and_every_image_comes_once_an_epoch() -> None:
    images = [AnnotatedImage(f"{i}", Path("x.jpg"), (9, 5) if i < 9 else (5, 9), [], [], []) for i in range(16)]
    batches = list(islice(training_batches(images, 3, (48, 64), seed=4), 40))
    assert all(len({request.image.width for request in batch}) == 1 for batch in batches)
    for width, number in ((9, 9), (5, 7)):
        names = [request.image.name for batch in batches for request in batch if request.image.width == width]
        epochs = [names[start : start + number] for start in range(0, len(names) - number, number)]
        assert len(epochs) >= 4
        assert all(len(set(epoch)) == number for epoch in epochs)
        assert epochs[0] != epochs[1]
    drawn = [request for batch in batches for request in batch]
    assert {(request.side, request.flipped) for request in drawn} == {(48, False), (48, True), (64, False), (64, True)}
    others = next(training_batches(images, 3, (48, 64), seed=5))
    assert [request.image.name for request in others] != [request.image.name for request in batches[0]]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc") / "VOCdevkit", num_train=10, num_test=4, empty=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detection") / "weights.safetensors"
    return write_weights(path, drawn_backbone(NARROW), NARROW)


def detect_line(weights: Path, voc: Path, out: Path, *flags: str) -> list[object]:
    return ["detect", weights, "--data", voc, "--out", out, *TINY, *flags]


def test_a_stopped_detection_continues_exactly(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, voc: Path, weights: Path
) -> None:
    """Paused at iteration 3 of 6, and killed after 4: the same tensors and result as in one go; what a result holds."""
    whole, output = succeeded(capsys, *detect_line(weights, voc, tmp_path / "whole", "--iterations=6"))
    assert "10 train images with boxes" in output
    parts = detect_line(weights, voc, tmp_path / "parts", "--iterations=6")
    paused, output = succeeded(capsys, *parts, "--max-steps=3")
    assert (paused["complete"], paused["step"]) == (False, 3)
    assert "paused after step 3, as --max-steps asks" in output
    with killed(after=1) as saved:
        succeeded(capsys, *parts, "--checkpoint-every-s=0")
    assert saved == [4]
    again, _ = succeeded(capsys, *parts)
    assert again == whole
    assert same_files("detector.safetensors", tmp_path / "whole", tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir() if path.name[0] != ".") == [
        *("detector.safetensors", "result.json", "settings.json")
    ]
    assert (whole["train_images"], whole["test_images"]) == (10, 4)
    assert whole["settings"]["lr_steps"] == [4, 6]  # 18 of 24 and 22 of 24
    for name in ("AP_11point", "AP50_11point", "AP75_11point"):
        assert 0 <= whole[name] <= 100
    assert whole["AP50_11point_per_class"]["aeroplane"] is None
    assert whole["evaluator"] == "detect-voc"


def test_running_statistics_are_those_of_all_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, voc: Path, weights: Path
) -> None:
    """The first batch-norm's mean and biased variance are those of the convolution's outputs for all of the batches."""
    line = detect_line(weights, voc, tmp_path / "out", "--iterations=2", "--train-sides", "64", "--precision=fp64")
    succeeded(capsys, *line)
    state = load_file(tmp_path / "out" / "detector.safetensors")
    assert int(state["c4.bn1.num_batches_tracked"]) == 4
    images = [image for image in read_voc(voc, ["VOC2007/trainval"]).images if len(image.labels)]
    reader = BatchReader(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), max_side=160, with_ignored=True,
        workers=1, device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip
    outputs = []
    for batch in reader.read(islice(training_batches(images, 4, (64,), seed=0), 2, 4)):
        convolved = torch.nn.functional.conv2d(batch.images, state["c4.conv1.weight"], stride=2, padding=3)
        outputs.append(convolved.transpose(0, 1).flatten(1))
    variance, mean = torch.var_mean(torch.cat(outputs, dim=1), dim=1, correction=0)
    torch.testing.assert_close(state["c4.bn1.running_mean"], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state["c4.bn1.running_var"], variance, rtol=1e-9, atol=1e-12)


def test_published_rounding() -> None:
    """As detectron2 writes them: scores with three decimals, which ties these two, corners from pixel 1 with one."""
    found = ImageDetections(
        boxes=np.array([[0.04, 1.26, 10.06, 20.0], [-0.5, 0.96, 7.24, 8.25]]),
        scores=np.array([0.81239, 0.8116]),
        labels=np.array([1, 0]),
    )
    (rounded,) = published_rounding([found])
    assert rounded.scores.tolist() == [0.812, 0.812]
    np.testing.assert_allclose(rounded.boxes, [[0.0, 1.3, 10.1, 20.0], [-0.5, 1.0, 7.2, 8.2]], atol=1e-9)
    assert rounded.labels.tolist() == [1, 0]
    assert not DetectionProtocol().config().published_rounding


def test_coco_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path, voc: Path, weights: Path) -> None:
    coco = write_coco(tmp_path / "coco", voc)
    flags = [flag for flag in TINY if flag not in ("--train-sets", "VOC2007/trainval")]
    line = ["detect", weights, "--data", coco, "--out", tmp_path / "out", "--dataset=coco", "--iterations=2"]
    result, output = succeeded(capsys, *line, *flags, "--max-images=3")
    assert (result["train_images"], result["test_images"], result["settings"]["max_images"]) == (3, 3, 3)
    assert "(COCO's definition; 3 test images)" in output
    assert "AP_11point" not in result
    assert result["settings"]["train_sets"] == ["train2017"]


def test_misuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, voc: Path, weights: Path) -> None:
    out = tmp_path / "out"
    assert "there is no folder" in refused(capsys, *detect_line(weights, tmp_path / "nowhere", out))
    assert "VOC2012" in refused(capsys, "detect", weights, "--data", voc, "--out", out)
    assert "batch size 0 is not allowed" in refused(capsys, *detect_line(weights, voc, out, "--batch-size=0"))
    assert "workers 0 is not allowed" in refused(capsys, *detect_line(weights, voc, out, "--workers=0"))
    assert "anchor sizes 0 is not allowed" in refused(capsys, *detect_line(weights, voc, out, "--anchor-sizes=0"))
    with pytest.raises(ValueError, match="--train-sides without a value is not allowed"):
        DetectionProtocol(train_sides=()).config()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_small_detector_learns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """ResNet-18 of a quarter's width from random weights, 24 drawn images of 96 x 120: AP50 above 50 % on 12 others."""
    voc = write_voc(tmp_path / "VOCdevkit", num_train=24, num_test=12, side=96)
    config = BackboneConfig(arch="resnet18", width_multiplier=0.25)
    weights = write_weights(tmp_path / "weights.safetensors", drawn_backbone(config), config)
    flags = ["--train-sets", "VOC2007/trainval", "--iterations=150", "--batch-size=4", "--warmup-iterations=20"]
    flags += ["--train-sides=96", "--test-side=96", "--anchor-sizes", "24", "36", "--regions-per-image=32"]
    flags += ["--precise-bn-batches=10", "--device=cpu"]
    result, _ = succeeded(capsys, "detect", weights, "--data", voc, "--out", tmp_path / "out", *flags)
    assert result["AP50_11point"] > 50
