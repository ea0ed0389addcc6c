"""The HTML report: complete and self-contained by its text, and right in a real browser."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser

import afpq
from afpq._report_html import render_html
from afpq.packed import read_packed
from afpq.report import build_report

MOST_BYTES = 2_000_000
MOST_SECONDS = 2.0


@pytest.fixture(scope="module")
def report(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that a run with calibration knows."""
    folder = tmp_path_factory.mktemp("page")
    model = afpq.quantize(
        models / "lenet5_digits.onnx",
        data=models / "digits_calibration.npz",
        samples=32,
        bits=5,
        exclude=["/0/Conv"],
    )
    model.save(folder / "lenet5.onnx")
    model.report(folder / "r.json")
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found | {"command": "afpq quantize lenet5_digits.onnx -o lenet5.onnx --bits 5"}


@pytest.fixture(scope="module")
def bare(packed_lenet: Path) -> dict[str, Any]:
    """What the file alone tells."""
    return build_report(read_packed(packed_lenet))


class Page(HTMLParser):
    """Elements and attributes of a page; unbalanced tags are errors."""

    VOID = frozenset({"meta", "link", "br", "input", "circle", "line", "rect", "path", "polyline"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


@pytest.mark.parametrize("count", [1, 2])
def test_page_is_one_balanced_document_that_names_nothing_outside(
    report: dict[str, Any], count: int
) -> None:
    source = render_html([report] * count)

    page = Page(source)
    ids = page.values("id")
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    links = [value for value in page.values("href") if value != "data:,"]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert page.values("src") == []
    assert "default-src 'none'" in source and "url(" not in source
    namespace = "http://www.w3.org/2000/svg"
    assert set(re.findall(r"https?:[^\"'\s<]*", source)) <= {namespace}


def test_page_has_every_fact(report: dict[str, Any]) -> None:
    source = render_html([report])

    for expected in (
        "Top-1 accuracy",
        "smaller",
        "Speed on this machine",
        "Bits per weight",
        "predicted loss",
        "measured loss",
        "SQNR",
        "kernel",
        "Weights and codebooks",
        "The best plan under other budgets",
        "left out by --include, --exclude or --layer",
        "Calibration",
        "compensated rounding",
        report["command"],
        report["source"]["sha256"],
        report["output"]["sha256"],
        report["output"]["plan_hash"],
        report["environment"]["onnxruntime"],
    ):
        assert expected in source, expected
    assert source.count('<tr data-i="') == len(report["layers"]) == 4
    assert len(re.findall(r'id="m0-w\d+"', source)) == 4


def test_uncertainty_stands_beside_the_accuracy(report: dict[str, Any]) -> None:
    # 8 held-out samples, none of which changes: half a row in each cell leaves 31 points of top-1 open.
    source = render_html([report])

    assert re.search(r">[+\u2212]?\d+\.\d\d \u00b1 [\d.]+ points<", source)
    assert "Only 8 rows judged it" in source


def test_a_page_from_the_file_alone_claims_nothing_else(bare: dict[str, Any]) -> None:
    source = render_html([bare])

    Page(source)
    assert "Accuracy was not measured" in source
    assert "not measured" in source and "a packed file does not hold its search" in source
    assert "No command is known" in source
    assert "measured loss" not in source and "Weights and codebooks" not in source


def test_names_of_layers_are_escaped(report: dict[str, Any]) -> None:
    changed = deepcopy(report)
    evil = '<script>alert("1")</script>'
    changed["layers"][0]["name"] = changed["left_float"][0]["name"] = evil
    changed["command"] = changed["output"]["path"] = evil

    source = render_html([changed, changed])

    Page(source)
    assert "alert" in source and "<script>alert" not in source


def test_a_model_of_many_layers_stays_small(report: dict[str, Any]) -> None:
    large = deepcopy(report)
    large["layers"] = [
        {**report["layers"][i % 4], "name": f"/encoder/block.{i}/attention/MatMul"}
        for i in range(500)
    ]

    assert len(render_html([large]).encode()) < MOST_BYTES


def test_a_goal_shows_its_trials_and_its_limit(report: dict[str, Any]) -> None:
    trials = [
        {"bits_per_weight": 4.5, "percent": 0.5, "met": True},
        {"bits_per_weight": 3.25, "percent": 2.0, "met": False},
        {"bits_per_weight": 2.25, "percent": None, "met": False},
    ]
    goal = {"max_drop": 1.0, "met": False, "text": "2 points lost", "trials": trials}

    source = render_html([report | {"goal": goal}])

    assert "Goal of at most 1 % missed: 2 points lost." in source
    assert source.count("drop 0.5 %") == source.count("drop 2 %") == 1


def test_models_stand_side_by_side(report: dict[str, Any], bare: dict[str, Any]) -> None:
    source = render_html([report, bare])

    comparison = source.split('id="comparison"')[1].split("</article>")[0]
    assert "bits per weight" in comparison and "KL divergence from float" in comparison
    row = next(r for r in comparison.split("<tr>") if "/0/Conv" in r)
    assert ">float</td>" in row and "chip" in row  # float in the first model, packed in the second


def test_files_of_one_name_are_told_apart_by_their_folders(bare: dict[str, Any]) -> None:
    pair = [{**bare, "output": {**bare["output"], "path": f"{d}/m.onnx"}} for d in ("a", "b")]

    source = render_html(pair)

    assert "<h2>a/m.onnx</h2>" in source and "<h2>b/m.onnx</h2>" in source
    assert "<h1>m.onnx</h1>" in render_html(pair[:1])


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Browser(command) as found:
        yield found


@pytest.fixture
def page(browser: Browser, report: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """A page that must neither complain nor ask for anything but itself."""
    path = tmp_path / "report.html"
    path.write_text(render_html([report]), encoding="utf-8")
    browser.console.clear()
    browser.requests.clear()
    yield path
    assert browser.console == []
    assert set(browser.requests) <= {path.as_uri(), "data:,"}


def column(browser: Browser, number: int) -> list[str]:
    found: list[str] = browser.run(
        f"[...document.querySelectorAll('.layers tbody tr')].map(r => r.cells[{number}].dataset.v)"
    )
    return found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_the_screen_in_both_themes(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)

    assert browser.run("document.documentElement.scrollWidth") == width
    background, colour = browser.run(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    bright = [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in (background, colour)]
    assert (bright[0] < 60 < 200 < bright[1]) if dark else (bright[1] < 60 < 200 < bright[0])
    small = browser.run("Math.min(...[...document.querySelectorAll('main *')].map(e => parseFloat("
        "getComputedStyle(e).fontSize)))")  # fmt: skip
    assert small >= 10


def test_columns_sort_by_value_and_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    titles = browser.run(
        "[...document.querySelectorAll('.layers th button')].map(b => b.innerText)"
    )
    number = next(i for i, title in enumerate(titles) if title.startswith("size"))
    head = f".layers th:nth-child({number + 1})"

    browser.run(f"document.querySelector('{head} button').click()")
    falling = [int(v) for v in column(browser, number)]
    browser.run(f"document.querySelector('{head} button').click()")
    rising = [int(v) for v in column(browser, number)]

    assert falling == sorted(falling, reverse=True) and rising == falling[::-1]
    assert len(set(falling)) > 1
    assert browser.run(f"document.querySelector('{head}').ariaSort") == "ascending"


def test_headers_can_be_reached_and_used_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    for _ in range(60):
        browser.press("Tab")
        if (
            browser.run("document.activeElement.closest('th') && document.activeElement.innerText")
            == "layer"
        ):
            break

    browser.press("Enter")

    names = column(browser, 1)
    assert names == ["/11/Gemm", "/9/Gemm", "/7/Gemm", "/3/Conv"] or names == [
        "/3/Conv", "/7/Gemm", "/9/Gemm", "/11/Gemm",
    ]  # fmt: skip
    assert browser.run("document.querySelector('.layers th:nth-child(2)').ariaSort") == "ascending"


def test_filter_hides_other_layers(browser: Browser, page: Path) -> None:
    browser.open(page)

    browser.run(
        "(i => { i.value = 'gemm'; i.dispatchEvent(new Event('input')); })(document.querySelector('input'))"
    )

    assert (
        browser.run(
            "[...document.querySelectorAll('.layers tbody tr')].filter(r => !r.hidden).length"
        )
        == 3
    )
    assert browser.run("document.querySelector('.count').textContent") == "3 of 4 layers"


def test_details_of_a_layer_appear_on_hover(browser: Browser, page: Path) -> None:
    browser.open(page)

    browser.point('.hit[data-i="1"]')

    shown = browser.run("document.getElementById('tip').innerText")
    assert shown.startswith("2 /7/Gemm") and "predicted loss" in shown and "size, bytes" in shown
    assert browser.run("document.querySelectorAll('#tip svg').length") == 1  # its histogram
    assert browser.run("document.querySelector('tr.on').dataset.i") == "1"


def test_details_of_layers_follow_the_arrow_keys(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('.strip').focus()")

    for _ in range(3):
        browser.press("ArrowRight")
    browser.press("ArrowLeft")
    shown = browser.run("document.getElementById('tip').innerText")
    browser.press("Escape")

    assert shown.startswith("2 /7/Gemm")
    assert browser.run("document.getElementById('tip').hidden") is True


def test_the_button_switches_the_theme(browser: Browser, page: Path) -> None:
    browser.open(page)
    light = browser.run("getComputedStyle(document.body).backgroundColor")

    browser.run("document.getElementById('theme').click()")

    assert browser.run("getComputedStyle(document.body).backgroundColor") != light
    assert browser.run("document.getElementById('theme').textContent") == "Light"


def test_paper_is_light_and_shows_everything(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, dark=True)

    browser.send("Emulation.setEmulatedMedia", media="print")

    assert browser.run("getComputedStyle(document.body).color") == "rgb(29, 33, 39)"
    assert browser.run("getComputedStyle(document.querySelector('.tall')).overflowY") == "visible"
    browser.print(tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").read_bytes()[:5] == b"%PDF-"


def test_text_can_be_read_in_both_themes(browser: Browser, page: Path) -> None:
    # WCAG AA: a contrast of 4.5 between text and what lies behind it.
    ratio = """
      (() => {
        const channel = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = c => {
          const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel);
          return .2126 * r + .7152 * g + .0722 * b;
        };
        const probe = document.createElement('i');
        document.body.append(probe);
        const colour = name => { probe.style.color = `var(${name})`; return light(getComputedStyle(probe).color); };
        const against = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        return Math.min(...['--ink', '--soft', '--accent', '--bad', '--warn', '--good'].flatMap(
          name => ['--back', '--panel'].map(back => against(colour(name), colour(back)))));
      })()
    """
    for dark in (False, True):
        browser.open(page, dark=dark)
        assert browser.run(ratio) >= 4.5


@pytest.mark.slow
def test_page_of_a_real_network_is_small_and_opens_fast(
    browser: Browser, shared: Path, tmp_path: Path
) -> None:
    source = shared / "models" / "imagenet" / "mobilenetv2_tv.onnx"
    model = afpq.quantize(source, bits=5)
    model.save(tmp_path / "m.onnx")

    model.report(tmp_path / "r.html")

    assert (tmp_path / "r.html").stat().st_size < MOST_BYTES
    assert browser.open(tmp_path / "r.html") < MOST_SECONDS
