"""What scripts/main_job.py may empty: only a directory that it made."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "main_job.py"


@pytest.fixture(scope="module")
def main_job():
    spec = importlib.util.spec_from_file_location("main_job", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_directory_of_something_else_is_refused_before_anything_is_done(tmp_path):
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    done = subprocess.run([sys.executable, SCRIPT, "--run", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"main job: --run {tmp_path} is not an earlier main job and would be emptied: give a new or empty directory\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"] and mine.read_text() == "years of work"


def test_a_file_is_refused(tmp_path, main_job):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match="is not an earlier main job"):
        main_job.make_anew(file)
    assert file.exists()


def test_a_new_and_an_empty_directory_and_an_earlier_main_job_are_taken(tmp_path, main_job):
    main_job.make_anew(tmp_path / "runs" / "new")
    (tmp_path / "empty").mkdir()
    main_job.make_anew(tmp_path / "empty")
    (tmp_path / "empty" / "hf").mkdir()
    main_job.make_anew(tmp_path / "empty")
    assert not (tmp_path / "empty" / "hf").exists()
