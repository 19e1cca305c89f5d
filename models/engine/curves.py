"""Where a run can be watched: TensorBoard, Weights & Biases, and PNG files of its curves and samples."""

import hashlib
import json
import textwrap
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from data.images import open_image
from models.engine.logs import read_log
from utils import atomic_write


class Board:
    """Where a run can be watched: TensorBoard, and Weights & Biases if `train.wandb_project` is set.

    Args:
        first_step: events after it, which a killed process wrote, are hidden.

    Raises:
        ImportError: `train.wandb_project` without the package.
    """

    def __init__(self, output_dir: Path, config: dict, first_step: int):
        self.output_dir, self.wandb = output_dir, None
        self.writer = SummaryWriter(output_dir / 'tensorboard', purge_step=first_step)
        project = config['train']['wandb_project']
        if project:
            try:
                import wandb
            except ImportError:
                raise ImportError('train.wandb_project needs the package: pip install wandb') from None
            name = output_dir.resolve().name
            self.wandb = wandb.init(project=project, name=name, id=f'{name}-{config_hash(config)}', resume='allow',
                                    dir=output_dir, config=config)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        if self.wandb:
            self.wandb.log(values, step=step)

    def images(self, samples: list[tuple[Path, str]], step: int) -> None:
        """(image, caption) side by side, also as `samples.png`."""
        figure = image_grid(samples)
        with atomic_write(self.output_dir / 'samples.png', 'wb') as file:
            figure.savefig(file, dpi=110, format='png')
        if self.wandb:
            import wandb
            self.wandb.log({'samples': wandb.Image(str(self.output_dir / 'samples.png'))}, step=step)
        self.writer.add_figure('samples', figure, step)  # closes it
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


def config_hash(config: dict) -> str:
    return hashlib.sha1(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def image_grid(samples: list[tuple[Path, str]], columns: int = 4):
    """A matplotlib figure of images with their captions."""
    plt = pyplot()
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(2.8 * columns, 2.9 * rows))
    for axis in axes.flat:
        axis.axis('off')
    for axis, (path, caption) in zip(axes.flat, samples, strict=False):
        image = open_image(path)
        image.thumbnail((512, 512))
        axis.imshow(image)
        axis.set_title(textwrap.fill(caption, 34), fontsize=8)
    figure.tight_layout()
    return figure


def pyplot():
    """matplotlib without a screen."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def plot_curves(logs: list[Path], png: Path) -> None:
    """Draw every `train_*`, `val_*` and `test_*` number of JSON-lines logs over the epochs, one small panel each.

    A record's x position is its `progress` (fractional epoch) or, at the end of an epoch, `epoch` + 1. Numbers that
    are logged at both are drawn from the former. A series of one value is not drawn.
    """
    plt = pyplot()
    series: dict[str, list[tuple[float, float]]] = {}
    rows = [row for log in logs for row in read_log(log)]
    finer = {name for row in rows if 'progress' in row for name in row}  # their epoch means would look like spikes
    for row in rows:
        for name, value in row.items():
            if name.startswith(('train_', 'val_', 'test_')) and isinstance(value, int | float) and (
                    'progress' in row or name not in finer):
                series.setdefault(name, []).append((row.get('progress', row['epoch'] + 1), value))
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(3.2 * columns, 2.3 * rows))
    for axis in axes.flat[len(series):]:
        axis.axis('off')
    for axis, (name, points) in zip(axes.flat, series.items(), strict=False):
        axis.plot(*zip(*sorted(points), strict=True), marker='.', markersize=3, linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel('epoch', fontsize=8)
    figure.tight_layout()
    with atomic_write(png, 'wb') as file:
        figure.savefig(file, dpi=110, format='png')
    plt.close(figure)
