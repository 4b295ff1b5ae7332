"""Models, LoRAs and pictures' settings for other tools.

python -m pipeline export runs/digits --format diffusers
python -m pipeline convert lora.safetensors --to kohya --out kohya.safetensors
python -m pipeline workflow samples/a-lighthouse_0.png --out lighthouse.json
"""

from pathlib import Path

from cli import DTYPES, Parser, one_line_errors, output, plain_warnings
from storage.files import commit_json
from storage.models import find_model


def parser() -> Parser:
    p = Parser(prog="python -m pipeline", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, parser_class=Parser)
    convert = commands.add_parser("convert", help="write a LoRA under the names of another tool")
    convert.add_argument("lora", type=Path, help="a LoRA of any tool, file or folder")
    convert.add_argument("--to", choices=["diffusers", "kohya", "peft"], required=True)
    convert.add_argument("--out", type=output, required=True, help="a new file; for PEFT a new folder")
    export = commands.add_parser("export", help="write a model for other tools, with a model card")
    export.add_argument("model", type=Path, help="a run's folder, a model folder or a single file")
    export.add_argument("--format", choices=["diffusers", "single-file"], default="diffusers")
    export.add_argument("--out", type=output, help="a new folder; default: export/FORMAT in a run's folder")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--dtype", choices=DTYPES, help="type of network and VAE; default: as stored")
    export.add_argument(
        "--lora", action="append", metavar="PATH[:STRENGTH]", help="a LoRA or the like to merge; repeatable"
    )
    export.add_argument("--parts", type=Path, help="model folder with the tokenizers and encoders a single file lacks")
    export.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="also upload it to this Hugging Face repository; an export that exists is uploaded as it is",
    )
    workflow = commands.add_parser("workflow", help="write a workflow of ComfyUI that draws a picture again")
    workflow.add_argument("picture", type=Path, help="a PNG that sample.py drew with a model of a released one's shape")
    workflow.add_argument("--out", type=output, required=True, help="a new JSON file, to be opened in ComfyUI")
    return p


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        if args.command in ("convert", "workflow") and args.out.exists():
            raise ValueError(f"{args.out} exists: choose another --out")
        if args.command == "workflow":
            from pipeline.comfy import workflow  # slow

            made = workflow(args.picture)
            commit_json(args.out, made.nodes)
            print(f"{args.out}: open it in ComfyUI, whose folder needs")
            print(*(f"  {place}: {source}" for place, source in made.files.items()), sep="\n")
            return
        if args.command == "convert":
            from mmdit import lora  # slow
            from mmdit.convert import write_lora
            from pipeline.convert import convert
            from storage.updates import opened

            weights, settings = opened(args.lora)
            state = convert(weights, args.to, settings)
            notes = {key: text for key, text in weights.metadata.items() if key == lora.PROCESS}
            write_lora(state, args.to, args.out, notes)
            print(f"{args.out}: {len(state)} tensors")
            return
        path = find_model(args.model)
        run = args.model if args.model.is_dir() else args.model.parent
        if args.out is None and not (run / "config.yaml").is_file():
            raise ValueError(f"{args.model} is no run's folder: give --out, the new folder to write")
        out = args.out or run / "export" / args.format
        from pipeline import LoadOptions, Pipeline  # slow
        from pipeline.export import as_file, as_folder, check_place, upload

        there = bool(args.push_to_hub) and (out / "README.md").exists() and not args.overwrite
        check_place(out, path, args.overwrite or there)
        if not there:
            pipe = Pipeline.load(
                path, LoadOptions(dtype=args.dtype or "stored", lora=tuple(args.lora or ()), parts=args.parts)
            )
            write = as_folder if args.format == "diffusers" else as_file
            print(f"{out}: {write(pipe, out, run, (args.out or run).resolve().name)}")
        if args.push_to_hub:
            print(f"uploaded to {upload(out, args.push_to_hub)}")


if __name__ == "__main__":
    main()
