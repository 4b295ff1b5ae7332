"""Text encoders that learn: new words and low-rank updates."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from finetuned import FINETUNE, LORA, ROOT, faulty_after, fit, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from trials import assert_near, assert_same, assert_two_learn_as_one, state

import encode
import sample
from data.raw.pictures import load_picture
from data.text.inversion import NewWord
from data.text.sd3 import SD3Text
from mmdit import checkpoint, lora
from mmdit.lora import LoRA
from mmdit.network import Condition
from pipeline import LoadOptions, Pipeline
from pipeline.__main__ import main
from training.reader import NewWords, Reader, reading

WORDS = ROOT / "configs/sd3/new-words.yaml"
WIDTHS = {"text_encoder": 64, "text_encoder_2": 128, "text_encoder_3": tiny.TOKENS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "base"
    tiny.pipeline("sd35_medium", folder)
    return folder


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures whose captions have a new word, not encoded."""
    folder = tmp_path_factory.mktemp("toys")
    draw = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(8):
        Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"a <toy> and {i}")
    source = ["--encode.source.path", str(folder / "pictures"), "--encode.side", "32", "--encode.step", "16"]
    configs = (FINETUNE,)
    encode.main([*settings(base, folder / "store", configs, folder, 4), *source, "--encode.text", "captions",
                 "--encode.duplicates", "null"])  # fmt: skip
    return folder / "store"


@pytest.fixture
def encoders(base: Path) -> SD3Text:
    return SD3Text(base, tiny.TOKENS, tiny.POOLED, 16)


def table(encoders: SD3Text, name: str) -> Tensor:
    return encoders.encoder(name).get_input_embeddings().weight


def likened(encoders: SD3Text, like: str, named: str = "<toy>") -> NewWord:
    """A new word with the vectors of the tokens of known ones."""
    vectors = {}
    for part in encoders.parts:
        ids = part.tokenizer(like, add_special_tokens=False).input_ids
        vectors[part.name] = table(encoders, part.name)[ids].clone()
    return NewWord(named, vectors)


def condition(encoders: SD3Text, *captions: str) -> Condition:
    return Condition(*encoders.encode(captions))


def noised(count: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, 16, 8, 8, generator=draw), torch.rand(count, generator=draw)


@pytest.mark.parametrize("like", ["seven", "seven eight"])
def test_a_word_with_the_vectors_of_known_words_is_read_as_these(encoders: SD3Text, like: str) -> None:
    """Also by its pooled vector: no new token, whose number is the highest, is taken for the end."""
    taught = encoders.taught([likened(encoders, like)])
    for part in taught.parts:
        part.tower.settings["eos_token_id"] = 2  # as in the released settings
        part.tower.config.eos_token_id = 2
    for new, old in zip(taught.encode(["a <toy>", "nine"]), encoders.encode([f"a {like}", "nine"]), strict=True):
        assert torch.equal(new, old)
    assert torch.equal(taught.mask(["a <toy>"]), encoders.mask([f"a {like}"]))
    assert taught.fingerprint() != encoders.fingerprint()


def test_a_word_is_read_as_by_diffusers(base: Path, encoders: SD3Text, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    word = NewWord("<toy>", {name: torch.randn(2, width, generator=draw) for name, width in WIDTHS.items()})
    word.write(tmp_path)
    file = load_file(tmp_path / "toy.safetensors")

    class Theirs(StableDiffusion3Pipeline, TextualInversionLoaderMixin):
        pass

    pipe = Theirs.from_pretrained(base)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2"), ("t5xxl", "_3")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        pipe.load_textual_inversion(file[key], token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    prompt = "a <toy>"
    expanded = [pipe.maybe_convert_prompt(prompt, getattr(pipe, f"tokenizer{s}")) for s in ("", "_2", "_3")]
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(*expanded, do_classifier_free_guidance=False, max_sequence_length=16)
    taught = encoders.taught([NewWord.read(str(tmp_path / "toy.safetensors"))])
    ours = taught.encode([prompt])
    torch.testing.assert_close(ours.tokens[:, : taught.length], tokens[:, : taught.length], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)
    ids = [part.tokenizer(part.spelling(prompt)).input_ids for part in taught.parts]
    assert len(ids[2]) == 4  # a, two tokens, end


def test_a_reader_is_the_network_with_its_text_encoders(base: Path, encoders: SD3Text) -> None:
    """At first: updates begin at zero."""
    network = checkpoint.load(base)
    new_words = NewWords({"<toy>": "seven"}, vectors=2, encoders=("text_encoder", "text_encoder_3"))
    updates = LoRA(4, text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"))
    reader, numbered = reading(network, encoders, updates, new_words)
    started = {word.name: word for word in new_words.start(encoders)}
    taught = encoders.taught(list(started.values()))
    captions = ["a <toy> and nine", "eight"]
    with torch.no_grad():
        ours = reader(*noised(2), condition(numbered, *captions))
        theirs = network(*noised(2), condition(taught, *captions))
    assert torch.equal(ours, theirs)
    learning = {name for name, p in reader.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.endswith(".rows") for name in learning if name.startswith("encoders."))
    assert sum(name.endswith(".rows") for name in learning) == 2
    assert not torch.equal(condition(numbered, "a <toy>").text, condition(numbered, "a nine").text)


def test_the_gradient_reaches_a_new_word(base: Path, encoders: SD3Text) -> None:
    """Against the difference of two losses."""
    network = checkpoint.load(base).requires_grad_(False)
    reader, numbered = reading(network, encoders, None, NewWords({"<toy>": "seven"}))
    reader.double()
    inputs = [x.double() for x in noised()], condition(numbered, "a <toy>")
    inputs = *inputs[0], Condition(*(part.double() for part in inputs[1][:2]))
    rows = [p for name, p in reader.named_parameters() if name.endswith("rows")]
    gradients = torch.autograd.grad(reader(*inputs).square().sum(), rows)
    assert all(gradient.norm() > 0 for gradient in gradients)
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for own, gradient in zip(rows, gradients, strict=True):
                own += step * gradient / gradient.norm()
            losses.append(reader(*inputs).square().sum())
    slope = (losses[0] - losses[1]) / 2e-5
    torch.testing.assert_close(slope, sum(gradient.norm() for gradient in gradients), rtol=1e-5, atol=0)


def test_a_new_word_is_learned_and_drawn(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--optimization.lr", "0.1", "--text.init_args.max_sequence_length", "16"]
    fit(base, store, tmp_path / "run", *flags, configs=(FINETUNE, WORDS))
    file = tmp_path / "run/lora/embeddings/toy.safetensors"
    vectors = load_file(file)
    assert {key: tuple(own.shape) for key, own in vectors.items()} == {"clip_l": (2, 64), "clip_g": (2, 128)}
    assert not (tmp_path / "run/lora" / lora.FILE).exists()  # the network does not learn
    options = LoadOptions(max_sequence_length=16)
    trained = Pipeline.load(tmp_path / "run/lora", options)
    plain = Pipeline.load(base, options)
    given = Pipeline.load(base, LoadOptions(max_sequence_length=16, embedding=(str(file),)))
    drawn = [pipe([prompt], [0], height=32, width=32) for pipe, prompt in
             ((trained, "a <toy>"), (given, "a <toy>"), (plain, "a <toy>"))]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 0.005
    same = [pipe(["a seven"], [0], height=32, width=32) for pipe in (trained, plain)]
    assert torch.equal(*same)
    flags = ["--height", "32", "--width", "32", "--max-sequence-length", "16", "--out", str(tmp_path / "samples")]
    sample.main(["--model", str(tmp_path / "run"), "--prompt", "a <toy>", *flags])
    (shown,) = (tmp_path / "samples").glob("*_0.png")
    assert torch.equal(load_picture(shown, 3, 32, 32, 1)[0], drawn[0][0].mul(255).round().div(255))
    with pytest.raises(SystemExit):
        main(["workflow", str(shown), "--out", str(tmp_path / "workflow.json")])
    assert "has new words, and a workflow loads updates of the network alone" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no new words"):
        trained.save(tmp_path / "model")


def test_words_and_updates_resume_to_the_bit(base: Path, store: Path, tmp_path: Path) -> None:
    flags = [
        "--lora.rank",
        "2",
        "--lora.text_encoders",
        "[text_encoder,text_encoder_2]",
        "--data.caption_dropout",
        "0.5",
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fit(base, store, straight, *flags, configs=(FINETUNE, LORA, WORDS))
    with faulty_after(4):
        fit(base, store, resumed, *flags, configs=(FINETUNE, LORA, WORDS))
    assert state(resumed)["step"] == 2
    fit(base, store, resumed, *flags, configs=(FINETUNE, LORA, WORDS))
    assert_same(state(resumed), state(straight))
    for name in (lora.FILE, "embeddings/toy.safetensors"):
        assert_same(*(load_file(run / "lora" / name) for run in (resumed, straight)))
    names = load_file(straight / "lora" / lora.FILE)
    assert {name.partition(".")[0] for name in names} == {"transformer", "text_encoder", "text_encoder_2"}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_two_processes_learn_words_as_one(base: Path, store: Path, tmp_path: Path) -> None:
    config = Path(shutil.copyfile(FINETUNE, tmp_path / "config.yaml"))
    flags = settings(base, store, (LORA, WORDS), tmp_path / "run", 2)
    flags += ["--lora.rank", "2", "--lora.text_encoders", "[text_encoder]", "--grid.prompts", "[]"]
    assert_two_learn_as_one(config, *flags, kind="ddp")
    runs = [{name: load_file(tmp_path / run / "lora" / name) for name in (lora.FILE, "embeddings/toy.safetensors")}
            for run in ("one", "run")]  # fmt: skip
    for name, one in runs[0].items():
        assert_near(runs[1][name], one, 1e-5)


def test_updates_of_text_encoders_draw_the_same_in_diffusers(base: Path, store: Path, tmp_path: Path) -> None:
    """And here: what is written is what was learned."""
    flags = ["--optimization.lr", "0.1", "--lora.rank", "4", "--lora.alpha", "8", "--grid.prompts", "[]"]
    flags += ["--lora.text_encoders", "[text_encoder,text_encoder_2,text_encoder_3]"]
    fit(base, store, tmp_path / "run", *flags, configs=(FINETUNE, LORA))
    pipes = [Pipeline.load(path, LoadOptions(max_sequence_length=16)) for path in (tmp_path / "run/lora", base)]
    states = [pipe.text.encode(["a seven"]) for pipe in pipes]
    for slot in pipes[0].text.slots:
        assert not torch.allclose(*(own.tokens[:, slot.rows, slot.columns] for own in states), atol=0.01)
    theirs = StableDiffusion3Pipeline.from_pretrained(base)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path / "run/lora")
    with torch.no_grad():
        tokens, _, pooled, _ = theirs.encode_prompt("a seven", None, None, do_classifier_free_guidance=False,
                                                    max_sequence_length=16)  # fmt: skip
    rows = pipes[0].text.slots[0].rows  # diffusers reads no updates of T5
    torch.testing.assert_close(states[0].tokens[:, rows], tokens[:, rows], rtol=0, atol=1e-4)
    torch.testing.assert_close(states[0].pooled, pooled, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new_words.words", "{seven: nine}"], "the word seven exists already"),
        (["--new_words.words", "{<cat>: nine}"], "no caption of the data has the new word <cat>"),
        (["--new_words.words", "{<a toy>: nine}"], "letters without a space"),
        (["--new_words.words", "{<toy>: ''}"], "has no token"),
        (["--new_words.words", "{}"], "needs words"),
        (["--new_words.vectors", "0"], "vectors from 1 to 64"),
        (["--new_words.encoders", "[clip_l]"], "this model has no clip_l, only text_encoder, text_encoder_2"),
        (["--strategy.kind", "fsdp2"], "text encoders that learn exclude"),
        (["--network.init_args.path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(base, store, tmp_path / "run", *flags, configs=(FINETUNE, WORDS))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_encoded_text_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = ["--encode.source", "data.shapes.Shapes", "--encode.source.count", "12", "--encode.side", "32"]
    encode.main([*settings(base, tmp_path / "store", (FINETUNE,), tmp_path, 4), *source, "--encode.step", "16"])
    with pytest.raises(SystemExit) as end:
        fit(base, tmp_path / "store", tmp_path / "run", configs=(FINETUNE, WORDS))
    assert end.value.code == 2
    assert "holds encoded text: encode it anew with --encode.text captions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ({"clip_x": torch.ones(1, 64)}, "{file}", "is no new word of Stable Diffusion 3"),
        ({"clip_l": torch.ones(64)}, "{file}", "clip_l must be 1 to 64 finite vectors"),
        ({"clip_l": torch.full((1, 64), torch.nan)}, "{file}", "clip_l must be 1 to 64 finite vectors"),
        ({"clip_l": torch.ones(1, 60)}, "{file}", "vectors of 60 numbers, and text_encoder of 64"),
        ({"clip_l": torch.ones(1, 64)}, "{file}:seven", "the word seven exists already"),
        ({"clip_l": torch.ones(1, 64)}, "{file}:a b", "letters without a space"),
        ({"clip_l": torch.ones(1, 64)}, "{file}.x", "x"),
    ],
)
def test_files_that_are_no_words_are_refused(
    base: Path, tmp_path: Path, content: dict[str, Tensor], given: str, message: str
) -> None:
    file = tmp_path / "word.safetensors"
    save_file(content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Pipeline.load(base, LoadOptions(embedding=(given.format(file=file),)))


def test_a_word_is_given_once(encoders: SD3Text) -> None:
    word = likened(encoders, "seven")
    with pytest.raises(ValueError, match="given twice"):
        encoders.taught([word]).taught([word])
    more = encoders.taught([word]).taught([likened(encoders, "nine", "<toy>-2")])
    for new, old in zip(more.encode(["<toy>-2 <toy>"]), encoders.encode(["nine seven"]), strict=True):
        assert torch.equal(new, old)


def test_only_encoders_of_stable_diffusion_3_learn(model: Path) -> None:
    pipe = Pipeline.load(model)
    with pytest.raises(ValueError, match="only Stable Diffusion 3's text encoders learn"):
        reading(pipe.network, pipe.text, None, NewWords({"<toy>": "seven"}))
    assert not isinstance(pipe.network, Reader)
