"""The house style of figures."""

from pathlib import Path

from matplotlib.figure import Figure

from shared_modules.files import write_whole

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
PURPLE, SKY_BLUE, AMBER = "#CC79A7", "#56B4E9", "#E69F00"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "figure.titlesize": 16,
    "font.size": 11,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def new_figure(height_inches, width_inches=12):
    """A figure of 150 dots per inch, 12 inches wide unless told, with letters that can be read at half that size.

    Example
    -------
    >>> new_figure(5).get_size_inches().tolist()
    [12.0, 5.0]
    """
    figure = Figure(figsize=(width_inches, height_inches), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def save_figure(figure, path):
    """Write a figure, whole or not at all.

    Arguments
    ---------
    figure : matplotlib.figure.Figure
    path : str or Path
        Its ending tells the format; PNG where it has none.

    Raises
    ------
    ValueError
        If matplotlib knows no such format.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "empty.svg"
    >>> save_figure(Figure(), path)
    >>> path.read_text()[:5]
    '<?xml'
    """
    with write_whole(path, "wb") as stream:
        figure.savefig(stream, format=Path(path).suffix.lstrip(".") or "png")
