"""What a command may replace: what it wrote itself for the same purpose, and on demand what it wrote for another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.files import commit_json
from storage.text import read_json

KEY = "purpose"  # of a JSON result; its value is the command and its settings
RECORD = "purpose.json"  # in a folder of results: their purpose and the names of the files


def check_result(file: Path, purpose: Mapping[str, Any], overwrite: bool) -> bool:
    """Checks that a JSON result can be written, before the work for it.

    Args:
        file: the result, which holds its purpose under KEY.
        purpose: `command`, and the settings by their names, as JSON.
        overwrite: also a result of the same command with other settings may be replaced.

    Returns:
        Whether there is one of other settings.

    Raises:
        ValueError: there is a file that may not be replaced.
    """
    if not file.exists():
        return False
    try:
        held = read_json(file).get(KEY)
    except (ValueError, IsADirectoryError):
        held = None
    if not isinstance(held, dict) or held.get("command") != purpose["command"]:
        raise ValueError(f"{file} is not what {purpose['command']} writes: move it away, or choose another --out")
    changed = sorted(name for name in {**held, **purpose} if held.get(name) != purpose.get(name))
    if changed and not overwrite:
        cure = "choose another --out, or replace it with --overwrite"
        raise ValueError(f"{file} is for other settings ({', '.join(changed)}): {cure}")
    return bool(changed)


def claim_folder(folder: Path, purpose: Mapping[str, Any], names: Sequence[str], overwrite: bool) -> None:
    """Records in a folder which files a command is going to write. Those of other settings are removed.

    Args:
        folder: the folder, which is made if it does not exist.
        purpose: as for `check_result`.
        names: the names of the files.
        overwrite: as for `check_result`.

    Raises:
        ValueError: one of the files exists and may not be replaced.
        OSError: the folder cannot be written.
    """
    record = folder / RECORD
    changed = check_result(record, purpose, overwrite)
    old = {Path(name).name for name in read_json(record)["files"]} if record.exists() else set()
    if foreign := [name for name in names if name not in old and (folder / name).exists()]:
        what = f"{folder / foreign[0]} is not what {purpose['command']} wrote"
        raise ValueError(f"{what}: move it away, or choose another --out")
    for name in old if changed else ():
        (folder / name).unlink(missing_ok=True)
    commit_json(record, {KEY: purpose, "files": list(names)})
