"""The web page: in a real browser, and as hostile web pages would use it."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import watched
from torch.distributed.elastic.utils.distributed import get_free_port

from utils import ROOT

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytest.importorskip('gradio', reason='needs gradio')
playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
EXAMPLES = ROOT / 'prod/examples'


@pytest.fixture(scope='module')
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp('app')


@pytest.fixture(scope='module')
def address(temporary):
    """Of the page; afterwards it is stopped, and must have left no upload and asked for no other machine."""
    port = get_free_port()
    weight = str(ROOT / 'data/demo_teacher.pth')
    process = subprocess.Popen(
        [sys.executable, watched.__file__, temporary / 'log', 'prod.app', '--caption', weight, '--retrieval', weight,
         '--folder', EXAMPLES, '--index', temporary / 'index', '--port', str(port), '--max_upload', '100kb'],
        cwd=ROOT, env=os.environ | {'GRADIO_TEMP_DIR': str(temporary)}, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if 'Running on local URL' in line:
            break
    yield f'http://127.0.0.1:{port}'
    process.terminate()
    process.communicate(timeout=30)
    assert [path.name for path in temporary.iterdir()] == ['index'], 'no uploads, no log of other machines'


@pytest.fixture
def page(address):
    if CHROMIUM is None:
        pytest.skip('needs chromium')
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1100, 'height': 900})
        page.outside = []
        page.on('request', lambda request: page.outside.append(request.url)
                if request.url.startswith('http') and not request.url.startswith(address) else None)
        page.goto(address)
        yield page
        browser.close()


def expect(locator):
    return playwright.expect(locator)


def upload(page, path, number=0):
    page.locator('input[type=file]').nth(number).set_input_files(path)


def test_a_picture_is_captioned_and_a_bad_one_named(page, tmp_path):
    upload(page, EXAMPLES / '05.jpg')
    expect(page.get_by_role('button', name='Remove Image')).to_be_visible()
    page.get_by_role('button', name='Caption', exact=True).click()
    expect(page.locator('textarea').first).to_have_value(
        'within a green square there is a blue star on white', timeout=20_000)
    page.get_by_role('button', name='Remove Image').click()
    (tmp_path / 'broken.png').write_bytes(b'no image')
    upload(page, tmp_path / 'broken.png')
    page.get_by_role('button', name='Caption', exact=True).click()
    expect(page.get_by_text('is not a readable image')).to_be_visible()
    (tmp_path / 'large.png').write_bytes(bytes(200_000))
    page.reload()
    upload(page, tmp_path / 'large.png')
    expect(page.get_by_text('exceed the maximum allowed size').first).to_be_visible()
    assert not page.outside, 'the page asks nobody but this machine'


def test_search_shows_the_pictures(page):
    page.get_by_role('tab', name='Search a folder').click()
    box = page.get_by_label('What is in the image?')
    box.fill('a blue star inside a green square')
    box.press('Enter')
    first = page.locator('.grid-container .caption-label').first
    expect(first).to_contain_text('05.jpg', timeout=20_000)
    assert page.locator('.grid-container img').count() == 8
    box.fill('')
    upload(page, EXAMPLES / '06.jpg', 1)
    expect(page.get_by_role('button', name='Remove Image')).to_be_visible()
    page.get_by_role('button', name='Search', exact=True).click()
    expect(first).to_contain_text('06.jpg', timeout=20_000)
    expect(first).to_contain_text('1.000')


def test_it_answers_to_this_machine_alone(address):
    assert urllib.request.urlopen(address).status == 200
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith('127.'):
        pytest.skip('this machine has no other address')
    with pytest.raises(OSError):
        urllib.request.urlopen(address.replace('127.0.0.1', own), timeout=5)


def answer(address: str, path: str = '/', body: bytes | None = None, **headers: str) -> tuple[int, str, dict]:
    """(status, text, headers) of a request; underscores in the names of headers stand for hyphens."""
    request = urllib.request.Request(address + path, body, {k.replace('_', '-'): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


UPLOAD = (b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\nabc\r\n--b--\r\n',
          'multipart/form-data; boundary=b')


@pytest.mark.parametrize('path', ['/', '/config', '/gradio_api/info', '/gradio_api/file=x'])
@pytest.mark.parametrize('host', ['evil.example', 'evil.example:7860', 'localhost.evil.example', '10.0.0.1', '', '['])
def test_another_host_is_refused(address, path, host):
    status, _, headers = answer(address, path, Host=host, Origin=f'http://{host}')
    assert status in (400, 403) and not any('access-control' in name.lower() for name in headers)


def test_another_page_cannot_post(address, temporary):
    body, kind = UPLOAD
    own = address.removeprefix('http://')
    port = own.partition(':')[2]
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:1', f'http://127.0.0.1.evil.example:{port}'):
        assert answer(address, '/gradio_api/upload', body, Content_Type=kind, Origin=origin)[0] == 403
    assert answer(address, '/gradio_api/upload', body, Content_Type=kind, Sec_Fetch_Site='cross-site')[0] == 403
    assert not list(temporary.rglob('a.jpg'))
    for host in (own, f'localhost:{port}'):
        status, text, _ = answer(address, '/gradio_api/upload', body, Content_Type=kind, Host=host,
                                 Origin=f'http://{host}')
        assert status == 200
    (stored,) = json.loads(text)
    assert Path(stored).is_file()
    folder = temporary / Path(stored).relative_to(temporary).parts[0]
    assert folder.stat().st_mode & 0o077 == 0, 'only its user can read the uploads'


def test_a_link_from_another_page_opens_it(address):
    assert answer(address, Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate')[0] == 200


@pytest.fixture
def bait():
    """(address of a server on this machine, the requests that it got)"""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/x.jpg', asked
    server.shutdown()


@pytest.mark.parametrize('place', [0, 1])
@pytest.mark.parametrize('event', [0, 1])
def test_the_api_fetches_no_url(address, bait, event, place):
    url, asked = bait
    data = [[None, 1, False], ['star', None, 1, False]][event]
    data[place] = {'path': url.replace('http', 'HTTP'), 'url': url, 'meta': {'_type': 'gradio.FileData'}}
    body = json.dumps({'data': data, 'fn_index': event, 'session_hash': f's{event}{place}'}).encode()
    assert answer(address, '/gradio_api/queue/join', body, Content_Type='application/json')[0] == 200
    _, text, _ = answer(address, f'/gradio_api/queue/data?session_hash=s{event}{place}')
    assert 'fetches no URL' in text
    for path in (f'/gradio_api/file={url}', f'/gradio_api/proxy={url}', f'/gradio_api/file={url.upper()}'):
        assert answer(address, path)[0] == 403
    assert not asked
