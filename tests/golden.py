"""What must not change by accident: the first losses of each model, and the flags of each recipe.

python tests/golden.py dense cnn    # writes the losses of these models anew: the change is meant
python tests/golden.py recipes      # writes the flags of the recipes anew
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

LOSSES, RECIPES = (Path(__file__).with_name(name) for name in ("golden.json", "recipes.json"))
MODELS = {
    "dense": "train_mnist --model dense",
    "cnn": "train_mnist --model cnn",
    "convnet": "train_cifar --model convnet --limit-train 128 --val-size 0.0128",  # as it is slow
    "confignet": "train_cifar --model confignet --c1 8 --c2 16 --l1 32",
    "fastnet": "train_cifar --recipe fast --c1 8 --c2 16 --c3 16",
    "photonet": "train_cifar --recipe fast --model photonet --c1 4 --c2 8 --c3 8 --c4 16",
    "patchnet": "train_mnist --recipe fast --lr 0.06 --aux-lr 0.015",  # else rounding counts
    "sgd": "train_mnist --model dense --optimizer sgd --lr 0.1 --momentum 0.5 --weight-decay 0.1",
    "adamw": "train_mnist --model dense --optimizer adamw --lr 0.02 --weight-decay 0.9",
    "tutorial dense": "train_mnist --recipe tutorial --model dense",
    "tutorial confignet": "train_cifar --recipe tutorial --model confignet --c1 8 --c2 16 --l1 32",
}
COMMON = (
    "--dataset synthetic --epochs 3 --limit-train 256 --val-size 0.0256 --batch-size 64 "
    "--precision fp32 --device cpu --no-test --quiet"
)
# Of folders of two classes: the images to train on, those of the rarer class, and the median of the
# shorter sides. Some are about where --recipe photos begins to choose otherwise.
FOLDERS = [(20, 10, 48), (20, 10, 47), (30, 15, 64), (54, 14, 64), (53, 13, 64), (600, 300, 64)]
FOLDERS += [(2_000, 1_000, 64), (9_999, 5_000, 64), (10_000, 5_000, 64), (50_000, 25_000, 64)]
OF_THE_MACHINE = {"device", "precision", "data_dir", "runs_dir", "threads", "script", "argv"}
OF_THE_MACHINE |= {"directory", "listing", "typed"}


def losses(model):
    """The losses of three epochs with the script's own settings, on synthetic images, in fp32."""
    script, *argv = MODELS[model].split()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        argv = [*COMMON.split(), *argv, "--runs-dir", runs, "--run-name", "golden"]
        importlib.import_module(script).main(argv)
        rows = [json.loads(row) for row in Path(runs, "golden/log.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("train_loss", "val_loss")}


def recipes():
    """The values of all flags, {script and recipe: {flag: value}}, but for the machine's own."""
    found = {}
    for script in ("train_mnist", "train_cifar"):
        module = importlib.import_module(script)
        for name, recipe in module.RECIPES.items():
            if callable(recipe):
                found[f"{script} --recipe {name}"] = {
                    f"{images} images, {rarest} of one class, {side} pixels": recipe(
                        images, classes=2, rarest=rarest, side=side
                    )
                    for images, rarest, side in FOLDERS
                }
                continue
            flags = vars(module.parse_arguments(["--recipe", name]))
            found[f"{script} --recipe {name}"] = {
                flag: value for flag, value in flags.items() if flag not in OF_THE_MACHINE
            }
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for name in sys.argv[1:]:
        path = RECIPES if name == "recipes" else LOSSES
        content = json.loads(path.read_text()) if path is LOSSES else {}
        content.update(recipes() if path is RECIPES else {name: losses(name)})
        path.write_text(json.dumps(content, indent=1) + "\n")
