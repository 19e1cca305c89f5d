"""A web page on this machine: caption an image, search a folder by a text or an image.

    python -m prod.app --caption output/demo/caption/best.pth --retrieval output/demo/retrieval/best.pth \\
      --folder output/demo/data/flickr30k/flickr30k-images --index output/demo/index

`--caption data/demo_teacher.pth --retrieval data/demo_teacher.pth --folder prod/examples --index output/examples_index`
works in a fresh clone. The page answers only to this machine unless `--host` says otherwise. It sends nothing anywhere,
fetches no URL, and refuses requests that another web page makes. Uploads and thumbnails lie in a private temporary
folder, which is deleted when the page stops. Needs gradio (requirements-dev.txt).
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from configs.rules import output_path, whole
from prod import DLIPProd
from prod.images import read_image
from prod.index import ImageIndex
from prod.options import net_options, net_settings
from utils import clean_exit, logger, shown

SHOWN = 384  # pixels, the longer side of an image that was found
FONTS = ['system-ui', 'sans-serif']  # gradio's own would be fetched from the network
LOCAL = ('localhost', '127.0.0.1', '::1')
ANY_ADDRESS = ('0.0.0.0', '::')
CHECK_CACHE, KEEP_CACHED = 600, 3600  # seconds: uploads and thumbnails older than an hour are deleted while it runs


def thumbnail(path: str) -> Image.Image:
    """A small copy of an image file; grey if the file cannot be read any more."""
    try:
        image = read_image(path, path)
    except ValueError as error:
        logger.warning('%s', error)
        return Image.new('RGB', (SHOWN, SHOWN), '#e4e7ec')
    image.thumbnail((SHOWN, SHOWN))
    return image


class SameSite:
    """ASGI middleware that answers only requests to the page's own hosts that the page itself, or nobody's page, makes.

    A website that a visitor has open could otherwise read the indexed images (by DNS rebinding: its own host name made
    to point here, so that the browser takes the page for its own) or fill the upload folder (by cross-site posts).

    Args:
        host: the address to answer to. With an address that stands for all of them (0.0.0.0), every IP address and this
            machine's name are hosts of the page too: rebinding needs a name.
    """

    def __init__(self, app, host: str):
        self.app, self.any_address = app, host in ANY_ADDRESS
        self.hosts = {*LOCAL, host.lower()} | ({socket.gethostname().lower(), socket.getfqdn().lower()}
                                               if self.any_address else set())

    async def __call__(self, scope, receive, send):
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope['type'] in ('http', 'websocket'):
            reason = self.refusal(Headers(scope=scope), scope['path'])
            if reason:
                return await PlainTextResponse(reason, 403)(scope, receive, send)
        return await self.app(scope, receive, send)

    def refusal(self, headers, path: str) -> str | None:
        """Why a request is refused; None: it is answered."""
        host, origin = headers.get('host', ''), headers.get('origin')
        if not self.is_own(host):
            return 'This page does not answer to that host: see --host.'
        from_elsewhere = headers.get('sec-fetch-site') == 'cross-site' and headers.get('sec-fetch-mode') != 'navigate'
        if from_elsewhere or (origin is not None and urlsplit(origin).netloc.lower() != host.lower()):
            return 'This page does not answer to other web pages.'
        if any(scheme in path.lower() for scheme in ('=http:', '=https:')):
            return 'This page fetches no URL.'
        return None

    def is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f'//{host}').hostname or ''
            return name in self.hosts or (self.any_address and bool(ipaddress.ip_address(name)))
        except ValueError:
            return False


def without_urls(move):
    """A gradio block's way to bring a file into its cache, which downloads a URL; without that."""
    async def local_only(path):
        if path is not None and str(path).lower().startswith(('http:', 'https:')):
            raise ValueError('this page fetches no URL')
        return await move(path)
    return local_only


@contextmanager
def private_cache():
    """A folder for gradio's uploads and thumbnails that only this user can read; deleted at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # by default the process would end before the folder is gone
    folder = tempfile.mkdtemp(prefix='dlip-page-', dir=os.environ.get('GRADIO_TEMP_DIR'))  # mode 0700
    os.environ['GRADIO_TEMP_DIR'] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(captioner: DLIPProd, retriever: DLIPProd, index: ImageIndex):
    """The page: a `gradio.Blocks` with a tab for captions and one for search."""
    import gradio

    def upload(**look) -> gradio.Image:
        """An image that comes as the uploaded file: DLIPProd reads it, and says what is wrong with it."""
        image = gradio.Image(sources=['upload', 'clipboard'], **look)
        image.preprocess = lambda payload: payload and payload.path
        return image

    def asked(function, *arguments):
        try:
            return function(*arguments)
        except (TypeError, ValueError) as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from None

    def caption(image: str | None, count: float, sample: bool) -> str:
        if image is None:
            raise gradio.Error('Choose an image first.', print_exception=False)
        count = int(count)
        beams = {} if sample else {'num_beams': max(3, count)}
        said = asked(lambda: captioner.generate(image, sample=sample, num_captions=count, **beams))[0]
        return said if count == 1 else '\n'.join(said)

    def search(text: str, image: str | None, count: float, rerank: bool) -> list[tuple[Image.Image, str]]:
        if not text.strip() and image is None:
            raise gradio.Error('Write a text, or choose an image.', print_exception=False)
        query = text if text.strip() else Path(image)
        count = int(count)
        hits = asked(lambda: retriever.search(query, index, count, rerank=4 * count if rerank else 0))
        return [(thumbnail(path), f'{score:.3f}  {shown(Path(path).name)}') for path, score in hits]

    with gradio.Blocks(title='DLIP', analytics_enabled=False, delete_cache=(CHECK_CACHE, KEEP_CACHED)) as page:
        gradio.Markdown('# DLIP\nCaptions and search by a small vision-language model, on this machine.')
        with gradio.Tab('Caption an image'), gradio.Row():
            with gradio.Column():
                image = upload(label='Image', height=360)
                count = gradio.Slider(1, 5, 1, step=1, label='Captions')
                sample = gradio.Checkbox(label='Draw at random instead of the most likely ones')
                go = gradio.Button('Caption', variant='primary')
            said = gradio.Textbox(label='Caption', lines=5, buttons=['copy'])
            go.click(caption, [image, count, sample], said)
        with gradio.Tab('Search a folder'):
            with gradio.Row():
                with gradio.Column(scale=2):
                    text = gradio.Textbox(label=f'What is in the image? ({len(index)} images)')
                    with gradio.Row():
                        wanted = gradio.Slider(1, 20, min(8, len(index)), step=1, label='Images')
                        rerank = gradio.Checkbox(True, label='Compare the nearest again by matching (texts)')
                    find = gradio.Button('Search', variant='primary')
                like = upload(height=220, label='Or one that looks like this')
            found = gradio.Gallery(label='Found', columns=4, height='auto')
            for event in (find.click, text.submit):
                event(search, [text, like, wanted, rerank], found)
    for block in page.blocks.values():
        if hasattr(block, 'async_move_resource_to_block_cache'):
            block.async_move_resource_to_block_cache = without_urls(block.async_move_resource_to_block_cache)
    return page


def serve(page, host: str, port: int, max_upload: str) -> None:
    """Answer to requests until SIGINT or SIGTERM.

    Raises:
        OSError: the address cannot be listened to; names host and port.
    """
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    app = FastAPI(middleware=[Middleware(SameSite, host=host)])
    gradio.mount_gradio_app(
        app, page, '/', host, port, footer_links=[], max_file_size=max_upload,
        theme=gradio.themes.Default(font=FONTS, font_mono=['ui-monospace', 'monospace']))
    server = uvicorn.Server(uvicorn.Config(app, host, port, log_level='warning', timeout_graceful_shutdown=3))
    try:
        listening = server.config.bind_socket()
    except SystemExit:  # uvicorn has logged the reason
        raise OSError(f'cannot listen to {host}:{port}: choose another --port or --host') from None
    listening.listen()  # who comes before the server runs is answered then
    print(f'Running on local URL:  http://{host}:{listening.getsockname()[1]}', flush=True)
    server.run(sockets=[listening])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--caption', required=True, help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--retrieval', required=True, help='a retriever; may be the same file')
    parser.add_argument('--folder', required=True, help='images to search')
    parser.add_argument('--index', type=output_path, required=True, help='folder of the index; made when absent')
    net_options(parser)
    parser.add_argument('--host', default='127.0.0.1', help='address to answer to (default: this machine alone)')
    parser.add_argument('--port', type=whole(0, 65535), default=7860, help='default: %(default)s')
    parser.add_argument('--max_upload', default='20mb', help='largest upload (default: %(default)s)')
    args = parser.parse_args(argv)
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    if find_spec('gradio') is None:
        raise ImportError('the web page needs gradio: pip install gradio')
    served = net_settings(args)
    captioner = DLIPProd('caption', args.caption, **served)
    retriever = captioner if args.retrieval == args.caption else DLIPProd('retrieval', args.retrieval, **served)
    index = retriever.index(args.folder, args.index)
    with private_cache():
        serve(build(captioner, retriever, index), args.host, args.port, args.max_upload)


if __name__ == '__main__':
    with clean_exit():
        main()
