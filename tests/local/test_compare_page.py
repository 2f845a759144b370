"""The compare page in a real browser; skipped where there is none."""

import re
import shutil

import pytest
from fake_engine import FakeEngine, running

from serve.app import create_app, digest
from serve.deployment import EngineBackend

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
EVIL = "<img src=x onerror=\"document.title = 'owned'\">"


@pytest.fixture
def page():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


@pytest.fixture
def url():
    backends = {
        "teacher": EngineBackend(FakeEngine(words=["A ", "page ", EVIL], wait_s=0.02)),
        "student": EngineBackend(FakeEngine(words=["Grö", "ße"], wait_s=0.02)),
    }
    with running(create_app(backends, max_new_tokens=9, key_digests=[digest("the-key")])) as url:
        yield url


def test_both_answers_stand_side_by_side_as_text_and_a_missing_key_is_asked_for(page, url):
    page.goto(url)
    assert not page.is_visible("#key")
    page.click("text=Ask both")
    page.wait_for_selector("#key", state="visible")
    page.fill("#key", "the-key")
    page.click("text=Ask both")
    playwright.expect(page.locator(".note")).to_have_text([re.compile("3 tokens in"), re.compile("2 tokens in")])
    assert [heading.inner_text() for heading in page.query_selector_all("h2")] == ["teacher", "student"]
    assert [text.inner_text() for text in page.query_selector_all(".text")] == [f"A page {EVIL}", "Größe"]
    assert page.title() == "raystill: one question, two models"
