"""benchmarks/conditioning.py: facts as conditions, what is changed, and a training at large t alone."""

import pytest
import torch

from benchmarks import conditioning
from data.shapes import Group, Request
from pipeline import Pipeline

ASKED = Request((Group(1, "circle", "red", "small"), Group(2, "square", "blue", "large")), "above")


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline.load("assets/shapes/model")


def test_facts_say_everything_and_where_each_group_lies() -> None:
    first, second = conditioning.facts(ASKED)
    named = [{conditioning.FACTS[i] for i in row[:-2].nonzero()[:, 0]} for row in (first, second)]
    assert named == [{"circle", "red", "small", "one"}, {"square", "blue", "large", "two"}]
    assert first[-2:].tolist() == [-1, 0]  # up
    assert second[-2:].tolist() == [1, 0]  # down
    assert torch.equal(
        conditioning.facts(conditioning.reversed_relation(ASKED))[:, -2:], -conditioning.facts(ASKED)[:, -2:]
    )
    same = Request(ASKED.groups[::-1], "below")
    assert torch.equal(conditioning.facts(same), conditioning.facts(ASKED).flip(0))
    colours = conditioning.facts(conditioning.exchanged_colours(ASKED)) - conditioning.facts(ASKED)
    assert {conditioning.FACTS[i] for i in colours[0].nonzero()[:, 0]} == {"red", "blue"}
    left = conditioning.facts(Request(ASKED.groups, "to the left of"))
    assert left[:, -2:].tolist() == [[0, -1], [0, 1]]


def test_conditions_are_facts_alone_or_the_caption(pipe: Pipeline) -> None:
    asked = [ASKED, conditioning.reversed_relation(ASKED)]
    plain = conditioning.from_facts(pipe)(asked)
    assert not plain.text[:, 2:].any()
    assert not plain.pooled.any()
    assert not torch.equal(plain.text[0, :2], plain.text[1, :2])
    quiet = conditioning.from_facts(pipe, 0.25)(asked)
    torch.testing.assert_close((quiet.text[0] - quiet.text[1])[:2], 0.25 * (plain.text[0] - plain.text[1])[:2])
    words, wanted = conditioning.from_captions(pipe)(asked), pipe.condition([one.caption() for one in asked])
    assert torch.equal(words.text, wanted.text)
    assert torch.equal(words.pooled, wanted.pooled)


def test_a_copy_is_trained_at_the_times_that_are_asked_for(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, x0 = conditioning.encoded(pipe, 5, 8)
    conditions, times, loss = conditioning.from_facts(pipe), [], pipe.objective.loss
    before = conditioning.losses(pipe, conditions(asked), x0)
    monkeypatch.setattr(pipe.objective, "loss", lambda *given: (times.append(given[3]), loss(*given))[1])
    conditioning.train(pipe, conditions, asked, x0, 12, 1e-3, 0.8)
    assert len(times) == 12
    assert all(len(t) == conditioning.BATCH and t.min() >= 0.8 for t in times)
    assert conditioning.losses(pipe, conditions(asked), x0).mean() < before.mean()


def test_a_time_that_leaves_nothing_to_learn_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        conditioning.main(["--model", "assets/shapes/model", "--min-t", "1"])
    assert "--min-t must be from 0 to below 0.95" in capsys.readouterr().err
