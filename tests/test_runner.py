"""The runner of studies: order, several commands at a time, going on, and failures, with tiny commands."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from studies.runner import Step, ordered, result_of, run

WORK = """
import os, pathlib, sys, time
name, out, diary, *needs = sys.argv[1:]
def note(what):
    with open(diary, "a") as file:
        file.write(f"{what} {name}\\n")
note("begin")
for need in needs:
    assert (pathlib.Path(need) / "done").is_file(), need
"""
FINISH = """
note("end")
os.makedirs(out, exist_ok=True)
(pathlib.Path(out) / "done").touch()
"""


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


def step(diary: Path, name: str, *needs: Step, work: str = "", failure: str | None = None) -> Step:
    """A step that writes its beginning and its end into the diary, and fails unless all that it needs is there."""
    out = diary.parent / name
    words = ("-c", WORK + work + FINISH, name, str(out), str(diary), *(str(need.folder) for need in needs))
    return Step(words, out, "done", needs, failure)


def begun(diary: Path) -> list[str]:
    """The names of the steps that have begun, in order."""
    return [line.split()[1] for line in diary.read_text().splitlines() if line.startswith("begin")]


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_step_comes_once_and_after_what_it_needs(diary: Path, at_once: int) -> None:
    a = step(diary, "a")
    b, c = step(diary, "b", a), step(diary, "c", a)
    d, e = step(diary, "d", b, c), step(diary, "e")
    run([d, e], "test", at_once)  # the others come along, as needs
    assert Counter(begun(diary)) == Counter("abcde")
    lines = diary.read_text().splitlines()
    for later, earlier in ((b, a), (c, a), (d, b), (d, c)):
        assert lines.index(f"end {earlier.folder.name}") < lines.index(f"begin {later.folder.name}")


def test_so_many_commands_run_at_once_and_no_more(diary: Path) -> None:
    wait = 'while "begin {}" not in open(diary).read(): time.sleep(0.01)\ntime.sleep(0.2)'
    a, b = step(diary, "a", work=wait.format("b")), step(diary, "b", work=wait.format("d"))  # a ends only beside b
    run([a, b, *(step(diary, name, work="time.sleep(0.3)") for name in "cd")], "test", 2)
    counts, now = [], 0
    for line in diary.read_text().splitlines():
        now += 1 if line.startswith("begin") else -1
        counts.append(now)
    assert max(counts) == 2


def test_the_cores_are_shared_out(diary: Path) -> None:
    run([step(diary, "a", work="note(os.environ['OMP_NUM_THREADS'])")], "test", 1)
    run([step(diary, "b", work="note(os.environ['OMP_NUM_THREADS'])")], "test", 10**6)
    whole = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {f"{whole} a", "1 b"} <= set(diary.read_text().splitlines())


def test_after_a_failure_only_what_is_missing_runs(diary: Path) -> None:
    cure = diary.with_name("cure")
    a = step(diary, "a")
    b = step(diary, "b", a, work=f"assert pathlib.Path({str(cure)!r}).exists()")
    c = step(diary, "c", b)
    with pytest.raises(OSError, match="AssertionError"):
        run([c], "test", 1)
    assert begun(diary) == ["a", "b"]
    cure.touch()
    run([c], "test", 1)
    assert begun(diary) == ["a", "b", "b", "c"]
    run([c], "test", 1)
    assert begun(diary) == ["a", "b", "b", "c"]


def test_a_result_of_another_command_is_refused_before_any_work(diary: Path) -> None:
    run([step(diary, "a")], "test", 1)
    with pytest.raises(ValueError, match="a holds the result of another command: remove it"):
        run([step(diary, "b"), step(diary, "a", work="pass")], "test", 1)
    assert begun(diary) == ["a"]


def test_a_command_that_was_killed_before_it_was_noted_runs_again(diary: Path) -> None:
    a = step(diary, "a")
    run([a], "test", 1)
    a.note.unlink()
    run([a], "test", 1)
    assert begun(diary) == ["a", "a"]
    assert a.is_done()


def test_a_result_whose_source_is_gone_is_not_mixed_with_a_new_source(diary: Path) -> None:
    a = step(diary, "a")
    b = step(diary, "b", a)
    run([b], "test", 1)
    (a.folder / "done").unlink()
    with pytest.raises(ValueError, match=r"b was made from .*a, which is gone: remove the former too"):
        run([b], "test", 1)
    assert begun(diary) == ["a", "b"]


def test_the_first_failure_stops_the_others_and_says_why(diary: Path) -> None:
    wait = 'while "begin long" not in open(diary).read(): time.sleep(0.01)\n'
    long, never = step(diary, "long", work="time.sleep(60)"), step(diary, "never")
    short = step(diary, "short", work=wait + 'print("a reason", file=sys.stderr); sys.exit(2)')
    start = time.monotonic()
    with pytest.raises(ValueError, match="short failed with status 2: a reason") as fault:
        run([long, short, never], "test", 2)
    assert time.monotonic() - start < 30
    assert sorted(begun(diary)) == ["long", "short"]
    assert "end long" not in diary.read_text()
    assert str(short.log) in str(fault.value)
    said = short.log.read_text()
    assert said.startswith("$ python -c ")
    assert said.endswith("a reason\n")


def test_a_failure_that_counts_as_a_result_leaves_out_what_needs_it(diary: Path) -> None:
    a = step(diary, "a", work='sys.exit("the loss is infinite: try a lower lr")', failure="try a lower lr")
    b = step(diary, "b", a)
    c, d = step(diary, "c", b), step(diary, "d")
    run([a, c, d], "test", 1)
    assert begun(diary) == ["a", "d"]
    assert [s.is_done() for s in (a, b, c, d)] == [False, False, False, True]
    with pytest.raises(OSError, match="another reason"):
        run([step(diary, "e", work='sys.exit("another reason")', failure="try a lower lr")], "test", 1)


def test_success_without_a_result_is_a_failure(diary: Path) -> None:
    with pytest.raises(ValueError, match="a failed with status 0: it left no done"):
        run([step(diary, "a", work="sys.exit()")], "test", 1)


def test_two_steps_in_one_folder_are_refused(diary: Path) -> None:
    with pytest.raises(ValueError, match=r"two steps write to .*a: give one of them another folder"):
        ordered([step(diary, "a"), step(diary, "a")])


def test_only_commands_of_this_project_have_a_known_result() -> None:
    assert result_of(["sample.py", "pairs", "--num", "1"]) == "report.json"
    assert result_of(["evaluate.py"]) == "results.json"
    for words in (["sample.py", "--prompt", "a"], ["train.py"], ["rm", "-r"], []):
        with pytest.raises(ValueError, match=r"is no command of a study: take train.py fit, sample.py pairs"):
            result_of(words)
