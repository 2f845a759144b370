import math
from itertools import pairwise

import pytest

from ray_jobs.reporting.charts import (
    BOTTOM,
    FRAME,
    LEFT,
    RIGHT,
    TOP,
    Box,
    Circle,
    Point,
    Scale,
    bubble_chart,
    line_chart,
    place_labels,
    round_values,
    thinned,
)


def test_a_scale_maps_its_ends_and_is_linear_between():
    scale = Scale(2.0, 4.0, BOTTOM, TOP)
    assert (scale(2.0), scale(4.0)) == (BOTTOM, TOP)
    assert scale(3.0) == pytest.approx((TOP + BOTTOM) / 2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.31, 2.74), (-3, 900), (1e-5, 3e-5), (0, 40)])
def test_ticks_are_round_evenly_spaced_and_inside(low, high):
    values = [value for value, _ in round_values(low, high, 5)]
    assert 3 <= len(values) <= 11
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    step = values[1] - values[0]
    assert all(math.isclose(b - a, step) for a, b in pairwise(values))
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_tick_texts_say_the_value():
    assert [text for _, text in round_values(2.3, 2.7, 4)] == ["2.3", "2.4", "2.5", "2.6", "2.7"]
    assert "1,000" in [text for _, text in round_values(0, 1000, 2)]


def test_long_curves_are_thinned_to_means_and_keep_their_last_point():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thin = thinned(points, 100)
    assert len(thin) <= 100
    assert thin[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for _, y in thin[:-1])
    assert thinned(points[:50], 100) == points[:50]


def test_a_line_chart_says_in_words_what_it_shows_and_leaves_out_what_is_not_finite():
    chart = line_chart("Loss", {"training": [(1, 3.0), (2, math.nan), (3, 2.0)], "none": []}, x_label="step", y_label="nats")
    assert chart.summary == "training: from 3 at step 1 to 2 at step 3."
    assert "nan" not in chart.curves[0].path
    assert line_chart("Loss", {"training": []}, x_label="step", y_label="nats") is None


def test_one_point_and_a_flat_curve_divide_by_nothing():
    for points in ([(0.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)]):
        chart = line_chart("Loss", {"training": points}, x_label="step", y_label="nats")
        assert all(TOP <= y <= BOTTOM for _, y in chart.curves[0].dots)


def test_bubbles_stay_in_the_frame_and_areas_follow_sizes():
    points = [Point("base", 20, 2.7, 400, "base"), Point("student", 30, 2.4, 100, "student")]
    large, small = (bubble.circle for bubble in bubble_chart("Speed", points, x_label="tokens/s", y_label="nats").bubbles)
    assert large.radius == pytest.approx(2 * small.radius, rel=0.02)
    for circle in (large, small):
        assert LEFT <= circle.x - circle.radius and circle.x + circle.radius <= RIGHT
        assert TOP <= circle.y - circle.radius and circle.y + circle.radius <= BOTTOM
    assert bubble_chart("Speed", [], x_label="", y_label="") is None


def test_labels_of_neighbours_do_not_cover_each_other():
    circles = [Circle(f"variant-{i}", "student", 200.0 + 12 * i, 100.0, 8.0) for i in range(3)]
    boxes = []
    for bubble in place_labels(circles):
        width = 6.6 * len(bubble.circle.name)
        left = {"start": bubble.label_x, "middle": bubble.label_x - width / 2, "end": bubble.label_x - width}[bubble.anchor]
        boxes.append(Box(left, bubble.label_y - 11, left + width, bubble.label_y + 4))
    assert all(a.overlap(b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])


def test_overlap_is_the_shared_area():
    assert Box(0, 0, 4, 4).overlap(Box(2, 3, 10, 10)) == 2
    assert FRAME.overlap(Box(-5, -5, 0, 0)) == 0
