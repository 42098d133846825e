"""The five changes of CONTRIBUTING.md, as a student makes them in a copy: each in two places at
most, and a run that began before goes on to the bit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train_mnist

from conftest import ROOT, check_same, run

DENSE = "--dataset synthetic --model dense --schedule constant --quiet"
DENSE += " --augment --optimizer sgd --lr 0.01 --runs-dir runs"

# Of each change: the class or function, the line of the table that comes before the new one, the
# new one, and flags that use it.
CHANGES = [
    (  # a model
        '''class Wide(nn.Module):
    """One layer of `width` units, with a leak."""

    def __init__(self, image_shape, classes, width=16, leak=0.1, deep=False):
        super().__init__()
        self.leak, self.deep = leak, deep
        self.first = nn.Linear(math.prod(image_shape), width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, classes)

    def forward(self, x):
        x = F.leaky_relu(self.first(x.flatten(1)), self.leak)
        if self.deep:
            x = F.leaky_relu(self.second(x), self.leak)
        return self.last(x)
''',
        "MODELS = {\n",
        '    "wide": Wide,\n',
        "--model=wide --width=9 --leak=0.2 --deep",
    ),
    (  # a loss
        '''def focal(logits, labels, focus=2.0):
    """T.-Y. Lin et al., "Focal loss for dense object detection" (2017)."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** focus * losses
''',
        "LOSSES = {",
        '"focal": focal, ',
        "--loss=focal --focus=3 --class-weights=balanced",
    ),
    (  # an optimiser
        '''def rmsprop(weights, lr, precision, alpha=0.99):
    """torch's RMSprop."""
    return [torch.optim.RMSprop(weights, lr, alpha)]
''',
        "OPTIMIZERS = {\n",
        '    "rmsprop": rmsprop,\n',
        "--optimizer=rmsprop --alpha=0.9",
    ),
    (  # a schedule
        "",
        "SCHEDULES = {\n",
        '    "root": lambda progress: (1 - progress) ** 0.5,\n',
        "--schedule=root",
    ),
    (  # an augmentation
        '''def cut_out(images, pixels, random):
    """Blacken a square of so many pixels, anywhere in each image."""
    height, width = images.shape[-2:]
    top = (one_each(images, random) * height).long()
    left = (one_each(images, random) * width).long()
    down = torch.arange(height, device=images.device).view(-1, 1) - top
    right = torch.arange(width, device=images.device) - left
    inside = (down >= 0) & (down < pixels) & (right >= 0) & (right < pixels)
    return images.masked_fill(inside, 0)
''',
        '    "shift": (number(int, 0), "PIXELS", '
        '"move by up to so many along each axis", shift),\n',
        '    "cut_out": (number(int, 0), "PIXELS", "black square of so many pixels", cut_out),\n',
        "--cut-out=8",
    ),
]
PROGRAM = """
import json, sys, forked, train_mnist
train_mnist.synthetic = forked.few_digits
for argv in json.loads(sys.argv[1]):
    print(json.dumps(train_mnist.main(argv)), flush=True)
try:
    train_mnist.main(["--help"])
except SystemExit:
    pass
"""


def changed(text, definition, line, new):
    """The text of common.py with a definition before a table, and a new line in the table."""
    assert text.count(line) == 1
    end = text.index(line) + len(line)
    tables = re.finditer(r"^[A-Z]+\b.* = \{", text[:end], re.MULTILINE)
    start = max(match.start() for match in tables)
    return f"{text[:start]}{definition}\n\n{text[start:end]}{new}{text[end:]}"


def test_each_change_touches_two_places_and_a_run_of_before_goes_on_to_the_bit(few_images):
    """What CONTRIBUTING.md shows works, with its flags, and older runs do not notice."""
    argv = DENSE.split()
    whole, *_ = run(train_mnist, *argv, "--epochs", 2)
    cut, *_ = run(train_mnist, *argv, "--epochs", 2, "--stop-after", 1)

    # A copy with all five changes.
    copy = Path("copy")
    copy.mkdir()
    for name in ("records.py", "train_mnist.py", "train_cifar.py"):
        shutil.copy(ROOT / name, copy)
    text = (ROOT / "common.py").read_text()
    for definition, line, new, _ in CHANGES:
        text = changed(text, definition, line, new)
    (copy / "common.py").write_text(text)
    (copy / "program.py").write_text(PROGRAM)

    # In it, each new thing trains an epoch with its options, and the run of before goes on.
    flags = [flags for *_, flags in CHANGES]
    calls = [[*argv, "--epochs", "1", *each.split()] for each in flags]  # of two the last counts
    calls.append(["--resume", str(cut), "--quiet"])
    env = {"PYTHONPATH": f"{ROOT}/tests", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, copy / "program.py", json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    check_same(whole, cut)
    *lines, help_text = done.stdout.split("\n", len(calls))
    for line in lines:
        assert json.loads(line)["status"] == "finished"
    for flag in " ".join(flags).split():
        assert flag.split("=")[0] in help_text
