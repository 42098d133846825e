"""Whole runs, in this process: what they write, that they learn, repeat and continue."""

import json
import math
import os
import re
import shutil
from datetime import UTC, datetime

import pytest
import torch
from conftest import EVERYTHING_ON, check_same, read_run, run, without_times
from forked import few

import common
import evaluate
import train_cifar
import train_mnist

RECORD = {
    "name", "script", "argv", "args", "status", "error", "started", "ended", "seconds", "compile_seconds", "seed",
    "device", "precision", "versions", "host", "git", "data", "parameters", "epochs", "best", "test",
}  # fmt: skip
ROW = ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second"]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def small_synthetic_sets(request, monkeypatch):
    """Draw 300 training images rather than 10,000, but for the tests of learning."""
    if "learn" in request.node.name:
        return
    for script, draw in ((train_mnist, train_mnist.synthetic_digits), (train_cifar, train_cifar.synthetic_shapes)):
        monkeypatch.setattr(script, "synthetic", few(draw))


def test_a_run_directory_holds_what_the_contract_says(tmp_path):
    directory, record, rows = run(train_mnist, "--dataset", "synthetic", "--epochs", 2)
    assert directory.parent == common.Path("runs")
    assert re.fullmatch(r"train_mnist-\d{8}T\d{6}Z-[0-9a-f]{4}", directory.name)
    assert {path.name for path in directory.iterdir()} == {".lock", "best.pt", "last.pt", "log.jsonl", "run.json"}
    assert json.loads((directory / "run.json").read_text()) == record and set(record) == RECORD
    assert record["status"] == "finished" and record["error"] is None and record["epochs"] == 2
    assert record["argv"] == ["--dataset", "synthetic", "--epochs", "2"] and record["args"]["batch_size"] == 64
    assert record["data"]["train"] == 270 and record["data"]["val"] == 30 and record["data"]["test"] == 60
    assert [list(row) for row in rows] == [ROW, ROW] and [row["epoch"] for row in rows] == [1, 2]
    best = min(rows, key=lambda row: row["val_loss"])
    assert record["best"] == {name: best[name] for name in ("epoch", "val_loss", "val_acc")}
    assert 0 <= record["test"]["acc"] <= 1 and record["seconds"] >= sum(row["seconds"] for row in rows)


@pytest.mark.parametrize("model", ["dense", "cnn"])
def test_mnist_models_learn_the_synthetic_digits(model):
    _, record, rows = run(train_mnist, "--dataset", "synthetic", "--model", model, "--epochs", 3, "--limit-train", 2500)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and record["test"]["acc"] > {"dense": 0.15, "cnn": 0.6}[model]


def test_confignet_learns_the_synthetic_shapes():
    argv = ["--dataset", "synthetic", "--limit-train", 1500, "--epochs", 3, "--batch-size", 50]
    _, record, _ = run(train_cifar, *argv, "--c1", 8, "--c2", 16, "--l1", 64, "--lr", 0.003)
    assert record["test"]["acc"] > 0.3
    assert record["args"]["model_options"] == {"c1": 8, "c2": 16, "l1": 64, "d1": 0.1, "kernel_size": 3}


def test_best_pt_rebuilds_the_model_and_its_results_of_smoothed_labels_in_validation_and_plain_ones_in_the_test():
    directory, record, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 2, "--val-size", 0)  # validates on the test set
    best = torch.load(directory / "best.pt", weights_only=True)
    model = common.MODELS[best["model"]](best["image_shape"], len(best["classes"]), **best["model_options"])
    model.load_state_dict(best["weights"])
    loader = common.Loader(train_cifar.synthetic_shapes(60, 0), 60, best["mean"], best["std"])
    autocast = common.autocast_to(torch.device("cpu"), record["precision"])
    for smoothing, loss in ((0.1, record["best"]["val_loss"]), (0.0, record["test"]["loss"])):
        totals = common.Totals("cpu")
        common.evaluate_epoch(model, loader.batches(), autocast, totals, smoothing)
        assert totals.loss == pytest.approx(loss, rel=1e-4)
        assert totals.accuracy == record["test"]["acc"] == record["best"]["val_acc"]
    assert best["epoch"] == record["best"]["epoch"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    first = run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    again = run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    other = run(train_cifar, *EVERYTHING_ON, "--epochs", 2, "--seed", 7)
    assert without_times(first[2]) == without_times(again[2]) != without_times(other[2])
    assert first[1]["test"] == again[1]["test"]


def interrupt_in_epoch(monkeypatch, wanted, fault):
    """Make the second batch of epoch `wanted` call `fault`."""
    original = common.Loader.batches

    def batches(self, epoch=0, side=None):
        for index, batch in enumerate(original(self, epoch, side)):
            if epoch == wanted and index == 1:
                fault()
            yield batch

    monkeypatch.setattr(common.Loader, "batches", batches)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_continues_bit_for_bit(monkeypatch, precision):
    argv = [*EVERYTHING_ON, "--epochs", 4, "--precision", precision]
    whole, record, _ = run(train_cifar, *argv, "--run-name", "whole")
    assert record["status"] == "finished" and record["test"]
    steps, adam_step = [], torch.optim.Adam.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda *a: (steps.append("step"), adam_step(*a))[1])
        interrupt_in_epoch(patch, 3, lambda: steps.append("signal") or os.kill(os.getpid(), common.signal.SIGTERM))
        cut, record, rows = run(train_cifar, *argv, "--run-name", "cut")
    assert steps.count("step") > 2 and len(steps) - steps.index("signal") <= 2  # one more at most
    assert record["status"] == "interrupted" and record["error"] == "SIGTERM" and len(rows) == 2
    cut, _, _ = run(train_cifar, "--resume", cut, "--quiet")
    check_same(whole, cut)


def test_between_two_saves_only_what_is_unsaved_is_lost(monkeypatch):
    whole, _, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 4)
    saved, save = [], common.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", lambda path, state: (saved.append(path.name), save(path, state)))
        interrupt_in_epoch(patch, 4, lambda: os.kill(os.getpid(), common.signal.SIGTERM))
        cut, record, rows = run(train_cifar, *EVERYTHING_ON, "--epochs", 4, "--save-interval", 1000)
        assert saved == ["last.pt", "best.pt"] and (record["epochs"], len(rows)) == (3, 3) and record["best"]
        run(train_cifar, "--resume", cut, "--stop-after", 2, "--quiet")
        assert saved == ["last.pt", "best.pt", "best.pt", "last.pt"]
    run(train_cifar, "--resume", cut, "--save-interval", 0, "--quiet")
    check_same(whole, cut)


FAST = [
    "--recipe", "fast", "--dataset", "synthetic", "--c1", "8", "--c2", "8", "--c3", "8", "--batch-size", "64",
    "--val-size", "0.1", "--sizes", "16,32", "--precision", "fp32", "--quiet",
]  # fmt: skip


def test_the_fast_recipe_continues_bit_for_bit_and_its_test_is_augmented():
    whole, record, _ = run(train_cifar, *FAST, "--epochs", 5)
    assert record["args"]["recipe"] == "fast" and record["args"]["optimizer"] == "muon"
    cut, _, _ = run(train_cifar, *FAST, "--epochs", 5, "--stop-after", 4)
    run(train_cifar, "--resume", cut, "--quiet")
    check_same(whole, cut)
    trained = evaluate.load_trained(whole, torch.device("cpu"))
    images = train_cifar.synthetic(False)
    batches = list(trained.loader(images, 60).batches())
    for views, same in ((("mirror+shift", record["args"]["tta_below"]), True), ((None,), False)):
        loss = torch.nn.functional.cross_entropy(evaluate.predict(trained.model, batches, *views), images.labels).item()
        assert (loss == pytest.approx(record["test"]["loss"], rel=1e-4)) == same


def test_the_images_grow_over_the_epochs(monkeypatch):
    seen, original = [], common.train_epoch

    def train_epoch(model, batches, *rest):
        def watched():
            for images, labels in batches:
                seen.append(tuple(images.shape[2:]))
                yield images, labels

        original(model, watched(), *rest)

    monkeypatch.setattr(common, "train_epoch", train_epoch)
    run(train_cifar, *FAST, "--sizes", "16,24,32", "--epochs", 5, "--batch-size", 300)
    assert seen == [(16, 16)] + [(24, 24)] * 2 + [(32, 32)] * 2
    del seen[:]
    run(train_cifar, *FAST, "--sizes", "16,24,32", "--epochs", 1, "--batch-size", 300)
    assert seen == [(32, 32)]


def test_epochs_can_be_raised_and_a_finished_run_is_left_alone(capsys):
    argv = [*EVERYTHING_ON, "--schedule", "constant"]
    _, whole, whole_rows = run(train_cifar, *argv, "--epochs", 3)
    directory, _, _ = run(train_cifar, *argv, "--epochs", 2)
    before = (directory / "run.json").read_bytes()
    run(train_cifar, "--resume", directory)
    assert "nothing to do" in capsys.readouterr().out and (directory / "run.json").read_bytes() == before
    _, record, rows = run(train_cifar, "--resume", directory, "--epochs", 3, "--quiet")
    assert without_times(rows) == without_times(whole_rows) and record["test"] == whole["test"]
    assert record["args"]["epochs"] == 3


def test_a_run_interrupted_before_its_first_epoch_ended_continues(monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 1, lambda: os.kill(os.getpid(), common.signal.SIGINT))
        directory, record, rows = run(train_cifar, *EVERYTHING_ON, "--epochs", 1)
    assert record["status"] == "interrupted" and record["error"] == "SIGINT" and rows == [] and record["best"] is None
    _, record, rows = run(train_cifar, "--resume", directory, "--quiet")
    assert record["status"] == "finished" and len(rows) == 1


def test_early_stopping_ends_the_run_and_the_best_epoch_is_reported():
    argv = ["--dataset", "synthetic", "--model", "dense", "--epochs", 30, "--tolerance", 2, "--quiet"]
    directory, record, rows = run(train_mnist, *argv, "--lr", 0.03, "--schedule", "constant")
    assert record["status"] == "stopped_early" and len(rows) == record["epochs"] < 30
    losses = [row["val_loss"] for row in rows]
    assert record["best"]["val_loss"] == min(losses) and record["best"]["epoch"] == len(rows) - 2
    cut, _, _ = run(train_mnist, *argv, "--lr", 0.03, "--schedule", "constant", "--stop-after", len(rows) - 1)
    run(train_mnist, "--resume", cut, "--quiet")
    check_same(directory, cut)
    _, again, _ = run(train_mnist, "--resume", directory, "--epochs", 40, "--quiet")
    assert again["epochs"] == len(rows) and again["status"] == "stopped_early"


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step_and_is_never_best(monkeypatch):
    loss, adam_step = common.F.cross_entropy, torch.optim.Adam.step

    def run_with_a_bad_loss_in_epoch(epoch, in_training=True):
        with monkeypatch.context() as patch:
            poisoned, steps = {"now": False}, []
            interrupt_in_epoch(patch, epoch, lambda: poisoned.update(now=True))

            def poisoned_loss(*arguments, **options):
                bad = poisoned["now"] and torch.is_grad_enabled() == in_training
                return loss(*arguments, **options) * (math.nan if bad else 1)

            patch.setattr(common.F, "cross_entropy", poisoned_loss)
            patch.setattr(torch.optim.Adam, "step", lambda *a: (steps.append(poisoned["now"]), adam_step(*a))[1])
            directory, record, rows = run(train_cifar, *EVERYTHING_ON, "--epochs", 3)
            assert any(steps) != in_training  # no step after the poison, where it is in training
            return directory, record, rows

    for in_training in (True, False):
        directory, record, rows = run_with_a_bad_loss_in_epoch(2, in_training)
        assert record["status"] == "diverged" and "epoch 2" in record["error"] and record["test"] is None
        assert len(rows) == 1 and record["best"]["epoch"] == 1
        assert common.load_checkpoint(directory / "last.pt")["epoch"] == 1
    directory, record, rows = run_with_a_bad_loss_in_epoch(1)
    assert record["status"] == "diverged" and record["best"] is None and rows == []
    assert not (directory / "best.pt").exists()


def test_an_error_in_training_is_recorded(monkeypatch):
    def fail():
        raise OSError("no space left")

    interrupt_in_epoch(monkeypatch, 2, fail)
    with pytest.raises(OSError, match="no space"):
        run(train_cifar, *EVERYTHING_ON, "--epochs", 3, "--run-name", "broken")
    record, rows = read_run(common.Path("runs/broken"))
    assert record["status"] == "failed" and record["error"] == "OSError: no space left" and len(rows) == 1


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    common.write_atomically(path, b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        common.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_run_never_reads_the_test_images_before_the_end_nor_with_no_test(monkeypatch):
    reads, synthetic = [], train_cifar.synthetic
    monkeypatch.setattr(train_cifar, "synthetic", lambda train: reads.append(train) or synthetic(train))
    monkeypatch.setattr(
        common, "train_epoch", lambda *a, original=common.train_epoch: reads.append("train") or original(*a)
    )
    run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    assert reads == [True, "train", "train", False]
    reads.clear()
    _, record, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 1, "--no-test")
    assert reads == [True, "train"] and record["test"] is None


def test_resume_refuses_other_data_another_flag_and_a_file_that_is_no_checkpoint(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 2, lambda: os.kill(os.getpid(), common.signal.SIGTERM))
        directory, _, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    for argv, message in (
        (["--lr", "0.1"], "--lr cannot change"),
        (["--run-name", "x"], "--run-name cannot change"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(train_cifar, "--resume", directory, *argv)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(train_mnist, "--resume", directory)
    assert "made by train_cifar.py" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar, "synthetic", lambda train: train_cifar.synthetic_shapes(300, 99))
        with pytest.raises(common.RunError, match="checksums differ"):
            run(train_cifar, "--resume", directory)
    with common.locked(directory / ".lock"), pytest.raises(common.RunError, match="in use"):
        run(train_cifar, "--resume", directory)
    (directory / "last.pt").write_bytes((directory / "last.pt").read_bytes()[:1000])
    with pytest.raises(common.RunError, match=r"last\.pt is damaged, or is not a checkpoint"):
        run(train_cifar, "--resume", directory)


def test_a_checkpoint_that_would_run_code_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    common.save_checkpoint(tmp_path / "last.pt", {"epoch": Bomb()})
    with pytest.raises(common.RunError, match="not a checkpoint"):
        common.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flags", [("sgd", "cosine"), ("adamw", "onecycle"), ("adam", "constant")])
def test_optimizers_and_schedules_train(flags):
    optimizer, schedule = flags
    argv = ["--dataset", "synthetic", "--epochs", 3, "--lr", 0.005, "--model", "dense", "--weight-decay", 0.01]
    _, _, rows = run(train_mnist, *argv, "--optimizer", optimizer, "--schedule", schedule, "--quiet")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert (rows[-1]["lr"] < 0.005) == (schedule != "constant")


def test_the_end_of_a_schedule_cannot_be_moved(monkeypatch, capsys):
    directory, _, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 1)
    with pytest.raises(SystemExit) as stopped:
        run(train_cifar, "--resume", directory, "--epochs", 2)
    assert stopped.value.code == 2 and "--schedule onecycle" in capsys.readouterr().err


def test_a_run_continued_elsewhere_says_so(monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 2, lambda: os.kill(os.getpid(), common.signal.SIGTERM))
        patch.setattr(common.platform, "node", lambda: "here")
        directory, record, _ = run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    assert record["host"] == "here"
    monkeypatch.setattr(common.platform, "node", lambda: "there")
    assert run(train_cifar, "--resume", directory, "--quiet")[1]["host"] == "there"


def test_a_second_signal_ends_at_once(monkeypatch):
    def twice():
        os.kill(os.getpid(), common.signal.SIGTERM)
        os.kill(os.getpid(), common.signal.SIGTERM)
        raise AssertionError("the second signal did not interrupt")

    interrupt_in_epoch(monkeypatch, 2, twice)
    _, record, rows = run(train_cifar, *EVERYTHING_ON, "--epochs", 2)
    assert record["status"] == "interrupted" and record["error"] == "SIGTERM" and len(rows) == 1


def test_a_name_that_is_taken_by_chance_is_drawn_again(monkeypatch):
    suffixes = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(common.secrets, "token_hex", lambda size: next(suffixes))
    monkeypatch.setattr(common, "datetime", type("", (), {"now": lambda zone: datetime(2026, 1, 1, tzinfo=UTC)}))
    first, second = (run(train_cifar, *EVERYTHING_ON, "--epochs", 1)[0] for _ in range(2))
    assert first.name.endswith("-aaaa") and second.name.endswith("-bbbb")


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
def test_a_compiled_model_trains_and_its_weights_load_without_compilation():
    argv = ["--dataset", "synthetic", "--model", "dense", "--epochs", 1, "--quiet"]
    _, plain, _ = run(train_mnist, *argv)
    directory, record, _ = run(train_mnist, *argv, "--compile")
    assert record["best"]["val_loss"] == pytest.approx(plain["best"]["val_loss"], rel=0.02)
    assert 0 < record["compile_seconds"] < record["seconds"] and plain["compile_seconds"] == 0
    best = torch.load(directory / "best.pt", weights_only=True)
    common.dense((1, 28, 28), 10).load_state_dict(best["weights"])


@needs_compiler
def test_all_is_compiled_before_the_first_epoch(monkeypatch, request):
    compile_ahead = common.compile_ahead

    def and_no_more(*args):
        seconds = compile_ahead(*args)
        torch.compiler.set_stance("fail_on_recompile")
        return seconds

    monkeypatch.setattr(common, "compile_ahead", and_no_more)
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    argv = ["--recipe", "fast", "--dataset", "synthetic", "--c1", 8, "--c2", 8, "--c3", 8]
    argv += ["--batch-size", 100, "--epochs", 4, "--sizes", "8,8,8,32", "--val-size", 0.2, "--no-test", "--quiet"]
    _, _, rows = run(train_cifar, *argv)
    _, record, compiled = run(train_cifar, *argv, "--compile")
    assert record["status"] == "finished" and record["compile_seconds"] > 0
    assert compiled[0]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.01)
