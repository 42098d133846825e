"""Train a convolutional net on CIFAR-10, CIFAR-100, synthetic shapes or a folder of images.

    python train_cifar.py --dataset synthetic --epochs 2   # no download, a minute
    python train_cifar.py --c1 48 --epochs 50              # ConfigNet on CIFAR-10, the defaults' fine-tuning run
    python train_cifar.py --model convnet --batch-size 24 --epochs 10 --no-augment --lr 0.001
    python train_cifar.py --resume runs/<run>              # go on where it stopped

The defaults are the final run of the CIFAR-10 tutorial: ConfigNet 48-96-256, Adam at 0.0008, batches of 512,
augmentation, at most 50 epochs, early stopping after 6 without a lower validation loss.
"""

import sys

import common


def build_parser():
    parser = common.ArgumentParser(prog="train_cifar.py", description=__doc__)
    common.add_options(parser, datasets=("cifar10", "cifar100"))
    parser.set_defaults(
        dataset="cifar10", image_size=32, model="confignet", epochs=50, batch_size=512, lr=0.0008, tolerance=6,
        augment=True, rotation=20.0, brightness=0.2, hue=0.1, flip=0.5,
    )  # fmt: skip
    return parser


def main(argv=None):
    """Run the job; return the content of run.json and the run's `directory`."""
    return common.run_job(common.parse_arguments(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(common.command_line(main))
