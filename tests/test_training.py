"""Whole runs, in this process: what they write, that they learn, repeat and continue."""

import contextlib
import copy
import itertools
import math
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import common
import records
import train_cifar
import train_mnist

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERYTHING_ON, ROOT, check_same, read_run, run, states_are_equal, without_times
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("few_images")

DENSE = ["--dataset", "synthetic", "--model", "dense", "--schedule", "constant", "--quiet"]
RECORD = (
    "format name script argv args status error started ended seconds seed device precision "
    "threads versions host git data parameters frozen epochs best test"
)
ROW = "epoch train_loss train_acc val_loss val_acc lr seconds images_per_second"


@contextlib.contextmanager
def at_step(number, action):
    """Call `action()` after the `number`-th step of a training, after each where that is None."""
    count = itertools.count(1)

    def event(optimizer, *_):
        fits_temperature = isinstance(optimizer, torch.optim.LBFGS)
        if not fits_temperature and number in (None, next(count)):
            action()

    handle = register_optimizer_step_post_hook(event)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def at_test(action):
    """Call `action()` when a net sees the sixty test images."""

    def event(net, inputs, logits):
        if type(net) in common.MODELS.values() and len(logits) == 60 and not net.training:
            action()

    handle = register_module_forward_hook(event)
    try:
        yield
    finally:
        handle.remove()


def interrupt():
    assert callable(signal.getsignal(signal.SIGTERM)), "it would end the tests"
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def batches(monkeypatch):
    """What nets and F.cross_entropy see: [the net as it was then, images, logits, labels]."""

    def forward(net, inputs, logits):
        if type(net) in common.MODELS.values() and logits.device.type != "meta":
            batches.append([copy.deepcopy(net), inputs[0], logits.detach().float()])

    def loss(logits, labels, **options):
        if len(batches[-1]) == 3:  # the fit of the temperature computes its loss again and again
            batches[-1].append(labels)
        return cross_entropy(logits, labels, **options)

    batches, cross_entropy, handle = [], F.cross_entropy, register_module_forward_hook(forward)
    monkeypatch.setattr(F, "cross_entropy", loss)
    yield batches
    handle.remove()


def test_a_run_directory_holds_what_the_contract_says():
    directory, record, rows = run(train_mnist, *DENSE, "--epochs", 2, "--device", "cpu")
    assert directory.parent == Path("runs").absolute() and directory.name == record["name"]
    assert re.fullmatch(r"train_mnist-\d{8}T\d{6}Z-[0-9a-f]{8}", directory.name)
    files = {".lock", "best.pt", "last.pt", "log.jsonl", "run.json"}
    assert {path.name for path in directory.iterdir()} == files
    assert records.read_json(directory / "run.json") == record and " ".join(record) == RECORD
    found = [record[name] for name in ("status", "error", "epochs", "format")]
    assert found == ["finished", None, 2, 2]
    assert record["argv"][-4:] == ["--epochs", "2", "--device", "cpu"]
    assert record["args"]["batch_size"] == 64
    assert all(os.path.isabs(record["args"][name]) for name in ("runs_dir", "data_dir"))
    assert [record["data"][part] for part in ("train", "val", "test")] == [270, 30, 60]
    assert [" ".join(row) for row in rows] == [ROW, ROW] and [row["epoch"] for row in rows] == [
        1,
        2,
    ]
    best = min(rows, key=lambda row: row["val_loss"])
    state = records.load_checkpoint(directory / "best.pt")
    expected = {name: best[name] for name in ("epoch", "val_loss", "val_acc")}
    expected["temperature"] = state["temperature"]
    assert record["best"] == expected == {name: state[name] for name in expected}
    # The commit is that of the scripts, and not of the current directory.
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (record["git"] or "").removesuffix("-dirty") == commit


@pytest.mark.parametrize("script", [train_cifar, train_mnist])
def test_nets_learn(monkeypatch, script):
    draw, argv = train_mnist.synthetic_digits, ["--c1", 8, "--c2", 16, "--optimizer", "muon"]
    if script is train_cifar:
        draw, argv = train_cifar.synthetic_shapes, ["--c1", 4, "--c2", 16, "--lr", 0.003]
    monkeypatch.setattr(script, "synthetic", lambda train: draw(1500 if train else 300, int(train)))
    argv += ["--dataset", "synthetic", "--l1", 64, "--batch-size", 32, "--epochs", 6, "--quiet"]
    _, record, rows = run(script, *argv)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and record["test"]["acc"] > 0.35


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.5, "weight_decay": 0.1, "nesterov": True}),
        ("Adam", {"weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1}),
    ],
)
def test_optimizers_do_what_those_of_torch_do(batches, name, options):
    argv = ["--optimizer", name.lower(), "--lr", 0.1, "--epochs", 1, "--d1", 0, "--no-test"]
    argv += ["--precision", "fp32", "--weight-decay", 0.1]
    if "momentum" in options:
        argv += ["--momentum", 0.5]
    directory, _, _ = run(train_mnist, *DENSE, *argv)
    training, net = [batch for batch in batches if batch[0].training], batches[0][0]
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1, **options)
    for _, images, _, labels in training:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    weights = records.load_checkpoint(directory / "best.pt")["weights"]
    assert len(training) == 5
    for name, found in net.named_parameters():
        assert torch.allclose(found, weights[name], rtol=1e-3, atol=1e-5)


def means(batches, smoothing=0.0):
    """Loss and accuracy over all images of `batches`."""
    logits, labels = (torch.cat([batch[column] for batch in batches]) for column in (2, 3))
    targets = F.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
    loss = -(logits.log_softmax(1) * targets).sum(1).mean().item()
    return pytest.approx((loss, (logits.argmax(1) == labels).double().mean().item()), rel=1e-4)


def test_losses_are_means_per_image_of_labels_smoothed_but_in_the_test(batches):
    argv = [*EVERYTHING_ON, "--epochs", 1, "--lr", 0.05, "--label-smoothing", 0.4]
    _, record, (row,) = run(train_cifar, *argv)
    assert (row["train_loss"], row["train_acc"]) == means(batches[:3], 0.4)
    assert (row["val_loss"], row["val_acc"]) == means(batches[3:4], 0.4)
    assert (record["test"]["loss"], record["test"]["acc"]) == means(batches[5:])
    # The validation images are seen once more, for the temperature.
    assert [len(batch[3]) for batch in batches] == [64, 64, 22, 30, 30, 60]


def test_a_temperature_is_fitted_on_a_hundred_validation_images_when_a_training_ends(batches):
    argv = [*EVERYTHING_ON, "--label-smoothing", 0.4, "--lr", 0.01, "--tolerance", 0]
    argv += ["--epochs", 12, "--no-test", "--val-size"]
    _, record, _ = run(train_cifar, *argv, 99 / 300)
    assert record["data"]["val"] == 99 and record["best"]["temperature"] == 1
    directory, record, _ = run(train_cifar, *argv, 100 / 300, "--stop-after", 11)
    assert record["best"]["temperature"] == 1
    _, record, _ = run(train_cifar, "--resume", directory, "--quiet")
    *_, (net, _, logits, labels) = batches
    weights = records.load_checkpoint(directory / "best.pt")["weights"]
    assert states_are_equal(dict(net.state_dict()), weights) and len(labels) == 100
    # The temperature of the highest likelihood, among a thousand.
    temperatures = torch.logspace(-1, 1, 1001).tolist()
    losses = [F.cross_entropy(logits / one, labels).item() for one in temperatures]
    expected = temperatures[int(np.argmin(losses))]
    assert record["best"]["temperature"] == pytest.approx(expected, rel=0.01) != 1


@pytest.mark.parametrize("way", ["balanced", "margin"])
def test_a_rare_class_counts_as_much_as_the_others_with_class_weights(batches, monkeypatch, way):
    def rare(train):
        drawn = forked.few_shapes(train)
        return drawn.select((drawn.labels != 3) | (torch.arange(len(drawn)) % 4 == 0))

    monkeypatch.setattr(train_cifar, "synthetic", rare)
    argv = [*EVERYTHING_ON[:2], *EVERYTHING_ON[4:], "--epochs", 1, "--class-weights", way]
    _, record, (row,) = run(train_cifar, *argv)
    training = [batch for batch in batches if batch[0].training]
    counts = torch.cat([labels for *_, labels in training]).bincount(minlength=10)
    shares = counts / counts.sum()
    assert shares.argmin() == 3
    weights, margins = 1 / shares, torch.zeros(10)
    if way == "margin":
        weights, margins = torch.ones(10), shares.log()  # the head start of common classes

    def mean(batches):
        """Images count by the weights of their classes; torch weighs the smoothing by them, too."""
        logits, labels = (torch.cat([batch[column] for batch in batches]) for column in (2, 3))
        losses = F.cross_entropy(logits + margins, labels, label_smoothing=0.1, reduction="none")
        mean = (losses * weights[labels]).sum() / weights[labels].sum()
        return pytest.approx(mean.item(), 1e-4)

    assert row["train_loss"] == mean(training)
    assert row["val_loss"] == mean(batches[len(training) : len(training) + 1])
    *_, (_, _, logits, labels) = batches
    assert record["test"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


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
    argv = [*EVERYTHING_ON, "--epochs", 1, "--no-test", "--precision", "fp32"]
    losses = {
        flags: run(train_cifar, *argv, *flags.split())[2][0]["train_loss"]
        for flags in ("", *CHANGES)
    }
    assert [flags for flags, loss in losses.items() if loss == losses[""]] == [""]


@pytest.mark.parametrize(
    ("side", "batch", "largest"), [(28, 64, 1000), (64, 64, 250), (64, 300, 300)]
)
def test_validation_and_test_are_means_over_batches_of_so_many_pixels(
    monkeypatch, batches, side, batch, largest
):
    def noise(train):
        images = torch.randint(256, (2102 if train else 1051, 1, side, side), dtype=torch.uint8)
        return common.ImageSet(images, torch.arange(len(images)) % 10, list("abcdefghij"))

    monkeypatch.setattr(train_mnist, "synthetic", noise)
    argv = ["--l1", 4, "--epochs", 1, "--val-size", 0.5, "--batch-size", batch]
    _, record, (row,) = run(train_mnist, *DENSE, *argv)
    seen = [batch for batch in batches if not batch[0].training]
    third = len(seen) // 3  # the validation, that for the temperature, and the test
    assert [row["val_loss"], row["val_acc"]] == means(seen[:third])
    assert [*record["test"].values()] == means(seen[-third:])
    for part in (seen[:third], seen[-third:]):
        sizes = [len(labels) for *_, labels in part]
        assert max(sizes) == largest and sum(sizes) == 1051


SMALL = ["--dataset", "synthetic", "--batch-size", 64, "--c1", 8, "--c2", 8, "--quiet"]
FAST = ["--recipe", "fast", *SMALL, "--c3", 8, "--val-size", 0.1, "--sizes", "1/2,3/4,1"]


def test_the_images_grow_over_the_epochs_and_come_in_another_order(batches):
    for epochs, sides in ((5, [16, 24, 24, 32, 32]), (1, [32])):
        batches.clear()
        run(train_cifar, *FAST, "--epochs", epochs, "--batch-size", 300, "--no-test")
        training = [batch for batch in batches if batch[0].training]
        assert [images.shape[-1] for _, images, *_ in training] == sides
        assert len({tuple(labels.tolist()) for *_, labels in training}) == epochs


@pytest.mark.parametrize(
    ("script", "argv", "epochs", "precision"),
    [
        (train_cifar, EVERYTHING_ON, 4, "fp32"),
        (train_cifar, EVERYTHING_ON, 4, "bf16"),
        (train_cifar, ["--recipe", "tutorial", *EVERYTHING_ON], 3, "fp32"),
        (train_cifar, FAST, 4, "fp32"),
        (train_mnist, ["--recipe", "fast", *SMALL], 2, "fp32"),
        (train_mnist, ["--recipe", "fast996", *SMALL, "--c3", 8], 3, "fp32"),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(script, argv, epochs, precision):
    argv = [*argv, "--epochs", epochs, "--precision", precision]
    whole, record, _ = run(script, *argv)
    assert record["status"] == "finished" and record["test"]
    cut, record, rows = run(script, *argv, "--stop-after", 1)
    assert (record["status"], record["test"], len(rows)) == ("interrupted", None, 1)
    records.write_json(cut / "run.json", {**record, "seconds": 1000})
    with at_step(2, interrupt):  # in the middle of an epoch
        _, record, rows = run(script, "--resume", cut, "--quiet")
    assert (record["status"], record["error"], len(rows)) == ("interrupted", "SIGTERM", 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(script, "--resume", cut, "--quiet")[1]["seconds"] > 1000
    check_same(whole, cut)


def test_epochs_can_be_raised_and_a_finished_run_is_left_alone(capsys):
    whole, _, _ = run(train_mnist, *DENSE, "--epochs", 3)
    directory, before, _ = run(train_mnist, *DENSE, "--epochs", 2)
    for more in ([], ["--epochs", 8, "--stop-after", 1], ["--epochs", 8, "--stop-after", 2]):
        assert run(train_mnist, "--resume", directory, *more)[1] == before
        assert "nothing to do" in capsys.readouterr().out

    def look(row):
        tests.append(read_run(directory)[0]["test"])

    tests = []
    argv = ["--resume", directory, "--epochs", 3, "--quiet"]
    _, record, _ = run(train_mnist, *argv, on_epoch=look)
    check_same(whole, directory)
    assert record["args"]["epochs"] == 3 and before["test"] and record["test"]
    assert tests == [None]  # what was tested were other weights


def test_early_stopping_ends_the_run_with_the_test_of_its_best_epoch_and_can_be_lifted(capsys):
    # The validation is the test, which is told.
    argv = [*DENSE[:-1], "--lr", 0.03, "--val-size", 0, "--epochs", 40, "--tolerance", 3]
    whole, record, rows = run(train_mnist, *argv)
    assert "the test set validates" in capsys.readouterr().out
    found = [record["data"][name] for name in ("selection", "train", "val", "test")]
    assert found == ["test set", 300, 60, 60]
    losses = [row["val_loss"] for row in rows]
    assert record["status"] == "stopped_early" and record["epochs"] == len(rows) < 40
    assert record["best"]["val_loss"] == min(losses) == losses[-4]
    assert record["best"]["epoch"] == len(rows) - 3
    expected = pytest.approx([losses[-4], rows[-4]["val_acc"]], rel=1e-5)
    assert [record["test"]["loss"], record["test"]["acc"]] == expected

    cut, _, _ = run(train_mnist, *argv, "--stop-after", len(rows) - 1)
    run(train_mnist, "--resume", cut, "--quiet")
    check_same(whole, cut)
    for tolerance in (1, 2, 3):  # with less patience there is nothing to do
        run(train_mnist, "--resume", whole, "--tolerance", tolerance)
        assert "stopped early after" in capsys.readouterr().out
    assert read_run(whole)[0] == record
    _, record, more = run(train_mnist, "--resume", whole, "--epochs", 60, "--quiet")
    assert more[: len(rows)] == rows and len(more) > len(rows) and record["test"]
    _, record, more = run(train_mnist, "--resume", cut, "--tolerance", 0, "--quiet")
    assert len(more) == 40 and record["status"] == "finished" and record["test"]
    assert record["args"]["tolerance"] == 0


def test_the_last_epoch_is_kept_where_that_is_asked_for(capsys):
    # At this rate a later epoch is worse than an earlier one.
    argv = [*DENSE[:-1], "--lr", 0.03, "--tolerance", 0, "--epochs", 6]
    _, best_of_all, rows = run(train_mnist, *argv)
    assert best_of_all["best"]["epoch"] < 6
    argv[argv.index("--tolerance") :] = ["--keep", "last", "--epochs", 6]
    capsys.readouterr()
    whole, record, last_rows = run(train_mnist, *argv)
    assert without_times(last_rows) == without_times(rows)
    assert record["best"]["epoch"] == 6 and record["best"]["val_loss"] == rows[-1]["val_loss"]
    assert "last epoch 6: validation loss" in capsys.readouterr().out
    kept, last = (records.load_checkpoint(whole / name) for name in ("best.pt", "last.pt"))
    assert states_are_equal(kept["weights"], last["model"])
    assert record["test"]["loss"] != best_of_all["test"]["loss"]

    # So it is for a run that goes on.
    cut, record, _ = run(train_mnist, *argv, "--stop-after", 4, "--quiet")
    assert record["best"]["epoch"] == 4
    run(train_mnist, "--resume", cut, "--quiet")
    check_same(whole, cut)


@pytest.mark.parametrize("end", [["--epochs", 3], ["--epochs", 40, "--lr", 0.03, "--tolerance", 2]])
def test_a_run_killed_between_its_last_epoch_and_its_test_is_only_tested(end):
    whole, expected, _ = run(train_mnist, *DENSE, *end)
    with at_test(interrupt):
        cut, record, _ = run(train_mnist, *DENSE, *end)
    assert record["status"] == "interrupted" and record["test"] is None
    records.write_json(cut / "run.json", {**record, "status": "running", "error": None})
    with at_step(1, pytest.fail):
        run(train_mnist, "--resume", cut, "--quiet")
    check_same(whole, cut)
    # And so is one whose best.pt is gone.
    (cut / "best.pt").unlink()
    assert run(train_mnist, "--resume", cut, "--quiet")[1]["test"] == expected["test"]
    check_same(whole, cut)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("training", "epoch"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_touches_the_weights(
    monkeypatch, training, epoch, value
):
    loss, steps, bad = F.cross_entropy, [], []

    def poisoned(*arguments, **options):
        if torch.is_grad_enabled() == training and len(steps) >= 3 * epoch - 2:
            bad.append(value)
        return loss(*arguments, **options) * (value if bad else 1)

    with monkeypatch.context() as patch, at_step(None, lambda: steps.append(bool(bad))):
        patch.setattr(F, "cross_entropy", poisoned)
        directory, record, rows = run(train_cifar, *EVERYTHING_ON, "--epochs", 3)
    assert record["status"] == "diverged" and record["test"] is None
    assert f"epoch {epoch}" in record["error"]
    assert bad and not any(steps)
    assert len(rows) == record["epochs"] == epoch - 1
    assert len(list(directory.glob("*.pt"))) == 2 * len(rows)
    for path in directory.glob("*.pt"):
        assert len(records.load_checkpoint(path).get("history", rows)) == 1
    with pytest.raises(records.RunError, match="would again"):
        run(train_cifar, "--resume", directory)


def test_the_test_images_are_used_once_after_the_training_if_at_all():
    def events_of(epochs, *argv, on_epoch=None):
        events.clear()
        argv = [*EVERYTHING_ON, "--epochs", epochs, *argv]
        return run(train_cifar, *argv, on_epoch=on_epoch)

    events = []
    with at_step(None, lambda: events.append("step")), at_test(lambda: events.append("test")):
        events_of(2)
        assert events == [*["step"] * 6, "test"]
        directory, record, (row,) = events_of(1, "--no-test", on_epoch=events.append)
        assert events == [*["step"] * 3, row | {"directory": str(directory)}]
        assert record["test"] is None and record["status"] == "finished"
        events_of(2, "--no-test", on_epoch=lambda row: "no")
        assert events == ["step"] * 6, "True alone ends it"
        _, record, rows = events_of(3, on_epoch=lambda row: row["epoch"] == 2)
        assert events == ["step"] * 6 and len(rows) == 2
    assert record["best"] and record["test"] is None and record["status"] == "pruned"


def test_resume_refuses_what_would_not_be_the_same_run(monkeypatch, capsys):
    directory, before, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 4, "--stop-after", 2)
    argv = ["--model", "patchnet", "--c1", 2, "--c2", 2, "--schedule", "constant", "--epochs", 2]
    argv += [*DENSE[:2], "--sizes", "1/2,1", "--stop-after", 1, "--quiet"]
    growing, *_ = run(train_cifar, *argv)
    for cut, argv, message in (
        (directory, "--lr 0.1", "--lr cannot change"),
        (directory, "--batch-size 32", "--batch-size cannot change"),
        (directory, "--model cnn", "--model cannot change"),
        (directory, "--no-augment", "--augment cannot change"),
        (directory, "--run-name x", "--run-name cannot change"),
        (directory, "--epochs 8", "--epochs cannot change under --schedule onecycle"),
        (directory, "--epochs 1", "the run already has 2 epochs"),
        (growing, "--epochs 3", "--epochs cannot change under --sizes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(train_cifar, "--resume", cut, *argv.split())
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        run(train_mnist, "--resume", directory)
    assert "is a run of train_cifar.py" in capsys.readouterr().err
    in_use = pytest.raises(records.RunError, match="in use by another process")
    with records.locked(directory / ".lock"), in_use:
        run(train_cifar, "--resume", directory)
    other = train_cifar.synthetic_shapes(300, 99)
    monkeypatch.setattr(train_cifar, "synthetic", lambda train: other)
    with pytest.raises(records.RunError, match="checksums differ"):
        run(train_cifar, "--resume", directory)
    assert read_run(directory)[0] == before


def test_a_run_goes_on_with_its_threads_and_says_where(monkeypatch):
    threads = []
    torch.set_num_threads(2)
    directory, record, _ = run(train_mnist, *DENSE, "--epochs", 2, "--stop-after", 1)
    assert record["threads"] == 2 and record["host"] == socket.gethostname()
    torch.set_num_threads(1)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with at_step(1, lambda: threads.append(torch.get_num_threads())):
        _, record, _ = run(train_mnist, "--resume", directory, "--quiet")
    assert threads == [2] and record["threads"] == 2 and record["host"] == "elsewhere"


def test_a_last_batch_of_one_is_not_trained_on_and_one_of_all_images_is_remarked_upon(
    batches, capsys
):
    run(train_mnist, *DENSE[:-1], "--epochs", 1, "--batch-size", 269)
    assert [len(labels) for net, *_, labels in batches if net.training] == [269]
    assert "--batch-size" not in capsys.readouterr().out
    run(train_mnist, *DENSE[:-1], "--epochs", 1, "--batch-size", 270)
    text = "--batch-size 270: the 270 training images .* try --batch-size 13"
    assert re.search(text, capsys.readouterr().out)


def test_a_compiled_model_trains_and_its_weights_load_without_compilation(monkeypatch):
    def without_a_compiler(net, **options):
        compiled.append(net)
        return compile_(net, backend="eager", **options)

    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    _, _, plain = run(train_mnist, *DENSE, "--epochs", 2)
    directory, _, rows = run(train_mnist, *DENSE, "--epochs", 2, "--compile")
    assert len(compiled) == 1 and without_times(rows) == without_times(plain)
    best = records.load_checkpoint(directory / "best.pt")
    common.build_model(best).load_state_dict(best["weights"])
