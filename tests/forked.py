"""A training script in a process forked from one that has imported torch: so dozens of them start
in seconds."""

import contextlib
import ctypes
import functools
import importlib
import io
import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util  # for `before`
import os
import resource  # noqa: F401 for `before`
import signal
import sys
from pathlib import Path

import common
import train_cifar
import train_mnist

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@functools.cache
def few_digits(train):
    """The synthetic images of train_mnist.py, but 300 and 60 of them."""
    return train_mnist.synthetic_digits(300 if train else 60, int(train))


@functools.cache
def few_shapes(train):
    """The synthetic images of train_cifar.py, but 300 and 60 of them."""
    return train_cifar.synthetic_shapes(300 if train else 60, int(train))


def start_server():
    """Start the process that others are forked from, also the workers of sweeps: their context."""
    context = multiprocessing.get_context("forkserver")
    names = "forked pytest torch._dynamo undrawn sweep pandas scipy.stats optuna._gp.optim_mixed"
    context.set_forkserver_preload(names.split())
    multiprocessing.forkserver.ensure_running()
    return context


class Forked:
    """`script.py` with the arguments `argv` and such few images, in the current directory.

    What it prints goes to the files `out` and `err`. `before` is code that is run before it, with
    the names that this file has, and `each_epoch` after every epoch of it.
    """

    def __init__(self, script, *argv, before="", each_epoch="", out="out", err="err"):
        self.err = Path(err)
        call = script, [str(argument) for argument in argv], before, each_epoch, out, err
        self.process = start_server().Process(target=as_a_program, args=call)
        self.process.start()

    def finish(self):
        """Wait for its end: the exit status, and what it said on stderr."""
        self.process.join(300)
        self.process.kill()
        return self.process.exitcode, self.err.read_text()


def as_a_program(script, argv, before, each_epoch, out, err):
    torch.set_num_threads(1)
    train_mnist.synthetic, train_cifar.synthetic = few_digits, few_shapes
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(descriptor, "w"), write_through=True) for descriptor in (1, 2)
    )
    sys.argv = [f"{script}.py", *argv]
    exec(before, globals())
    # A sweep that ran before in the tests' process has kept Ctrl-C from what it starts.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = importlib.import_module(script).main
    if script.startswith("train"):
        main = functools.partial(main, on_epoch=lambda row: exec(each_epoch, globals()))
    sys.exit(common.command_line(main))


def fork(path, arguments, descriptors):
    """Fork the server of a sweep's workers: as a new Python it would import torch for seconds. A
    sweep with this in place of multiprocessing.util.spawnv_passfds must not use W&B."""
    pid = os.fork()
    if pid:
        return pid
    for descriptor in {*range(3, 1000)}.difference(descriptors):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    try:
        exec(arguments[-1])
    finally:
        os._exit(0)


def signals_at(moments):
    """Send this process the signal `moments[n]` at its n-th event: an optimiser's step, or one of
    a save."""
    count, fsync, replace = itertools.count(), os.fsync, os.replace

    def event(*_):
        number = moments.get(next(count))
        if number:
            signal.raise_signal(number)

    register_optimizer_step_post_hook(event)
    # Before the content of the temporary file is on the disk, before it is renamed, and after.
    os.fsync = lambda *arguments: (event(), fsync(*arguments), event())
    os.replace = lambda *arguments: (replace(*arguments), event())


# Code that defines memory_in_use(): what is in use, and not what glibc keeps after it was freed.
MEMORY_IN_USE = """
import gc
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
def memory_in_use():
    gc.collect()
    found = mallinfo()
    return found.uordblks + found.hblkhd
"""


def as_an_ordinary_user():
    """Take all its capabilities from this process: root is to write only where it may."""
    version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, none) == 0
