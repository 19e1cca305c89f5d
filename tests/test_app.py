"""The web page in a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.request

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from utils import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytest.importorskip('gradio', reason='needs gradio')
playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium')
EXAMPLES = ROOT / 'prod/examples'


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp('app')
    port = get_free_port()
    weight = str(ROOT / 'data/demo_teacher.pth')
    process = subprocess.Popen(
        [sys.executable, '-m', 'prod.app', '--caption', weight, '--retrieval', weight, '--folder', str(EXAMPLES),
         '--index', str(folder / 'index'), '--port', str(port), '--max_upload', '100kb'],
        cwd=ROOT, env=os.environ | {'GRADIO_TEMP_DIR': str(folder)}, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if 'Running on local URL' in line:
            break
    yield f'http://127.0.0.1:{port}'
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture
def page(address):
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
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    upload(page, tmp_path / 'broken.png')
    page.get_by_role('button', name='Caption', exact=True).click()
    expect(page.get_by_text('is not a readable picture')).to_be_visible()
    (tmp_path / 'large.png').write_bytes(bytes(200_000))
    page.reload()
    upload(page, tmp_path / 'large.png')
    expect(page.get_by_text('exceed the maximum allowed size').first).to_be_visible()
    assert not page.outside, 'the page asks nobody but this machine'


def test_search_shows_the_pictures(page):
    page.get_by_role('tab', name='Search a folder').click()
    box = page.get_by_label('What is in the picture?')
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
