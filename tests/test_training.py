"""Whole runs, in this process: what they write, that they learn, repeat and continue."""

import ctypes
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common
import evaluate
import records
import train_cifar
import train_mnist

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EVERYTHING_ON,
    ROOT,
    check_same,
    fails_with_one_line,
    read_run,
    run,
    states_are_equal,
    without_times,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("few_images", "undrawn")

DENSE = "--dataset synthetic --model dense --schedule constant"
EVERYTHING = " ".join(EVERYTHING_ON)
RECORD = (
    "format name script argv args status error started ended seconds seed device precision "
    "threads versions host git data parameters frozen epochs best test"
)
ROW = "epoch train_loss train_acc val_loss val_acc lr seconds images_per_second"


def dense(flags, **options):
    """A run of the dense net."""
    return run(train_mnist, *DENSE.split(), "--quiet", *flags.split(), **options)


def everything(flags, **options):
    """A run with everything on."""
    return run(train_cifar, *EVERYTHING_ON, *flags.split(), **options)


def resume(directory, flags="", **options):
    """Go on with a run, by the script that began it."""
    script = sys.modules[records.read_record(directory)["script"]]
    return run(script, "--resume", directory, "--quiet", *flags.split(), **options)


def best_of(directory):
    return records.load_checkpoint(directory / "best.pt")


def at_step(number, action):
    """Call `action()` after the `number`-th step of a training, after each where that is None."""
    count = itertools.count(1)

    def event(optimizer, *_):
        fits_temperature = isinstance(optimizer, torch.optim.LBFGS)
        if not fits_temperature and number in (None, next(count)):
            action()

    return register_optimizer_step_post_hook(event)


def is_model(net):
    """Whether this module is a whole net, and no layer of one."""
    return type(net) in common.MODELS.values()


def at_test(action):
    """Call `action()` when a net sees the sixty test images."""

    def event(net, inputs, logits):
        if is_model(net) and len(logits) == 60 and not net.training:
            action()

    return register_module_forward_hook(event)


def interrupt():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def batches(monkeypatch):
    """The logits and labels of each batch of `training` and `evaluation`."""
    seen = SimpleNamespace(training=[], evaluation=[])
    cross_entropy = F.cross_entropy

    def forward(net, inputs, logits):
        if is_model(net) and logits.device.type != "meta":
            seen.last = SimpleNamespace(logits=logits.detach().float(), labels=None)
            part = seen.training if net.training else seen.evaluation
            part.append(seen.last)

    def loss(logits, labels, **options):
        if seen.last.labels is None:  # the fit of the temperature computes its loss again and again
            seen.last.labels = labels
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(F, "cross_entropy", loss)
    with register_module_forward_hook(forward):
        yield seen


# ------------------------ What a run writes ------------------------
def test_a_run_directory_holds_what_the_contract_says():
    """Programs may rely on the names of the files, and of what is in run.json and the log."""
    directory, record, rows = dense("--epochs 2 --device cpu")
    name = record["name"]
    assert re.fullmatch(r"train_mnist-\d{8}T\d{6}Z-[0-9a-f]{8}", name)
    assert directory == Path("runs", name).absolute()
    files = ".lock best.pt last.pt log.jsonl run.json"
    assert sorted(os.listdir(directory)) == files.split()

    # What was run, on what, and how it ended.
    assert records.read_json(directory / "run.json") == record
    assert " ".join(record) == RECORD
    assert (record["format"], record["status"], record["error"]) == (2, "finished", None)
    assert record["argv"][-2:] == ["--device", "cpu"]
    for path in ("runs_dir", "data_dir"):
        assert os.path.isabs(record["args"][path])

    # The epochs, and the best of them.
    assert [" ".join(row) for row in rows] == [ROW] * 2
    assert [row["epoch"] for row in rows] == [1, 2]
    best = min(rows, key=lambda row: row["val_loss"])
    expected = {name: best[name] for name in ("epoch", "val_loss", "val_acc")}
    assert record["best"] == expected | {"temperature": 1}
    assert record["best"].items() <= best_of(directory).items()

    # The commit is that of the scripts, and not of the current directory.
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (record["git"] or "").removesuffix("-dirty") == commit


# ------------------------ What is learnt ------------------------
EQUAL = torch.ones(10)


def means(batches, weights=EQUAL, margins=0, smoothing=0.0):
    """Loss and accuracy over all images; they count by the `weights` of their classes."""
    logits = torch.cat([batch.logits for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    losses = F.cross_entropy(logits + margins, labels, label_smoothing=smoothing, reduction="none")
    loss = (losses * weights[labels]).sum() / weights[labels].sum()
    accuracy = (logits.argmax(1) == labels).float().mean()
    return pytest.approx([loss.item(), accuracy.item()], rel=1e-4)


@pytest.mark.parametrize("way", ["balanced", "margin"])
def test_losses_are_means_per_image_of_smoothed_labels_but_in_the_test(batches, monkeypatch, way):
    """With --class-weights a rare class counts as the others do, but in the test."""

    def rare(train):
        drawn = forked.few_shapes(train)
        is_kept = (drawn.labels != 3) | (torch.arange(len(drawn)) % 4 == 0)
        return drawn.select(is_kept)

    monkeypatch.setattr(train_cifar, "synthetic", rare)
    _, record, (row,) = everything(f"--epochs 1 --lr 0.05 --class-weights {way}")
    labels = torch.cat([batch.labels for batch in batches.training])
    shares = labels.bincount(minlength=10) / len(labels)
    assert shares.argmin() == 3
    weighed = {
        "balanced": (1 / shares, 0),
        "margin": (EQUAL, shares.log()),  # the head start of common classes
    }[way]
    expected = means(batches.training, *weighed, smoothing=0.1)
    assert [row["train_loss"], row["train_acc"]] == expected
    expected = means(batches.evaluation[:1], *weighed, smoothing=0.1)
    assert [row["val_loss"], row["val_acc"]] == expected
    assert [*record["test"].values()] == means(batches.evaluation[-1:])


def test_a_temperature_is_fitted_on_a_hundred_validation_images_when_a_training_ends(batches):
    """It makes the probabilities of the weights that are kept as likely as they can be."""
    flags = "--label-smoothing 0.4 --lr 0.01 --tolerance 0 --epochs 12 --no-test --val-size"
    _, record, _ = everything(f"{flags} {99 / 300}")
    assert record["best"]["temperature"] == 1
    directory, record, _ = everything(f"{flags} {100 / 300} --stop-after 11")
    assert record["best"]["temperature"] == 1
    _, record, _ = resume(directory)

    # They were seen once more, and no other temperature among a thousand does better.
    last = batches.evaluation[-1]
    assert len(last.labels) == 100
    best = record["best"]
    assert [best["val_loss"], best["val_acc"]] == means([last], smoothing=0.4)
    temperatures = torch.logspace(-1, 1, 1001).tolist()
    expected = min(temperatures, key=lambda one: F.cross_entropy(last.logits / one, last.labels))
    assert best["temperature"] == pytest.approx(expected, rel=0.01) != 1


def test_the_temperature_is_1_where_no_validation_image_is_wrong(monkeypatch):
    """Images that are all right cannot tell how sure a net should be."""

    def points(train):
        labels = torch.arange(2200) % 10
        images = F.one_hot(labels, 784).byte().view(-1, 1, 28, 28) * 255
        return common.ImageSet(images, labels, list("0123456789"))

    monkeypatch.setattr(train_mnist, "synthetic", points)
    _, record, _ = dense("--epochs 2 --no-test")
    assert record["data"]["val"] == 220
    assert record["best"]["val_acc"] == 1
    assert record["best"]["temperature"] == 1


CHANGES = [
    "--d1 0.6",
    "--kernel-size 5",
    "--c1 5",
    "--c2 9",
    "--l1 17",
    "--tutorial-layers",
    "--seed 7",
    "--lr 0.01",
    "--batch-size 50",
    "--schedule linear",
    "--schedule cosine",
    "--schedule constant",
    "--optimizer sgd",
    "--optimizer adamw --weight-decay 0.9 --lr 0.5",
    "--label-smoothing 0",
    "--limit-train 140",
    "--val-size 0.2",
    "--normalize dataset",
    "--no-augment",
    "--rotation 5",
    "--brightness 0",
    "--hue 0",
    "--flip 0",
    "--shift 1",
    "--alternate-flip",
    "--precision bf16",
]


def test_what_is_to_change_the_training_does():
    """None of these flags is taken and forgotten."""
    losses = {}
    for change in ("", *CHANGES):
        _, _, (row,) = everything(f"--epochs 1 --no-test --precision fp32 {change}")
        losses[change] = row["train_loss"]
    unchanged = [change for change, loss in losses.items() if loss == losses[""]]
    assert unchanged == [""]


@pytest.mark.parametrize(
    ("side", "batch_size", "largest"),
    [
        (28, 64, 1000),
        (64, 64, 250),
        (64, 300, 300),
    ],
)
def test_validation_and_test_are_means_over_batches_of_so_many_pixels(
    monkeypatch, batches, side, batch_size, largest
):
    """What is evaluated at once takes no more memory for larger images."""

    def noise(train):
        images = torch.randint(256, (2102 if train else 1051, 1, side, side), dtype=torch.uint8)
        return common.ImageSet(images, torch.arange(len(images)) % 10, list("abcdefghij"))

    monkeypatch.setattr(train_mnist, "synthetic", noise)
    _, record, (row,) = dense(f"--l1 4 --epochs 1 --val-size 0.5 --batch-size {batch_size}")
    third = len(batches.evaluation) // 3  # the validation, that for the temperature, and the test
    for part, found in (
        (batches.evaluation[:third], [row["val_loss"], row["val_acc"]]),
        (batches.evaluation[-third:], [*record["test"].values()]),
    ):
        assert found == means(part)
        sizes = [len(batch.labels) for batch in part]
        assert max(sizes) == largest
        assert sum(sizes) == 1051


@pytest.mark.parametrize(("size", "is_told"), [(269, False), (270, True)])
def test_a_last_batch_of_one_is_not_trained_on_and_one_of_all_images_is_remarked_upon(
    batches, capsys, size, is_told
):
    """Batch norm needs two images; and who makes one step an epoch hardly learns."""
    run(train_mnist, *DENSE.split(), "--epochs", 1, "--no-test", "--batch-size", size)
    assert [len(batch.labels) for batch in batches.training] == [size]
    assert ("try --batch-size 13" in capsys.readouterr().out) == is_told


def test_a_compiled_model_trains_and_its_weights_load_without_compilation(monkeypatch):
    """--compile changes the speed alone."""

    def without_a_compiler(net, **options):
        compiled.append(net)
        return compile_(net, backend="eager", **options)

    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    _, _, plain = dense("--epochs 2")
    assert not compiled
    directory, _, rows = dense("--epochs 2 --compile")
    assert len(compiled) == 1
    assert without_times(rows) == without_times(plain)
    best = best_of(directory)
    common.build_model(best).load_state_dict(best["weights"])


def test_images_per_second_are_those_of_the_training_without_the_validation():
    """The figure does not depend on how many images validate."""

    def sleep(module, _):
        if isinstance(module, torch.nn.Linear) and not module.training:
            time.sleep(0.1)

    with register_module_forward_pre_hook(sleep):
        _, record, rows = dense("--epochs 2 --no-test")

    # The dense net has two layers, and the validation images are a batch.
    for row in rows:
        training = record["data"]["train"] / row["images_per_second"]
        assert 0 < training < row["seconds"] - 0.19


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
def test_memory_does_not_grow_from_epoch_to_epoch():
    """A training of many epochs does not run out of memory: a leak of 70 kB an epoch is noticed."""
    look = "print(memory_in_use(), sys.getallocatedblocks(), flush=True)"
    argv = [*EVERYTHING_ON, "--tolerance", 0, "--epochs", 20, "--runs-dir", "runs"]
    training = forked.Forked("train_cifar", *argv, before=forked.MEMORY_IN_USE, each_epoch=look)
    assert training.finish() == (0, "")

    # Between the fifth epoch and the last.
    table = np.loadtxt("out")
    assert len(table) == 20
    in_use, objects = table[19] - table[4]
    assert in_use < 1e6
    assert objects < 1e4


TUTORIAL = "--recipe tutorial --dataset synthetic --epochs 1 --c1 4 --c2 8 --l1 8"


def test_dropout_stays_on_in_evaluation_and_an_export_has_none(capsys):
    """The tutorial's figures are those of a net that drops units, the same ones each time."""
    directory, record, rows = run(train_cifar, *TUTORIAL.split())
    assert record["best"]["val_loss"] == record["test"]["loss"]
    assert "flattered" in capsys.readouterr().out
    _, mended, mended_rows = run(train_cifar, *TUTORIAL.split(), "--no-always-dropout")

    # The training is the same. What it prints is not, and evaluating again gives it again.
    assert rows[0]["train_loss"] == mended_rows[0]["train_loss"]
    loss = pytest.approx(record["test"]["loss"], rel=1e-6)
    assert mended["test"]["loss"] != loss
    for _ in range(2):
        measured = evaluate.main([str(directory), "--quiet"])
        assert measured["loss"] == loss

    # An export that dropped anything would answer otherwise than the model without it.
    evaluate.main([str(directory), "--export", "torch.export", "--quiet"])
    assert (directory / "model.pt2").exists()


# ------------------------ Going on ------------------------
SMALL = "--dataset synthetic --batch-size 64 --c1 8 --c2 8 --quiet"
GROWING = "--c3 8 --val-size 0.1 --sizes 1/2,3/4,1"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_cifar, f"{EVERYTHING} --epochs 4 --precision fp32"),
        (train_cifar, f"{EVERYTHING} --epochs 4 --precision bf16"),
        (train_cifar, f"{EVERYTHING} --epochs 3 --recipe tutorial"),
        (train_cifar, f"{SMALL} --epochs 4 --precision fp32 --recipe fast {GROWING}"),
        (train_mnist, f"{SMALL} --epochs 2 --precision fp32 --recipe fast"),
        (train_mnist, f"{SMALL} --epochs 3 --precision fp32 --recipe fast996 --c3 8"),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(script, flags):
    """Its weights, log and results are those of a run that nothing has disturbed."""
    whole, *_ = run(script, *flags.split())

    # One process ends after an epoch, one by a signal in the middle of an epoch, one at the end.
    cut, record, rows = run(script, *flags.split(), "--stop-after", 1)
    assert (record["status"], record["test"], len(rows)) == ("interrupted", None, 1)
    records.write_json(cut / "run.json", {**record, "seconds": 1000})
    with at_step(2, interrupt):
        _, record, rows = resume(cut)
    assert (record["status"], record["error"], len(rows)) == ("interrupted", "SIGTERM", 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    _, record, _ = resume(cut)
    assert record["seconds"] > 1000
    check_same(whole, cut)


def test_epochs_can_be_raised_and_a_finished_run_is_left_alone(capsys):
    """A run with more epochs is the one that had them from the start."""
    whole, *_ = dense("--epochs 3")
    directory, before, _ = dense("--epochs 2")
    for more in ([], ["--epochs", 8, "--stop-after", 1], ["--epochs", 8, "--stop-after", 2]):
        _, record, _ = run(train_mnist, "--resume", directory, *more)
        assert record == before
        assert "nothing to do" in capsys.readouterr().out

    # What was tested were other weights, so that is forgotten.
    tests = []

    def look(row):
        tests.append(read_run(directory)[0]["test"])

    _, record, _ = resume(directory, "--epochs 3", on_epoch=look)
    assert record["args"]["epochs"] == 3
    assert tests == [None]
    check_same(whole, directory)


def test_early_stopping_ends_the_run_with_the_test_of_its_best_epoch_and_can_be_lifted():
    """--tolerance epochs after the best the training ends, and has the weights of the best."""
    # The validation is the test: so the weights that are tested can be told.
    flags = "--lr 0.03 --val-size 0 --epochs 40 --tolerance 3"
    whole, record, rows = dense(flags)
    assert record["status"] == "stopped_early"
    assert len(rows) < 40
    best = rows[-4]
    assert best["val_loss"] == min(row["val_loss"] for row in rows)
    assert record["best"]["epoch"] == best["epoch"]
    expected = [best["val_loss"], best["val_acc"]]
    assert [*record["test"].values()] == pytest.approx(expected, rel=1e-5)

    # A run that goes on has counted the epochs before.
    cut, *_ = dense(f"{flags} --stop-after {len(rows) - 1}")
    resume(cut)
    check_same(whole, cut)

    # With less patience there is nothing to do; with more epochs, or endless patience, there is.
    for tolerance in (1, 2, 3):
        assert resume(whole, f"--tolerance {tolerance}")[1] == record
    _, record, more = resume(whole, "--epochs 60")
    assert more[: len(rows)] == rows
    assert len(more) > len(rows)
    assert record["test"]
    _, record, more = resume(cut, "--tolerance 0")
    assert len(more) == 40
    assert record["status"] == "finished"
    assert record["args"]["tolerance"] == 0
    assert record["test"]


def test_a_run_that_is_prolonged_and_at_once_interrupted_is_prolonged_still():
    """It goes on for as long as one that nothing has disturbed, without being asked again."""
    flags = "--lr 0.03 --epochs 40 --tolerance 2 --run-name"
    whole, _, rows = dense(f"{flags} whole")
    cut, *_ = dense(f"{flags} cut")
    _, _, more = resume(whole, "--tolerance 4")
    assert len(more) > len(rows) + 2
    with at_step(1, interrupt):
        resume(cut, "--tolerance 4")
    resume(cut)
    check_same(whole, cut)


def test_the_last_epoch_is_kept_where_that_is_asked_for():
    """With --keep last, its weights are tested and saved, whatever the validation says."""
    # At this rate a later epoch is worse than an earlier one. The validation is the test.
    flags = "--lr 0.03 --epochs 6 --keep last --val-size 0"
    whole, record, rows = dense(flags)
    losses = [row["val_loss"] for row in rows]
    assert losses[-1] > min(losses)
    assert record["test"]["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert record["best"]["epoch"] == 6
    last = records.load_checkpoint(whole / "last.pt")
    assert states_are_equal(best_of(whole)["weights"], last["model"])

    # So it is for a run that goes on.
    cut, record, _ = dense(f"{flags} --stop-after 4")
    assert record["best"]["epoch"] == 4
    resume(cut)
    check_same(whole, cut)


@pytest.mark.parametrize("end", ["--epochs 3", "--epochs 40 --lr 0.03 --tolerance 2"])
def test_a_run_killed_between_its_last_epoch_and_its_test_is_only_tested(end):
    """Nothing is trained again, whether it had finished or stopped early."""
    whole, *_ = dense(end)
    with at_test(interrupt):
        cut, record, _ = dense(end)
    assert (record["status"], record["test"]) == ("interrupted", None)
    records.write_json(cut / "run.json", {**record, "status": "running", "error": None})
    with at_step(1, pytest.fail):
        resume(cut)
    check_same(whole, cut)

    # A best.pt that is gone is written again.
    (cut / "best.pt").unlink()
    resume(cut)
    check_same(whole, cut)


def test_a_run_goes_on_with_its_threads_and_says_where(monkeypatch):
    """More threads would round otherwise, so a run keeps to its number on another machine, too."""
    torch.set_num_threads(2)
    directory, *_ = dense("--epochs 2 --stop-after 1")
    torch.set_num_threads(1)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    threads = []
    with at_step(1, lambda: threads.append(torch.get_num_threads())):
        _, record, _ = resume(directory)
    assert threads == [2]
    assert (record["threads"], record["host"]) == (2, "elsewhere")


def test_a_run_does_not_go_on_in_two_processes_nor_with_other_images(monkeypatch):
    """The line says so, and the run stays what it was."""
    directory, before, _ = everything("--epochs 4 --stop-after 2")
    argv = ["--resume", directory]
    with records.locked(directory / ".lock"):
        line = fails_with_one_line(*argv, main=train_cifar.main)
    assert "in use by another process" in line
    other = train_cifar.synthetic_shapes(300, 99)
    monkeypatch.setattr(train_cifar, "synthetic", lambda train: other)
    assert "checksums differ" in fails_with_one_line(*argv, main=train_cifar.main)
    assert read_run(directory)[0] == before


# ------------------------ How a run ends ------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_touches_the_weights(
    monkeypatch, training, epoch, value
):
    """The run says in which epoch it diverged; the epochs before are whole."""
    cross_entropy = F.cross_entropy
    bad = []
    steps = []

    def poisoned(*arguments, **options):
        if torch.is_grad_enabled() == training and len(steps) >= 3 * epoch - 2:
            bad.append(value)
        return cross_entropy(*arguments, **options) * (value if bad else 1)

    monkeypatch.setattr(F, "cross_entropy", poisoned)
    with at_step(None, lambda: steps.append(bool(bad))):
        directory, record, rows = everything("--epochs 3")
    assert (record["status"], record["test"]) == ("diverged", None)
    assert f"epoch {epoch}" in record["error"]
    assert not any(steps)
    assert len(rows) == record["epochs"] == epoch - 1

    # No checkpoint is of the epoch that failed, and to go on would fail again.
    assert len([*directory.glob("*.pt")]) == 2 * len(rows)
    if rows:
        assert records.load_checkpoint(directory / "last.pt")["history"] == rows
        assert best_of(directory)["epoch"] == 1
    with pytest.raises(records.RunError, match="would again"):
        resume(directory)


def test_the_test_images_are_used_once_after_the_training_if_at_all():
    """They are not looked at before the end, nor with --no-test, nor by a trial that is pruned."""
    events = []

    def events_of(flags, on_epoch=None):
        events.clear()
        return everything(flags, on_epoch=on_epoch)

    with at_step(None, lambda: events.append("step")), at_test(lambda: events.append("test")):
        events_of("--epochs 2")
        assert events == [*["step"] * 6, "test"]

        # Each epoch is told as it ends.
        directory, record, (row,) = events_of("--epochs 1 --no-test", events.append)
        assert events == [*["step"] * 3, row | {"directory": str(directory)}]
        assert (record["status"], record["test"]) == ("finished", None)

        # True alone, as an answer to that, ends the run.
        events_of("--epochs 2 --no-test", lambda row: "no")
        assert events == ["step"] * 6
        _, record, rows = events_of("--epochs 3", lambda row: row["epoch"] == 2)
        assert events == ["step"] * 6
        assert len(rows) == 2
    assert (record["status"], record["test"]) == ("pruned", None)
