"""What a documented command is called with instead when the tests run it: smaller, elsewhere, or by a name that is there.

Everything else of a command is run as it stands on the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# So little training detects planes everywhere, and all of them would be outlined.
FEW = "training.evaluate_every=4 training.checkpoint_every=4 architecture.max_detections=20 synthetic=null"
CROPS = "training.evaluate_every=4 training.checkpoint_every=4 architecture.crop_size=64"
DETECTRON2 = (
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 2 "
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 20"
)
STEP = r"python -m pipelines\.steps\."


@dataclass(frozen=True)
class Substitution:
    """A pattern, what stands there instead, and why."""

    pattern: str
    instead: str
    why: str

    def __call__(self, command: str) -> str:
        """The command as it is run; names in braces are filled in later."""
        return re.sub(self.pattern, self.instead, command)


# In their order; each is applied to what the ones before left.
SUBSTITUTIONS = (
    Substitution(r"^make demo$", "python -m scoring.demo --steps 4", "make installs first; this is what it then calls"),
    Substitution(r"(--recipe )course_det_\w+", r"\1demo_detector_detectron2", "R101, X101 and COCO's weights: too large"),
    Substitution(r"(--recipe )course_mask", r"\1demo_maskrcnn_detectron2", "R50 and COCO's weights: too large"),
    Substitution(r"SOLVER\.MAX_ITER=1000,5000", "SOLVER.MAX_ITER=1", "one iteration shows what thousands do"),
    Substitution(r"SOLVER\.BASE_LR=0\.00025,0\.0005,0\.001", "SOLVER.BASE_LR=0.00025,0.001", "two for three"),
    Substitution(rf"^({STEP}train_(?!unet).*detectron2.*)$", rf"\1 {DETECTRON2}", "two iterations teach a test enough"),
    Substitution(rf"^({STEP}ablate .*detectron2.*)$", rf"\1 {DETECTRON2}", "two iterations, where the grid has none"),
    Substitution(
        rf"^({STEP}train_(?!unet)(?!.*detectron2).*)$", rf'\1 --steps 4 --batch-size 2 --set "{FEW}"', "minutes to seconds"
    ),
    Substitution(rf"^({STEP}train_unet.*)$", rf'\1 --steps 4 --batch-size 2 --set "{CROPS}"', "minutes to seconds"),
    Substitution(rf"^({STEP}ablate .*demo_unet.*)$", rf'\1 --set "steps=4 batch_size=2 {CROPS}"', "minutes to seconds"),
    Substitution(
        rf"^({STEP}ablate .*detector_scratch.*)$", rf'\1 --set "steps=4 batch_size=2 {FEW}"', "minutes to seconds"
    ),
    Substitution(r"minimum=0\.5 -P min_gain=0\.01", "min_gain=-1", "what was trained in seconds passes no gate of quality"),
    Substitution(r"--folds 5", "--folds 2", "two folds for five"),
    Substitution(r"--seeds 3", "--seeds 2", "two seeds for three"),
    Substitution(r"--search 20", "--search 2", "two trials for twenty"),
    Substitution(r"--actors 4", "--actors 1", "an actor takes a core"),
    Substitution(r"^(score view .*)$", r"\1 --no-open --port {port}", "no browser of whoever runs the tests"),
    Substitution(r"--port 500\d", "--port {port}", "a port that is free"),
    Substitution(r"localhost:500\d", "localhost:{port}", "the port of the line before"),
    Substitution(r"dev\.planes-det/7", "dev.planes-det/1", "the only version of that name"),
    Substitution(r"(?<= )/data/", "data/", "a folder of the test's own"),
    Substitution(r"https://mlflow\.(production|your-company)", "{server}", "a server on loopback"),
    Substitution(r"submission/planes-inst-1(?=/)", "{submission}", "the version may have another number here"),
    Substitution(r"PARENT_RUN_ID", "{parent}", "the newest run of folds, given scores if it found no plane"),
    Substitution(r"RUN_ID RUN_ID", "{scored} {scored_before}", "the two newest scorings"),
)

# Parameters that entry points of `mlflow run .` get besides those on the page; overrides come after the page's own.
_TRAINING = {"steps": "4", "batch_size": "2"}
ENTRY_POINTS = {
    "train_unet": {**_TRAINING, "overrides": CROPS},
    "train_detector": {**_TRAINING, "overrides": FEW},
    "train_maskrcnn": {**_TRAINING, "overrides": FEW},
    "ablate": {"overrides": f"steps=4 batch_size=2 {CROPS}"},
}


def substituted(command: str) -> str:
    """What is run for a documented command, with names in braces to be filled in."""
    for one in SUBSTITUTIONS:
        command = one(command)
    return command
