"""A contact sheet: one PNG with the table, captioned images, queries with their top images, and the curves."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import open_image
from eval.page import thumbnail
from utils import atomic_write

WIDTH, MARGIN, GAP = 1600, 48, 20
PAPER, CARD, INK, SOFT, LINE = '#f5f6f8', '#ffffff', '#1c2330', '#667085', '#e4e7ec'
GOOD, BAD = '#12805c', '#b42318'


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's own files, so that the sheet looks the same on every machine."""
    import matplotlib
    name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / name, size)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels (a longer word stands alone)."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(word)
    return lines


class Sheet:
    """Draws from the top to the bottom; the paper grows as needed."""

    def __init__(self):
        self.paper = Image.new('RGB', (WIDTH, 2000), PAPER)
        self.pen = ImageDraw.Draw(self.paper)
        self.y = MARGIN

    def text(self, x: int, y: int, text: str, size: int = 15, colour: str = INK, bold: bool = False,
             width: int = WIDTH - 2 * MARGIN, right: bool = False) -> int:
        """Write wrapped text at (x, y); returns the y below it. `right`: x is the right edge."""
        face = font(size, bold)
        for line in wrap(text, face, width):
            self.pen.text((x, y), line, fill=colour, font=face, anchor='ra' if right else 'la')
            y += round(1.35 * size)
        return y

    def heading(self, title: str, note: str = '', size: int = 21) -> None:
        self.y = self.text(MARGIN, self.y, title, size, bold=True) + 4
        if note:
            self.y = self.text(MARGIN, self.y, note, 14, SOFT)
        self.y += 12

    def card(self, x: int, y: int, width: int, height: int) -> None:
        if y + height + 400 > self.paper.height:  # room for this block and the heading after it
            taller = Image.new('RGB', (WIDTH, y + height + 2000), PAPER)
            taller.paste(self.paper)
            self.paper, self.pen = taller, ImageDraw.Draw(taller)
        self.pen.rounded_rectangle((x, y, x + width, y + height), 14, CARD, LINE)

    def image(self, x: int, y: int, path: Path, side: int, frame: str | None = None) -> None:
        self.paper.paste(thumbnail(path, side), (x, y))
        if frame:
            self.pen.rectangle((x - 5, y - 5, x + side + 4, y + side + 4), outline=frame, width=5)

    def table(self, rows: list[dict[str, str]]) -> None:
        """Rows of equal keys; the first column names the row."""
        pitch, keys = 34, list(rows[0])
        self.card(MARGIN, self.y, WIDTH - 2 * MARGIN, pitch * (len(rows) + 1))
        step = (WIDTH - 2 * MARGIN - 300) // (len(keys) - 1)
        for i, row in enumerate([dict(zip(keys, keys, strict=True)), *rows]):
            for j, key in enumerate(keys):
                x = MARGIN + 18 if j == 0 else MARGIN + 282 + j * step
                self.text(x, self.y + pitch * i + 8, row[key], 15 if i else 13, INK if i else SOFT, bold=j == 0,
                          right=j > 0)
        self.y += pitch * (len(rows) + 1) + 36

    def captions(self, cards: list[tuple[Path, list[tuple[str, str, bool | None]]]], columns: int = 6) -> None:
        """Images with their captions (whose, text, right or wrong where known)."""
        width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
        for start in range(0, len(cards), columns):
            row, face = cards[start:start + columns], font(14)
            lines = max(sum(len(wrap(text, face, width - 28)) for _, text, _ in said) for _, said in row)
            height = width + 24 + 19 * lines + 28 * len(row[0][1])
            for i, (path, said) in enumerate(row):
                x = MARGIN + i * (width + GAP)
                self.card(x, self.y, width, height)
                self.image(x + 1, self.y + 1, path, width - 1)
                y = self.y + width + 14
                for who, text, right in said:
                    y = self.text(x + 14, y, who.upper(), 10, SOFT, bold=True)
                    colour = {True: GOOD, False: BAD, None: INK}[right]
                    y = self.text(x + 14, y, text, 14, colour, width=width - 28) + 10
            self.y += height + GAP
        self.y += 24

    def queries(self, queries: list[tuple[str, list[tuple[Path, float, bool]]]], side: int = 150) -> None:
        """Text queries, each with its top images; the right one is framed."""
        for query, hits in queries:
            self.card(MARGIN, self.y, WIDTH - 2 * MARGIN, side + 36)
            lines = wrap(query, font(18, bold=True), 520)
            self.text(MARGIN + 24, self.y + (side + 36 - 24 * len(lines)) // 2, query, 18, bold=True, width=520)
            for i, (path, _, right) in enumerate(hits):
                self.image(WIDTH - MARGIN - 18 - (len(hits) - i) * (side + 24) + 12, self.y + 18, path, side,
                           GOOD if right else None)
            self.y += side + 36 + 14
        self.y += 24

    def figure(self, png: Path) -> None:
        image = ImageOps.contain(open_image(png), (WIDTH - 2 * MARGIN - 32, 900))
        self.card(MARGIN, self.y, WIDTH - 2 * MARGIN, image.height + 32)
        self.paper.paste(image, ((WIDTH - image.width) // 2, self.y + 16))
        self.y += image.height + 32 + 24

    def save(self, path: Path) -> None:
        with atomic_write(path, 'wb') as file:
            self.paper.crop((0, 0, WIDTH, self.y + MARGIN - 24)).save(file, 'PNG', optimize=True)
