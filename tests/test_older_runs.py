"""Runs that an older version began, and which figures of two runs may be compared."""

import json
from pathlib import Path

import common
import records
import train_cifar
import train_mnist

import pytest
from conftest import EVERYTHING_ON, check_same, run
from torch.nn.modules.module import register_module_forward_hook

pytestmark = pytest.mark.usefixtures("few_images")
# Of the arguments in an older run.json: those of all models and optimisers, whatever is chosen.
OLDER = {"c1": None, "c2": None, "c3": None, "l1": None, "d1": None, "kernel_size": None}
OLDER |= {"tutorial_layers": False, "momentum": 0.9, "aux_lr": 0.03, "weight_decay": 0.0}
NEWER = ("loss", "resize", "fold", "threads")
FAST = ["--recipe", "fast", "--dataset", "synthetic", "--batch-size", 64, "--c1", 8, "--c2", 8]
FAST += ["--c3", 8, "--val-size", 0.1, "--quiet"]


def made_older(directory, **changes):
    """Write run.json as an older version did. Returns it."""
    record = records.read_record(directory)
    args = {**OLDER, **record["args"], **changes}
    record["args"] = {name: value for name, value in args.items() if name not in NEWER}
    for name in ("val_checksum", "files", "files_checksum"):
        del record["data"][name]
    records.write_json(directory / "run.json", record)
    return record


@pytest.mark.parametrize(
    ("script", "argv", "changes"),
    [
        (train_cifar, EVERYTHING_ON, {}),
        (train_mnist, ["--dataset", "synthetic", "--model", "dense", "--quiet"], {}),
        (train_cifar, FAST, {"sizes": [20, 24, 32]}),  # it had pixels
    ],
)
def test_an_older_run_goes_on_as_it_would_have(script, argv, changes):
    whole, _, _ = run(script, *argv, "--epochs", 3)
    cut, _, _ = run(script, *argv, "--epochs", 3, "--stop-after", 1)
    before = made_older(cut, **changes)
    assert (
        script is train_cifar
        or before["args"].items() >= {"augment": False, "rotation": 10}.items()
    )
    run(script, "--resume", cut, "--quiet")
    check_same(whole, cut)


def test_what_an_older_run_cannot_go_on_with_is_refused_in_a_line(tmp_path, capsys):
    argv = [*EVERYTHING_ON, "--epochs", 3, "--stop-after", 1]
    weighted, _, _ = run(train_cifar, *argv, "--class-weights", "balanced")
    unknown, _, _ = run(train_cifar, *argv)
    folder, _, _ = run(train_cifar, *argv)
    made_older(weighted)
    made_older(unknown, shear=3)
    made_older(folder, dataset=str(tmp_path))
    for directory, text in (
        (weighted, "--class-weights weighed the losses otherwise"),
        (unknown, "has --shear, which is not here"),
        (folder, "did not write down its images"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_cifar.main(["--resume", str(directory)])
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(records.RECORD))
def test_a_run_json_that_lacks_something_is_refused_in_a_line(name, capsys):
    Path("r").mkdir()
    record = {"format": 2, **dict.fromkeys(records.RECORD - {name})}
    Path("r/run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        train_mnist.main(["--resume", "r"])
    error = capsys.readouterr().err
    assert f"r/run.json is damaged: it has no {name}" in error and error.count("\n") == 1


def test_the_sizes_of_training_images_are_parts_of_their_side(monkeypatch):
    def larger(train):
        drawn = train_cifar.synthetic_shapes(100, int(train))
        pixels = drawn.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return common.ImageSet(pixels, drawn.labels, drawn.classes)

    def see(net, inputs, _):
        if type(net) is common.MODELS["fastnet"] and inputs[0].device.type != "meta":
            sides.append((net.training, inputs[0].shape[-1]))

    sides = []
    monkeypatch.setattr(train_cifar, "synthetic", larger)
    handle = register_module_forward_hook(see)
    run(train_cifar, *FAST, "--epochs", 3, "--batch-size", 90)
    handle.remove()
    assert [side for training, side in sides if training] == [40, 48, 64]
    assert {side for training, side in sides if not training} == {64}


def test_one_function_says_which_figures_of_two_runs_may_be_compared():
    argv = [*EVERYTHING_ON, "--epochs", 1]
    flags = {
        "plain": "",
        "seed": "--seed 7",
        "smooth": "--label-smoothing 0.3",
        "lr": "--lr 0.02",
        "weights": "--class-weights balanced",
        "other part": "--val-size 0.2",
    }
    runs = {name: run(train_cifar, *argv, *flag.split())[1] for name, flag in flags.items()}
    runs["older"] = made_older(run(train_cifar, *argv)[0])

    def reasons(name):
        figures = ("val_loss", "val_acc", "test_loss", "test_acc")
        found = [common.why_not_comparable(runs["plain"], runs[name], figure) for figure in figures]
        assert found == [common.why_not_comparable(runs[name], runs["plain"], f) for f in figures]
        return [text.removeprefix("the runs differ in ") for text in found]

    assert reasons("plain") == reasons("lr") == reasons("older") == [""] * 4
    assert reasons("smooth") == ["--label-smoothing", "", "", ""]
    assert reasons("weights") == ["--class-weights", "", "", ""]
    assert reasons("seed") == reasons("other part") == ["val images", "val images", "", ""]
