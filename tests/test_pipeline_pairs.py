"""Pairs of noise and picture: what they are, how they replay, and what they are refused for."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from store_files import replan
from torch import Tensor

import sample
from data.order import Use, normal
from data.store.mixture import held_out
from data.store.reader import Sample, Store, Writer
from data.text.encoder import Text
from pipeline import Pipeline, pairs
from pipeline.pairs import Captions, Coupling, PairMaker
from pipeline.sampling import Sampling

PROMPTS = ["a seven", "the digit 3", "zero"]
HOW = Coupling(num=14, inverted=0, seed=5, batch_size=4, sampling=Sampling(steps=3, guidance=2.0))


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "UNIT", 4)
    monkeypatch.setattr(pairs, "SHARD", 8)


@pytest.fixture
def maker(pipe: Pipeline, tmp_path: Path) -> Callable[..., PairMaker]:
    def make(
        name: str = "pairs", how: Coupling = HOW, source: list[str] | Store = PROMPTS, apart: int = 0
    ) -> PairMaker:
        return PairMaker(pipe, "the model", Captions(source, how.seed, apart), how, tmp_path / name)

    return make


@pytest.fixture
def digits(pipe: Pipeline, tmp_path: Path) -> Store:
    """Twelve samples of latents, with one or two captions each."""
    plan = {"codec": pipe.codec.fingerprint(), "latents": "mean", "factor": 1, "channels": 1,
            "buckets": {"side": 8, "sizes": [[8, 8]]}}  # fmt: skip
    tokens, pooled = pipe.text.encode([""])
    writer = Writer(tmp_path / "digits", plan, Text(tokens[0], pooled[0]))
    latents = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = []
    for i, x0 in enumerate(latents):
        captions = (f"the digit {i % 10}", f"{i % 10}")[: 1 + i % 2]
        tokens, pooled = pipe.text.encode(captions)
        weights = (1.0, 3.0)[: len(captions)]
        samples.append(Sample(f"s{i}", captions, weights, 0, (8, 8), (0, 0), 0, x0, pooled, tokens))
    writer.write(0, samples, [], 12, True)
    writer.finish(1, None)
    return Store(tmp_path / "digits")


def halves(store: Store) -> tuple[Tensor, Tensor]:
    """Pictures and noise of all pairs."""
    return store.latents(np.arange(len(store))).float().chunk(2, dim=1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pair_is_noise_of_its_own_stream_and_what_the_model_makes_of_it(
    pipe: Pipeline, maker: Callable[..., PairMaker], tmp_path: Path
) -> None:
    made = maker()
    report = made.run()
    assert report is not None
    assert report["kept"] == 14
    store = Store(tmp_path / "pairs")
    x0, noise = halves(store)
    numbers = np.arange(14)
    assert torch.equal(noise, normal(5, Use.PAIR, 0, numbers, (1, 8, 8)).bfloat16().float())
    captions = [store.captions(i)[0] for i in range(14)]
    told = torch.cat([pipe.integrate(noise[i : i + 4], captions[i : i + 4], HOW.sampling) for i in (0, 4)])
    assert torch.equal(x0[:8], told.bfloat16().float())
    tokens, pooled = pipe.text.encode(captions)
    text = store.text(numbers, np.zeros(14, dtype=int))
    assert torch.equal(text.tokens, tokens.bfloat16())
    assert torch.equal(text.pooled, pooled.bfloat16())
    assert sorted(Counter(captions).values()) == [4, 5, 5]
    assert set(captions) == set(PROMPTS)


def test_any_pair_replays_from_seed_and_number_and_other_seeds_give_others(maker: Callable[..., PairMaker]) -> None:
    made = maker()
    first, again = made.block(np.arange(4, 8)), maker("again").block(np.arange(4, 8))
    for a, b in zip(first, again, strict=True):
        assert (a.id, a.captions) == (b.id, b.captions)
        assert torch.equal(a.latents, b.latents)
    other = maker("other", replace(HOW, seed=6)).block(np.arange(4, 8))
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(first, other, strict=True))


def test_stopped_anywhere_and_gone_on_with_is_the_straight_run_to_the_byte(
    maker: Callable[..., PairMaker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker("straight").run()
    plain = PairMaker.block
    for lasts in (1, 3):
        count = 0

        def stopping(self: PairMaker, numbers: np.ndarray, lasts: int = lasts) -> list[Sample]:
            nonlocal count
            count += 1
            if count > lasts:
                raise KeyboardInterrupt
            return plain(self, numbers)

        monkeypatch.setattr(PairMaker, "block", stopping)
        with pytest.raises(KeyboardInterrupt):
            maker(f"stopped-{lasts}").run()
        monkeypatch.setattr(PairMaker, "block", plain)
        maker(f"stopped-{lasts}").run()
        assert content(tmp_path / f"stopped-{lasts}") == content(tmp_path / "straight")


def test_two_processes_make_the_store_of_one(maker: Callable[..., PairMaker], tmp_path: Path) -> None:
    maker("one").run()
    assert maker("two").run(rank=1, world=2) is None
    assert maker("two").run(rank=0, world=2) is not None
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_the_store_of_another_model_or_setting_is_refused_by_name(
    pipe: Pipeline, maker: Callable[..., PairMaker], tmp_path: Path
) -> None:
    maker()
    with pytest.raises(ValueError, match=r'teacher: there "the model", now "another"'):
        PairMaker(pipe, "another", Captions(PROMPTS, 5), HOW, tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"source\.sampling\.guidance: there 2\.0, now 3\.0"):
        maker(how=replace(HOW, sampling=replace(HOW.sampling, guidance=3.0)))
    with pytest.raises(ValueError, match=r"source\.prompts"):
        maker(source=["zero"])


def test_inverted_pairs_are_real_samples_with_the_noise_that_leads_to_them(
    pipe: Pipeline, maker: Callable[..., PairMaker], digits: Store, tmp_path: Path
) -> None:
    fine = Sampling(steps=60, guidance=1.0, sampler="heun")
    maker(how=replace(HOW, num=10, inverted=6, sampling=fine), source=digits, apart=3).run()
    store = Store(tmp_path / "pairs")
    x0, noise = halves(store)
    captions = [store.captions(i)[0] for i in range(10)]
    real = digits.latents(np.arange(12)).float()
    rows = [next((i for i in range(12) if torch.equal(real[i], x)), None) for x in x0]
    assert rows[:4] == [None] * 4
    assert None not in rows[4:]
    assert all(captions[i] in digits.captions(rows[i]) for i in range(4, 10))
    apart = held_out(digits, 3)
    assert not apart & {digits.ids()[row].as_py() for row in rows[4:]}
    back = pipe.integrate(noise[4:], captions[4:], fine)
    torch.testing.assert_close(back, x0[4:], rtol=0, atol=0.03)  # the noise is rounded to bfloat16
    assert not torch.equal(noise[4:], normal(5, Use.PAIR, 0, np.arange(4, 10), (1, 8, 8)).bfloat16().float())


def test_captions_of_a_store_come_by_weight_and_round_again(digits: Store) -> None:
    captions = Captions(digits, seed=2, apart=3)
    assert {captions.row(i) for i in range(9)} == {captions.row(i) for i in range(9, 18)}
    told = Counter(captions[i] for i in range(9000))
    numeral = sum(count for caption, count in told.items() if caption.isdigit())
    with_two = sum(1 for i in range(9) if len(digits.captions(captions.row(i))) == 2)
    assert numeral / 9000 == pytest.approx(0.75 * with_two / 9, abs=0.02)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num", "0"], "must be at least 1"),
        (["--num", "4", "--model", "nowhere"], "nowhere is no model folder"),
        (["--num", "4", "--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--num", "4", "--prompts", "EMPTY"], "at least one line"),
        (["--num", "4", "--invert", "5"], "inverted pairs must be from 0 to all 4"),
        (["--num", "4", "--invert", "2"], "only samples of a store"),
        (["--num", "4", "--sampler", "meanflow"], "sampler meanflow needs a network of two times"),
        (["--num", "4", "--prompts", "DIGITS", "--held-out", "12"], "held-out must be from 0 to below the store's 12"),
        (["--num", "4", "--prompts", "DIGITS", "--held-out", "2", "--invert", "1", "--sampler", "ddim:eta=1"],
         "sampler ddim:eta=1 draws noise on the way"),
        (["--num", "4", "--prompts", "DIGITS", "--held-out", "2", "--invert", "1", "--sampler", "dpmpp_2m"],
         "sampler dpmpp_2m cannot go backward: take euler, heun or midpoint"),
        (["--num", "4", "--prompts", "OTHERS", "--held-out", "2", "--invert", "1"], "was encoded otherwise: codec"),
        (["--num", "4", "--sampler", "ddim"], "sampler ddim draws noise on the way"),
        (["--numb", "4"], "required: --num"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(
    model: Path, digits: Store, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("zero\n")
    (tmp_path / "empty.txt").write_text("\n")
    shutil.copytree(digits.folder, tmp_path / "others")
    replan(tmp_path / "others", codec={"class": "VAE"})
    names = {"EMPTY": "empty.txt", "DIGITS": "digits", "OTHERS": "others"}
    places = {name: str(tmp_path / file) for name, file in names.items()}
    given = ["--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), *argv]
    with pytest.raises(SystemExit) as end:
        sample.main(["pairs", *(places.get(arg, arg) for arg in given), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out/index.arrow").exists()


def test_the_command_writes_what_it_says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("zero\none\n")
    argv = ["pairs", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--num", "6", "--steps", "2"]
    sample.main([*argv, "--out", str(tmp_path / "out")])
    assert "6 pairs are in" in capsys.readouterr().out
    store = Store(tmp_path / "out")
    assert (len(store), store.plan["latents"], store.plan["source"]["sampling"]["steps"]) == (6, "pair", 2)
