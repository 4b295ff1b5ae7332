"""Gives every command wrong inputs by the hundred: `python -m benchmarks.wrong_inputs --count 800`.

Each input is a correct call in which one flag, one key of the YAML or one file is wrong. A command must end with status
1 or 2 and one line of error, and change no file. Some of the inputs are not wrong for every command; those are counted
as accepted. Each call runs in a process of its own, forked from one that has imported everything, within limits of time
and memory. The same seed gives the same inputs.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from argparse import Action, ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
MEMORY, SECONDS = 6 * 2**30, 30  # of one call, beyond what the imports take
NUMBERS = ("-1", "0", "nan", "inf", "1000000000000", "9" * 40, "x", "", "1e400", "0x10", "1,2", "½")
WORDS = ("", "x", "\udcff", "../..", "None", "[", "{", "💥" * 90, "-1", "true")
DEVICES = ("hpu", "privateuseone", "meta", "cuda:99", "cpu:7", "mps", "xla", "")


def deep(opening: str) -> bytes:
    return opening.encode() * 100_000


CONTENTS = {  # name of a file → what it holds
    "empty": b"",
    "zeros.bin": bytes(4096),
    "latin.txt": "ein schöner Tag\n".encode("latin-1"),
    "deep.json": deep('{"a":'),
    "deep.yaml": deep("["),
    "bomb.yaml": b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n".encode()
        for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
    ),
    "page.html": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n",
    "list.json": b"[1, 2]",
    "null.yaml": b"null\n",
    "number.json": b'{"sample_size": 1e400, "_class_name": 3}',
    "header.safetensors": (2**40).to_bytes(8, "little") + b"{}",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
}


class Call(NamedTuple):
    """A call of a command."""

    command: str
    argv: list[str]
    damage: tuple[str, bytes] | None = None  # a file of the prepared folder, and what it holds instead

    def __str__(self) -> str:
        words = [word if len(word) < 40 else f"{word[:37]}…" for word in self.argv]
        damaged = f" with {self.damage[0]} = {self.damage[1][:20]!r}" if self.damage else ""
        return f"{self.command} {' '.join(words)}{damaged}".encode(errors="backslashreplace").decode()


def commands() -> dict[str, Callable[[list[str]], None]]:
    """Name → the function that runs the command."""
    import compare
    import data.__main__
    import encode
    import evaluate
    import pipeline.__main__
    import sample
    import train

    return {
        "train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main, "encode.py": encode.main,
        "compare.py": compare.main, "-m pipeline": pipeline.__main__.main, "-m data": data.__main__.main,
    }  # fmt: skip


def prepare(folder: Path) -> dict[str, Any]:
    """Makes a small run, pictures, a store and prompts in a folder. Returns the config of the run."""
    from PIL import Image

    config = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    config["run"] |= {"folder": "run", "steps": 2, "validate_every": 2, "checkpoint_every": 2, "log_every": 1}
    config["text"]["init_args"]["folder"] = "text"
    config["network"]["init_args"] |= {"depth": 1, "width": 16, "heads": 1}
    config["data"]["init_args"]["batch_size"] = 4
    config["optimization"]["warmup"] = 1
    config["grid"] = {"prompts": ["a handwritten seven"], "columns": 1}
    shutil.copytree(ROOT / "assets/digits/text", folder / "text")
    (folder / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (40 + number, 40), (60 * number, 0, 0)).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(f"picture {number}")
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "prompts.txt").write_text("a handwritten one\na handwritten two\n")
    source = {"class_path": "data.raw.sources.Pictures", "init_args": {"path": "pictures"}}
    encoding = {"source": source, "store": "store", "side": 32, "step": 32, "batch_size": 2, "threads": 1}
    coded = {key: config[key] for key in ("run", "text", "codec", "data", "network", "objective", "optimization")}
    coded["codec"] = {"class_path": "Pixels", "init_args": {"channels": 3}}
    arguments = config["network"]["init_args"] | {"in_channels": 3}
    coded["network"] = {"class_path": "mmdit.model.MMDiT", "init_args": arguments}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "encode.yaml").write_text(yaml.safe_dump(coded | {"encode": encoding}))
    command = "sample.py grid --model run --prompts prompts.txt --out {out}/grid.json"
    (folder / "study.yaml").write_text(yaml.safe_dump({"steps": {"grid": command}}))
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return config


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted key → value of all that a YAML tree holds; sections, too."""
    if path:
        yield ".".join(path), tree
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from leaves(value, (*path, key))


def wrong_values(action: Action) -> tuple[str, ...]:
    """Values that do not fit a flag of argparse, most of them."""
    kind = getattr(action.type, "__name__", "")
    if action.dest in ("device", "text_device"):
        return DEVICES
    if kind in ("Path", "PosixPath"):
        return (
            *CONTENTS,
            "",
            "missing",
            "pictures",
            "/dev/zero",
            "x" * 300,
            "\udcff",
            "run/checkpoints",
            "prompts.txt/x",
        )
    return WORDS if kind in ("", "str") and not action.choices else NUMBERS


def of_parser(command: str, parser: ArgumentParser, base: list[str]) -> Iterator[Call]:
    """The base call with one more flag that is wrong."""
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and action.dest != "help":
            flag = action.option_strings[-1]
            for value in wrong_values(action):
                kept = [*base]
                if flag in kept:  # in place of the right one
                    at = kept.index(flag)
                    kept = kept[:at] + kept[at + 2 :]
                yield Call(command, [*kept, f"{flag}={value}"])
    yield Call(command, [*base, "--unknown", "1"])


def calls(config: dict[str, Any], folder: Path) -> list[Call]:
    """All wrong calls."""
    import compare
    import evaluate
    import pipeline.__main__
    import sample

    draw = ["--model", "run", "--prompt", "a handwritten two", "--steps", "1", "--out", "drawn"]
    pairs = ["--model", "run", "--prompts", "prompts.txt", "--num", "2", "--steps", "1", "--out", "pairs"]
    grid = ["--model", "run", "--prompts", "prompts.txt", "--num", "2", "--fine", "4", "--out", "grid.json"]
    rated = ["--model", "run", "--samples", "10", "--steps", "1", "--out", "rated"]
    exported = ["--out", "exported"]
    found = [
        *of_parser("sample.py", sample.parser(), draw),
        *(Call("sample.py", ["pairs", *call.argv]) for call in of_parser("", sample.pairs_parser(), pairs)),
        *(Call("sample.py", ["grid", *call.argv]) for call in of_parser("", sample.grid_parser(), grid)),
        *of_parser("evaluate.py", evaluate.parser(), rated),
        *of_parser("compare.py", compare.parser(), ["study.yaml", "--out", "study"]),
        *(Call("compare.py", [name]) for name in CONTENTS),
        *(Call("-m data", [verb, place]) for verb in ("info", "verify") for place in (*CONTENTS, "", "missing", "run")),
    ]
    (export,) = (action for action in pipeline.__main__.parser()._actions if action.dest == "command")
    exports = of_parser("", export.choices["export"], exported)  # type: ignore[index]
    found += [Call("-m pipeline", ["export", "run", *call.argv]) for call in exports if "--push" not in str(call)]
    found += [Call("-m pipeline", ["export", name, *exported]) for name in (*CONTENTS, "", "missing", "pictures")]
    shown = ["--out", "shown.json"]
    found += [Call("-m pipeline", ["workflow", name, *shown]) for name in (*CONTENTS, "", "missing", "pictures")]
    for name in CONTENTS:
        found += [Call("train.py", ["fit", "--config", name]), Call("encode.py", ["--config", name])]
        found += [Call("train.py", ["fit", "--config", "config.yaml", "--config", name])]
    values = (*NUMBERS, *WORDS, "[1, 2]", "{a: 1}", "null")
    for key, _ in leaves(config):
        found += [Call("train.py", ["fit", "--config", "config.yaml", f"--{key}={value}"]) for value in values]
    for key, _ in leaves(yaml.safe_load((folder / "encode.yaml").read_text())["encode"]):
        found += [Call("encode.py", ["--config", "encode.yaml", f"--encode.{key}={value}"]) for value in values]
    for place, base in (("run/model", ["sample.py", *draw]), ("store", ["-m data", "verify", "store"])):
        for file in sorted((folder / place).rglob("*")):
            if file.is_file():
                name = str(file.relative_to(folder))
                bad = [*CONTENTS.values(), file.read_bytes()[: file.stat().st_size // 2]]
                found += [Call(base[0], base[1:], (name, content)) for content in bad]
    return found


def state(folder: Path) -> dict[str, str]:
    """File → hash of its content; locks are left out."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def forked(run: Callable[[list[str]], None], argv: list[str], folder: Path, said: Path) -> int:
    """The status of a call in a process of its own; negative: the signal that ended it."""
    if not (child := os.fork()):
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setsid()
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        status = 70
        try:
            with chdir(folder):
                sys.argv = ["command", *argv]
                run(argv)
                status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def verdict(call: Call, status: int, text: str, before: dict[str, str], after: dict[str, str]) -> str:
    """What to say of a call: refused and accepted are right."""
    errors = [line for line in text.replace("\r", "\n").split("\n") if line.startswith("error:")]
    if status == -signal.SIGALRM:
        return "hangs"
    if status < 0:
        return f"dies of {signal.Signals(-status).name}"
    if "Traceback" in text:
        return "traceback"
    if any(after.get(name) != content for name, content in before.items()):
        return "changes files"
    if status == 0:
        return "accepted"
    if call.argv[:1] == ["verify"] and status == 1 and text.strip():
        return "refused"  # it lists all faults
    return "refused" if status in (1, 2) and len(errors) == 1 else f"status {status} with {len(errors)} lines of error"


def run(count: int | None, seed: int, show: bool) -> list[tuple[str, str, str]]:
    """(verdict, call, last words) of `count` calls, or of all."""
    mains = commands()
    with tempfile.TemporaryDirectory() as place:
        folder, said = Path(place) / "work", Path(place) / "said"
        folder.mkdir()
        config = prepare(folder)
        for command, argv in (
            ("train.py", ["fit", "--config", "config.yaml"]),
            ("encode.py", ["--config", "encode.yaml"]),
        ):
            if forked(mains[command], argv, folder, said):
                raise RuntimeError(f"the right call of {command} failed: {said.read_text()}")
        chosen = calls(config, folder)
        random.Random(seed).shuffle(chosen)
        found = []
        before = state(folder)
        kept = Path(place) / "kept"
        shutil.copytree(folder, kept)
        for call in tqdm(chosen[:count], desc="wrong inputs", unit="call", disable=not show):
            if call.damage:
                (folder / call.damage[0]).write_bytes(call.damage[1])
            there = state(folder) if call.damage else before
            status = forked(mains[call.command], call.argv, folder, said)
            text = said.read_text(errors="replace")
            after = state(folder)
            found.append((verdict(call, status, text, there, after), str(call), text.strip()[-300:]))
            if after != before or any(path.name not in {*os.listdir(kept)} for path in folder.iterdir()):
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)
    return found


def main() -> None:
    p = ArgumentParser(description=__doc__)
    p.add_argument("--count", type=int, help="calls; default: all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="a file for a line of JSON for each call")
    args = p.parse_args()
    found = run(args.count, args.seed, show=True)
    for kind, call, words in found:
        if kind not in ("refused", "accepted"):
            print(f"{kind}: {call}\n    {words[-200:]!r}")
    if args.out:
        args.out.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    print(dict(Counter(kind for kind, _, _ in found)))


if __name__ == "__main__":
    main()
