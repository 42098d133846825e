"""Runs that an older version began, and which figures of two runs may be compared."""

import common
import records
import train_cifar

import pytest
from conftest import EVERYTHING_ON, check_same, exits_with_one_line, run
from test_data import pictures
from torch.nn.modules.module import register_module_forward_hook

pytestmark = pytest.mark.usefixtures("few_images")
# Of the arguments in an older run.json: those of all models and optimisers, whatever is chosen.
OLDER = dict.fromkeys(("c1", "c2", "c3", "l1", "d1", "kernel_size"))
OLDER |= {"tutorial_layers": False, "momentum": 0.9, "aux_lr": 0.03, "weight_decay": 0.0}
NEWER = ("loss", "resize", "fold", "threads")
FAST = "--recipe fast --dataset synthetic --batch-size 90 --c1 8 --c2 8"
FAST = f"{FAST} --c3 8 --val-size 0.1 --quiet --epochs 3".split()


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
    ("argv", "changes"),
    [
        ([*EVERYTHING_ON, "--epochs", 3], {}),
        (FAST, {"sizes": [20, 24, 32]}),  # it had pixels
    ],
)
def test_an_older_run_goes_on_as_it_would_have(argv, changes):
    """A run of before an update of the scripts ends as it would have without the update."""
    whole, *_ = run(train_cifar, *argv)
    cut, *_ = run(train_cifar, *argv, "--stop-after", 1)
    made_older(cut, **changes)
    run(train_cifar, "--resume", cut, "--quiet")
    check_same(whole, cut)


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        (["--class-weights", "balanced"], {}, "--class-weights weighed the losses otherwise"),
        ([], {"shear": 3}, "has --shear, which is not here"),
        ([], {"dataset": "/photos"}, "did not write down its images"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_in_a_line(capsys, flags, changes, expected):
    """The line says what the run has that this version lacks, or does otherwise."""
    directory, *_ = run(train_cifar, *EVERYTHING_ON, "--epochs", 3, "--stop-after", 1, *flags)
    made_older(directory, **changes)
    line = exits_with_one_line(capsys, "--resume", directory, main=train_cifar.main)
    assert expected in line


def test_the_sizes_of_training_images_are_parts_of_their_side():
    """--sizes is for images of any side; the validation sees the whole ones."""

    def see(net, inputs, _):
        images = inputs[0]
        if type(net) is common.MODELS["fastnet"] and images.device.type != "meta":
            sides.append((net.training, images.shape[-1]))

    sides = []
    pictures("p", {"a": 30, "b": 30})
    handle = register_module_forward_hook(see)
    run(train_cifar, *FAST, "--epochs", 4, "--dataset", "p", "--image-size", 64)
    handle.remove()
    assert [side for training, side in sides if training] == [40, 48, 64, 64]
    assert {side for training, side in sides if not training} == {64}


def test_one_function_says_which_figures_of_two_runs_may_be_compared():
    """It makes no difference which run comes first, and whether one is of an older version."""
    argv = [*EVERYTHING_ON, "--epochs", 1]
    directory, plain, _ = run(train_cifar, *argv)
    older = made_older(directory)
    figures = ("val_loss", "val_acc", "test_loss", "test_acc")
    for flags, *reasons in (
        ("", "", ""),
        ("--lr 0.02", "", ""),
        ("--label-smoothing 0.3", "--label-smoothing", ""),
        ("--class-weights balanced", "--class-weights", ""),
        ("--seed 7", "val images", "val images"),
        ("--val-size 0.2", "val images", "val images"),
    ):
        _, other, _ = run(train_cifar, *argv, *flags.split())
        expected = [reason and f"the runs differ in {reason}" for reason in (*reasons, "", "")]
        for pair in ((plain, other), (other, plain), (older, other), (other, older)):
            found = [common.why_not_comparable(*pair, figure) for figure in figures]
            assert found == expected
