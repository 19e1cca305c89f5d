"""A web page on this machine: caption a picture, search a folder by a text or a picture.

    python -m prod.app --caption output/demo/caption/best.pth --retrieval output/demo/retrieval/best.pth \\
      --folder output/demo/data/flickr30k/flickr30k-images --index output/demo/index

`--caption data/demo_teacher.pth --retrieval data/demo_teacher.pth --folder prod/examples --index output/examples_index`
works in a fresh clone. The page answers to this machine alone unless `--host` says otherwise, and nothing is sent
anywhere. Needs gradio (requirements-dev.txt).
"""

import argparse
import os
from pathlib import Path

from PIL import Image

from configs.rules import whole
from prod import DLIPProd
from prod.images import read_image
from prod.index import PictureIndex
from utils import clean_exit, setup_process

SHOWN = 384  # pixels, the longer side of a picture that was found
FONTS = ['system-ui', 'sans-serif']  # gradio's own would be fetched from the network


def thumbnail(path: str) -> Image.Image:
    picture = read_image(path, path)
    picture.thumbnail((SHOWN, SHOWN))
    return picture


def build(captioner: DLIPProd, retriever: DLIPProd, index: PictureIndex):
    """The page: a `gradio.Blocks` with a tab for captions and one for search."""
    import gradio

    def upload(**look) -> gradio.Image:
        """A picture that comes as the uploaded file: DLIPProd reads it, and says what is wrong with it."""
        image = gradio.Image(sources=['upload', 'clipboard'], **look)
        image.preprocess = lambda payload: payload and payload.path
        return image

    def asked(function, *arguments):
        try:
            return function(*arguments)
        except (TypeError, ValueError) as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from None

    def caption(picture: str | None, count: float, sample: bool) -> str:
        if picture is None:
            raise gradio.Error('Choose a picture first.', print_exception=False)
        count = int(count)
        beams = {} if sample else {'num_beams': max(3, count)}
        said = asked(lambda: captioner.generate(picture, sample=sample, num_captions=count, **beams))[0]
        return said if count == 1 else '\n'.join(said)

    def search(text: str, picture: str | None, count: float, rerank: bool) -> list[tuple[Image.Image, str]]:
        if not text.strip() and picture is None:
            raise gradio.Error('Write a text, or choose a picture.', print_exception=False)
        query = text if text.strip() else Path(picture)
        count = int(count)
        hits = asked(lambda: retriever.search(query, index, count, rerank=4 * count if rerank else 0))
        return [(thumbnail(path), f'{score:.3f}  {Path(path).name}') for path, score in hits]

    with gradio.Blocks(title='DLIP', analytics_enabled=False) as page:
        gradio.Markdown('# DLIP\nCaptions and search by a small vision-language model, on this machine.')
        with gradio.Tab('Caption a picture'), gradio.Row():
            with gradio.Column():
                picture = upload(label='Picture', height=360)
                count = gradio.Slider(1, 5, 1, step=1, label='Captions')
                sample = gradio.Checkbox(label='Draw at random instead of the most likely ones')
                go = gradio.Button('Caption', variant='primary')
            said = gradio.Textbox(label='Caption', lines=5, buttons=['copy'])
            go.click(caption, [picture, count, sample], said)
        with gradio.Tab('Search a folder'):
            with gradio.Row():
                with gradio.Column(scale=2):
                    text = gradio.Textbox(label=f'What is in the picture? ({len(index)} pictures)')
                    with gradio.Row():
                        wanted = gradio.Slider(1, 20, min(8, len(index)), step=1, label='Pictures')
                        rerank = gradio.Checkbox(True, label='Compare the nearest again by matching (texts)')
                    find = gradio.Button('Search', variant='primary')
                like = upload(height=220, label='Or one that looks like this')
            found = gradio.Gallery(label='Found', columns=4, height='auto')
            for event in (find.click, text.submit):
                event(search, [text, like, wanted, rerank], found)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--caption', required=True, help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--retrieval', required=True, help='a retriever; may be the same file')
    parser.add_argument('--folder', required=True, help='pictures to search')
    parser.add_argument('--index', required=True, help='folder of the index; made when absent')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', help='fp32, bf16 or int8 (default: %(default)s)')
    parser.add_argument('--backend', default='torch', help='torch or openvino (default: %(default)s)')
    parser.add_argument('--host', default='127.0.0.1', help='address to answer to (default: this machine alone)')
    parser.add_argument('--port', type=whole(0, 65535), default=7860, help='default: %(default)s')
    parser.add_argument('--max_upload', default='20mb', help='largest upload (default: %(default)s)')
    args = parser.parse_args(argv)
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError:
        raise ImportError('the web page needs gradio: pip install gradio') from None
    device = str(setup_process(args.device))
    served = {'device': device, 'precision': args.precision, 'backend': args.backend}
    captioner = DLIPProd('caption', args.caption, **served)
    retriever = captioner if args.retrieval == args.caption else DLIPProd('retrieval', args.retrieval, **served)
    index = retriever.index(args.folder, args.index)
    build(captioner, retriever, index).launch(
        server_name=args.host, server_port=args.port, share=False, max_file_size=args.max_upload, footer_links=[],
        theme=gradio.themes.Default(font=FONTS, font_mono=['ui-monospace', 'monospace']))


if __name__ == '__main__':
    with clean_exit():
        main()
