"""Writes docs/likelihood.md from the results of configs/studies/likelihood.yaml.

The template bits.md in this folder holds the text, with a name in braces for each table.
"""

from pathlib import Path

from metrics.significance import Sample
from storage.files import commit_bytes
from studies.claims import METHOD, Claim, claims_table
from studies.presentation import filled, spread, table
from studies.results import Result, read, select
from studies.steps import Steps

TEMPLATE = Path(__file__).with_suffix(".md")
CODES = ("uniform code", "histogram of each pixel")
NAMES = {  # step → what it trains
    "rectified-flow": "rectified flow, logit-normal t",
    "uniform": "rectified flow, uniform t",
    "levels": "rectified flow, uniform t, plain digits",
    "v-cosine": "V on the cosine path",
    "vp": "ε on the VP path",
    "ddpm": "ε, DDPM-linear, plain digits",
    "iddpm": "ε, improved cosine, learned variance, plain digits",
    "vae": "autoencoder, plain digits",
    "codes": "levels one after the other, plain digits",
}


def rows_of(folder: Path, seed: int) -> list[Result]:
    """The rows of an evaluation. The recipe of a row is the name of the model's folder, or of the code."""
    found = []
    for row in read(folder)["rows"]:
        recipe = Path(row["folder"]).name if "folder" in row else row["model"]
        found.append(row | {"recipe": recipe, "seed": seed})
    return found


def all_rows(study: Steps, out: Path) -> list[Result]:
    """The rows of all evaluations of the study; those of the codes without a model once for each seed."""
    rows: list[Result] = []
    for seed in study.seeds:
        rows += rows_of(study.folder(f"digits/{seed}/bits", out), seed)
        rows += [row for row in rows_of(study.folder(f"digits/{seed}/exact", out), seed) if "folder" in row]
    return rows


def values(rows: list[Result], recipe: str, likelihood: str) -> list[float]:
    """The bits per dimension of a recipe, for each seed."""
    return [row["bits_per_dim"] for row in select(rows, recipe=recipe, likelihood=likelihood)]


def differences(rows: list[Result], more: tuple[str, str], less: tuple[str, str]) -> list[float]:
    """One recipe and likelihood minus another, for each seed."""
    return [a - b for a, b in zip(values(rows, *more), values(rows, *less), strict=True)]


def claims(rows: list[Result]) -> list[Claim]:
    """What the study asks."""
    flows = [name for name in NAMES if values(rows, name, "ODE") and name != "levels"]
    gaps = [min(gap) for gap in zip(*(differences(rows, (f, "bound"), (f, "ODE")) for f in flows), strict=True)]
    ours, vae, codes = ("uniform", "ODE"), ("vae", "IWAE-64"), ("codes", "exact")
    return [
        Claim("the bound of a flow minus its ODE's bits, smallest over the flows",
              Sample.of(gaps), low=0.0, form=".3f"),
        Claim("the autoencoder's ELBO minus its IWAE-64",
              Sample.of(differences(rows, ("vae", "ELBO"), vae)), low=0.0, form=".3f"),
        Claim("rectified flow, logit-normal minus uniform t",
              Sample.of(differences(rows, ("rectified-flow", "ODE"), ours)), low=0.0, form=".3f"),
        Claim("plain minus dequantised digits, uniform t",
              Sample.of(differences(rows, ("levels", "ODE"), ours)), low=1.0),
        Claim("the autoencoder's IWAE-64 minus rectified flow, uniform t",
              Sample.of(differences(rows, vae, ours)), low=0.0, form=".3f"),
        Claim("rectified flow, uniform t, minus levels one after the other",
              Sample.of(differences(rows, ours, codes)), low=0.0, form=".3f"),
    ]  # fmt: skip


def bits_table(rows: list[Result]) -> str:
    """Every model and what is measured of it, in bits per dimension."""
    body = []
    for name in (*CODES, *NAMES):
        for kind in dict.fromkeys(row.get("likelihood") for row in select(rows, recipe=name)):
            each = select(rows, recipe=name, likelihood=kind) if kind else select(rows, recipe=name)
            error = max(row["bits_per_dim_error"] for row in each)
            found = spread([row["bits_per_dim"] for row in each if kind or row is each[0]], ".3f")
            body.append([NAMES.get(name, name), kind or "–", found, f"{error:.3f}"])
    return table(["model", "measured by", "bits / dim", "error over the pictures"], body)


def write(study: Steps, out: Path, docs: Path, command: str) -> Path:
    """Writes likelihood.md from the results alone. Returns the document.

    Args:
        study: the study; it must have been run.
        out: the folder of its results.
        docs: the folder of the document.
        command: the command that repeats the study.

    Raises:
        FileNotFoundError: a result is missing.
    """
    rows = all_rows(study, out)
    parts = {
        "COMMAND": command,
        "SEEDS": str(len(study.seeds)),
        "SAMPLES": str(rows[0]["samples"]),
        "METHOD": METHOD.format(test="Student's t"),
        "BITS": bits_table(rows),
        "CLAIMS": claims_table(claims(rows)),
    }
    commit_bytes(docs / "likelihood.md", filled(TEMPLATE, parts))
    return docs / "likelihood.md"
