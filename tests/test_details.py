"""Details that a change could lose without another test noticing: each test here fails where one of them is lost."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import common
import train_cifar
import train_mnist

import numpy as np
import pytest
import test_data
import torch
from conftest import EVERYTHING_ON, ROOT, check_same, run, states_are_equal
from forked import Forked
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

DENSE = ["--dataset", "synthetic", "--model", "dense", "--schedule", "constant", "--quiet"]
cifar_dir, origin = test_data.cifar_dir, test_data.origin  # a server to download from


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
    assert not (train.images[: len(test)] == test.images).flatten(1).all(1).any()


def test_a_download_has_a_time_out(origin, monkeypatch):
    answer, seen, before = test_data.Handler.do_GET, [], socket.getdefaulttimeout()
    monkeypatch.setattr(
        test_data.Handler,
        "do_GET",
        lambda handler: seen.append(socket.getdefaulttimeout()) or answer(handler),
    )
    argv = ["--model", "dense", "--l1", 2, "--epochs", 1, "--no-test", "--quiet"]
    try:
        socket.setdefaulttimeout(None)
        run(train_mnist, *argv, "--data-dir", "fresh")
    finally:
        socket.setdefaulttimeout(before)
    assert len(seen) >= 4 and all(timeout and 0 < timeout <= 600 for timeout in seen)


def few_colours():
    levels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return Image.fromarray(levels).quantize(16)


def checkerboard():
    return Image.fromarray(np.indices((32, 32)).sum(0) % 2 == 1)


@pytest.mark.parametrize(("draw", "mode"), [(few_colours, "P"), (checkerboard, "1")])
@pytest.mark.parametrize("grey", ["--grey", "--no-grey"])
def test_an_image_of_few_colours_gets_all_of_them_before_it_is_resized(draw, mode, grey):
    image = draw()
    assert image.mode == mode
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
    assert settings("--optimizer=muon") == settings("--optimizer", "muon")
    assert settings("--optimizer", "muon", "--lr", "0.3") == [0.3, 0.015, 0.6, "linear"]
    assert settings("--optimizer", "sgd") == [*settings()[:2], 0.9, settings()[3]]
    fast = settings("--recipe", "fast")
    assert fast[0] == script.RECIPES["fast"]["lr"]
    assert settings("--recipe", "fast", "--optimizer", "muon") == fast


# ------------------------------ Runs that go on ------------------------------


def test_a_tolerance_given_on_resume_is_recorded(few_images):
    directory, *_ = run(train_mnist, *DENSE, "--epochs", 3, "--stop-after", 1)
    _, record, _ = run(train_mnist, "--resume", directory, "--tolerance", 7, "--quiet")
    assert record["args"]["tolerance"] == 7
    assert json.loads((directory / "run.json").read_text())["args"]["tolerance"] == 7


def test_a_run_that_goes_on_has_no_test_result_until_it_is_tested_again(few_images):
    def look(row):
        seen.append(json.loads((directory / "run.json").read_text()))
        if row["epoch"] == 2:
            signal.raise_signal(signal.SIGTERM)

    directory, record, _ = run(train_mnist, *DENSE, "--epochs", 1)
    assert record["test"] and record["data"]["test"] == 60 and record["data"]["test_checksum"]
    seen = []
    _, _, rows = run(train_mnist, "--resume", directory, "--epochs", 3, "--quiet", on_epoch=look)
    seen.append(json.loads((directory / "run.json").read_text()))
    assert [one["status"] for one in seen] == ["running", "interrupted"] and len(rows) == 2
    assert [one["test"] for one in seen] == [None, None]
    assert run(train_mnist, "--resume", directory, "--quiet")[1]["test"]


@pytest.mark.parametrize(
    "change", ["--batch-size 32", "--model cnn", "--augment", "--schedule linear", "--l1 16"]
)
def test_what_a_run_computes_cannot_change_on_resume(few_images, capsys, change):
    directory, *_ = run(train_mnist, *DENSE, "--epochs", 2, "--stop-after", 1)
    before = (directory / "run.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run(train_mnist, "--resume", directory, *change.split())
    error = capsys.readouterr().err
    assert f"{change.split()[0]} cannot change" in error and error.count("\n") == 1
    assert (directory / "run.json").read_bytes() == before


def test_the_epochs_cannot_change_where_the_images_grow_over_them(few_images, capsys):
    argv = ["--dataset", "synthetic", "--model", "patchnet", "--c1", 2, "--c2", 2, "--quiet"]
    argv += ["--schedule", "constant", "--sizes", "1/2,1", "--epochs", 2, "--stop-after", 1]
    directory, *_ = run(train_mnist, *argv)
    with pytest.raises(SystemExit, match="2"):
        run(train_mnist, "--resume", directory, "--epochs", 3)
    error = capsys.readouterr().err
    assert "--epochs cannot change under --sizes" in error and error.count("\n") == 1


# ------------------------------ What goes wrong ------------------------------


def test_too_little_memory_in_a_training_is_one_line_and_status_1():
    status, error = Forked(
        "train_mnist",
        *DENSE,
        *("--runs-dir", "runs", "--run-name", "r"),
        before="register_optimizer_step_post_hook(lambda *_: torch.empty(2**50))",
    ).finish()
    assert status == 1 and error.count("\n") == 1 and "allocate memory" in error
    assert error.startswith("train_mnist.py: error: ") and "smaller --batch-size" in error
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["status"] == "failed" and record["error"].startswith("RuntimeError: ")


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_an_error_in_the_middle_of_a_checkpoint_leaves_the_old_one(
    few_images, monkeypatch, failure
):
    def save(content, file, *arguments, **options):
        if len(content.get("history", ())) < 2:
            return torch_save(content, file, *arguments, **options)
        half = b"PK\x03\x04 and no more"
        file.write(half) if hasattr(file, "write") else Path(file).write_bytes(half)
        raise failure

    def look(row):
        there.update({path.name: path.read_bytes() for path in directory.glob("*.pt")})

    there, directory, torch_save = {}, Path("runs/r"), torch.save
    argv = [*EVERYTHING_ON, "--epochs", 3]
    whole, *_ = run(train_cifar, *argv)
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(torch, "save", save)
        run(train_cifar, *argv, "--run-name", "r", on_epoch=look)
    assert {path.name: path.read_bytes() for path in directory.glob("*.pt")} == there
    assert {*there, "run.json", "log.jsonl", ".lock"} == {*os.listdir(directory)}
    assert best_of(directory)["epoch"] == 1 and len(there) == 2
    record = json.loads((directory / "run.json").read_text())
    assert (record["status"], record["epochs"]) == ("failed", 1)
    assert record["error"] == f"{type(failure).__name__}: {failure}"
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


LEAK = "gc.kept = [*getattr(gc, 'kept', []), torch.ones(100_000)]; "


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
@pytest.mark.parametrize("leak", ["", LEAK], ids=["as it is", "with a leak"])
def test_memory_does_not_grow_from_epoch_to_epoch(leak):
    """Of the memory, what is in use: glibc keeps what is freed. A leak of 400 kB an epoch is noticed."""
    look = f"{leak}print(memory_in_use(), sys.getallocatedblocks(), flush=True)"
    argv = ["train_cifar", *EVERYTHING_ON, "--tolerance", 0, "--epochs", 20, "--runs-dir", "runs"]
    assert Forked(*argv, before=MEMORY_IN_USE, each_epoch=look).finish() == (0, "")
    sizes = [[int(size) for size in line.split()] for line in Path("out").read_text().splitlines()]
    assert len(sizes) == 20
    in_use, objects = (last - fifth for fifth, last in zip(sizes[4], sizes[19], strict=True))
    assert (in_use > 1e6) == bool(leak) and objects < 1e4


# ------------------------------ What a run writes down ------------------------------


def test_the_commit_is_that_of_the_scripts_and_not_of_the_current_directory(
    few_images, tmp_path, monkeypatch
):
    _, record, _ = run(train_mnist, *DENSE, "--epochs", 1, "--no-test")
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (record["git"] or "").removesuffix("-dirty") == commit

    scripts, other = tmp_path / "scripts", tmp_path / "other"
    scripts.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, scripts)
    subprocess.run(["git", "init", "--quiet", other], check=True)
    as_somebody = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    commit = [*as_somebody, "commit", "--quiet", "--allow-empty", "--message=first"]
    subprocess.run(commit, cwd=other, check=True)
    argv = ["--limit-train", "100", "--epochs", "1", "--no-test", "--run-name", "r"]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    subprocess.run(
        [sys.executable, scripts / "train_mnist.py", *DENSE, *argv], cwd=other, check=True
    )
    assert json.loads((scripts / "runs/r/run.json").read_text())["git"] is None


def test_images_per_second_are_those_of_the_training_without_the_validation(few_images):
    def sleep(module, _):
        if isinstance(module, torch.nn.Linear) and not module.training:
            time.sleep(0.1)
            slept.append(0.1)

    slept, sums = [], []
    handle = register_module_forward_pre_hook(sleep)
    try:
        argv = [*DENSE, "--epochs", 2, "--no-test"]
        _, record, rows = run(
            train_mnist, *argv, on_epoch=lambda row: sums.append(sum(slept)) or slept.clear()
        )
    finally:
        handle.remove()
    assert len(rows) == 2 and min(sums) > 0
    for row, asleep in zip(rows, sums, strict=True):
        training = record["data"]["train"] / row["images_per_second"]
        assert 0 < training < row["seconds"] - 0.99 * asleep


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
    units = [tuple(output.amax(0).tolist()) for output in outputs]
    assert len(set(units)) == 1, "the images and the weights are to be the same"
    assert len({tuple((output != 0).flatten().tolist()) for output in outputs}) == 6


def test_the_temperature_is_1_where_no_validation_image_is_wrong(monkeypatch):
    def bars(train):
        drawn = train_mnist.synthetic_digits(2200, int(train))
        rows = torch.arange(28).view(1, 1, 28, 1) // 2 == drawn.labels.view(-1, 1, 1, 1)
        return common.ImageSet((rows * 255).byte(), drawn.labels, drawn.classes)

    monkeypatch.setattr(train_mnist, "synthetic", bars)
    directory, record, _ = run(train_mnist, *DENSE, "--epochs", 2, "--no-test")
    assert record["data"]["val"] == 220 and record["best"]["val_acc"] == 1
    assert record["best"]["temperature"] == best_of(directory)["temperature"] == 1


# ------------------------------ What is left, and what is lacking ------------------------------


@pytest.mark.parametrize(
    "end",
    [
        ["--epochs", 2],
        ["--epochs", 3, "--stop-after", 2],
        ["--epochs", 40, "--lr", 0.03, "--tolerance", 2],
    ],
)
def test_a_best_pt_that_is_gone_is_made_again(few_images, end):
    directory, record, _ = run(train_mnist, *DENSE, *end)
    before = torch.load(directory / "best.pt", weights_only=True)
    (directory / "best.pt").unlink()
    words = end[2:] if "--stop-after" in end else []
    _, again, _ = run(train_mnist, "--resume", directory, *words, "--quiet")
    after = torch.load(directory / "best.pt", weights_only=True)
    assert states_are_equal(before, after) and again["test"] == record["test"]
    assert again["status"] == record["status"] and again["epochs"] == record["epochs"]


def test_a_run_that_stopped_early_has_nothing_to_do_with_less_patience(few_images, capsys):
    argv = [*DENSE, "--lr", 0.03, "--epochs", 40, "--tolerance", 3]
    directory, record, _ = run(train_mnist, *argv)
    before = (directory / "run.json").read_bytes()
    assert record["status"] == "stopped_early"
    for tolerance in (1, 2, 3):
        run(train_mnist, "--resume", directory, "--tolerance", tolerance)
        assert "stopped early after" in capsys.readouterr().out
    assert (directory / "run.json").read_bytes() == before


@pytest.mark.parametrize("output", ["out", "err"])
def test_an_output_that_takes_nothing_does_not_end_a_training(output):
    argv = [*map(str, DENSE[:-1]), "--epochs", "2", "--runs-dir", "runs", "--run-name", "r"]
    process = Forked("train_mnist", *argv, **{output: "/dev/full"})
    process.process.join(300)
    assert process.process.exitcode == 0
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["status"] == "finished" and record["test"]


def test_images_too_small_for_a_shift_are_one_line():
    status, error = Forked("train_mnist", *DENSE, "--shift", 28, "--runs-dir", "runs").finish()
    assert (status, error.count("\n")) == (2, 1) and not Path("runs").exists()
    assert "--shift 28: the images are too small" in error


def test_a_run_goes_on_with_the_script_that_began_it(few_images, capsys):
    directory, *_ = run(train_mnist, *DENSE, "--epochs", 2, "--stop-after", 1)
    with pytest.raises(SystemExit, match="2"):
        train_cifar.main(["--resume", str(directory)])
    error = capsys.readouterr().err
    assert "is a run of train_mnist.py" in error and error.count("\n") == 1
