"""Details that a change could lose without another test noticing."""

import ctypes
import itertools
import json
import os
import socket
import time
from pathlib import Path

import common
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import torch
from conftest import EVERYTHING_ON, check_same, run
from forked import Forked
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

DENSE = ["--dataset", "synthetic", "--model", "dense", "--schedule", "constant", "--quiet"]


def best_of(directory):
    return torch.load(directory / "best.pt", weights_only=True)


# ------------------------------ Data ------------------------------


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_the_synthetic_test_images_are_not_drawn_as_the_training_images_are(script, monkeypatch):
    name = "synthetic_digits" if script is train_mnist else "synthetic_shapes"
    draw = getattr(script, name)
    monkeypatch.setattr(script, name, lambda count, seed: draw(count // 10, seed))  # it is quicker
    train, test = script.synthetic(True), script.synthetic(False)
    assert (train.labels[: len(test)] == test.labels).float().mean() < 0.2


def test_a_download_has_a_time_out(monkeypatch):
    def download(dataset):
        seen.append(socket.getdefaulttimeout())
        raise OSError

    seen, before = [], socket.getdefaulttimeout()
    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    try:
        socket.setdefaulttimeout(None)
        with pytest.raises(records.RunError):
            run(train_mnist, "--data-dir", "fresh", "--quiet")
    finally:
        socket.setdefaulttimeout(before)
    assert 0 < seen[0] <= 600


@pytest.mark.parametrize(("mode", "grey"), [("P", "--no-grey"), ("1", "--grey")])
def test_an_image_of_few_colours_gets_all_of_them_before_it_is_resized(mode, grey):
    levels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(levels).convert(mode)
    for name in "ab":
        Path("images", name).mkdir(parents=True)
        for number in range(10):
            image.save(f"images/{name}/{number}.png")
    argv = ["--dataset", "images", "--image-size", 16, grey, "--normalize", "dataset"]
    argv += ["--model", "dense", "--l1", 2, "--epochs", 1, "--batch-size", 8, "--quiet"]
    directory, *_ = run(train_mnist, *argv)
    pixels = image.convert("L" if grey == "--grey" else "RGB")
    pixels = np.asarray(pixels.resize((16, 16), Image.Resampling.BILINEAR)).reshape(256, -1) / 255
    assert best_of(directory)["mean"] == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)


# ------------------------------ Options ------------------------------


def test_a_tilde_in_a_path_is_the_home_directory(few_images, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    argv = ["--runs-dir", "~/x", "--run-name", "r"]
    run(train_mnist, *DENSE, *argv, "--epochs", 1, "--no-test")
    assert (home / "x/r/run.json").exists() and not Path("~").exists()
    assert train_mnist.main(["--resume=~/x/r", "--epochs", "2", "--quiet"])["epochs"] == 2
    assert train_mnist.parse_arguments(["--data-dir", "~/d"]).data_dir == home / "d"
    args = train_mnist.parse_arguments(["--dataset", "~/images"])
    assert args.dataset == str(home / "images")


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_muon_has_rates_and_a_schedule_of_its_own_where_the_recipe_is_for_another(script):
    def settings(*argv):
        args = vars(script.parse_arguments([*argv]))
        return [args.get(name) for name in ("lr", "aux_lr", "momentum", "schedule")]

    assert settings("--optimizer", "muon") == [0.12, 0.015, 0.6, "linear"]
    assert settings("--optimizer=muon", "--lr", "0.3") == [0.3, 0.015, 0.6, "linear"]
    assert settings("--optimizer", "sgd") == [*settings()[:2], 0.9, settings()[3]]
    fast = settings("--recipe", "fast")
    assert fast[0] == script.RECIPES["fast"]["lr"]
    assert settings("--recipe", "fast", "--optimizer", "muon") == fast


# ------------------------------ What goes wrong ------------------------------


def test_too_little_memory_in_a_training_is_one_line_and_status_1():
    before = "register_optimizer_step_post_hook(lambda *_: torch.empty(2**50))"
    argv = [*DENSE, "--runs-dir", "runs", "--run-name", "r"]
    status, error = Forked("train_mnist", *argv, before=before).finish()
    assert status == 1 and error.count("\n") == 1 and "allocate memory" in error
    assert error.startswith("train_mnist.py: error: ") and "smaller --batch-size" in error
    record = records.read_record(Path("runs/r"))
    assert record["status"] == "failed" and record["error"].startswith("RuntimeError: ")


def test_an_error_in_the_middle_of_a_checkpoint_leaves_the_old_one(few_images, monkeypatch):
    def save(content, file, *arguments, **options):
        if len(content.get("history", ())) < 2:
            return torch_save(content, file, *arguments, **options)
        file.write(b"PK\x03\x04 and no more")
        raise MemoryError

    def look(row):
        there.update({path.name: path.read_bytes() for path in directory.glob("*.pt")})

    there, directory, torch_save = {}, Path("runs/r"), torch.save
    argv = [*EVERYTHING_ON, "--epochs", 3]
    whole, *_ = run(train_cifar, *argv)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "save", save)
        run(train_cifar, *argv, "--run-name", "r", on_epoch=look)
    assert {path.name: path.read_bytes() for path in directory.glob("*.pt")} == there
    assert {*there, "run.json", "log.jsonl", ".lock"} == {*os.listdir(directory)}
    assert best_of(directory)["epoch"] == 1 and len(there) == 2
    record = records.read_record(directory)
    assert (record["status"], record["epochs"]) == ("failed", 1)
    assert record["error"].startswith("MemoryError")
    run(train_cifar, "--resume", directory, "--quiet")
    check_same(whole, directory)


MEMORY_IN_USE = """
import gc
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
def memory_in_use():
    gc.collect()
    found = mallinfo()
    return found.uordblks + found.hblkhd
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
def test_memory_does_not_grow_from_epoch_to_epoch():
    """What is in use: glibc keeps what is freed. A leak of 70 kB an epoch is noticed."""
    look = "print(memory_in_use(), sys.getallocatedblocks(), flush=True)"
    argv = ["train_cifar", *EVERYTHING_ON, "--tolerance", 0, "--epochs", 20, "--runs-dir", "runs"]
    assert Forked(*argv, before=MEMORY_IN_USE, each_epoch=look).finish() == (0, "")
    lines = Path("out").read_text().splitlines()
    assert len(lines) == 20
    before, after = (np.array(line.split(), int) for line in (lines[4], lines[19]))
    in_use, objects = after - before
    assert in_use < 1e6 and objects < 1e4


# ------------------------------ What a run writes down ------------------------------


def test_images_per_second_are_those_of_the_training_without_the_validation(few_images):
    def sleep(module, _):
        if isinstance(module, torch.nn.Linear) and not module.training:
            time.sleep(0.1)
            slept.append(0.1)

    slept, sums = [], []
    handle = register_module_forward_pre_hook(sleep)
    try:
        argv = [*DENSE, "--epochs", 2, "--no-test"]
        _, record, rows = run(train_mnist, *argv, on_epoch=lambda _: sums.append(sum(slept)))
    finally:
        handle.remove()
    assert len(rows) == 2 and sums[0] > 0
    for row in rows:
        training = record["data"]["train"] / row["images_per_second"]
        assert 0 < training < row["seconds"] - 0.99 * sums[0]


def test_dropout_draws_other_units_in_each_epoch(monkeypatch):
    def equal_images(train):
        drawn = train_mnist.synthetic_digits(160, 0)
        pixels = drawn.images[:1].expand(160, -1, -1, -1).clone()
        return common.ImageSet(pixels, drawn.labels, drawn.classes)

    def keep(module, _, output):
        if "Dropout" in type(module).__name__ and module.training and output.device.type == "cpu":
            outputs.append(output.detach().clone())

    outputs = []
    monkeypatch.setattr(train_mnist, "synthetic", equal_images)
    handle = register_module_forward_hook(keep)
    try:
        # At such a rate the weights stay what they were: only the dropout differs.
        argv = [*DENSE, "--lr", 1e-30, "--batch-size", 72, "--epochs", 3, "--precision", "fp32"]
        run(train_mnist, *argv, "--no-test")
    finally:
        handle.remove()
    assert [len(output) for output in outputs] == [72] * 6
    for first, second in itertools.combinations(outputs, 2):
        assert torch.equal(first.amax(0), second.amax(0)), "the images and weights are the same"
        assert not torch.equal(first != 0, second != 0)


def test_the_temperature_is_1_where_no_validation_image_is_wrong(monkeypatch):
    def bars(train):
        drawn = train_mnist.synthetic_digits(2200, int(train))
        rows = torch.arange(28).view(1, 1, 28, 1) // 2 == drawn.labels.view(-1, 1, 1, 1)
        return common.ImageSet((rows * 255).byte(), drawn.labels, drawn.classes)

    monkeypatch.setattr(train_mnist, "synthetic", bars)
    directory, record, _ = run(train_mnist, *DENSE, "--epochs", 2, "--no-test")
    assert record["data"]["val"] == 220 and record["best"]["val_acc"] == 1
    assert record["best"]["temperature"] == best_of(directory)["temperature"] == 1


@pytest.mark.parametrize("output", ["out", "err"])
def test_an_output_that_takes_nothing_does_not_end_a_training(output):
    argv = [*map(str, DENSE[:-1]), "--epochs", "2", "--runs-dir", "runs", "--run-name", "r"]
    process = Forked("train_mnist", *argv, **{output: "/dev/full"})
    process.process.join(300)
    assert process.process.exitcode == 0
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["status"] == "finished" and record["test"]


def test_images_too_small_for_a_shift_are_told(few_images):
    with pytest.raises(records.UsageError, match="--shift 28: the images are too small"):
        run(train_mnist, *DENSE, "--shift", 28)
    assert not Path("runs").exists()
