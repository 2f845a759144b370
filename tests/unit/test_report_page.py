"""The page as text: what stands in it, and that nothing a model wrote becomes markup. The browser test looks at it alive."""

import json
import re
from html.parser import HTMLParser

import pytest
from report_run import config_of, make_questions, write_run

from ray_jobs import report

STAGES = ("prepare", "finetune", "distill", "answer", "judge", "compress")
ATTACK = "<script>alert(1)</script> \"'</textarea></script><!--<script> {{ 7 * 7 }} <img src=x onerror=alert(2)>\u2028\u202eevil\u202c"


class Tags(HTMLParser):
    """Collects tags, attributes and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.attributes = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


def make_page(folder, questions, **options):
    run = write_run(folder, questions, **options)
    report.run(config_of(folder), force=False)
    return run.folder("report").read_bytes("report.html").decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("runs"), make_questions(12))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    questions = [{**q, "question": f"{q['question']} {ATTACK}", "reference": ATTACK, "topic": ATTACK} for q in make_questions(4)]
    return make_page(tmp_path_factory.mktemp("runs"), questions, answer_of=lambda q, model, i: f"{ATTACK} {model}")


def test_it_opens_on_the_answer_and_names_the_judge(page):
    heading = re.search(r"<h1>(.*?)</h1>", page, re.S)[1]
    assert "fine-tuned model" in heading and "coverage judge" in heading and "p\u00a0=\u00a0" in heading and "interval" in heading
    assert "not a language model" in page and "GPT-4" not in page


def test_a_judge_that_cannot_depend_on_the_order_is_not_said_to_agree_with_itself(page, tmp_path):
    assert "Same winner in both orders" not in page
    assert "Same winner in both orders" in make_page(tmp_path, make_questions(3), judges=("openai",))


def test_it_shows_the_parts_that_were_asked_for(page):
    words = " ".join(" ".join(Tags(page).words).split())
    for text in (
        "95 % interval", "Cohen's kappa", "Fine-tuning", "Distillation", "openvino-int8", "finetune.learning_rate",
        "raystill", "Dropped near duplicate", "Peak memory", "Held-out text, nats per token",
    ):  # fmt: skip
        assert text in words, text


def test_plots_have_titles_and_descriptions(page):
    pictures = re.findall(r'<svg[^>]*role="img" aria-labelledby="(\S+) (\S+)"', page)
    assert len(pictures) == 8
    for name in (identifier for pair in pictures for identifier in pair):
        assert f'id="{name}">' in page


def test_it_needs_nothing_from_outside(page):
    for tag, name, value in Tags(page).attributes:
        assert tag not in ("link", "img", "iframe")
        assert name not in ("src", "style") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
    assert not re.findall(r"url\(|@import|https?://", page)


def test_ids_are_unique(page):
    identifiers = [value for _, name, value in Tags(page).attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_nothing_a_model_or_author_wrote_becomes_markup(page, attacked):
    assert sorted(set(Tags(attacked).tags)) == sorted(set(Tags(page).tags))
    assert Tags(attacked).tags.count("script") == 2
    assert "49" not in Tags(attacked).words
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', attacked, re.S)[1])
    assert data["questions"][0]["answers"]["base"]["text"] == f"{ATTACK} base"
    assert data["questions"][0]["reference"] == ATTACK


@pytest.mark.parametrize("gone", STAGES[1:])
def test_a_stage_that_is_missing_is_named_in_its_place(tmp_path, gone):
    left_out = {gone, "judge"} if gone == "answer" else {gone}
    html = make_page(tmp_path, make_questions(4), stages=tuple(stage for stage in STAGES if stage not in left_out))
    assert f"Stage <strong>{gone}</strong> has not finished" in html


def test_only_prepared_is_still_a_page(tmp_path):
    html = make_page(tmp_path, make_questions(4), stages=("prepare",))
    assert "Nobody has judged" in html and html.rstrip().endswith("</html>")


def test_training_shows_memory_against_its_limit_and_where_the_time_went(page):
    words = " ".join(" ".join(Tags(page).words).split())
    assert "1.9\u202fGB, 1.9\u202fGB (limit 17.2\u202fGB; planned 1.8\u202fGB, measured 106\u202f% of it)" in page
    assert "640 (320 a worker)" in words and "backward 60 %" in words
    assert len(re.findall(r'<rect class="part p\d" x=', page)) == 5


def test_a_stage_of_a_version_that_measured_less_is_left_out_of_training(page):
    assert "Fine-tuning: where a step" in page and "Distillation: where a step" not in page
