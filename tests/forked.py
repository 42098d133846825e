"""A training run in a process forked from one that has imported torch: dozens of them start in seconds."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import torch

import common
import sweep
import train_cifar


def few(draw):
    """Synthetic data of 300 and 60 images rather than 10,000 and 2,000."""
    return lambda train: draw(300 if train else 60, int(train))


def train(directory, argv, dies_at, sizes):
    os.chdir(directory)
    torch.set_num_threads(1)
    train_cifar.synthetic = few(train_cifar.synthetic_shapes)
    if dies_at is not None:
        die_in_a_save(dies_at)
    if sizes:
        record_memory(sizes)
    train_cifar.main(argv)


def die_in_a_save(dies_at):
    """Kill this process at the `dies_at`-th step of its saves."""
    steps, fsync, replace = iter(range(dies_at)), os.fsync, Path.replace

    def step():
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    # Before the content of the temporary file is on the disk, before it is renamed, and after.
    os.fsync = lambda *arguments: (step(), fsync(*arguments), step())[1]
    Path.replace = lambda *arguments: (replace(*arguments), step())[0]


def resident():
    """The memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def record_memory(path):
    """Write `resident()` down at each epoch."""
    original = common.Run.write_log

    def write_log(run):
        with open(path, "a") as file:
            print(resident(), file=file)
        original(run)

    common.Run.write_log = write_log


def start(directory, argv, dies_at=None, sizes=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sweep.PRELOADED)
    process = context.Process(target=train, args=(directory, argv, dies_at, sizes))
    process.start()
    return process
