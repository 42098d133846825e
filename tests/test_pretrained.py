"""Weights to begin with: of a file, of a run, of ImageNet; frozen, and fine-tuned."""

import shutil
from pathlib import Path
from urllib.error import URLError

import common
import evaluate
import records
import train_cifar

import pytest
import torch
import undrawn
from conftest import check_same, run
from PIL import Image
from test_data import pictures
from test_files import evaluated, exits_with_one_line, fails_with_one_line
from torchvision import models, transforms

SMALL = ["--dataset", "p", "--image-size", 32, "--batch-size", 8, "--epochs", 3, "--quiet"]
RESNET = [*SMALL, "--model", "resnet18", "--weights", "weights.pth"]


@pytest.fixture(autouse=True)
def photos(monkeypatch):
    """Two classes of 15 small pictures, in the folder p. Others' pictures are not drawn."""
    undrawn.nothing_is_drawn(monkeypatch.setattr)
    pictures("p", {"a": 15, "b": 15})


def weights_file(name="resnet18", path="weights.pth", wrap=lambda state: state, classes=1000):
    """A file with random weights of a net of torchvision; returns them."""
    torch.manual_seed(7)
    state = models.get_model(name, num_classes=classes).state_dict()
    torch.save(wrap(state), path)
    return state


def train(*argv):
    return run(train_cifar, *argv)


def best(directory):
    return records.load_checkpoint(Path(directory, "best.pt"))


def changed(before, after):
    """The names of the tensors that differ."""
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# ------------------------ Frozen ------------------------
@pytest.mark.parametrize(
    "name, head, key",
    [
        ("mobilenet_v3_small", "classifier.3", "state_dict"),
        ("squeezenet1_1", "classifier.1", "model"),  # a convolution
    ],
)
def test_a_frozen_net_trains_its_last_layer_alone_resumes_and_is_evaluated(name, head, key):
    # The file has a level more, and the names of several GPUs.
    state = weights_file(name, wrap=lambda state: {key: {f"module.{k}": state[k] for k in state}})
    argv = [*SMALL, "--model", name, "--weights", "weights.pth", "--freeze", "--grey"]
    whole, record, _ = train(*argv)
    cut, *_ = train(*argv, "--stop-after", 1)
    Path("weights.pth").unlink()  # a run that goes on has its own
    (cut / "best.pt").unlink()
    train("--resume", cut, "--quiet")
    check_same(whole, cut)

    # All but the head are those of the file, and are written once.
    weights = best(whole)["weights"]
    trained = {f"{head}.weight", f"{head}.bias"}
    assert weights.keys() == state.keys()
    assert changed(state, weights) == trained
    sizes = {path.name: path.stat().st_size for path in whole.glob("*.pt")}
    assert sizes["best.pt"] + sizes["last.pt"] < sizes["frozen.pt"] / 10

    # What was validated on features is what comes out of pixels, of one grey channel.
    assert best(whole)["image_shape"] == [1, 32, 32]
    for part, expected in (("val", record["best"]["val_acc"]), ("test", record["test"]["acc"])):
        assert evaluated(whole, "--split", part)[0]["accuracy"] == pytest.approx(expected)


def test_frozen_weights_that_were_changed_are_refused():
    weights_file()
    for name in ("one", "other"):
        train(*RESNET, "--freeze", "--stop-after", 1, "--run-name", name, "--seed", len(name))
    shutil.copy("runs/one/frozen.pt", "runs/other/frozen.pt")
    for main, argv in (
        (train_cifar.main, ["--resume", "runs/other"]),
        (evaluate.main, ["runs/other", "--quiet"]),
    ):
        line = fails_with_one_line(*argv, main=main)
        assert "runs/other/frozen.pt is not that of this run" in line


def test_a_frozen_net_learns_from_mirrored_images_too_but_not_at_flip_0():
    # The classes are each other's mirror images: who has learnt from both cannot tell them apart.
    shutil.rmtree("p")
    for name, left in (("left", 0), ("right", 16)):
        Path("p", name).mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (32, 32), (number, 60, 90))
            image.paste((250, 200 - number, 160), (left, 0, left + 16, 32))
            image.save(Path("p", name, f"{number}.png"))
    weights_file()
    argv = [*RESNET, "--freeze", "--epochs", 20]
    assert train(*argv)[2][-1]["train_acc"] < 0.7
    assert train(*argv, "--flip", 0)[2][-1]["train_acc"] == 1


# ------------------------ Fine-tuned ------------------------
def test_a_net_that_is_fine_tuned_learns_its_new_layer_ten_times_as_fast_and_goes_on():
    state = weights_file()
    argv = [*RESNET, "--lr", 0.01, "--epochs", 2]
    whole, *_ = train(*argv)
    cut, *_ = train(*argv, "--stop-after", 1)
    last = records.load_checkpoint(cut / "last.pt")
    groups = [last[f"optimizer_{index}"]["param_groups"][0] for index in (0, 1)]
    rates = [(group["initial_lr"], len(group["params"])) for group in groups]
    assert rates == [(0.01, 2), (0.001, len([*models.resnet18().parameters()]) - 2)]
    del last["model"]["fc.weight"], last["model"]["fc.bias"]
    assert changed(state, last["model"]) >= {"conv1.weight", "layer4.1.conv2.weight"}
    Path("weights.pth").unlink()
    train("--resume", cut, "--quiet")
    check_same(whole, cut)


def test_the_last_layer_is_new_even_where_the_number_of_classes_agrees():
    state = weights_file(classes=2)
    directory, *_ = train(*RESNET, "--freeze", "--lr", 1e-9)
    assert changed(state, best(directory)["weights"]) == {"fc.weight", "fc.bias"}


def test_a_file_that_does_not_fit_is_refused_with_the_name_of_a_tensor():
    state = weights_file()
    for content, expected in (
        (state | {"layer1.0.conv1.weight": torch.ones(2)}, "mismatch for layer1.0.conv1.weight"),
        (state | {"layer9.weight": torch.ones(2)}, 'Unexpected key(s) in state_dict: "layer9'),
        ({"epoch": 3, "net": state}, 'Missing key(s) in state_dict: "conv1.weight"'),
        ([1, 2], "weights.pth is no file of weights"),
        (None, "weights.pth is no file of weights"),
    ):
        torch.save(content, "weights.pth")
        if content is None:
            Path("weights.pth").write_text("no weights")
        assert expected in fails_with_one_line(*RESNET, main=train_cifar.main)
    assert not Path("runs").exists()


# ------------------------ Runs ------------------------
def test_the_weights_of_a_run_bring_their_net_and_preprocessing():
    argv = [*SMALL, "--model", "confignet", "--c1", 4, "--c2", 6, "--l1", 5, "--image-size", 24]
    first, *_ = train(*argv, "--grey", "--resize", "pad", "--normalize", "dataset")
    before = best(first)
    shutil.copytree("p", "q")
    Path("q/b").rename("q/c")
    argv = ["--weights", first, "--epochs", 1, "--lr", 1e-9, "--quiet", "--freeze"]
    for folder, kept in (("p", True), ("q", False)):
        after = best(train("--dataset", folder, *argv)[0])
        for name in ("model", "c1", "l1", "image_shape", "resize", "mean", "std"):
            assert after[name] == before[name], name
        head = {name: after["weights"].pop(name) for name in ("fc2.weight", "fc2.bias")}
        assert not changed(before["weights"], after["weights"])
        moved = (head["fc2.weight"] - before["weights"]["fc2.weight"]).abs().max()
        assert (moved < 1e-6) == kept  # the same classes: the last layer stays
    assert before["mean"] != [0.5]


@pytest.mark.parametrize("freeze", ["--freeze", "--no-freeze"])
def test_what_a_net_learns_before_its_first_epoch_is_kept_too(freeze):
    argv = ["--recipe", "fast", "--c1", 4, "--c2", 4, "--c3", 4, "--val-size", 0.2]
    first, *_ = train(*SMALL, *argv)
    for path in Path("p").glob("*/*"):
        Image.effect_noise((8, 8), 80).save(path)
    directory, *_ = train(*SMALL[:2], "--weights", first, freeze, "--epochs", 1, "--quiet")
    moved = changed(best(first)["weights"], best(directory)["weights"])
    assert "0.weight" not in moved
    assert ("2.weight" in moved) == (freeze == "--no-freeze")


# ------------------------ Nets of torchvision ------------------------
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"


def test_imagenet_weights_bring_side_square_mean_and_std(monkeypatch):
    state = models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: state)
    argv = ["--dataset", "p", "--weights", "imagenet", "--model", "mobilenet_v3_small"]
    config = best(train(*argv, "--freeze", "--epochs", 1, "--quiet")[0])
    assert config["image_shape"] == [3, 224, 224]
    assert config["resize"] == "crop:0.875:bilinear"
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert config["std"] == [0.229, 0.224, 0.225]


def test_without_a_network_one_line_says_what_to_put_where(monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(DOWNLOAD, fail)
    argv = ["--dataset", "p", "--weights", "imagenet", "--quiet"]
    line = fails_with_one_line(*argv, main=train_cifar.main)
    assert "(no route to host); put https://" in line
    assert "checkpoints" in line


def test_what_does_not_go_together_is_refused(capsys):
    weights_file()
    frozen = [*RESNET, "--freeze"]
    for argv, text in (
        ([*SMALL, "--model", "resnet19"], "invalid choice: 'resnet19'"),
        ([*SMALL, "--model", "fcn_resnet50"], "invalid choice"),
        ([*SMALL, "--weights", "nowhere"], "is no file and no run"),
        ([*SMALL, "--weights", "imagenet", "--model", "fastnet"], "not fastnet"),
        ([*SMALL, "--freeze"], "--freeze has no effect without --weights"),
        ([*frozen, "--shift", 2], "--shift has no effect with --freeze"),
        ([*frozen, "--sizes", "1/2,1"], "--sizes has no effect with --freeze"),
        (
            ["--dataset", "p", "--weights", "imagenet", "--normalize", "half"],
            "--normalize has no effect with --weights",
        ),
    ):
        assert text in exits_with_one_line(capsys, *argv, main=train_cifar.main)
    argv = [*SMALL, "--model", "googlenet"]
    line = fails_with_one_line(*argv, main=train_cifar.main, kind=records.UsageError)
    assert "googlenet" in line
    assert "more than one output" in line


def test_the_square_is_that_of_torchvision():
    noise = Image.effect_noise((45, 30), 200)
    image = noise.resize((450, 300), Image.Resampling.BICUBIC)
    image.save("wide.png")
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.CenterCrop(224)(transforms.Resize(256, bicubic)(image))
    theirs = transforms.functional.pil_to_tensor(theirs).float()

    def difference(way):
        ours = common.read_image(Path("wide.png"), 224, True, way)
        return (ours - theirs).abs().mean()

    assert difference("crop:0.875:bicubic") < 1.5
    assert difference("crop") > 10
