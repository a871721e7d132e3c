"""Training in several processes: as one process would, resumable to the bit, none is left over, errors are one line.

The processes are forked here, which saves them the imports; the journey starts them as the command does.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import distributed, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from models.engines.torchvision.network import build_detector
from models.errors import DataError, ModelError, PlanesError, RecipeError
from models.saved.folder import read_weights
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import OptimizerSettings, TrainingSettings
from pipelines.training import group as groups
from pipelines.training import processes
from pipelines.training.detector import train_detector
from pipelines.training.group import ALONE, Group, check_processes, weighted
from pipelines.training.loop import CHECKPOINT, Job, Stopped, pick_workers, run
from pipelines.training.processes import backend_of, own_device, train_in_processes
from pipelines.training.shared_detector import SharedSampler
from pipelines.training.unet import segmenter_loss, train_unet
from tests.conftest import write_image
from tests.gpu import fake_gpu

BATCH = 7


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Processes that begin at once, and Ctrl-C as a terminal gives it; none is left when a test ends."""
    monkeypatch.setattr(processes, "START", "fork")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
        yield
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


class Batches:
    """Seven rows of three numbers each step, of which the third process of three gets two."""

    def __len__(self):
        return 4

    def __getitem__(self, step):
        return self.share(step, 0, 1)

    def share(self, step, rank, world):
        rows = np.random.default_rng(step).standard_normal((BATCH, 3)).astype(np.float32)
        return torch.from_numpy(rows[rank::world])


class Net(nn.Module):
    """Layers of which one is never used and one for rows with a large first number alone, as a mask head is."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.rare, self.unused = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, rows):
        hidden = torch.tanh(self.body(rows))
        large = rows[:, 0] > 1
        return self.head(hidden)[:, 0], self.rare(hidden[large])[:, 0] if large.any() else None


def squares(group):
    """Means over all rows, and over the large ones, of the whole batch."""

    def loss(model, rows, device):
        first, second = model(rows)
        large = rows[:, 0] > 1
        number, many = group.total(torch.tensor([len(rows), int(large.sum())])).tolist()
        losses = {"all": (first - rows.sum(1)).square().sum() / number}
        losses["large"] = (second - rows[large, 0]).square().sum() / many if second is not None else first.sum() * 0
        return losses

    return loss


def make_job(folder, group, listeners=(), *, change=lambda job: None, clip_norm=0.0, **training):
    # Those of the first process count.
    torch.manual_seed(group.rank)
    settings = {"steps": 10, "batch_size": BATCH, "checkpoint_every": 3, "precision": "32", **training}
    job = Job(
        Net(),
        Batches(),
        loss=squares(group),
        training=TrainingSettings(**settings),
        # Adam would not notice gradients of another size.
        optimizer=OptimizerSettings(name="sgd", lr=0.05, warmup_steps=3, clip_norm=clip_norm),
        folder=folder,
        device="cpu",
        metric="m",
        listeners=listeners,
        group=group,
    )
    change(job)
    return job


def train(folder, number, listeners=(), **more):
    """History and weights of a training in so many processes."""
    folder.mkdir(exist_ok=True)

    def work(*, device, listeners, group):
        outcome = run(make_job(folder, group, listeners, **more))
        if group.rank == 0:
            torch.save(outcome.weights, folder / "weights.pt")
        return outcome

    outcome = train_in_processes(work, (), number, device="cpu", batch_size=BATCH, listeners=listeners)
    return outcome, torch.load(folder / "weights.pt", weights_only=True)


def close(first, second, tolerance=1e-5):
    """Whether two trainings went the same way, to rounding."""
    (a, weights), (b, others) = first, second
    same = [pytest.approx(r, rel=tolerance, abs=tolerance) == s for r, s in zip(a.history, b.history, strict=True)]
    return all(same) and all(torch.allclose(v, others[k], atol=tolerance) for k, v in weights.items())


def equal(first, second):
    """Whether they are equal to the bit."""
    (a, weights), (b, others) = first, second
    return a.history == b.history and all(torch.equal(v, others[k]) for k, v in weights.items())


class Told:
    """A listener that keeps what it is told and may act after a step."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.steps, self.safe, self.notified = at, act, [], 0, 0
        self.pid = None

    def on_start(self, history, total):
        self.begun, self.total = len(history), total
        self.processes = multiprocessing.active_children()

    def on_step(self, record):
        self.steps.append(record["step"])
        self.pid = os.getpid()
        if record["step"] == self.at:
            self.act()

    def on_checkpoint(self, history):
        self.safe = len(history)
        assert [r["step"] for r in history] == list(range(1, len(history) + 1))

    def on_interrupt(self):
        self.notified += 1


def failing(at, act, rank=1):
    """A change of the job: a process does something when it comes to a step."""

    def change(job):
        plain, steps = job.loss, iter(range(1, 1000))

        def loss(*given):
            if next(steps) == at and job.group.rank == rank:
                act()
            return plain(*given)

        job.loss = loss

    return change


def kill_9():
    os.kill(os.getpid(), signal.SIGKILL)


def test_pictures_of_validations_come_from_the_first_process(tmp_path):
    class Gallery(Told):
        def on_pictures(self, step, pictures):
            self.shown = (*getattr(self, "shown", ()), (step, pictures["p"].tolist(), os.getpid()))

    def change(job):
        job.evaluate, job.pictures = lambda model: {"m": 1.0}, lambda: {"p": np.full((1, 1, 3), 7, np.uint8)}

    listeners = Told(), Gallery()
    train(tmp_path / "n", 2, listeners, change=change, evaluate_every=5)
    assert listeners[1].shown == tuple((step, [[[7, 7, 7]]], os.getpid()) for step in (5, 10))
    assert listeners[0].safe == 10


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_train_as_one_does(number, tmp_path):
    alone = train(tmp_path / "1", 1)
    listener = Told()
    assert close(train(tmp_path / "n", number, [listener]), alone)
    assert (listener.steps, listener.begun, listener.total, listener.safe) == ([*range(1, 11)], 0, 10, 10)
    assert listener.pid == os.getpid()


def test_gradients_are_clipped_by_the_norm_of_the_whole_batch(tmp_path):
    alone, shared, free = (train(tmp_path / f"{n}-{clip}", n, clip_norm=clip) for n, clip in ((1, 0.3), (2, 0.3), (1, 0.0)))
    assert close(shared, alone)
    assert not close(free, alone)


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16-mixed", 2e-2), ("16-mixed", 5e-3)])
def test_several_processes_train_in_half_precision(kind, tolerance, tmp_path):
    alone, shared = (train(tmp_path / str(n), n, precision=kind) for n in (1, 2))
    assert close(shared, alone, tolerance)
    assert ("loss_scale" in shared[0].history[0]) == (kind == "16-mixed")


def test_one_process_validates_and_keeps_the_average(tmp_path):
    def validating(job):
        seen = []

        def evaluate(model):
            # The others wait in their next step meanwhile.
            time.sleep(0.3)
            seen.append({k: v.clone() for k, v in model.state_dict().items()})
            (tmp_path / f"validated-{os.getpid()}").touch()
            return {"m": float(len(seen) == 2) + float(seen[-1]["head.bias"]) * 1e-3}

        job.evaluate = evaluate

    more = {"ema": 0.8, "evaluate_every": 3, "change": validating}
    alone, shared = (train(tmp_path / str(n), n, **more) for n in (1, 2))
    assert close(shared, alone)
    assert (shared[0].step, alone[0].step) == (6, 6)
    assert shared[0].best == pytest.approx(alone[0].best, abs=1e-6)
    assert [r["step"] for r in shared[0].history if "val/m" in r] == [3, 6, 9, 10]
    # That of one process, and that of the first of two.
    assert len(list(tmp_path.glob("validated-*"))) == 2
    assert [p.name for p in (tmp_path / "2").glob("best-*")] == ["best-6.pt"]


@pytest.mark.parametrize(("number", "rank"), [(2, 1), (3, 0)])
def test_a_lost_process_ends_all_and_a_resumed_training_has_the_same_bits(number, rank, tmp_path):
    whole = train(tmp_path / "whole", number, ema=0.8)
    started = time.monotonic()
    said = rf"training process {rank + 1} of {number} was ended by signal 9 \(SIGKILL\); is the memory full\?; the same"
    with pytest.raises(ModelError, match=said):
        train(tmp_path / "cut", number, ema=0.8, change=failing(8, kill_9, rank))
    assert time.monotonic() - started < 20
    assert torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)["step"] == 6
    listener = Told()
    resumed = train(tmp_path / "cut", number, [listener], ema=0.8)
    assert listener.begun == 6
    assert listener.steps == [7, 8, 9, 10]
    assert equal(resumed, whole)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on(first, second, tmp_path):
    with pytest.raises(PlanesError):
        train(tmp_path, first, [Told(8, _stop)])
    listener = Told()
    assert close(train(tmp_path, second, [listener]), train(tmp_path / "whole", 1))
    assert listener.begun == 6


def _stop():
    raise Stopped("seen enough")


def test_a_listener_that_has_seen_enough_ends_all(tmp_path):
    listener = Told(2, _stop)
    with pytest.raises(Stopped, match="seen enough"):
        train(tmp_path, 2, [listener], steps=100_000)
    assert len(listener.processes) == 2


def _ctrl_c():
    """As a terminal sends it: to all."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def _slowly(job):
    plain = job.loss
    job.loss = lambda *given: (time.sleep(0.1), plain(*given))[1]


def test_ctrl_c_is_held_back_until_all_are_done_with_a_step(tmp_path):
    whole = train(tmp_path / "whole", 2, steps=40, checkpoint_every=40)
    listener = Told(2, _ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 2, [listener], steps=40, checkpoint_every=40, change=_slowly)
    saved = torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)
    assert listener.notified == 1
    assert listener.steps[-1] == listener.safe == saved["step"]
    assert 2 <= saved["step"] < 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert equal(train(tmp_path / "cut", 2, steps=40, checkpoint_every=40), whole)


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path):
    listener = Told(5, lambda: [_ctrl_c(), _ctrl_c()])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 2, [listener], steps=40, change=_slowly)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 3


def test_ctrl_c_after_the_last_step_is_not_lost(tmp_path):
    """Nothing is to be done any more, but what comes after the training must not begin."""

    def work(*, device, listeners, group):
        listeners[0].on_step({"step": 1}) if listeners else None
        # It comes meanwhile.
        time.sleep(1)
        return run(make_job(tmp_path, group, steps=1))

    with pytest.raises(KeyboardInterrupt):
        train_in_processes(work, (), 2, device="cpu", batch_size=2, listeners=[Told(1, _ctrl_c)])

    def late(*, device, listeners, group):
        listeners[0].on_step({"step": 1}) if listeners else None
        return SimpleNamespace(weights=None)

    with pytest.raises(KeyboardInterrupt):
        train_in_processes(late, (), 2, device="cpu", batch_size=2, listeners=[Told(1, _ctrl_c)])


def test_no_process_outlives_the_one_that_started_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader, writer = multiprocessing.Pipe()

    def start():
        class Pids(Told):
            def on_step(self, record):
                writer.send([p.pid for p in multiprocessing.active_children()])

        train(tmp_path, 2, [Pids()], steps=100_000, change=_slowly)

    parent = multiprocessing.get_context("fork").Process(target=start)
    parent.start()
    assert reader.poll(60)
    pids = reader.recv()
    assert len(pids) == 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob("planes-*"))


def test_a_loss_that_explodes_is_the_error_of_one_process(tmp_path):
    """Of the share of one process alone: all notice it in the same step."""

    def exploding(job):
        plain = job.loss
        job.loss = lambda model, rows, device: {
            k: v * (float("inf") if job.group.rank == 1 else 1) for k, v in plain(model, rows, device).items()
        }

    with pytest.raises(ModelError, match=r"^step 1: the loss is (inf|nan); lower optimizer\.lr"):
        train(tmp_path, 2, change=exploding)


def _raise(error):
    raise error


def test_errors_come_out_as_they_are(tmp_path):
    """Those for people; what else goes wrong in a process is told in one line, with where it was as the cause."""
    with pytest.raises(DataError, match=r"^x\.png: missing$") as caught:
        train(tmp_path, 2, change=failing(2, lambda: _raise(DataError("x.png: missing", "missing"))))
    assert caught.value.kind == "missing"

    class Odd(PlanesError):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    with pytest.raises(ModelError, match=r"^odd error$"):
        train(tmp_path, 2, change=failing(2, lambda: _raise(Odd("odd", "error")), rank=0))
    with pytest.raises(ModelError, match=r"^training process 2 of 2 failed: ValueError: two lines$") as caught:
        train(tmp_path, 2, change=failing(2, lambda: _raise(ValueError("two\nlines"))))
    assert "in failing" in str(caught.value.__cause__) or "in _raise" in str(caught.value.__cause__)


def test_a_process_that_never_begins_says_what_a_script_needs(tmp_path, monkeypatch):
    """As in a script without a guard, which each process would run again."""
    monkeypatch.setattr(processes, "_send_logs", lambda connection: sys.exit(1))
    with pytest.raises(ModelError, match=r"of 2 ended with exit code 1 before it began; .*__name__ == \"__main__\""):
        train(tmp_path, 2)


def test_a_process_that_just_ends_is_missed(tmp_path):
    with pytest.raises(ModelError, match="training process 1 of 2 ended with exit code 0; the same call goes on"):
        train(tmp_path, 2, change=failing(2, lambda: os._exit(0), rank=0))


def test_what_processes_log_is_logged_here(tmp_path, caplog, capfd):
    def telling():
        logging.getLogger("pipelines.x").warning("image %s is gone", "a.png")
        logging.getLogger("models.y").info("by the way")
        print("not for people")

    with caplog.at_level(logging.INFO):
        train(tmp_path, 2, change=failing(1, telling))
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("pipelines.x", "WARNING", "image a.png is gone"),
        ("models.y", "INFO", "by the way"),
    ]
    assert "Gloo" not in capfd.readouterr().out


def test_processes_share_the_threads_and_wait_for_long(monkeypatch):
    def work(*, device, listeners, group):
        options = distributed.group.WORLD._get_backend(torch.device("cpu")).options
        return SimpleNamespace(
            weights=1, known=(torch.get_num_threads(), options._timeout, os.environ["GLOO_SOCKET_IFNAME"], device)
        )

    monkeypatch.setattr(torch, "get_num_threads", lambda kept=torch.get_num_threads: 5)
    real = torch.set_num_threads
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(n) or real(n))

    def threads(*, device, listeners, group):
        outcome = work(device=device, listeners=listeners, group=group)
        outcome.known = (seen, *outcome.known[1:])
        return outcome

    outcome = train_in_processes(threads, (), 2, device="cpu", batch_size=2, listeners=())
    assert outcome.known == ([2], timedelta(days=30), "lo", "cpu")
    assert outcome.weights == {}


def test_processes_begin_without_ctrl_c_and_warnings(monkeypatch):
    """Before they can see to it themselves a terminal may send it, and torch has looked at the environment."""
    seen = []

    def start(place, work, arguments):
        seen.append((signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.environ.get("TORCH_CPP_LOG_LEVEL")))
        raise SystemError

    monkeypatch.setattr(processes, "_start", start)
    for given in (None, "INFO"):
        monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
        if given:
            monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", given)
        with pytest.raises(SystemError):
            train_in_processes(None, (), 2, device="cpu", batch_size=2, listeners=())
        assert os.environ.get("TORCH_CPP_LOG_LEVEL") == given
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert [signal.SIGINT in mask for mask, _ in seen] == [True, True]
    assert [level for _, level in seen] == ["ERROR", "INFO"]


@pytest.mark.parametrize(
    ("number", "device", "batch", "message"),
    [
        (3, "cuda", 8, "--num-gpus 3: there are 2"),
        (2, "cuda:1", 8, "--num-gpus 2 with --device cuda:1: takes the first 2 GPUs; use --device cuda"),
        (3, "cpu", 2, "--num-gpus 3: more than the 2 images of a batch"),
    ],
)
def test_numbers_without_room_are_refused(number, device, batch, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError) as caught:
        train_in_processes(None, (), number, device=device, batch_size=batch, listeners=())
    assert str(caught.value) == message
    check_processes(2, "cuda", 2)
    check_processes(1, "cuda:1", 1)


def test_on_gpus_each_process_has_one_and_batch_norm_sees_all(monkeypatch):
    fake_gpu(monkeypatch)
    assert [own_device("cuda", r) for r in (0, 1)] == ["cuda:0", "cuda:1"]
    assert (own_device("cpu", 1), backend_of("cpu"), backend_of("cuda:1")) == ("cpu", "gloo", "cpu:gloo,cuda:nccl")
    made, met = [], []

    def parallel(model, **options):
        made.append(options)
        model.register_comm_hook = lambda state, hook: None
        return model

    monkeypatch.setattr(groups.nn.parallel, "DistributedDataParallel", parallel)
    monkeypatch.setattr(distributed, "broadcast", lambda statistic, src: None)
    joined = Group(1, 2).joined(Net(), torch.device("cuda:1"))
    assert isinstance(joined.norm, nn.SyncBatchNorm)
    assert not isinstance(Group(1, 2).joined(Net(), torch.device("cpu")).norm, nn.SyncBatchNorm)
    model = Net()
    assert ALONE.joined(model, torch.device("cuda:0")) is model
    # Without it DDP adds gradients in another order from its second step on, which a resumed run would begin with anew.
    assert made == [{"broadcast_buffers": False, "find_unused_parameters": True}] * 2
    monkeypatch.setattr(distributed, "init_process_group", lambda *given, **more: met.append((given, more)))
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: met.append(tensor.device.type))
    monkeypatch.setattr(torch.cuda, "set_device", met.append)
    assert processes._meet(processes._Place(1, 2, "cuda", "/tmp/none")) == "cuda:1"
    assert met[0] == torch.device("cuda:1")
    assert met[1][0] == ("cpu:gloo,cuda:nccl",)
    assert (met[1][1]["rank"], met[1][1]["world_size"]) == (1, 2)
    # Seen once in 60 rounds on busy cores: one with nothing to do left while another one was still connecting.
    assert met[2:] == ["cpu"]
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert [pick_workers("cuda:0", None, n) for n in (1, 2, 3)] == [6, 3, 2]


def test_a_mean_over_nothing_counts_nothing():
    nothing = torch.zeros(0, requires_grad=True)
    losses = weighted({"a": torch.tensor(3.0), "b": nothing.mean()}, [0.25, 0.0])
    assert {k: float(v.detach()) for k, v in losses.items()} == {"a": 0.75, "b": 0.0}
    losses["b"].backward()
    # Of something it is an error that must be seen.
    assert weighted({"a": torch.tensor(float("nan"))}, [0.5])["a"].isnan()


def _crops(step, rank, world):
    rng = np.random.default_rng(step)
    masks = np.zeros((3, 16, 16), np.float32)
    masks[0, 4:9, 3:12] = 1
    return rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)[rank::world], masks[rank::world]


@pytest.mark.parametrize("planes", [True, False])
def test_the_losses_of_a_segmenter_are_those_of_the_whole_batch(planes, tmp_path):
    """Dice's loss is no mean over crops; two of three crops are without a plane, and the second process has none."""

    def segmenting(job):
        torch.manual_seed(1)
        job.model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
        job.loss = segmenter_loss("bce_dice", group=job.group)
        job.batches = _Crops(planes)

    alone, shared = (train(tmp_path / str(n), n, change=segmenting, steps=4) for n in (1, 2))
    assert close(shared, alone)
    assert (alone[0].history[0]["train/loss_dice"] > 0) == planes


class _Crops:
    def __init__(self, planes):
        self.planes = planes

    def __len__(self):
        return 4

    def share(self, step, rank, world):
        crops, masks = _crops(step, rank, world)
        return crops, masks * self.planes

    def __getitem__(self, step):
        return self.share(step, 0, 1)


@pytest.fixture(scope="module")
def data(airfield):
    return open_dataset(str(airfield), "train"), open_dataset(str(airfield), "test")


SMALL = ["architecture.norm=group", "architecture.backbone=resnet18", "architecture.fpn_channels=32"]
SMALL += ["architecture.head_channels=64", "architecture.trainable_stages=5", "training.epochs=null", "training.steps=2"]
SMALL += ["training.precision=32", "training.evaluate_every=2", "training.checkpoint_every=1"]


def _trained(name, more, data, folder, number, batch):
    recipe = load_recipe(name, [*SMALL, *more, f"training.batch_size={batch}"])
    saved, outcome = train_detector(recipe, *data, folder=folder, device="cpu", num_gpus=number)
    return outcome, read_weights(saved)


@pytest.mark.parametrize(
    ("name", "more", "batch"),
    [
        # Shares of two images and of one.
        ("demo_detector", ["window=128"], 3),
        ("demo_maskrcnn", ["window=128", "architecture.mask_channels=16"], 2),
        # Turned images of several sizes, padded to the largest, at sizes that torchvision draws.
        ("demo_detector", ["window=null", "architecture.min_size=96", "augmentation.rotation=true"], 3),
        # Fewer proposals than are asked for, and images without planes.
        ("demo_detector", ["window=64", "focus=0", "architecture.train_proposals=20"], 4),
    ],
    ids=["windows", "masks", "whole", "few"],
)
def test_a_detector_in_two_processes_learns_as_in_one(name, more, batch, data, tmp_path):
    """Every anchor and proposal is sampled as in one process, and every mean is the whole batch's."""
    alone, shared = (_trained(name, more, (data[0], None), tmp_path / str(n), n, batch) for n in (1, 2))
    assert close(shared, alone, 1e-4)


def test_frozen_statistics_of_given_weights_are_those_of_all_processes(data, tmp_path):
    """Only the first process reads the weights; the statistics among them are not parameters."""
    more = ["window=128", "architecture.norm=frozen", "optimizer.lr=0.0001"]
    network = build_detector(load_recipe("demo_detector", [*SMALL, *more]).architecture, 1)
    values = network.state_dict()
    torch.manual_seed(5)
    for name in values:
        if "running" in name:
            values[name].add_(torch.rand_like(values[name]))
    torch.save(values, tmp_path / "given.pth")
    more.append(f"weights={tmp_path / 'given.pth'}")
    alone, shared = (_trained("demo_detector", more, (data[0], None), tmp_path / str(n), n, 2) for n in (1, 2))
    assert close(shared, alone, 1e-4)
    (tmp_path / "without").mkdir()
    other = _trained("demo_detector", more[:-1], (data[0], None), tmp_path / "without", 1, 2)
    assert not close(other, alone, 1e-2)


def test_images_of_other_sizes_are_padded_as_in_one_batch(tmp_path):
    """GroupNorm sees what is padded; the larger images are of one process, then of the other."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "plane"}]}
    for i, (height, width) in enumerate([(96, 96), (96, 192), (160, 96), (96, 96)]):
        write_image(tmp_path / "images" / f"{i}.png", height, width, i)
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        box = {"bbox": [20, 24, 30, 26], "area": 780, "iscrowd": 0, "segmentation": [[20, 24, 50, 24, 50, 50, 20, 50]]}
        content["annotations"].append({"id": i, "image_id": i, "category_id": 1, **box})
    (tmp_path / "images" / "train_coco.json").write_text(json.dumps(content))
    train = open_dataset(tmp_path / "images", "train")
    more = ["window=null", "augmentation.quarter_turns=false", "augmentation.mirror=false"]
    alone, shared = (_trained("demo_detector", more, (train, None), tmp_path / str(n), n, 2) for n in (1, 2))
    assert close(shared, alone, 1e-4)


class Together:
    """A group of two, of which the other one's numbers are known."""

    rank, world = 0, 2

    def __init__(self, other):
        self.other = other

    def total(self, values):
        return values + self.other


def test_shares_are_those_of_what_is_sampled():
    """Of an image with many planes no more count than are sampled; the other process's image has one plane."""
    sampler = SharedSampler(BalancedPositiveNegativeSampler(8, 0.25), Together(torch.tensor([[0, 0], [1, 20]])), 2)
    positive, negative = sampler([torch.tensor([1] * 6 + [0] * 10)])
    assert (int(positive[0].sum()), int(negative[0].sum())) == (2, 6)
    assert (sampler.share, sampler.share_of_planes) == (0.5, pytest.approx(2 / 3))


def test_a_detector_is_validated_by_one_process(data, tmp_path):
    val = data[1].subset([data[1].samples[0].image_id], "val")
    alone, shared = (_trained("demo_detector", ["window=128"], (data[0], val), tmp_path / str(n), n, 2) for n in (1, 2))
    assert close(shared, alone, 1e-4)
    assert "val/AP" in shared[0].history[-1]


def test_a_unet_trains_in_two_processes(data, tmp_path):
    """Its BatchNorm sees a share of the batch, so that it is another training than in one process."""
    more = ["training.steps=2", "training.epochs=null", "training.batch_size=5", "architecture.crop_size=32"]
    recipe = load_recipe("demo_unet", [*more, "training.checkpoint_every=1"])
    whole = train_unet(recipe, data[0], None, folder=tmp_path / "whole", device="cpu", num_gpus=2)
    with pytest.raises(SystemError):
        train_unet(recipe, data[0], None, folder=tmp_path / "cut", device="cpu", num_gpus=2, listeners=[Told(2, _killed)])
    assert (tmp_path / "cut" / CHECKPOINT).exists()
    resumed = train_unet(recipe, data[0], None, folder=tmp_path / "cut", device="cpu", num_gpus=2)
    assert equal((resumed[1], read_weights(resumed[0])), (whole[1], read_weights(whole[0])))


def _killed():
    raise SystemError("killed")
