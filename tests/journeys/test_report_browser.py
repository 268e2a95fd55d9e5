"""The report in headless Chromium: no errors, filters, phone width, dark mode, print."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import builtin_tasks
from slimvlm.models.load import anatomy
from slimvlm.runs.report import read_record, report_html
from tests import tiny
from tests.evaluation.test_compare import answered as replied
from tests.runs.test_report import write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs slimvlm[test]: selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)",
    ),
]
VISIBLE = (
    "return [...document.querySelectorAll('.card')].filter(card => card.offsetParent)"
    ".map(card => card.dataset.kind)"
)
CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")


def answered(name, right):
    """True answers to a demo task's questions where a digit is 1."""
    task, asked = builtin_tasks()[name], builtin_tasks()[name].load(len(right))
    pairs = zip(asked, right, strict=True)
    replies = [q.answers[0] if digit == "1" else "zebra crossing" for q, digit in pairs]
    return replied(asked, replies, task.metric)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run with real questions: 3 lost, 1 gained, 3 both right, 1 both wrong."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "run", anatomy(tiny.llama()))
    for name, right in (("original", ("1101", "1110")), ("recovered", ("0111", "1000"))):
        tasks = {task: answered(task, r) for task, r in zip(("name", "count"), right, strict=True)}
        result = Result(name, 2_000_000, 1_000_000, tasks, prefill_ms=4.0, decode_ms=2.0)
        result.save(folder / "run" / "results" / f"{name}.json")
    (folder / "run" / "results" / "pruned.json").unlink()
    path = folder / "report.html"
    path.write_text(report_html(read_record(folder / "run")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browse(page):
    """Opens the page at a width, light or dark, on screen or on paper, in one browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))

    def at(width=1200, scheme="light", media="screen"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": features}
        )
        browser.get(page.as_uri())
        return browser

    yield at
    browser.quit()


def find(browser, selector):
    return browser.find_element("css selector", selector)


def shown(browser):
    """The cards that can be seen, by kind."""
    return dict(Counter(browser.execute_script(VISIBLE)))


def legible(browser):
    """The colour of the ground, on which every text can be read."""
    ratio, where = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, where
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return [int(number) for number in re.findall(r"\d+", ground)]


@pytest.mark.parametrize(
    ("width", "scheme"), [(320, "light"), (390, "dark"), (768, "light"), (1200, "dark")]
)
def test_it_renders_without_an_error_can_be_read_and_nothing_scrolls_sideways(
    browse, width, scheme
):
    browser = browse(width, scheme)
    assert browser.get_log("browser") == []
    pictures = "return [...document.images].map(image => image.complete && image.naturalWidth)"
    assert all(sizes := browser.execute_script(pictures))
    assert sizes
    assert len(browser.find_elements("css selector", "figure img")) >= 8
    assert (legible(browser)[0] > 128) is (scheme == "light")


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_scrolls_sideways(browse, width):
    browser = browse(width)
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width


def test_filters_work_by_mouse(browse):
    browser = browse()
    assert shown(browser) == {"both right": 3, "both wrong": 1, "gained": 1, "lost": 3}
    find(browser, "button[data-kind=lost]").click()
    assert shown(browser) == {"lost": 3}
    assert "3 of 8" in find(browser, "#status").text
    find(browser, "#task option[value='1']").click()
    assert shown(browser) == {"lost": 1}
    find(browser, "button[data-kind='']").click()
    assert shown(browser) == {"both right": 2, "gained": 1, "lost": 1}
    find(browser, "#search").send_keys("zebra")
    assert shown(browser) == {"gained": 1, "lost": 1}


def test_filters_work_by_keyboard(browse):
    from selenium.webdriver.common.keys import Keys

    browser = browse()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("data-kind") == "gained":
            break
    active = browser.switch_to.active_element
    assert active.value_of_css_property("outline-style") != "none"
    active.send_keys(Keys.SPACE)
    assert shown(browser) == {"gained": 1}
    assert active.get_attribute("aria-pressed") == "true"
    find(browser, "button[data-kind='']").send_keys(Keys.ENTER)
    assert sum(shown(browser).values()) == 8
    find(browser, "#task").send_keys(Keys.ARROW_DOWN)
    assert sum(shown(browser).values()) == 4


def test_it_prints_without_filters_and_with_all_tables(browse):
    browser = browse(700, scheme="dark", media="print")
    assert not find(browser, "#filters").is_displayed()
    assert not find(browser, "nav").is_displayed()
    assert legible(browser) == [255, 255, 255]
