"""A report as a file: what is written, what can be read back, what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
import torch

from fxopt.rewrite.fusion import Verdict
from fxopt.view import save, text
from fxopt.view.highlight import highlighted
from fxopt.view.report import GraphReport, Kernel, Report

HOSTILE = "</script></pre><b>bold</b>\" onclick='x' {{ 7 * 7 }} {% raw %} \x00\x1b[31m \ud800"


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.shown = True
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.shown = tag not in ("script", "style")
        self.attributes += attributes

    def handle_endtag(self, tag):
        self.shown = True

    def handle_data(self, data):
        if self.shown:
            self.text += data


@pytest.fixture
def hostile(make) -> Report:
    verdict = Verdict(HOSTILE, HOSTILE, 1.0)
    texts = dict.fromkeys(("fusion", "op", "module"), HOSTILE) | {"verdict": verdict}
    many = (HOSTILE,)
    return Report(
        [
            GraphReport(
                HOSTILE,
                before=HOSTILE,
                after=HOSTILE,
                normalized=True,
                steps=[
                    make.step(**texts, rule=HOSTILE, replaced=many, made=many, sources=many, tags={HOSTILE: HOSTILE})
                ],
                misses=[make.miss(fusion=HOSTILE, reason=HOSTILE, node=HOSTILE, source=HOSTILE)],
                sites=[make.site(**texts, implementation=HOSTILE, source=HOSTILE, passed_over=((HOSTILE, HOSTILE),))],
                generated={HOSTILE: HOSTILE},
                seconds={HOSTILE: 1.0},
                lowering=HOSTILE,
                notes=[HOSTILE],
            ),
            GraphReport(HOSTILE, reason=HOSTILE),
        ]
    )


def test_json_round_trip(report, tmp_path):
    path = report.save(tmp_path / "r.json")
    assert Report.from_json(path) == report


def test_json_round_trip_of_hostile_strings(hostile, tmp_path):
    assert Report.from_json(hostile.save(tmp_path / "r.json")).to_dict() == hostile.to_dict()


@pytest.mark.parametrize("error", [math.inf, math.nan, -0.0, None])
def test_json_has_no_bare_nan(error, tmp_path, make):
    path = Report([GraphReport("g", sites=[make.site(verdict=Verdict("failed", error=error))])]).save(
        tmp_path / "r.json"
    )
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"bare {word}"))
    assert repr(Report.from_json(path).sites[0].verdict.error) == repr(error)


def test_json_of_odd_tags(tmp_path, make):
    tags = {
        "dtype": torch.float16,
        "dims": (1, 2),
        "names": {"b", "a"},
        3: None,
        "module": torch.nn.ReLU(),
        "type": int,
    }
    path = Report([GraphReport("g", steps=[make.step(tags=tags)])]).save(tmp_path / "r.json")
    assert Report.from_json(path).steps[0].tags == {
        "dtype": "torch.float16",
        "dims": [1, 2],
        "names": ["a", "b"],
        "3": None,
        "module": "ReLU()",
        "type": "<class 'int'>",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 99, "graphs": []}', "schema 99"),
        ('{"graphs": []}', "no schema version"),
        ("[]", "not an fxopt report"),
        ("{", "Expecting"),
        ('{"schema": 2, "graphs": [{"name": "g"}]}', "damaged: KeyError"),
        ('{"schema": 2}', "damaged"),
    ],
)
def test_what_is_not_a_report_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Report.from_json(path)
    assert "odd.json" in str(error.value)


@pytest.mark.parametrize("name", ["r.pdf", "r", "json"])
def test_unknown_suffix_names_the_known_ones(report, name, tmp_path):
    with pytest.raises(ValueError, match=r"one of \.dot, \.graphml, \.html, \.json, \.txt"):
        report.save(tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["r.json", "r.TXT", "deep/er/r.html"])
def test_parent_folders_are_made_and_nothing_is_left_beside(report, name, tmp_path):
    path = report.save(str(tmp_path / name))
    assert path.stat().st_size > 100
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_keeps_the_old_file(report, tmp_path, monkeypatch):
    path = tmp_path / "r.txt"
    path.write_text("old")
    monkeypatch.setattr(save.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.txt"]


def test_text_file_is_the_table(report, tmp_path):
    assert report.save(tmp_path / "r.txt").read_text() == str(report) + "\n"


def test_text_of_hostile_strings_has_no_control_characters(hostile, tmp_path):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", hostile.save(tmp_path / "r.txt").read_text())


def test_page_has_everything(report, tmp_path):
    shown = Page(report.save(tmp_path / "r.html").read_text()).text
    for part in (
        "2 graphs, 2 sites fused",
        "toy/model.py:12 in forward: p = scores.softmax(-1)",
        "not triton: the inputs are on cpu",
        "checked: equal, error at most 0.5 times",
        "autocast is on",
        "the softmax runs over dimension 1",
        "return attention(x)",
        "def kernel()",
        "one dimension is symbolic",
        "undone",
        "retrace 250.0 ms",
    ):
        assert part in shown, part


def test_page_tells_a_form_given_back_from_a_failure(make):
    back = make.step(applied=False, verdict=Verdict("equal", "undone: nothing fused the result"))
    wrong = make.step(applied=False, verdict=Verdict("failed", "3 off"))
    shown = [Page(save.page(Report([GraphReport("g", normalized=True, steps=[step])]))).text for step in (back, wrong)]
    assert ["given back" in page for page in shown] == [True, False]
    assert ["undone" in page for page in shown] == [False, True]


def test_page_fetches_nothing_and_runs_one_script_of_its_own(report, hostile, tmp_path):
    for each in (report, hostile, Report()):
        html = each.save(tmp_path / "r.html").read_text()
        page = Page(html)
        assert not {"link", "img", "iframe", "object", "form"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
        (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in (value or "")]
        assert policy.startswith("default-src 'none'; ")
        script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'; worker-src blob:" in policy


def test_hostile_strings_stay_text_in_the_page(hostile, tmp_path):
    html = hostile.save(tmp_path / "r.html").read_text()
    page = Page(html)
    assert page.tags.count("script") == 4  # data, dagre, layout, the page's own
    assert page.tags.count("b") == len(hostile.graphs)  # the page's own: each graph's name
    assert page.text.count("</script></pre><b>bold</b>") >= 20
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)


def test_the_script_reads_what_the_json_has(hostile):
    data, read = hostile.to_dict(), json.loads(save.page_data(hostile))
    for graph in data["graphs"]:
        graph |= {"before": "", "after": "", "generated": {}, "compiled": ""}  # as text they are in the page already
    for site in (site for graph in read["graphs"] for site in graph["sites"]):
        assert site.pop("computed")
        assert site.pop("sheets") == []  # its op is unknown, and no code bears its name
    assert read == json.loads(json.dumps(data))
    assert not {"<", ">", "&"} & set(save.page_data(hostile))


def test_source_is_in_the_page_once(make):
    """Of many sites, in several graphs: one sheet for the kernel, one for what stands in their places."""
    generated = {"rms_norm, decomposed": "def forward(self, x): return x"}
    sites = [
        make.site(i, op="rms_norm", implementation=used, code=f"rms_norm, {used}", arguments=("None",))
        for i, used in enumerate(["triton", *["decomposed"] * 8])
    ]
    kernel = Kernel("rms_norm", "triton", "@triton.jit\ndef _the_kernel(): ...")
    report = Report(
        [GraphReport(f"graph {i}", normalized=True, sites=sites, generated=generated) for i in (0, 1)], [kernel]
    )
    html = save.page(report)
    assert html.count("_the_kernel") == 1
    assert Page(html).text.count("def forward(self, x): return x") == 1
    first, second = (graph["sites"] for graph in json.loads(save.page_data(report))["graphs"])
    assert first[0]["sheets"] == [["sheet-0", "what computes it"]]
    assert [id for id, _ in second[1]["sheets"]] == ["sheet-1", "sheet-0"]
    assert (
        second[1]["sheets"][1][1]
        == "the op's own kernel, passed over here: the inputs are on cpu, not on a CUDA device"
    )


def test_colours_leave_the_source_as_it_is():
    for source in (
        HOSTILE,
        "",
        "\n\n@f\ndef g(x: int = 3):  # <b>\n    '''</pre>'''\n\n",
        "def f(:\n  'unclosed",
        "&amp;\r\n\t",
    ):
        html = str(highlighted(source))
        assert set(Page(html).tags) <= {"span"}
        assert Page(html).text == source.replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"implementation": "triton", "opaque": True}, "own kernel"),
        ({"implementation": "sdpa_filled"}, "scaled_dot_product_attention"),
        ({"implementation": "aten"}, "ATen"),
        ({"implementation": "decomposed"}, "Inductor compiles"),
        ({"implementation": "reference"}, "the unfused arithmetic"),
        ({"implementation": "a plugin's"}, "nodes of the graph"),
    ],
)
def test_who_computes_a_site_is_said_in_words(changes, words, make):
    assert words in text.computed(make.site(**changes), "inductor, mode=default")
    assert "Inductor" not in text.computed(make.site(**changes), "eager: no C++ compiler")


def test_notebook_shows_the_page_in_a_sandboxed_frame(hostile):
    frame = Page(hostile._repr_html_())
    assert frame.tags == ["iframe"]
    attributes = dict(frame.attributes)
    assert attributes["sandbox"] == "allow-scripts"  # and not the notebook's own origin
    assert attributes["srcdoc"] == save.page(hostile)


def test_a_long_graph_is_left_to_the_json():
    graph = GraphReport("g", normalized=True, before="x" * save.LONGEST, after="y")
    html = save.page(Report([graph]))
    assert "too long for a page" in html
    assert len(html) < save.LONGEST
