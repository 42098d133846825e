"""Train a dense net or a CNN on MNIST, FashionMNIST, KMNIST, synthetic digits or a folder of images.

    python train_mnist.py --dataset synthetic --epochs 3   # no download, half a minute
    python train_mnist.py                                  # the CNN on MNIST
    python train_mnist.py --model dense
    python train_mnist.py --resume runs/<run> --epochs 20  # ten epochs more

The defaults are the MNIST tutorial's: Adam at 0.001, batches of 64, 10 epochs, no augmentation.
"""

import sys

import common


def build_parser():
    parser = common.ArgumentParser(prog="train_mnist.py", description=__doc__)
    common.add_options(parser, datasets=("mnist", "fashion-mnist", "kmnist"))
    parser.set_defaults(
        dataset="mnist", image_size=28, model="cnn", epochs=10, batch_size=64, lr=0.001, tolerance=0,
        augment=False, rotation=10.0, brightness=0.2, hue=0.0, flip=0.0,
    )  # fmt: skip
    return parser


def main(argv=None):
    """Run the job; return the content of run.json and the run's `directory`."""
    return common.run_job(common.parse_arguments(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(common.command_line(main))
