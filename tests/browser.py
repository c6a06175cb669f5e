"""Headless Chromium over the pipe of its DevTools: opens a page, points, clicks, takes pictures.

By hand, the size of pages and how soon they show; and pictures of a page, in light and dark, for a
desk and for a phone, of every view if it has views:

    python tests/browser.py measure report.html run.html ..
    python tests/browser.py pictures report.html FOLDER [VIEW ..]
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
)
SECONDS = 60  # for any answer


class Browser:
    """One tab. `events` are messages that nobody asked for: requests, errors, console."""

    def __init__(self, write: int, read: int):
        self._write, self._read = write, read
        self._buffer, self._number, self._session = b'', 0, None
        self.events: list[dict] = []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)[
            'sessionId'
        ]
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self.call(f'{domain}.enable')
        script = "addEventListener('load', () => { readyAtLoad = document.body.dataset.ready; })"
        self.call('Page.addScriptToEvaluateOnNewDocument', source=script)

    def _receive(self) -> dict:
        while b'\0' not in self._buffer:
            data = os.read(self._read, 1 << 20)
            assert data, 'the browser ended'
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        """The result of a method of the protocol."""
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._receive()
            if answer.get('id') == self._number:
                assert 'error' not in answer, (method, answer)
                return answer['result']
            self.events.append(answer)

    def run(self, expression: str):
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call(
            'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def open(self, path: Path, width: int = 1280, height: int = 900, **hash_values) -> None:
        """Opens a file and waits until it says that it is ready, which it does before `load`."""
        self.size(width, height)
        address = '&'.join(f'{name}={value}' for name, value in hash_values.items())
        self.call('Page.navigate', url='about:blank')
        self.call('Page.navigate', url=f'{path.absolute().as_uri()}#{address}')
        self.wait('document.body && document.body.dataset.ready')
        self.wait('document.readyState === "complete"')
        assert self.run('readyAtLoad') == 'yes', 'loaded before it was drawn'

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """The size of the window, in CSS pixels."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def wait(self, expression: str) -> None:
        """Returns once the expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f'Boolean({expression})'):
            assert time.monotonic() < end, f'{expression} did not become true'
            time.sleep(0.02)

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element on the screen, scrolled into sight; of its widest line."""
        return tuple(
            self.run(
                f'(e => {{ e.scrollIntoView({{block: "center", behavior: "instant"}}); '
                'const r = [...e.getClientRects()].reduce((a, b) => b.width > a.width ? b : a); '
                f'return [r.x + r.width / 2, r.y + r.height / 2]; }})'
                f'(document.querySelector({json.dumps(selector)}))'
            )
        )

    def hover(self, selector: str, x: float | None = None, y: float | None = None) -> None:
        """Moves the mouse to the middle of an element, or x, y pixels from its corner."""
        self._mouse('mouseMoved', selector, x, y)

    def click(self, selector: str, x: float | None = None, y: float | None = None) -> None:
        """Clicks there."""
        self._mouse('mouseMoved', selector, x, y)
        for kind in ('mousePressed', 'mouseReleased'):
            self._mouse(kind, selector, x, y, button='left', clickCount=1)

    def _mouse(self, kind, selector, x, y, **more) -> None:
        at = self.middle(selector)
        if x is not None:
            corner = self.run(
                f'(r => [r.x, r.y])(document.querySelector({json.dumps(selector)})'
                '.getBoundingClientRect())'
            )
            at = corner[0] + x, corner[1] + y
        self.call('Input.dispatchMouseEvent', type=kind, x=at[0], y=at[1], **more)

    def key(self, key: str) -> None:
        """Presses and releases a key."""
        text = {'text': key} if len(key) == 1 else {}
        self.call('Input.dispatchKeyEvent', type='keyDown', key=key, **text)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.run(f'document.querySelector({json.dumps(selector)}).textContent')

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what the window shows."""
        data = self.call('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        path.write_bytes(base64.b64decode(data))

    def errors(self) -> list[dict]:
        """What went wrong so far: exceptions, and messages of the console and the log."""
        return [
            event
            for event in self.events
            if event.get('method')
            in ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded')
        ]

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return [
            event['params']['request']['url']
            for event in self.events
            if event.get('method') == 'Network.requestWillBeSent'
        ]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium with a profile of its own, ended at the end."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol's pipe is at the file descriptors 3 and 4.
        command = (
            f'exec {CHROMIUM} --headless=new --remote-debugging-pipe --no-sandbox --disable-gpu '
            f'--hide-scrollbars --no-first-run --disable-background-networking '
            f'--user-data-dir={profile} about:blank 3<&{to_browser[0]} 4>&{from_browser[1]}'
        )
        process = subprocess.Popen(
            ['bash', '-c', command],
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
            process.terminate()
            process.wait()


def measure(*pages: str) -> None:
    """Prints the size of each page and how soon it shows, in a browser of its own, and is ready."""
    for page in map(Path, pages):
        with browser() as tab:
            tab.open(page)
            ready = tab.run('performance.now()')
            paint = 'performance.getEntriesByName("first-contentful-paint")'
            tab.wait(f'{paint}.length')
            first = tab.run(f'{paint}[0].startTime')
            asked = [url for url in tab.requests() if not url.startswith(('file:', 'about:'))]
            print(
                f'{page.name}: {page.stat().st_size / 1e6:.2f} MB, first paint after {first:.0f} '
                f'ms, ready after {ready:.0f} ms, {len(asked)} requests, errors: {tab.errors()}'
            )


def pictures(page: str, folder: str, *views: str) -> None:
    """Pictures of a page or of its views, in both themes and two sizes."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {'desk': (1280, 860), 'phone': (390, 844)}
    with browser() as tab:
        tab.open(Path(page))
        has_views = tab.run('typeof VIEWS !== "undefined"')
        for view in views or (tab.run('Object.keys(VIEWS)') if has_views else ['page']):
            for name, (width, height) in sizes.items():
                for theme in ('light', 'dark'):
                    tab.size(width, height)
                    tab.run(f'setTheme({theme!r})')
                    if has_views:
                        tab.run(f'change({{view: {view!r}}})')
                    time.sleep(0.3)
                    tab.picture(out / f'{view}-{name}-{theme}.png', whole=name == 'desk')
        print(tab.errors() or 'no error on the page')


if __name__ == '__main__':
    {'measure': measure, 'pictures': pictures}[sys.argv[1]](*sys.argv[2:])
