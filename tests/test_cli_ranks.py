"""The place of a process among those that were started together, by whoever started them."""

from pathlib import Path

import pytest

from cli import Ranks, own_ranks
from training.run_folder import Run

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID",
         "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NAME", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")  # fmt: skip
SRUN = "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NNODES=2 SLURM_NTASKS_PER_NODE=2"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))


def run(devices: int, machines: int) -> Run:
    return Run(Path("run"), devices=devices, num_nodes=machines)


@pytest.mark.parametrize(
    ("variables", "devices", "machines", "place"),
    [
        ("", 1, 1, Ranks(0, 1, 0)),
        ("", 4, 1, Ranks(0, 4, 0)),  # it starts the other three
        ("NODE_RANK=1", 4, 2, Ranks(4, 8, 0)),
        ("NODE_RANK=1 LOCAL_RANK=2 WORLD_SIZE=8", 4, 2, Ranks(6, 8, 2)),  # one of these
        ("TORCHELASTIC_RUN_ID=x RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 GROUP_RANK=1", 4, 2, Ranks(5, 8, 1)),
        (SRUN, 2, 2, Ranks(3, 4, 1)),
        (f"{SRUN} TORCHELASTIC_RUN_ID=x RANK=1 WORLD_SIZE=8 LOCAL_RANK=1", 8, 1, Ranks(1, 8, 1)),  # torchrun by srun
        ("SLURM_NTASKS=8", 1, 1, Ranks(0, 1, 0)),  # a shell that salloc opened
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NAME=bash", 2, 1, Ranks(0, 2, 0)),
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_NAME=interactive", 1, 1, Ranks(0, 1, 0)),
        ("SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0", 4, 1, Ranks(0, 4, 0)),  # a task with four GPUs
    ],
)
def test_a_training_knows_its_place(devices: int, machines: int, place: Ranks) -> None:
    assert run(devices, machines).ranks() == place


@pytest.mark.parametrize(
    ("variables", "devices", "machines", "message"),
    [
        ("LOCAL_RANK=1", 1, 1, "LOCAL_RANK=1, not a RANK below WORLD_SIZE: unset them"),
        ("LOCAL_RANK=1", 2, 1, "LOCAL_RANK=1"),
        ("LOCAL_RANK=0", 2, 1, "1 processes were started"),
        ("NODE_RANK=1", 1, 1, "NODE_RANK=1"),
        ("WORLD_SIZE=4", 4, 1, "WORLD_SIZE=4"),
        ("RANK=2 WORLD_SIZE=2", 2, 1, "RANK=2"),
        ("RANK=one WORLD_SIZE=2", 2, 1, "RANK=one"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", 1, 1, "2 processes were started"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", 1, 2, "as number 1 of its machine, but run.devices × run.num_nodes is 1"),
        (SRUN, 1, 1, "4 processes were started"),
        ("SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0", 1, 1, "2 processes were started"),
        ("SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0", 2, 1, "must be run.devices and run.num_nodes, 2 and 1, got"),
        ("SLURM_PROCID=0 SLURM_NTASKS=2", 2, 1, "LOCAL_RANK="),
        (SRUN, 4, 1, "2 and 2"),
    ],
)
def test_what_does_not_fit_is_refused(devices: int, machines: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(devices, machines).ranks()


@pytest.mark.parametrize(
    ("variables", "place"),
    [("", Ranks(0, 1, 0)), ("RANK=1 WORLD_SIZE=2", Ranks(1, 2, 1)), (SRUN, Ranks(3, 4, 1))],
)
def test_other_commands_share_their_work_as_they_were_started(place: Ranks) -> None:
    assert own_ranks() == place
