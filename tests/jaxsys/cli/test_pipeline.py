"""``jaxsys pipeline``: what it prints, draws, saves and refuses."""

import pytest

from jaxsys.cli.main import main
from pipelines.generators import GENERATORS
from pipelines.schedule import Table

SIZE = ["--stages", "4", "--microbatches", "8"]
SMALL = ["--stages", "3", "--microbatches", "4"]  # where the search for the best moves residuals too


def run(capsys, *options):
    code = main(["pipeline", *([] if "--stages" in options else SIZE), *options])
    return code, *capsys.readouterr()


def test_all_schedules_are_drawn_and_compared(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and "3 ...0a1b2c3dA4eB5fC6gD7hEFGH" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-len(GENERATORS) :]}
    assert rows.keys() == GENERATORS.keys()
    assert rows["zb-h1"] == ["27.0", "11.1%", "11.1%", "4", "4.00", "0.00", "0%"]
    assert rows["1f1b"][:3] == ["40.0", "40.0%", "27.3%"]


def test_the_head_makes_the_last_stage_slower(capsys):
    """GPipe: each of the eight forwards waits for the last stage's, which takes twice as long."""
    _, out, _ = run(capsys, "--schedule", "gpipe", "--head", "1")
    assert out.splitlines()[-1].split()[1] == f"{3 + 8 * 2 + 11 * 2:.1f}"


def test_a_link_offloads_and_says_why(capsys, tmp_path):
    picture, table = tmp_path / "a.svg", tmp_path / "a.json"
    code, out, _ = run(capsys, "--schedule", "1f1b", "--link", "1500", "--draw", str(picture), "--save", str(table))
    assert code == 0 and "nobody waits for a transfer" in out and "2 slots instead of 4" in out
    assert "to the host" in picture.read_text()
    assert Table.load(table).offloads
    code, again, _ = run(capsys, "--schedule", str(table), "--link", "1500")
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_cheap_operations_are_computed_again_where_that_makes_room(capsys):
    light = ["--schedule", "1f1b", "--link", "2000", "--residual", "5", "--light", "2", "--again"]
    code, out, _ = run(capsys, *light, "0.05")
    assert code == 0 and "nobody waits for a transfer" in out
    assert "cheap operations again, the least on a device within 5% of the time" in out
    code, out, _ = run(capsys, *light, "0.5")
    assert code == 0 and "everything kept, the least on a device" in out and "nothing moves" in out


def test_the_best_under_a_limit(capsys):
    code, free, _ = run(capsys, "--schedule", "best", "--width", "0")
    code_tight, tight, _ = run(capsys, "--schedule", "best", "--limit", "2.5", "--width", "0")
    assert code == code_tight == 0
    assert float(tight.splitlines()[-1].split()[-3]) <= 2.5 < float(free.splitlines()[-1].split()[-3])


def test_schedules_that_need_more_slots_are_left_out_of_all(capsys):
    code, out, err = run(capsys, "--link", "100", "--slots", "1", "--width", "0")
    assert code == 0 and "left out: schedule 'eager': slots=1 are too few" in err
    rows = out.splitlines()
    rows = rows[next(i for i, line in enumerate(rows) if line.startswith("schedule ")) :]
    assert [line.split()[0] for line in rows] == ["schedule", "gpipe", "1f1b", "interleaved"]


def test_the_limit_that_an_error_names_is_met(capsys):
    _, _, err = run(capsys, *SMALL, "--schedule", "best", "--limit", "0.1", "--link", "100")
    least = float(err.split("expected at least ")[1].split()[0]) / 1e3
    code, out, _ = run(capsys, *SMALL, "--schedule", "best", "--limit", str(least), "--link", "100", "--width", "0")
    assert code == 0 and float(out.splitlines()[-1].split()[-3]) <= least


def test_schedules_that_cannot_use_the_microbatches_are_left_out_of_all(capsys):
    code, out, err = run(capsys, "--chunks", "0", "--width", "0")
    assert code == 0 and "left out: schedule 'interleaved': chunks=0" in err and "interleaved" not in out


def test_a_table_of_another_size_is_refused(capsys, tmp_path):
    GENERATORS["1f1b"](2, 8).save(tmp_path / "a.json")
    code, _, err = run(capsys, "--schedule", str(tmp_path / "a.json"))
    assert code == 2 and "a table of 2 stages and 8 microbatches, found --stages 4 --microbatches 8" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schedule", "nope"], "unknown schedule 'nope'"),
        (["--schedule", "best", "--limit", "0.1"], "no schedule keeps to 100 MB a stage: expected at least"),
        (["--schedule", "interleaved", "--chunks", "1"], "chunks=1, expected at least 2"),
        (["--forward", "0"], "--forward: found 0, expected a number above 0"),
        (["--slots", "2"], "--slots: how fast residuals move is not known"),
        (["--shared", "2"], "--shared: how fast residuals move is not known"),
        (["--light", "1"], "--light: how fast residuals move is not known"),
        (["--again", "1"], "--again 1: what is kept then is not known"),
        (["--limit", "2"], "--limit with --schedule all: it is for the search"),
        (["--chunks", "3", "--schedule", "1f1b"], "--chunks with --schedule 1f1b"),
        (["--save", "table.json"], "--save table.json with --schedule all: expected one schedule"),
        (["--draw", "a.nope", "--width", "0"], "a.nope: found the ending '.nope'"),
        (["--draw", "nodir/a.png"], "nodir/a.png: there is no directory nodir"),
        (["--schedule", "missing.json"], "missing.json: No such file"),
        (["--schedule", "1f1b,best"], "--schedule 1f1b,best: best stands alone"),
        (["--schedule", "1f1b,1f1b"], "--schedule 1f1b,1f1b: a schedule is there twice"),
        (["--width", "-5"], "--width: found -5, expected 0 or more"),
        ([*SMALL, "--schedule", "best", "--limit", "0.1", "--link", "100"], "expected at least 500 MB"),
    ],
)
def test_what_it_cannot_do_is_one_line(capsys, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *options)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
