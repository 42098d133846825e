"""The first losses of each model, which must not change by accident.

python tests/golden.py dense cnn    # writes these anew into golden.json, where a change is meant
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

PATH = Path(__file__).with_name("golden.json")
MODELS = {
    "dense": "train_mnist --model dense",
    "cnn": "train_mnist --model cnn",
    "convnet": "train_cifar --model convnet",
    "confignet": "train_cifar --model confignet --c1 8 --c2 16 --l1 32",
    "fastnet": "train_cifar --recipe fast --c1 8 --c2 16 --c3 16",
    "patchnet": "train_mnist --recipe fast",
    "tutorial dense": "train_mnist --recipe tutorial --model dense",
    "tutorial confignet": "train_cifar --recipe tutorial --model confignet --c1 8 --c2 16 --l1 32",
}
COMMON = "--dataset synthetic --epochs 1 --limit-train 640 --batch-size 64 --precision fp32 --device cpu --quiet"


def losses(model):
    """The losses of the first ten steps with the script's own settings, on the synthetic data, in fp32, one thread."""
    found, original = [], F.cross_entropy

    def recorded(*arguments, **options):
        found.append(original(*arguments, **options))
        if len(found) == 10:
            raise KeyboardInterrupt  # that is enough
        return found[-1]

    script, *argv = f"{MODELS[model]} {COMMON}".split()
    torch.set_num_threads(1)
    F.cross_entropy = recorded
    try:
        with tempfile.TemporaryDirectory() as runs:
            importlib.import_module(script).main([*argv, "--runs-dir", runs])
    except KeyboardInterrupt:
        return [loss.item() for loss in found]
    finally:
        F.cross_entropy = original


if __name__ == "__main__":
    sys.path.insert(0, str(PATH.parent.parent))
    content = json.loads(PATH.read_text())
    content["losses"].update({model: losses(model) for model in sys.argv[1:]})
    PATH.write_text(json.dumps(content, indent=1) + "\n")
