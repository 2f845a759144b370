"""What a log reader sees: without a terminal a bar is plain lines, few and with the time left."""

from ray_jobs.core.progress import Bar


def test_without_a_terminal_every_new_note_is_one_line_and_old_ones_are_not_repeated(capsys):
    with Bar("finetune", "step", each_note=True) as bar:
        for done, note in ((0, ""), (1, "loss 2.0"), (1, "loss 2.0"), (2, "loss 2.0"), (4, "loss 1.0")):
            bar(done, 4, note)
    assert capsys.readouterr().err.splitlines() == ["finetune: 1/4, 0 s left, loss 2.0", "finetune: 4/4, loss 1.0"]


def test_notes_in_quick_succession_are_not_all_printed(capsys):
    with Bar("finetune", "step", each_note=True) as bar:
        for done in range(1, 200):
            bar(done, 1000, f"loss {done}")
    assert len(capsys.readouterr().err.splitlines()) < 20


def test_work_that_is_quickly_done_prints_nothing(capsys):
    with Bar("answer", "answer") as bar:
        for done in range(5):
            bar(done, 5, f"note {done}")
    assert capsys.readouterr().err == ""


def test_a_resumed_run_is_timed_from_where_it_went_on(capsys):
    with Bar("finetune", "step", each_note=True) as bar:
        bar(90, 100, "loss 2.0")
    assert capsys.readouterr().err == "finetune: 90/100, loss 2.0\n"
