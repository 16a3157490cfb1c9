"""A report in a real browser: Chromium without a window, from a file, with everything that it asks for written down."""

import json

import pytest
from browser import chromium, needs_chromium
from report_runs import log, preference_line, record, system, write_run
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from sysdag import Draw, Trace
from sysdag.reporting.html import render
from sysdag.reporting.page import page
from sysdag.reporting.read import read_run

pytestmark = needs_chromium
PAYLOADS = [
    "<script>window.pwned = 1</script>", "</script><script>window.pwned = 2</script>",
    '"><img src=http://127.0.0.1:9/x onerror="window.pwned = 3">', "</style><svg onload=window.pwned=4>",
    "<link rel=stylesheet href=http://127.0.0.1:9/y>", "{{ ''.__class__ }}",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), height=900, logs=("browser", "performance")) as driver:
        yield driver


def requests(browser):
    """What was asked for since the last call and not held back, but the contents of `data:` addresses, and what belongs
    to the browser's own first page, which may still be loading (`chrome:`; no other page gets at that)."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
    held = {params["requestId"] for params in failed if params.get("blockedReason") == "csp"}
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in sent if params["requestId"] not in held]
    return [url for url in urls if not url.startswith(("data:", "chrome:"))]


def open_report(browser, folder, change=lambda text: text):
    file = folder / "report.html"
    file.write_text(change(render(page([read_run(folder)], defaults={}, most_prompts=20))))
    browser.get_log("browser")
    requests(browser)
    browser.get(file.as_uri())
    return file.as_uri()


@pytest.fixture
def hostile(tmp_path):
    """Payloads wherever a model or a file has a say."""
    texts = "\n".join(PAYLOADS)
    nodes = dict.fromkeys(PAYLOADS[:3], PAYLOADS[3])
    graph = system(nodes, [(PAYLOADS[4], name) for name in nodes], (PAYLOADS[4],))
    trace = Trace({PAYLOADS[4]: [texts]}, {name: [Draw([texts, {name: texts}])] for name in nodes})
    other = Trace({PAYLOADS[4]: [texts]}, {name: [Draw([name, texts])] for name in nodes})
    lines = [preference_line(step, dict.fromkeys(nodes, (0.1 * step, 0.0))) for step in range(1, 30)]
    run = record(system=graph, config={PAYLOADS[0]: texts}, status=texts, versions={texts: texts})
    return write_run(tmp_path, lines, run, {"before": trace, "after": other}, {texts: texts})


def test_nothing_of_a_run_is_run_and_nothing_is_asked_for(browser, hostile):
    address = open_report(browser, hostile)
    assert browser.execute_script("return window.pwned") is None
    assert requests(browser) == [address]
    assert browser.get_log("browser") == []
    assert PAYLOADS[2] in browser.find_element(By.TAG_NAME, "body").text


def test_what_would_slip_through_is_held_by_the_pages_policy(browser, hostile):
    address = open_report(browser, hostile, lambda text: text.replace("<main>", f"<main>{''.join(PAYLOADS)}", 1))
    assert browser.execute_script("return window.pwned") is None
    assert requests(browser) == [address]
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_values_are_read_off_and_lines_are_hidden(browser, tmp_path):
    lines = log()
    open_report(browser, write_run(tmp_path, lines))
    figure = browser.find_element(By.CSS_SELECTOR, "figure.chart")
    svg, tip = figure.find_element(By.TAG_NAME, "svg"), figure.find_element(By.CLASS_NAME, "tip")
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(svg).perform()
    step = int(tip.text.splitlines()[0].removeprefix("step "))
    (loss,) = [line["loss"] for line in lines if line["step"] == step and "loss" in line]
    assert tip.text.splitlines()[1] == f"training: {float(f'{loss:.4g}'):g}"
    assert tip.text.splitlines()[2].startswith("evaluation: 0.")
    button = figure.find_element(By.CSS_SELECTOR, ".legend button")
    (curve,) = figure.find_elements(By.CSS_SELECTOR, '.curve[data-label="training"]')
    for pressed in (False, True):
        button.click()
        assert button.get_attribute("aria-pressed") == str(pressed).lower()
        assert curve.is_displayed() == pressed


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_its_window(browser, hostile, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_report(browser, hostile)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_colours_follow_the_readers_choice(browser, tmp_path):
    folder, grounds = write_run(tmp_path), []
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        open_report(browser, folder)
        colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        grounds.append(browser.execute_script(colours))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    (light, ink), (dark, chalk) = grounds
    assert light == "rgb(255, 255, 255)"
    assert light != dark
    assert ink != chalk
