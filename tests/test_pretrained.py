"""Weights to begin with: of a file, of a run, of ImageNet; frozen, and fine-tuned."""

import shutil
from pathlib import Path
from urllib.error import URLError

import evaluate
import records
import train_cifar

import pytest
import torch
from conftest import check_same, run
from matplotlib.figure import Figure
from PIL import Image
from test_data import pictures
from test_files import evaluated, exits_with_one_line, fails_with_one_line
from torchvision import models, transforms

NETS = ("resnet18", "mobilenet_v3_small", "efficientnet_b0")
SMALL = ["--dataset", "p", "--image-size", 32, "--batch-size", 8, "--epochs", 3, "--quiet"]


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """The pictures are another file's tests, and take seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def photos():
    """Two classes of 15 small pictures, in the folder p."""
    pictures("p", {"a": 15, "b": 15})


def weights_file(name, path="weights.pth", wrap=lambda state: state, classes=1000):
    """A file with random weights of a net of torchvision; returns them."""
    torch.manual_seed(7)
    state = models.get_model(name, num_classes=classes).state_dict()
    torch.save(wrap(state), path)
    return state


def best_weights(directory):
    return records.load_checkpoint(Path(directory, "best.pt"))["weights"]


def changed(before, after):
    """The names of the tensors that differ."""
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# ------------------------ Frozen ------------------------
@pytest.mark.parametrize("name", NETS)
def test_a_frozen_net_trains_its_last_layer_alone_resumes_and_is_evaluated_and_exported(name):
    state = weights_file(name)
    argv = [*SMALL, "--model", name, "--weights", "weights.pth", "--freeze"]
    whole, record, _ = run(train_cifar, *argv, "--run-name", "whole")
    cut, *_ = run(train_cifar, *argv, "--run-name", "cut", "--stop-after", 1)
    Path("weights.pth").unlink()  # a run that goes on has its own
    (cut / "best.pt").unlink()
    run(train_cifar, "--resume", cut, "--quiet")
    check_same(whole, cut)

    # All but the head are those of the file, and are written once.
    weights = best_weights(whole)
    head = [key for key in weights if weights[key].shape != state[key].shape]
    assert len(head) == 2 and weights[head[0]].shape[0] == 2
    assert not changed(state, {key: weights[key] for key in weights if key not in head})
    sizes = {file: (whole / file).stat().st_size for file in ("best.pt", "last.pt", "frozen.pt")}
    assert sizes["best.pt"] + sizes["last.pt"] < sizes["frozen.pt"] / 10

    # What was validated on features is what comes out of pixels.
    for part, figures in (("val", record["best"]), ("test", record["test"])):
        metrics, _ = evaluated(whole, "--split", part)
        accuracy = figures.get("val_acc", figures.get("acc"))
        assert metrics["accuracy"] == pytest.approx(accuracy)
    evaluate.main([str(whole), "--quiet", "--export", "torch.export"])
    assert (whole / "model.pt2").exists()


def test_frozen_weights_that_were_changed_are_refused():
    for name in ("one", "other"):
        weights_file("resnet18", f"{name}.pth")
        argv = ["--model", "resnet18", "--weights", f"{name}.pth", "--freeze", "--stop-after", 1]
        run(train_cifar, *SMALL, *argv, "--run-name", name, "--seed", len(name))
    shutil.copy("runs/one/frozen.pt", "runs/other/frozen.pt")
    for call in (train_cifar.main, evaluate.main):
        argv = ["runs/other", "--quiet"]
        argv = ["--resume", *argv] if call is train_cifar.main else argv
        line = fails_with_one_line(*argv, main=call)
        assert "runs/other/frozen.pt is not that of this run" in line


def test_a_last_layer_that_is_a_convolution_is_trained_alone_too():
    state = weights_file("squeezenet1_1")
    argv = ["--model", "squeezenet1_1", "--weights", "weights.pth", "--freeze"]
    directory, record, _ = run(train_cifar, *SMALL, *argv)
    weights = best_weights(directory)
    own = {key: weights[key] for key in weights if not key.startswith("classifier.1.")}
    assert len(own) == len(weights) - 2 and not changed(state, own)
    assert evaluated(directory, "--split", "val")[0]["accuracy"] == record["best"]["val_acc"]


def test_a_frozen_net_takes_no_augmentation_but_flips_and_freezing_needs_weights(capsys):
    weights_file("resnet18")
    argv = [*SMALL, "--model", "resnet18", "--weights", "weights.pth", "--freeze"]
    for flag in (["--shift", 2], ["--rotation", 5], ["--sizes", "1/2,1"]):
        line = exits_with_one_line(capsys, *argv, *flag, main=train_cifar.main)
        assert f"{flag[0]} has no effect with --freeze" in line
    line = exits_with_one_line(capsys, *SMALL, "--freeze", main=train_cifar.main)
    assert "--freeze has no effect without --weights" in line


def test_a_frozen_net_learns_from_mirrored_images_too_but_not_at_flip_0():
    # The classes are each other's mirror images: who has learnt from both cannot tell them apart.
    for name, box in (("left", (0, 0, 16, 32)), ("right", (16, 0, 32, 32))):
        Path("sides", name).mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (32, 32), (number, 60, 90))
            image.paste((250, 200 - number, 160), box)
            image.save(Path("sides", name, f"{number}.png"))
    weights_file("resnet18")
    argv = ["--dataset", "sides", *SMALL[2:], "--model", "resnet18", "--weights", "weights.pth"]
    _, _, (*_, both) = run(train_cifar, *argv, "--freeze", "--epochs", 20)
    _, _, (*_, as_they_are) = run(train_cifar, *argv, "--freeze", "--epochs", 20, "--flip", 0)
    assert both["train_acc"] < 0.7 and as_they_are["train_acc"] == 1


# ------------------------ Fine-tuned ------------------------
def test_a_net_that_is_fine_tuned_learns_its_new_layer_ten_times_as_fast():
    state = weights_file("resnet18")
    argv = ["--model", "resnet18", "--weights", "weights.pth", "--lr", 0.01, "--stop-after", 1]
    directory, *_ = run(train_cifar, *SMALL, *argv)
    last = records.load_checkpoint(directory / "last.pt")
    groups = [last[f"optimizer_{index}"]["param_groups"][0] for index in (0, 1)]
    rates = [(group["initial_lr"], len(group["params"])) for group in groups]
    assert rates == [(0.01, 2), (0.001, len([*models.resnet18().parameters()]) - 2)]
    body = {name: tensor for name, tensor in last["model"].items() if name[:3] != "fc."}
    assert changed(state, body) >= {"conv1.weight", "layer4.1.conv2.weight", "bn1.running_mean"}


def test_a_fine_tuned_run_goes_on_to_the_bit_without_its_file():
    weights_file("mobilenet_v3_small")
    argv = [*SMALL, "--model", "mobilenet_v3_small", "--weights", "weights.pth"]
    whole, *_ = run(train_cifar, *argv, "--run-name", "whole")
    cut, *_ = run(train_cifar, *argv, "--run-name", "cut", "--stop-after", 1)
    Path("weights.pth").unlink()
    run(train_cifar, "--resume", cut, "--quiet")
    check_same(whole, cut)


# ------------------------ Files ------------------------
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_file_of_weights_may_have_a_level_more_and_the_names_of_several_gpus(key):
    state = weights_file(
        "resnet18", wrap=lambda state: {key: {f"module.{name}": state[name] for name in state}}
    )
    argv = ["--model", "resnet18", "--weights", "weights.pth", "--freeze"]
    directory, *_ = run(train_cifar, *SMALL, *argv)
    body = {name: best_weights(directory)[name] for name in state if name[:3] != "fc."}
    assert len(body) == len(state) - 2 and not changed(state, body)


def test_the_last_layer_is_new_even_where_the_number_of_classes_agrees():
    state = weights_file("resnet18", classes=2)
    argv = ["--model", "resnet18", "--weights", "weights.pth", "--freeze", "--lr", 1e-9]
    directory, *_ = run(train_cifar, *SMALL, *argv)
    assert changed(state, best_weights(directory)) == {"fc.weight", "fc.bias"}


def test_a_tensor_that_does_not_fit_is_named():
    changes = {
        "size mismatch for layer1.0.conv1.weight": lambda s: (
            s | {"layer1.0.conv1.weight": torch.ones(2)}
        ),
        'Unexpected key(s) in state_dict: "layer9.weight"': lambda s: (
            s | {"layer9.weight": torch.ones(2)}
        ),
        'Missing key(s) in state_dict: "bn1.bias"': lambda s: {
            k: s[k] for k in s if k != "bn1.bias"
        },
        'Missing key(s) in state_dict: "conv1.weight"': lambda s: {"epoch": 3, "net": s},
    }
    for text, change in changes.items():
        weights_file("resnet18", wrap=change)
        argv = ["--model", "resnet18", "--weights", "weights.pth"]
        line = fails_with_one_line(*SMALL, *argv, main=train_cifar.main, kind=records.RunError)
        assert text in line
    torch.save([1, 2], "weights.pth")
    line = fails_with_one_line(*SMALL, *argv, main=train_cifar.main)
    assert "weights.pth is no file of weights" in line
    Path("weights.pth").write_text("no weights")
    line = fails_with_one_line(
        *SMALL, "--model", "resnet18", "--weights", "weights.pth", main=train_cifar.main
    )
    assert "weights.pth is no file of weights" in line
    assert not Path("runs").exists()


# ------------------------ Runs ------------------------
ON_SYNTHETIC = ["--dataset", "p", "--model", "confignet", "--c1", 4, "--c2", 6, "--l1", 5]
ON_SYNTHETIC += ["--image-size", 24, "--batch-size", 8, "--epochs", 2, "--quiet", "--grey"]


def test_the_weights_of_a_run_bring_their_net_and_preprocessing():
    run(train_cifar, *ON_SYNTHETIC, "--run-name", "first", "--resize", "pad")
    shutil.copytree("p", "q")
    Path("q/b").rename("q/c")
    argv = ["--weights", "runs/first", "--epochs", 1, "--lr", 1e-9, "--quiet", "--freeze"]
    before = best_weights("runs/first")
    for folder, kept in (("p", True), ("q", False)):
        directory, record, _ = run(train_cifar, "--dataset", folder, *argv)
        args = record["args"]
        assert (args["model"], args["c1"], args["l1"]) == ("confignet", 4, 5)
        assert (args["image_size"], args["grey"], args["resize"]) == (24, True, "pad")
        after = best_weights(directory)
        moved = {name: (after[name] - before[name]).abs().max() for name in after}
        assert all(moved[name] == 0 for name in moved if not name.startswith("fc2."))
        assert (moved["fc2.weight"] < 1e-6) == kept  # the same classes: the last layer stays


@pytest.mark.parametrize("freeze", ["--freeze", "--no-freeze"])
def test_what_a_net_learns_before_its_first_epoch_is_kept_too(freeze):
    argv = ["--dataset", "p", "--recipe", "fast", "--c1", 4, "--c2", 4, "--c3", 4]
    argv += ["--image-size", 16, "--batch-size", 8, "--epochs", 1, "--quiet"]
    run(train_cifar, *argv, "--run-name", "first", "--val-size", 0.2)
    shutil.copytree("p", "q")
    for path in Path("q").glob("*/*"):
        Image.effect_noise((8, 8), 80).save(path)
    argv = ["--dataset", "q", "--weights", "runs/first", freeze, "--epochs", 1, "--quiet"]
    directory, *_ = run(train_cifar, *argv)
    before, after = best_weights("runs/first"), best_weights(directory)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["2.weight"], after["2.weight"]) == (freeze == "--freeze")


def test_a_run_has_the_mean_and_std_of_its_weights(capsys):
    first, *_ = run(train_cifar, *ON_SYNTHETIC, "--run-name", "first", "--normalize", "dataset")
    second, *_ = run(train_cifar, "--dataset", "p", "--weights", first, "--epochs", 1, "--quiet")
    one, other = (records.load_checkpoint(run / "best.pt") for run in (first, second))
    assert one["mean"] == other["mean"] != [0.5] and one["std"] == other["std"]
    argv = ["--dataset", "p", "--weights", first, "--normalize", "half"]
    line = exits_with_one_line(capsys, *argv, main=train_cifar.main)
    assert "--normalize has no effect with --weights" in line


# ------------------------ Nets of torchvision ------------------------
def test_imagenet_weights_bring_side_square_mean_and_std(monkeypatch):
    state = models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    argv = ["--dataset", "p", "--weights", "imagenet", "--model", "mobilenet_v3_small"]
    directory, record, _ = run(train_cifar, *argv, "--freeze", "--epochs", 1, "--quiet")
    config = records.load_checkpoint(directory / "best.pt")
    assert record["args"]["image_size"] == 224 and config["image_shape"] == [3, 224, 224]
    assert config["mean"] == [0.485, 0.456, 0.406] and config["std"] == [0.229, 0.224, 0.225]
    assert config["resize"] == "crop:0.875:bilinear"


def test_without_a_network_one_line_says_what_to_put_where(monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    argv = ["--dataset", "p", "--weights", "imagenet", "--quiet"]
    line = fails_with_one_line(*argv, main=train_cifar.main)
    assert "efficientnet_b0 could not be downloaded (" in line and "no route to host" in line
    assert "put https://" in line and "checkpoints" in line


def test_what_is_no_classifier_is_refused(capsys):
    for argv, text in (
        (["--model", "resnet19"], "invalid choice: 'resnet19'"),
        (["--model", "fcn_resnet50"], "invalid choice"),
        (["--weights", "nowhere"], "is no file and no run"),
        (["--weights", "imagenet", "--model", "fastnet"], "not fastnet"),
        (["--resize", "crop:2"], "expected stretch"),
    ):
        assert text in exits_with_one_line(capsys, *SMALL, *argv, main=train_cifar.main)
    line = fails_with_one_line(
        *SMALL, "--model", "googlenet", main=train_cifar.main, kind=records.UsageError
    )
    assert "googlenet" in line and "more than one output" in line


def test_grey_images_become_three_channels():
    weights_file("resnet18")
    argv = [*SMALL, "--model", "resnet18", "--weights", "weights.pth", "--grey", "--freeze"]
    directory, record, _ = run(train_cifar, *argv)
    assert records.load_checkpoint(directory / "best.pt")["image_shape"] == [1, 32, 32]
    assert evaluated(directory)[0]["accuracy"] == record["test"]["acc"]


def test_the_square_is_that_of_torchvision():
    from common import read_image

    random = torch.Generator().manual_seed(3)
    small = torch.randint(0, 256, (3, 30, 45), generator=random, dtype=torch.uint8)
    image = transforms.functional.to_pil_image(small).resize((450, 300), Image.Resampling.BICUBIC)
    image.save("wide.png")
    theirs = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )(image)
    ours = read_image(Path("wide.png"), 224, False, "crop:0.875:bicubic")
    assert (ours.float() - theirs.float()).abs().mean() < 1.5
    other = read_image(Path("wide.png"), 224, False, "crop")
    assert (other.float() - theirs.float()).abs().mean() > 10
