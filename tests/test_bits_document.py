"""What docs/likelihood.md makes of results, here invented ones."""

import json
from pathlib import Path

import pytest

import compare
from studies import bits
from studies.steps import Steps

ROOT = Path(__file__).parents[1]
KINDS = {"ddpm": ["bound"], "iddpm": ["bound"], "vae": ["ELBO", "IWAE-64"], "codes": ["exact"]}
BITS = {"rectified-flow": 1.9, "uniform": 1.87, "levels": 3.5, "v-cosine": 1.95, "vp": 2.0, "ddpm": 3.4, "iddpm": 3.7,
        "vae": 2.1, "codes": 1.7}  # fmt: skip


@pytest.fixture
def study() -> Steps:
    read = compare.read(ROOT / "configs/studies/likelihood.yaml")
    assert isinstance(read, Steps)
    return read


def results(study: Steps, out: Path, bound: float) -> None:
    """Writes rows for each seed; a bound lies that much above the ODE's bits, an ELBO 0.1 above IWAE."""
    for seed in study.seeds:
        same = {"samples": 200, "bits_per_dim_error": 0.02}
        plain = [{"model": name, "bits_per_dim": 2.4, **same} for name in bits.CODES]
        rows = {"bits": list(plain), "exact": list(plain)}
        for name, value in BITS.items():
            for kind in KINDS.get(name, ["ODE", "bound"]):
                more = 0.1 * (kind == "ELBO") + bound * (kind == "bound") + 0.0001 * seed * len(name)
                own = rows["exact" if kind == "exact" else "bits"]
                own.append({"model": name, "folder": str(out / f"digits/{seed}/{name}"), "likelihood": kind,
                            "bits_per_dim": value + more * (1 + 0.1 * seed), **same})  # fmt: skip
        for step, own in rows.items():
            folder = study.folder(f"digits/{seed}/{step}", out)
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"rows": own}))


def test_the_document_shows_every_model_and_asks_its_questions(study: Steps, tmp_path: Path) -> None:
    results(study, tmp_path / "out", 0.2)
    (tmp_path / "docs").mkdir()
    text = bits.write(study, tmp_path / "out", tmp_path / "docs", "python compare.py x.yaml").read_text()
    assert "{" not in text.replace("{w}", "").split("## Digits")[1]
    assert "`python compare.py x.yaml`" in text
    for line in (
        "| uniform code | – | 2.400 | 0.020 |",
        "| rectified flow, uniform t | ODE | 1.871 ± 0.001 | 0.020 |",
        "| autoencoder, plain digits | IWAE-64 | 2.100 ± 0.000 | 0.020 |",
        "| levels one after the other, plain digits | exact | 1.701 ± 0.001 | 0.020 |",
    ):
        assert line in text
    table = text.split("| claim |")[1]
    assert table.count("| yes |") == 6
    assert set(bits.NAMES) == {name.rpartition("/")[2] for name in study.steps} - {"bits", "exact"}


def test_a_bound_below_the_likelihood_is_told(study: Steps, tmp_path: Path) -> None:
    results(study, tmp_path / "out", -0.2)
    rows = bits.all_rows(study, tmp_path / "out")
    assert [claim.holds for claim in bits.claims(rows)] == [False, True, True, True, True, True]
