"""Self-contained HTML pages of results: tables, images with captions, queries with their neighbours.

Every builder returns a string of HTML; texts are escaped, images become small JPEGs inside the page.
"""

import base64
import html
import io
from pathlib import Path

from PIL import Image, ImageOps

from data.images import open_image
from utils import atomic_write, logger

STYLE = '''
:root { --ink:#1c2330; --soft:#667085; --line:#e4e7ec; --good:#12805c; --good-bg:#e3f6ee;
  --bad:#b42318; --bad-bg:#fdeceb; }
* { box-sizing:border-box }
body { margin:0; background:#f5f6f8; color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1180px; margin:0 auto; padding:36px 24px 64px }
h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.02em }
h2 { font-size:18px; margin:40px 0 12px }
.note { color:var(--soft); margin:0 0 10px; max-width:80ch }
.card { background:#fff; border:1px solid var(--line); border-radius:14px; overflow:hidden;
  box-shadow:0 1px 2px #1018280d }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(172px,1fr)); gap:16px }
.card > img { width:100%; aspect-ratio:1; object-fit:cover; display:block }
.text { padding:12px 14px 14px }
.who { font-size:11px; font-weight:600; letter-spacing:.06em; text-transform:uppercase; color:var(--soft);
  margin-top:8px }
.who:first-child { margin-top:0 }
.said { padding:5px 9px; border-radius:8px; font-size:14px; line-height:1.4; background:#f2f4f7; margin-top:4px }
.said.right { background:var(--good-bg); color:var(--good) } .said.wrong { background:var(--bad-bg); color:var(--bad) }
details { margin-top:10px; font-size:13px; color:var(--soft) } summary { cursor:pointer }
details ul { margin:4px 0 0; padding-left:18px }
.query { display:flex; gap:18px; align-items:center; padding:14px 18px; margin-bottom:12px }
.query > .ask { flex:0 0 250px; font-weight:600 } .query > .ask img { width:130px; border-radius:10px; display:block }
.row { display:flex; gap:10px; flex-wrap:wrap }
.hit { width:128px; text-align:center; font-size:12px; color:var(--soft) }
.hit img { width:128px; border-radius:10px; display:block; border:4px solid transparent }
.hit.right img { border-color:#1aa179 } .hit.right { color:var(--good); font-weight:600 }
.lines { flex:1; display:grid; gap:5px }
.lines .said { margin:0; display:flex; justify-content:space-between; gap:14px }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { padding:10px 11px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--line) }
th { font-size:11.5px; color:var(--soft); font-weight:600; background:#fafbfc } tr:last-child td { border-bottom:0 }
th:first-child,td:first-child { text-align:left; font-weight:600 }
figure { margin:0; padding:14px }
figure img { width:100% }
'''


def thumbnail(path: Path, side: int = 192) -> Image.Image:
    """The middle square of an image file at `side` pixels; grey if the file cannot be read."""
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError) as error:
        logger.warning('%s', error)
        return Image.new('RGB', (side, side), '#e4e7ec')
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def img(image: Image.Image) -> str:
    """An <img> with the image inside."""
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def mark(right: bool | None) -> str:
    """CSS class of something right, wrong, or unknown."""
    return {True: ' right', False: ' wrong', None: ''}[right]


def said(who: str, text: str, right: bool | None) -> str:
    label = f'<div class="who">{html.escape(who)}</div>' if who else ''
    return f'{label}<div class="said{mark(right)}">{html.escape(text) or "&nbsp;"}</div>'


def caption_card(path: Path, captions: list[tuple[str, str, bool | None]], references: list[str] = ()) -> str:
    """An image with captions (whose, text, right or wrong where known) above its references."""
    lines = ''.join(f'<li>{html.escape(text)}</li>' for text in references)
    listed = f'<details open><summary>references</summary><ul>{lines}</ul></details>' if references else ''
    return (f'<div class="card">{img(thumbnail(path))}<div class="text">{"".join(said(*c) for c in captions)}'
            f'{listed}</div></div>')


def image_hits(query: str, hits: list[tuple[Path, float, bool]]) -> str:
    """A text query with its top images (file, score, right), the right one framed."""
    cells = ''.join(f'<div class="hit{" right" if right else ""}">{img(thumbnail(path, 128))}{score:.2f}</div>'
                    for path, score, right in hits)
    return f'<div class="card query"><div class="ask">{html.escape(query)}</div><div class="row">{cells}</div></div>'


def text_hits(path: Path, hits: list[tuple[str, float, bool]]) -> str:
    """An image query with its top texts (text, score, right), the right ones marked."""
    lines = ''.join(f'<div class="said{" right" if right else ""}"><span>{html.escape(text)}</span>'
                    f'<span>{score:.2f}</span></div>' for text, score, right in hits)
    return (f'<div class="card query"><div class="ask">{img(thumbnail(path, 128))}</div>'
            f'<div class="lines">{lines}</div></div>')


def grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def figure(png: Path) -> str:
    """A PNG file inside the page."""
    return (f'<div class="card"><figure><img alt="{html.escape(png.stem)}" src="data:image/png;base64,'
            f'{base64.b64encode(png.read_bytes()).decode()}"></figure></div>')


def table(rows: list[dict]) -> str:
    """Rows of equal keys; the first column names the row."""
    def line(cells, tag: str) -> str:
        return f'<tr>{"".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)}</tr>'
    return (f'<div class="card scroll"><table>{line(rows[0], "th")}{"".join(line(row.values(), "td") for row in rows)}'
            f'</table></div>')


def section(title: str, content: str, note: str = '') -> str:
    remark = f'<p class="note">{html.escape(note)}</p>' if note else ''
    return f'<h2>{html.escape(title)}</h2>{remark}{content}'


def write_page(path: Path, title: str, sections: list[str], note: str = '') -> None:
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style><main>'
            f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>{"".join(sections)}</main>')
    with atomic_write(path, 'wb') as file:
        file.write(page.encode(errors='backslashreplace'))  # of names that are not UTF-8
