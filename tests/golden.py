"""What must not change by accident: each model's first losses, and the flags of the command lines.

python tests/golden.py        # writes golden.json anew, when a change is meant
"""

import json
import sys
import tempfile
from pathlib import Path

PATH = Path(__file__).with_name("golden.json")
sys.path.insert(0, str(PATH.parent.parent))

import torch  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402
import sweep  # noqa: E402
import train_cifar  # noqa: E402
import train_mnist  # noqa: E402

SCRIPTS = {"train_mnist": train_mnist, "train_cifar": train_cifar}
MODELS = {
    "dense": ("train_mnist", []),
    "cnn": ("train_mnist", []),
    "convnet": ("train_cifar", []),
    "confignet": ("train_cifar", ["--c1", "8", "--c2", "16", "--l1", "32"]),
    "fastnet": ("train_cifar", ["--recipe", "fast", "--c1", "8", "--c2", "16", "--c3", "16"]),
    "patchnet": ("train_mnist", ["--recipe", "fast"]),
}


def losses(model):
    """The losses of the first ten steps with the script's own settings, on the synthetic data, in fp32, one thread."""
    found, threads, original = [], torch.get_num_threads(), common.F.cross_entropy

    def recorded(*arguments, **options):
        loss = original(*arguments, **options)
        if torch.is_grad_enabled():
            found.append(loss.item())
        return loss

    script, options = MODELS[model]
    argv = [
        *options,
        "--dataset",
        "synthetic",
        "--model",
        model,
        "--epochs",
        "1",
        "--limit-train",
        "640",
        "--batch-size",
        "64",
    ]
    argv += ["--precision", "fp32", "--device", "cpu", "--no-test", "--quiet"]
    torch.set_num_threads(1)
    common.F.cross_entropy = recorded
    try:
        with tempfile.TemporaryDirectory() as runs:
            SCRIPTS[script].main([*argv, "--runs-dir", runs])
    finally:
        common.F.cross_entropy = original
        torch.set_num_threads(threads)
    return found[:10]


def flags():
    """{script: {flag: its default}}."""
    return {
        name: {
            action.option_strings[0] if action.option_strings else action.dest: str(action.default)
            for action in script.build_parser()._actions
        }
        for name, script in {**SCRIPTS, "sweep": sweep, "evaluate": evaluate}.items()
    }


if __name__ == "__main__":
    content = {"losses": {model: losses(model) for model in MODELS}, "flags": flags()}
    PATH.write_text(json.dumps(content, indent=1) + "\n")
