"""No picture is drawn: they are the tests' of other files, and take seconds."""

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot  # noqa: F401 (it takes a second to import)
from matplotlib.figure import Figure
from optuna.visualization import matplotlib as optunas


def nothing(*_, **__):
    """What is done in place of drawing."""


def nothing_is_drawn(change=setattr):
    """Have matplotlib save nothing, and Optuna draw nothing."""
    change(Figure, "savefig", nothing)
    for name in [name for name in vars(optunas) if name.startswith("plot_")]:
        change(optunas, name, nothing)
