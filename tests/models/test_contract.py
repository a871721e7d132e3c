"""What every predictor must do, whatever its engine; small random networks, no training."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.engines.composed import ComposedArchitecture, save_composed
from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture, build_detector
from models.engines.torchvision.predictor import detector_spec
from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import ModelError
from models.geometry.rle import rle_decode
from models.loading import load_model
from models.predictor import Predictor
from models.saved.folder import read_weights, save_model

SMALL = DetectorArchitecture(
    backbone="resnet18",
    norm="batch",
    levels=[2, 3],
    pooled_level=False,
    fpn_channels=16,
    head_channels=32,
    anchor_sizes=[[16], [32]],
    min_size=None,
    score_threshold=0.0,
    max_detections=20,
)


def _detector(folder, **changes):
    architecture = SMALL.model_copy(update=changes)
    torch.manual_seed(0)
    return save_model(folder, detector_spec(architecture, ["plane"]), build_detector(architecture, 1).state_dict())


def _segmenter(folder, **settings):
    architecture = SegmenterArchitecture(crop_size=64, **settings)
    torch.manual_seed(0)
    return save_model(folder, segmenter_spec(architecture, ["plane"]), build_segmenter(architecture).state_dict())


def _mask_rcnn(folder, **changes):
    architecture = MaskArchitecture(**{**SMALL.model_dump(), "mask_channels": 16, **changes})
    torch.manual_seed(0)
    return save_model(folder, detector_spec(architecture, ["plane"]), build_detector(architecture, 1).state_dict())


def _detectron2(folder, config="COCO-Detection/faster_rcnn_R_50_FPN_1x", **settings):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from models.engines.detectron2.predictor import build_network, detectron2_spec, make_config

    small = {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "INPUT.MIN_SIZE_TEST": 96,
        "TEST.DETECTIONS_PER_IMAGE": 20,
    }
    cfg = make_config(config, {**small, **settings}, 1)
    torch.manual_seed(0)
    return save_model(folder, detectron2_spec(config, cfg, ["plane"]), build_network(cfg, "cpu").state_dict())


def _composed(folder):
    components = _detector(folder.parent / "d"), _segmenter(folder.parent / "s", network="unet", encoder="resnet18")
    return save_composed(folder, *components, ComposedArchitecture(), components={})


MAKERS = {
    "composed": _composed,
    "mask rcnn": _mask_rcnn,
    "mask rcnn resized": lambda f: _mask_rcnn(f, min_size=96, max_size=160, heads="v2"),
    "mask rcnn of 56 cells": lambda f: _mask_rcnn(f, mask_size=56),
    "detectron2 detector": _detectron2,
    "detectron2 own scale": lambda f: _detectron2(f, **{"INPUT.MIN_SIZE_TEST": 0, "INPUT.FORMAT": "RGB"}),
    "detectron2 retinanet": lambda f: _detectron2(f, "COCO-Detection/retinanet_R_50_FPN_1x"),
    "detectron2 mask rcnn": lambda f: _detectron2(f, "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"),
    "detector": _detector,
    "detector resized": lambda f: _detector(f, min_size=96, max_size=160),
    "detector zoomed": lambda f: _detector(f, zoom=0.5),
    "detector mobilenet": lambda f: _detector(f, backbone="mobilenet_v3_large"),
    "unet": lambda f: _segmenter(f, network="unet", encoder="resnet18"),
    "unet flips": lambda f: _segmenter(f, network="unet", encoder="resnet18", flips=True, normalisation="crop"),
    "skipnet": lambda f: _segmenter(f, network="skipnet"),
}


@pytest.fixture(scope="module", params=MAKERS)
def predictor(request, tmp_path_factory) -> Predictor:
    return load_model(MAKERS[request.param](tmp_path_factory.mktemp("saved") / "model"))


def _images(count=3):
    rng = np.random.default_rng(3)
    sizes = [(96, 128), (128, 96), (96, 128)][:count]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def _same(a, b):
    assert len(a) == len(b)
    # Sums over a batch may be ordered otherwise: equal to rounding.
    assert np.allclose(a.boxes, b.boxes, atol=1e-2)
    assert np.allclose(a.scores, b.scores, atol=1e-4)


def test_is_a_predictor_and_returns_one_result_per_image(predictor):
    assert isinstance(predictor, Predictor)
    results = predictor.predict(_images())
    assert [r.image_id for r in results] == ["0", "1", "2"]
    assert [(r.height, r.width) for r in results] == [(96, 128), (128, 96), (96, 128)]
    assert predictor.predict([]) == []


def test_boxes_are_inside_ordered_and_typed(predictor):
    for result in predictor.predict(_images()):
        assert result.boxes.dtype == np.float32
        assert result.labels.dtype == np.int64
        assert (np.diff(result.scores) <= 0).all()
        x1, y1, x2, y2 = result.boxes.T
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= result.width)).all()
        assert ((y1 >= 0) & (y1 < y2) & (y2 <= result.height)).all()
        for mask in result.masks or ():
            assert rle_decode(mask).shape == (result.height, result.width)


def test_a_batch_equals_single_images(predictor):
    images = _images()
    for together, image in zip(predictor.predict(images), images, strict=True):
        _same(together, predictor.predict([image])[0])


def test_the_same_image_gives_the_same_bits(predictor):
    first, second = (predictor.predict(_images(1))[0] for _ in range(2))
    assert first.boxes.tobytes() == second.boxes.tobytes()
    assert first.scores.tobytes() == second.scores.tobytes()


def test_an_empty_looking_and_a_tiny_image_do_not_fail(predictor):
    black, tiny = np.zeros((64, 64, 3), np.uint8), np.zeros((3, 5, 3), np.uint8)
    results = predictor.predict([black, tiny])
    assert [(r.height, r.width) for r in results] == [(64, 64), (3, 5)]


def test_segmenter_masks_stay_in_their_boxes(tmp_path):
    segmenter = load_model(MAKERS["unet"](tmp_path / "m"))
    image = _images(1)[0]
    boxes = np.array([[10.4, 20.6, 50.2, 70.1], [0, 0, 128, 96], [100, 5, 101, 6]])
    masks = segmenter.masks_in_boxes([image, image], [boxes, np.zeros((0, 4))])
    assert [len(m) for m in masks] == [3, 0]
    dense = rle_decode(masks[0][0])
    assert dense.shape == (96, 128)
    dense[20:71, 10:51] = False
    assert not dense.any()


def test_segmenting_many_crops_equals_one_by_one(tmp_path):
    segmenter = load_model(MAKERS["unet"](tmp_path / "m"))
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (*rng.integers(5, 90, 2), 3), dtype=np.uint8) for _ in range(40)]
    for together, crop in zip(segmenter.segment(crops), crops, strict=True):
        assert together.shape == crop.shape[:2]
        assert np.allclose(together, segmenter.segment([crop])[0], atol=1e-4)


def test_skipnet_is_the_network_described():
    from models.engines.unet.skipnet import SkipNet

    network = SkipNet()
    x, seen = torch.zeros(2, 3, 128, 128), []
    for part in (network.stem, *network.down, *network.up):
        part.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:])))
    assert network(x).shape == (2, 1, 128, 128)
    down = [(8, 128, 128), (16, 64, 64), (32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    up = [(256, 4, 4), (128, 8, 8), (64, 16, 16), (32, 32, 32), (16, 64, 64), (8, 128, 128)]
    assert seen == down + up
    with pytest.raises(ValueError, match="multiples of 64"):
        network(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_detector(SMALL.model_copy(update={"anchor_sizes": [[8]]}), 1), "1 lists for 2 feature maps"),
        (
            lambda: build_detector(SMALL.model_copy(update={"norm": "group"}), 1, "imagenet"),
            "not for group; use weights none",
        ),
        (
            lambda: build_detector(SMALL.model_copy(update={"norm": "group", "backbone": "mobilenet_v2"}), 1),
            "which mobilenet_v2's are not; use batch or frozen",
        ),
        (lambda: build_detector(SMALL.model_copy(update={"anchor_sizes": [[8], [8, 9]]}), 1), "same number of sizes"),
        (lambda: build_detector(SMALL.model_copy(update={"levels": [2, 9]}), 1), "not 9"),
        (lambda: build_detector(SMALL, 1, "/absent/weights.pth"), "no such file"),
        (lambda: build_detector(SMALL, 1, "coco"), "torchvision has none for resnet18 v1; it has resnet50 v1, resnet50 v2"),
        (lambda: build_segmenter(SegmenterArchitecture(network="unett")), "Wrong architecture type"),
        (lambda: build_segmenter(SegmenterArchitecture(encoder="resnet17")), "Wrong encoder name"),
        (lambda: build_segmenter(SegmenterArchitecture(), "imagnet"), "Available options"),
        (lambda: build_segmenter(SegmenterArchitecture(network="skipnet", crop_size=96)), "multiple of 64"),
    ],
)
def test_settings_that_do_not_fit_say_so(build, message):
    with pytest.raises(ModelError, match=message):
        build()


def test_pretrained_weights_offline_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # urllib keeps the proxies of its first call for all later ones of the process.
    monkeypatch.setattr("urllib.request._opener", None)
    with pytest.raises(ModelError, match="set weights to none, or to a local"):
        build_detector(SMALL, 1, "imagenet")


def test_weights_of_another_model_initialise_what_fits(tmp_path):
    folder = _detector(tmp_path / "source")
    torch.manual_seed(5)
    model = build_detector(SMALL, 1, str(folder))
    source = read_weights(folder)
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("maker", ["detector", "detector zoomed", "mask rcnn", "composed"])
@pytest.mark.parametrize("height", [8, 20, 40, 66])
def test_an_image_does_not_decide_how_later_ones_are_predicted(maker, height, tmp_path):
    """Padded to a multiple of 32, small ones grow by half and more: torchvision took strides of the first one for all."""
    folder = MAKERS[maker](tmp_path / "model")
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (side, 128, 3), dtype=np.uint8) for side in (height, 128))
    first, second = load_model(folder), load_model(folder)
    alone = first.predict([large])[0], first.predict([small])[0]
    later = second.predict([small])[0], second.predict([large])[0]
    assert len(alone[0])
    assert alone == later[::-1]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_an_image_that_becomes_a_single_column_keeps_its_rows(width):
    network = build_detector(SMALL.model_copy(update={"zoom": 0.5}), 1).eval()
    image = torch.arange(8.0).reshape(1, 8, 1).repeat(3, 1, width)
    resized = network.transform.resize(image)[0]
    pillow = Image.fromarray(image[0].numpy()).resize((resized.shape[2], 4), Image.Resampling.BILINEAR)
    torch.testing.assert_close(resized, torch.from_numpy(np.array(pillow)).expand_as(resized))
    assert len(resized.unique()) == 4


def test_group_norm_has_no_statistics_and_predicts():
    network = build_detector(SMALL.model_copy(update={"norm": "group", "backbone": "resnet18"}), 1).eval()
    kinds = {type(module).__name__ for module in network.backbone.modules()}
    assert "GroupNorm" in kinds
    assert not kinds & {"BatchNorm2d", "FrozenBatchNorm2d"}
    assert {g.num_groups for g in network.backbone.modules() if type(g).__name__ == "GroupNorm"} == {32}
    (found,) = network([torch.rand(3, 96, 96)])
    assert set(found) == {"boxes", "labels", "scores"}
