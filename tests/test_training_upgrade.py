"""What earlier versions wrote: YAML files with the names of before, run folders, model folders."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from trials import ROOT, assert_same, fit, refused, small, state

from training.experiment import parser, resolve, upgraded

OLD_NETWORK = {"picture_channels", "level_embeds", "text_mask", "conv_mlp"}  # keys that were not there before
OLD_DATA = {"text_mask", "degrade"}


def older(resolved: dict[str, Any]) -> dict[str, Any]:
    """A run's config as the version before would have written it."""
    tree = copy.deepcopy(resolved)
    tree["text"]["class_path"] = "data.text.CLIPText"
    objective = tree["objective"].pop("init_args")
    tree["objective"] = objective | {"variance": None, "average": None}
    del tree["terms"]
    for key in OLD_NETWORK:
        tree["network"]["init_args"].pop(key, None)
    for key in OLD_DATA:
        tree["data"]["init_args"].pop(key, None)
    return tree


def test_a_run_of_the_version_before_goes_on_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, stopped = small(tmp_path / "a"), small(tmp_path / "b")
    fit(straight)
    fit(stopped, "--run.steps", "6", "--run.folder", str(tmp_path / "b/run"))
    file = tmp_path / "b/run/config.yaml"
    file.write_text(yaml.safe_dump(older(yaml.safe_load(file.read_text()))))
    for step in (tmp_path / "b/run/checkpoints").iterdir():
        if step.name.endswith("6"):
            for part in step.iterdir():
                part.unlink()
            step.rmdir()
    fit(stopped)
    assert_same(state(tmp_path / "b/run"), state(tmp_path / "a/run"))
    message = refused(capsys, stopped, "--network.width", "32")
    assert "network.init_args.width is 16 there and 32 now" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"text": {"class_path": "data.text.CLIPText"}}, {"text": {"class_path": "data.text.clip.CLIPText"}}),
        ({"text": {"class_path": "data.sd3_text.SD3Text"}}, {"text": {"class_path": "data.text.sd3.SD3Text"}}),
        (
            {"encode": {"source": {"class_path": "data.sources.Pictures"}}},
            {"encode": {"source": {"class_path": "data.raw.sources.Pictures"}}},
        ),
        (
            {"objective": {"average": {"share": 0.5}, "density": "Uniform", "penalty": {"c": 0.1}, "path": None}},
            {
                "objective": {
                    "class_path": "flow.meanflow.MeanFlow",
                    "init_args": {"density": "Uniform", "penalty": {"c": 0.1}, "share": 0.5},
                }
            },
        ),
        (
            {"objective": {"path": "ImprovedCosine", "target": "Epsilon", "variance": {"weight": 0.002}}},
            {
                "objective": {
                    "class_path": "flow.variance.LearnedVariance",
                    "init_args": {"path": "ImprovedCosine", "target": "Epsilon", "vlb_weight": 0.002},
                }
            },
        ),
        (
            {"objective": {"density": {"class_path": "flow.density.Steps", "init_args": {"k": 2}}, "shift": 1.0}},
            {"objective": {"class_path": "flow.stepmap.StepMap", "init_args": {"shift": 1.0, "k": 2}}},
        ),
        ({"objective": {"shift": 2.0, "variance": None}}, {"objective": {"shift": 2.0}}),
    ],
)
def test_names_of_before_become_those_of_today(old: dict, new: dict) -> None:
    assert upgraded(old) == new
    assert upgraded(new) == new


def test_a_yaml_file_of_before_is_read_with_one_line_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = small(tmp_path)
    content = yaml.safe_load(config.read_text())
    content["text"]["class_path"] = "data.text.CLIPText"
    content["objective"] = {"average": {"share": 0.5}, "density": "Uniform"}
    content["network"]["init_args"]["two_times"] = True
    content["sampling"]["sampler"] = "meanflow"
    config.write_text(yaml.safe_dump(content))
    read = parser("").parse_args(["--config", str(config)])
    assert read.objective.class_path == "flow.meanflow.MeanFlow"
    assert read.objective.init_args.share == 0.5
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [f"warning: {config} has names of an earlier version: see CHANGELOG.md"]


def test_todays_files_need_no_such_line(capsys: pytest.CaptureFixture) -> None:
    for file in ("digits.yaml", "shapes.yaml", "photographs.yaml", "sd3/finetune.yaml"):
        parser("").parse_args(["--config", str(ROOT / "configs" / file)])
    assert capsys.readouterr().err == ""


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load(small(tmp_path).read_text())
    tree["text"]["class_path"] = "data.nothing.Text"
    with pytest.raises(ValueError, match="this version cannot read the run's config") as error:
        resolve(tree)
    assert "\n" not in str(error.value)
