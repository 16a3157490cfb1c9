"""A session of labelling in a real browser: Chromium without a window, against the server that the command starts."""

import sqlite3

import pytest
from browser import chromium, needs_chromium
from labelled_runs import Running
from PIL import Image
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

pytestmark = needs_chromium
PAYLOADS = [
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 2">',
    "</script></textarea></p><svg onload=window.pwned=3>",
    "<a id=payload href='javascript:window.pwned=4'>javascript:window.pwned=4</a>",
    "{{constructor.constructor('window.pwned=5')()}} ${window.pwned=6}",
]


def plain(prompts=6):
    numbers = [(prompt, run) for prompt in range(prompts) for run in range(2)]
    images = [Draw(Image.new("RGB", (8, 8), (40 * p, 100 * r, 90))) for p, r in numbers]
    return Trace(
        {"question": [f"question {prompt}" for prompt, _ in numbers]},
        {
            "sketches": [(image, image) for image in images],
            "draft": [Draw(f"draft {run} of {prompt}") for prompt, run in numbers],
            "answer": [Draw(f"answer {run} to {prompt}") for prompt, run in numbers],
        },
    )


def hostile():
    """Payloads everywhere that a model or a user has a say."""
    texts = "\n".join(PAYLOADS)
    name = PAYLOADS[1]
    values = [Draw([texts, {name: texts}, PAYLOADS[3], run]) for run in range(2)]
    return Trace(
        {name + "in": [texts, texts]},
        {name: values, PAYLOADS[0]: values, PAYLOADS[2]: [Draw(f"{texts}{run}") for run in range(2)]},
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), height=800) as driver:
        yield driver


class Page:
    """What a person does and sees."""

    def __init__(self, browser):
        self.browser = browser
        self.wait = WebDriverWait(browser, 30, poll_frequency=0.02)

    def open(self, link):
        self.browser.get(link)
        self.until("ready", "sign-in")

    def until(self, *states):
        self.wait.until(lambda _: self.script("return document.body.dataset.state") in states)

    def script(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def element(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.element(selector).text

    def press(self, key):
        ActionChains(self.browser).send_keys(key).perform()

    def label(self, key):
        """Presses a key and waits for the next pair."""
        self.until("ready")
        before = self.text("#progress-text")
        self.press(key)
        self.wait.until(lambda _: self.text("#progress-text") != before)
        self.until("ready")

    @property
    def progress(self):
        return self.text("#progress-text")


@pytest.fixture
def page(browser):
    yield Page(browser)
    for handle in browser.window_handles[1:]:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(browser.window_handles[0])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")


@pytest.fixture
def served(tmp_path):
    def make(trace, *options):
        traces = tmp_path / "runs.jsonl"
        trace.save(traces)
        return Running(traces, tmp_path / "labels.sqlite", *options)

    return make


def labels(server):
    database = sqlite3.connect(server.command[server.command.index("--database") + 1])
    found = database.execute("SELECT annotator, pair, choice FROM labels ORDER BY id").fetchall()
    database.close()
    return found


def test_a_session_by_keys_and_buttons_with_undo_reload_and_a_second_annotator(page, served):
    with served(plain(), "--overlap", "3") as server:
        page.open(server.link)
        assert "token" not in page.browser.current_url
        assert page.script("return document.cookie") == ""
        page.element("#name").send_keys("Ann")
        page.press(Keys.ENTER)
        page.until("ready")
        assert page.progress == "0 of 6"
        assert page.text("#question") == "Which answer is better?"
        assert page.text("#inputs").startswith("question\nquestion ")
        assert {page.text("#left").split()[1], page.text("#right").split()[1]} == {"0", "1"}

        number = page.text("#inputs").split()[-1]
        first = page.text("#left")
        assert "draft 0" not in page.text("#left") + page.text("#right")
        assert page.text("#left summary") == "How it got there: sketches, draft"
        page.press("i")
        assert {page.text(f"#{side} details p") for side in ("left", "right")} == {
            f"draft {run} of {number}" for run in (0, 1)
        }
        image = page.element("#left details img")
        assert image.get_attribute("alt") == "Image of sketches, element 1, 8 by 8 pixels"
        assert page.script("return arguments[0].naturalWidth", image) == 8
        page.press("i")
        assert page.text("#left") == first

        page.press("?")
        assert page.script("return document.querySelector('dialog').open")
        page.press(Keys.ARROW_LEFT)  # no label while the help is open
        page.press(Keys.ESCAPE)
        assert page.progress == "0 of 6"

        page.label(Keys.ARROW_LEFT)
        assert page.text("#status") == "Saved. Pair 2 of 6."
        assert page.script("return document.activeElement.id") == "question"
        page.label(Keys.ARROW_RIGHT)
        page.label("=")
        page.label("t")
        page.label("s")
        assert page.text("#status") == "Skipped. Pair 6 of 6."
        assert [choice for *_, choice in labels(server)] == ["left", "right", "tie", "tie", "skip"]
        page.label("u")
        assert page.text("#status") == "Undone. Pair 5 of 6."
        page.browser.refresh()
        page.until("ready")
        assert page.progress == "4 of 6"
        page.element("[data-action=right]").click()
        page.until("ready")
        page.element("#actions [data-action=undo]").click()
        page.until("ready")
        page.element("[data-action=left]").click()
        page.until("ready")
        page.element("[data-action=tie]").click()
        page.until("ready")
        assert page.text("#finished-heading") == "All done"
        assert [choice for *_, choice in labels(server)] == ["left", "right", "tie", "tie", "left", "tie"]

        page.element("#annotator-button").click()
        page.element("#name").send_keys("  Bob ")
        page.press(Keys.ENTER)
        page.until("ready")
        assert page.progress == "0 of 3"
        for _ in range(3):
            page.label(Keys.ARROW_LEFT)
        assert page.text("#finished-heading") == "All done"
        page.browser.find_element(By.LINK_TEXT, "Summary").click()
        page.wait.until(lambda _: page.element("#summary").is_displayed())
        assert "Cohen's kappa" in page.text("#figures")
        assert [row.text.split()[:2] for row in page.browser.find_elements(By.CSS_SELECTOR, "tbody tr")] == [
            ["Ann", "6"], ["Bob", "3"],
        ]  # fmt: skip


def test_a_double_click_and_two_tabs_label_once(page, served):
    with served(plain(), "--annotator", "Ann") as server:
        page.open(server.link)
        page.script(  # the second click comes when the next pair has just shown
            "const left = document.querySelector('[data-action=left]');"
            "const again = () => { left.click(); window.clicked = true; };"
            "const observer = new MutationObserver(() => { observer.disconnect(); setTimeout(again, 100); });"
            "observer.observe(document.querySelector('#progress-text'), { childList: true }); left.click();"
        )
        page.wait.until(lambda _: page.script("return window.clicked"))
        page.until("ready")
        assert (page.progress, len(labels(server))) == ("1 of 6", 1)
        ActionChains(page.browser).key_down(Keys.CONTROL).send_keys("s").key_up(Keys.CONTROL).perform()
        page.script("for (let n = 0; n < 3; n++) document.querySelector('[data-action=tie]').click()")
        page.until("ready")
        assert (page.progress, len(labels(server))) == ("2 of 6", 2)

        first = page.browser.current_window_handle
        page.browser.switch_to.new_window("tab")
        page.open(server.link)
        assert page.progress == "2 of 6"
        page.label(Keys.ARROW_RIGHT)
        page.browser.switch_to.window(first)
        page.press(Keys.ARROW_LEFT)  # of the pair that the other tab has labelled
        page.wait.until(lambda _: page.progress == "3 of 6")
        assert "from another tab" in page.text("#notice")
        page.label(Keys.ARROW_LEFT)
        assert [choice for *_, choice in labels(server)] == ["left", "tie", "right", "left"]
        assert not page.element("#notice").is_displayed()


def test_a_killed_server_loses_nothing_and_the_page_says_so(page, served):
    with served(plain(), "--annotator", "Ann") as server:
        page.open(server.link)
        page.label(Keys.ARROW_LEFT)
        server.process.kill()
        server.process.wait()
        page.press(Keys.ARROW_RIGHT)
        page.until("stopped")
        assert "Not saved. The server cannot be reached." in page.text("#notice")
        assert page.progress == "1 of 6"
        page.press("t")  # nothing else until that is settled
        page.element("#annotator-button").click()
        page.until("stopped")
        port = server.link.split(":")[2].split("/")[0]
    with served(plain(), "--annotator", "Ann", "--port", port) as again:
        page.element("#retry").click()
        page.wait.until(lambda _: "link with the token" in page.text("#notice"))
        first = page.browser.current_window_handle
        page.browser.switch_to.new_window("tab")
        page.open(again.link)
        assert page.progress == "1 of 6"
        page.browser.switch_to.window(first)
        page.element("#retry").click()  # the cookie of the new link lets the old tab in
        page.wait.until(lambda _: page.progress == "2 of 6")
        assert [choice for *_, choice in labels(again)] == ["left", "right"]
        assert not page.element("#notice").is_displayed()


def test_what_models_and_people_write_is_text(page, served):
    with served(hostile(), "--annotator", PAYLOADS[1]) as server:
        page.open(server.link)
        page.press("i")
        for payload in PAYLOADS:
            assert payload in page.text("#inputs")
            assert payload in page.text("#left")
            assert payload in page.text("#right")
        assert page.text("#annotator-button") == PAYLOADS[1]
        assert PAYLOADS[2] in page.text("#question")
        assert (
            page.script("return document.querySelectorAll('main img, main svg, main script, main a[id]').length") == 0
        )
        page.press("s")
        page.until("ready")
        page.element("#annotator-button").click()
        page.wait.until(lambda _: page.script("return document.querySelector('#names option')?.value") == PAYLOADS[1])
        page.browser.find_element(By.LINK_TEXT, "Summary").click()
        page.wait.until(lambda _: page.element("#summary").is_displayed())
        assert PAYLOADS[1] in page.text("#annotators")
        # Were a payload put into the page as HTML all the same, it would not run.
        for code in (
            "document.body.innerHTML = arguments[0]",
            "document.body.setAttribute('onload', 'window.pwned = 7')",
            "document.createElement('script').src = 'data:text/javascript,window.pwned=8'",
        ):
            with pytest.raises(JavascriptException, match="requires 'Trusted"):
                page.script(code, PAYLOADS[1])
        blocked = page.browser.execute_async_script(
            "document.addEventListener('securitypolicyviolation', (event) => arguments[1](event.effectiveDirective));"
            "document.body.append(Object.assign(new Image(), { src: arguments[0] }));",
            "http://127.0.0.1:9/",
        )
        assert blocked == "img-src"
        assert page.script("return window.pwned") is None


def luminance(page, selector, what):
    colour = page.script("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what)
    red, green, blue = (int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, text, ground):
    light, dark = sorted((luminance(page, text, "color"), luminance(page, ground, "backgroundColor")), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_can_be_read_in_light_and_dark_and_on_a_phone(page, served):
    with served(plain(1), "--annotator", "Ann") as server:
        page.open(server.link)
        for scheme in ("light", "dark"):
            still = {"name": "prefers-reduced-motion", "value": "reduce"}  # colours change at once
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}, still]}
            page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            assert (luminance(page, "body", "backgroundColor") < 0.1) == (scheme == "dark")
            for text, ground in ((".text", ".card"), (".inputs h3", ".card"), (".choice", ".choice"),
                                 ("#question", "body"), (".badge", ".badge"), ("#progress-text", ".bar"),
                                 ("kbd", "kbd")):  # fmt: skip
                assert contrast(page, text, ground) >= 4.5, (scheme, text)
        left, right = (side.rect for side in page.browser.find_elements(By.CSS_SELECTOR, ".side"))
        assert (left["y"], left["x"] < right["x"]) == (right["y"], True)
        page.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        )
        left, right = (side.rect for side in page.browser.find_elements(By.CSS_SELECTOR, ".side"))
        assert (left["x"], left["y"] < right["y"]) == (right["x"], True)
        assert page.script("return document.documentElement.scrollWidth") == 390
        for action in ("left", "tie", "right", "skip", "undo"):
            button = page.element(f"#actions [data-action={action}]").rect
            assert button["x"] >= 0
            assert button["x"] + button["width"] <= 390
            assert button["y"] + button["height"] <= 844


@pytest.mark.parametrize(
    ("collect", "keys", "button", "expected"),
    [("thumbs", "gb", "up", ["up", "down", "up", "skip"]), ("scores", "15", "3", ["1", "5", "3", "skip"])],
)
def test_single_runs_get_thumbs_or_scores(browser, tmp_path, collect, keys, button, expected):
    traces = tmp_path / "runs.jsonl"
    plain(2).save(traces)
    with Running(traces, tmp_path / "labels.sqlite", "--annotator", "Ann", "--collect", collect) as server:
        page = Page(browser)
        page.open(server.link)
        assert (
            page.text("#question") == {"thumbs": "Is this answer good?", "scores": "How good is this answer?"}[collect]
        )
        shown = [part.get_attribute("data-action") for part in browser.find_elements(By.CSS_SELECTOR, ".choice")
                 if part.is_displayed()]  # fmt: skip
        assert shown == {"thumbs": ["down", "up"], "scores": list("12345")}[collect]
        assert not page.element("#right").is_displayed()
        page.press(Keys.ARROW_LEFT)  # of pairs: nothing happens
        for key in keys:
            page.label(key)
        page.element(f"[data-action='{button}']").click()
        page.wait.until(lambda _: page.progress == "3 of 4")
        page.label("s")
        assert [choice for *_, choice in labels(server)] == expected
        browser.get(server.link.split("?")[0] + "summary")
        page.wait.until(lambda _: page.text("#annotators"))
        assert "3 of 4" in page.text("#figures")
        assert "Runs labelled" in page.text("#figures")
