"""Detectron2's engine against Detectron2 itself: predictions to the bit, configs by name, weights read safely."""

import os
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from models.engines.detectron2.predictor import build_network, detectron2_spec, make_config, zoo_configs
from models.engines.detectron2.weights import load_initial, load_whole
from models.errors import ModelError
from models.geometry.rle import rle_decode
from models.images.decoding import read_image
from models.loading import load_model
from models.saved.folder import save_model
from models.saved.spec import read_spec

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_3x"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
SMALL = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.FPN.OUT_CHANNELS": 32}
SMALL |= {"MODEL.ROI_BOX_HEAD.FC_DIM": 64, "MODEL.ROI_MASK_HEAD.CONV_DIM": 32, "INPUT.MIN_SIZE_TEST": 480}


# A Mask R-CNN has all that a Faster R-CNN has.
@pytest.mark.parametrize("config", [pytest.param(FASTER, marks=pytest.mark.soak), MASK])
def test_a_saved_model_predicts_what_defaultpredictor_predicts_to_the_bit(config, isaid, dota, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import DefaultPredictor

    cfg = make_config(config, {**SMALL, "TEST.DETECTIONS_PER_IMAGE": 30}, 1)
    torch.manual_seed(3)
    network = build_network(cfg, "cpu")
    with torch.no_grad():
        # Fresh heads answer 0.5 everywhere; spread, they rank their boxes.
        network.roi_heads.box_predictor.cls_score.weight.mul_(40)
        network.roi_heads.box_predictor.bbox_pred.weight.mul_(40)
    DetectionCheckpointer(network, str(tmp_path)).save("theirs")
    ours = load_model(save_model(tmp_path / "ours", detectron2_spec(config, cfg, ["plane"]), network.state_dict()))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = str(tmp_path / "theirs.pth"), "cpu"
    theirs = DefaultPredictor(cfg)
    paths = sorted([*isaid.rglob("*.png"), *dota.rglob("*.png"), *dota.rglob("*.jpg")])[::12][:5]
    assert len(paths) == 5
    total = 0
    for path in paths:
        image = read_image(path)
        instances = ours.predict([image])[0]
        expected = theirs(np.ascontiguousarray(image[:, :, ::-1]))["instances"]
        assert instances.boxes.tobytes() == expected.pred_boxes.tensor.numpy().tobytes()
        assert instances.scores.tobytes() == expected.scores.numpy().tobytes()
        total += len(instances)
        if config == MASK:
            for mask, dense in zip(instances.masks, expected.pred_masks.numpy(), strict=True):
                assert (rle_decode(mask) == dense).all()
    assert total > 20


def test_a_saved_model_says_what_it_needs(tmp_path):
    cfg = make_config(FASTER, SMALL, 1)
    spec = detectron2_spec(FASTER, cfg, ["plane"])
    assert (spec.kind, spec.engine, spec.architecture["config"]) == ("detector", "detectron2", FASTER)
    assert spec.versions["detectron2"] != "none"
    assert spec.architecture["settings"]["MODEL.RESNETS.DEPTH"] == 18
    assert not [k for k in spec.architecture["settings"] if k.startswith(("SOLVER", "DATASETS", "OUTPUT", "MODEL.WEIGHTS"))]
    spec.architecture["settings"]["MODEL.RESNETS.DEPTHS"] = 3
    folder = save_model(tmp_path / "m", spec, build_network(cfg, "cpu").state_dict())
    assert read_spec(folder).kind == "detector"
    with pytest.raises(ModelError, match=r"MODEL\.RESNETS\.DEPTHS 3: .*did you mean MODEL\.RESNETS\.DEPTH\?"):
        load_model(folder)


def test_every_config_of_the_zoo_is_taken_or_refused_with_its_reason():
    taken, refused = [], {}
    for name in zoo_configs():
        try:
            make_config(name, {}, 1)
            taken.append(name)
        except ModelError as error:
            refused[name] = str(error)
    assert {FASTER, MASK, "COCO-Detection/retinanet_R_101_FPN_3x", "Misc/cascade_mask_rcnn_R_50_FPN_3x"} <= set(taken)
    assert len(taken) > 40
    assert all("planes need boxes" in reason for reason in refused.values())


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_3", {}, "did you mean COCO-Detection/faster_rcnn_R_50_FPN_3x"),
        ("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ", {}, "is Python code"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", {}, "finds keypoints"),
        (FASTER, {"SOLVER.BASE_LRR": 1.0}, r"did you mean SOLVER\.BASE_LR\?"),
        (FASTER, {"SOLVER.MAX_ITER": "many"}, "SOLVER.MAX_ITER many"),
        (FASTER, {"SOLVER": 3}, "SOLVER 3"),
    ],
)
def test_settings_that_cannot_be_used_say_so(config, opts, message):
    with pytest.raises(ModelError, match=message):
        make_config(config, opts, 1)


def test_a_config_file_runs_no_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ModelError, match="cannot be used"):
        make_config(str(path), {}, 1)
    assert not (tmp_path / "ran").exists()


def test_weights_in_every_form_become_the_same_network(tmp_path):
    cfg = make_config(FASTER, SMALL, 1)
    torch.manual_seed(1)
    source = build_network(cfg, "cpu")
    state = source.state_dict()
    torch.save({"model": state, "iteration": 5, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    arrays = {k: v.numpy() for k, v in state.items()}
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    saved = save_model(tmp_path / "c", detectron2_spec(FASTER, cfg, ["plane"]), state)
    for form in (tmp_path / "a.pth", tmp_path / "b.pkl", saved, saved / "weights.safetensors"):
        torch.manual_seed(2)
        network = build_network(cfg, "cpu")
        load_initial(network, str(form), FASTER, cfg)
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items()), form
    other = build_network(make_config(FASTER, SMALL, 3), "cpu")
    load_initial(other, str(tmp_path / "a.pth"), FASTER, cfg)
    with pytest.raises(ModelError, match="not of this network"):
        load_whole(other, str(tmp_path / "a.pth"))


def test_the_heads_of_other_classes_stay_fresh_and_odd_files_are_refused(tmp_path):
    cfg = make_config(FASTER, SMALL, 1)
    network = build_network(cfg, "cpu")
    torch.save({"model": {"something": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="no tensor fits"):
        load_initial(network, str(tmp_path / "other.pth"), FASTER, cfg)
    with pytest.raises(ModelError, match="no such file"):
        load_initial(network, str(tmp_path / "absent.pth"), FASTER, cfg)
    with pytest.raises(ModelError, match="has none for"):
        load_initial(network, "zoo", "Misc/semantic_R_50_FPN_1x", cfg)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_pickle_that_calls_something_is_refused_and_does_not_run(tmp_path, suffix):
    cfg = make_config(FASTER, SMALL, 1)
    path = tmp_path / f"evil.{suffix}"
    content = {"model": {"a": _Evil(tmp_path / "ran")}, "__author__": "x"}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match="cannot be read safely"):
        load_initial(build_network(cfg, "cpu"), str(path), FASTER, cfg)
    assert not (tmp_path / "ran").exists()


def test_zoo_weights_offline_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # urllib keeps the proxies of its first call for all later ones of the process.
    monkeypatch.setattr("urllib.request._opener", None)
    cfg = make_config(FASTER, SMALL, 1)
    for weights in ("zoo", "imagenet"):
        with pytest.raises(ModelError, match="set weights to none, or to a local"):
            load_initial(build_network(cfg, "cpu"), weights, FASTER, cfg)


def test_images_are_resized_as_detectron2_resizes_them():
    from detectron2.data.transforms import ResizeShortestEdge

    from pipelines.data.loading.augment import shortest_edge

    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, size = (int(v) for v in rng.integers(20, 3000, 3))
        expected = ResizeShortestEdge.get_output_shape(height, width, size, 1333)
        assert shortest_edge(height, width, size, 1333) == expected
