"""The report as Markdown."""

from __future__ import annotations

import html
import re

from probe.report.markdown import escaped, report_markdown
from tests.support.helpers import rendered
from tests.support.synthetic_run import (
    make_result,
)


def test_long_texts_are_cut_off():
    assert escaped("x" * 30, limit=10) == "x" * 10 + " ... &#40;20 more characters&#41;"


def test_the_report_as_markdown_has_a_verdict(state):
    result = make_result(state, verdict="resolved", verdict_reasons=["k is 0.2", "ESS is *high*"])
    page = rendered(report_markdown(result))
    assert "Verdict: <strong>resolved</strong>" in page
    assert "<li>ESS is *high*</li>" in html.unescape(page)
    assert page.count("<table>") == 4
    # how to read the numbers is no head of the column of explanations
    heads = re.findall(r"<th>(.*?)</th>", page, re.DOTALL)
    assert [head for head in heads if "standard error" in head] == []
    assert "standard error, [95 % interval]" in html.unescape(page)
    assert re.search(r"<td><pre>deltaH1</pre></td>\n<td><pre>[^<]*<br>.*?</pre></td>", page)
