"""The pages in a browser: pointed at, sorted, filtered, by keyboard, dark, for screen readers, on narrow screens."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

from probe.report.html.run import run_page
from probe.report.html.training import training_page
from probe.text import printable
from tests.report.html.test_pages import HOSTILE, poisoned
from tests.support.browser import Visit
from tests.support.synthetic_training import made_up_history

SIZES = [(1400, 900), (700, 900)]


@pytest.fixture(scope="module")
def pages(logged, tmp_path_factory):
    """Files of a run, a training, a young training, and of a run full of hostile texts with 100,000 tokens."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = poisoned(logged.document, [])
    first = hostile["tokens"]["U"][0]
    many = 100_000
    for name, column in first.items():
        if isinstance(column, list):
            first[name] = (column * (many // len(column) + 1))[:many]
    hostile["sequences"]["U"][0] |= {"length": many, "contribution_deltaH1_tok": 1.0}
    texts = {
        "run": logged.page.read_text(encoding="utf-8"),
        "training": training_page(made_up_history(), 120, settings={"every": 2}, versions={"torch": "2.13"}),
        "young": training_page(made_up_history(probes=1, alarm=None), 1),
        "hostile": run_page(hostile, {"text": HOSTILE[0]}),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; in the end it must have asked for nothing, and nothing must have gone wrong."""
    contexts, visits = [], []

    def open_page(name, width=1400, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        visits.append(Visit(contexts[-1].new_page(), pages[name]))
        return visits[-1].page

    yield open_page
    for one in visits:
        assert one.requests == []
        assert one.errors == []
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["run", "training", "young", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(visit, name, scheme):
    page = visit(name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    if name == "run":
        page.get_by_role("button", name="Values as a table").first.click()
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found] == []


@pytest.mark.parametrize("name", ["run", "training", "young", "hostile"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_sticks_out(visit, name, width, height):
    """The page is as wide as the window, and every number of a chart stays on its line."""
    page = visit(name, width, height)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    broken = page.evaluate(
        """() => [...document.querySelectorAll('.number')].filter((one) => {
            const range = document.createRange();
            range.selectNodeContents(one);
            const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
            return lines.size > one.textContent.split('\\n').length;
        }).map((one) => one.textContent)"""
    )
    assert broken == []
    overprinted = page.evaluate(
        """() => [...document.querySelectorAll('.ticks, .across')].flatMap((row) => {
            const boxes = [...row.querySelectorAll('span')].map((one) => one.getBoundingClientRect())
                .filter((box) => box.width > 0);
            return boxes.slice(1).filter((box, k) => box.left < boxes[k].right).map(() => row.textContent);
        })"""
    )
    assert overprinted == []
    picture = page.screenshot(full_page=name != "hostile")
    assert picture.startswith(b"\x89PNG")
    if folder := os.environ.get("SCREENSHOTS"):  # for those who want to look
        Path(folder, f"{name}_{width}.png").write_bytes(picture)


def test_a_token_says_its_values_under_the_pointer(visit, logged):
    page = visit("run")
    box = page.get_by_role("listbox").first
    index = int(re.search(r"\d+", box.get_attribute("aria-label"))[0])
    tokens = logged.document["tokens"]["U"][index]
    for k in (0, len(tokens["id"]) - 1):
        box.get_by_role("option").nth(k).hover()
        said = page.locator("#reading").text_content()
        assert said.startswith(f"response {index}, token {k}; {json.dumps(printable(tokens['text'][k]))}; ")
        value = float(re.search(r"([-+]?[\d.]+(?:e[-+]\d+)?) nats per token to deltaH1", said)[1])
        assert value == pytest.approx(tokens["contribution_deltaH1_tok"][k], rel=1e-2)
        entropy = float(re.search(r"entropy ([\d.e-]+) nats", said)[1])
        assert entropy == pytest.approx(tokens["entropy_before"][k], rel=1e-2)


def test_colours_and_lines_follow_the_sign(visit, logged):
    page = visit("run")
    box = page.get_by_role("listbox").first
    index = int(re.search(r"\d+", box.get_attribute("aria-label"))[0])
    column = logged.document["tokens"]["U"][index]["contribution_deltaH1_tok"]
    for k, c in enumerate(column):
        style = box.get_by_role("option").nth(k).get_attribute("style") or ""
        assert ("--shade-rises" in style and "solid" in style) == (c > 0)
        assert ("--shade-falls" in style and "dashed" in style) == (c < 0)


def test_tokens_by_keyboard(visit):
    page = visit("run")
    box, status = page.get_by_role("listbox").first, page.locator("#reading")
    box.focus()
    assert ", token 0;" in status.text_content()
    for key, token in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert f", token {token};" in status.text_content()
    page.keyboard.press("End")
    last = box.get_by_role("option").count() - 1
    assert f", token {last};" in status.text_content()
    chosen = box.locator('[aria-selected="true"]')
    assert chosen.count() == 1
    assert box.get_attribute("aria-activedescendant") == chosen.get_attribute("id")


def test_everything_is_reached_by_the_tab_key(visit):
    """The skip link comes first, then the button for the colours, the links, and all that can be worked."""
    page = visit("run")
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        what = page.evaluate(
            "(document.activeElement.id || document.activeElement.textContent || '').trim().slice(0, 30)"
        )
        if page.evaluate("document.activeElement === document.body"):
            break
        seen.append(what)
    assert seen[0] == "Skip to the report"
    assert seen[1] == "theme"
    assert {"find", "order", "side"} <= set(seen)
    assert sum("Values as a table" in one for one in seen) == 16


def shown(page):
    return [int(re.search(r"\d+", one)[0]) for one in page.locator("#list h3").all_text_contents()]


def test_responses_are_sorted_and_filtered(visit, logged):
    page = visit("run")
    records = logged.document["sequences"]["U"]
    key = "contribution_deltaH1_tok"
    orders = {
        "size": lambda r: -abs(r[key]),
        "falls": lambda r: r[key],
        "rises": lambda r: -r[key],
        "index": lambda r: r["index"],
        "advantage": lambda r: -r["advantage"],
        "length": lambda r: -r["length"],
    }
    for name, order in orders.items():
        page.locator("#order").select_option(name)
        places = [order(records[i]) for i in shown(page)]
        assert len(places) == 16
        assert places == sorted(places)
    kinds = {
        "positive": lambda r: r["advantage"] > 0,
        "negative": lambda r: r["advantage"] < 0,
        "zero": lambda r: r["advantage"] == 0,
        "falls": lambda r: r[key] < 0,
        "rises": lambda r: r[key] > 0,
    }
    for name, kind in kinds.items():
        page.locator("#side").select_option(name)
        assert sorted(shown(page)) == [r["index"] for r in records if kind(r)]
    page.locator("#side").select_option("all")
    text = records[3]["completion"][:3]
    page.locator("#find").fill(text)
    prompts = logged.document["sequences"]["prompts"]
    found = [
        r["index"]
        for r in records
        if text.lower() in r["completion"].lower() or text.lower() in prompts[r["prompt"]]["text"].lower()
    ]
    assert sorted(shown(page)) == found
    assert page.locator("#found").text_content() == f"{len(found)} of {len(found)} shown"


def number(text):
    """The value of a number with its error, as a page shows it."""
    found = re.fullmatch(r"\(?(-?[\d.]+(?:e[-+]\d+)?)(?:\xa0±\xa0[\d.]+)?\)?(e[-+]\d+)?", text)
    return float(found[1] + (found[2] or ""))


def test_tables_are_sorted_by_their_numbers(visit, logged):
    page = visit("run")
    table = page.locator("#what-if table.sortable")
    head = table.get_by_role("button", name="predicted")
    before = table.locator("tbody th").all_text_contents()
    assert len(before) > 5
    for direction, sign in (("descending", -1), ("ascending", 1)):
        head.click()
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == direction
        cells = table.locator("tbody tr td:nth-child(3)").all_text_contents()
        values = [sign * number(text) for text in cells]
        assert values == sorted(values)
        assert sorted(table.locator("tbody th").all_text_contents()) == sorted(before)
    head.focus()
    page.keyboard.press("Enter")
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_values_of_a_response_as_a_table(visit, logged):
    page = visit("run")
    button = page.get_by_role("button", name="Values as a table").first
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    table = page.locator("#list table").first
    index = int(re.search(r"\d+", table.locator("caption").text_content())[0])
    tokens = logged.document["tokens"]["U"][index]
    assert table.locator("tbody tr").count() == len(tokens["id"])
    table.get_by_role("button", name="deltaH1").click()
    first = float(table.locator("tbody tr").first.locator("td").nth(2).text_content())
    assert first == pytest.approx(max(tokens["contribution_deltaH1_tok"]), rel=1e-2)
    button.click()
    assert page.locator("#list table").count() == 0


def colours(page):
    style = "getComputedStyle(document.body)"
    return page.evaluate(f"[{style}.backgroundColor, {style}.color]")


def test_light_and_dark(visit):
    light, dark = (colours(visit("run", color_scheme=scheme)) for scheme in ("light", "dark"))
    assert light != dark
    page = visit("training", color_scheme="dark")
    button = page.locator("#theme")
    assert (colours(page), button.get_attribute("aria-pressed")) == (dark, "true")
    button.click()
    assert (colours(page), button.get_attribute("aria-pressed")) == (light, "false")
    button.click()
    assert colours(page) == dark


def test_curves_are_read_by_pointer_and_keyboard(visit):
    page = visit("training")
    history = made_up_history()
    area = page.get_by_role("slider").first
    readout = page.locator(".readout").first
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 50)
    assert readout.text_content().startswith(f"step {history[-1]['step']}; ")
    page.mouse.move(box["x"] + 1, box["y"] + 50)
    assert readout.text_content().startswith("step 1; ")
    assert f"intervals {history[0]['H_orig_tok']:.4g} [" in readout.text_content()
    area.focus()
    page.keyboard.press("ArrowRight")
    assert area.get_attribute("aria-valuenow") == "3"
    assert area.get_attribute("aria-valuetext") == readout.text_content()
    page.keyboard.press("End")
    assert area.get_attribute("aria-valuenow") == str(history[-1]["step"])
    page.keyboard.press("ArrowRight")
    assert area.get_attribute("aria-valuenow") == str(history[-1]["step"])


def test_probes_are_filtered_by_verdict(visit):
    page = visit("training")
    for choice, count in (("caution", 20), ("alarm", 1), ("all", 60)):
        page.locator("#which").select_option(choice)
        assert page.locator("#probes tbody tr:visible").count() == count
        assert page.locator("#which-count").text_content() == f"{count} shown"


def test_hostile_texts_are_texts(visit):
    """Scripts do not run, marks do not turn the text around, and 100,000 tokens can be looked through."""
    page = visit("hostile")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script:not([type='application/json']), main img, main iframe").count() == 0
    text = page.locator("main").inner_text()
    assert "<script>window.hacked = 1</script>" in text
    assert "\\x1b[31mred\\x1b[0m" in text
    assert "\\u202egnp.exe" in text
    box = page.get_by_role("listbox").first
    assert box.get_by_role("option").count() == 1500
    page.get_by_role("button", name=re.compile("Show the other 98,500 tokens")).click()
    assert page.locator("#list .text").first.locator(".token").count() == 100_000
    page.keyboard.press("End")
    assert ", token 99999;" in page.locator("#reading").text_content()


def test_without_scripts_the_tables_are_there(visit):
    page = visit("run", java_script_enabled=False)
    assert page.locator("#changes table.plot").first.is_visible()
    assert page.locator("#responses noscript").count() == 1
