"""Tiny models of every family whose pictures can take fewer tokens, with their processors."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers as hf
from transformers.models.smolvlm import processing_smolvlm

from tests import tiny
from tests.tiny_folder import CHATML, VOCAB, root, tokenizer

# a package that numbers the frames of videos
processing_smolvlm.num2words = processing_smolvlm.num2words or str


class Seeing(NamedTuple):
    """A family's processor: how it is built around a tokenizer."""

    processor: Callable[[Any], Any]
    shown: str = "<image>"  # what its chat template writes for a picture
    counted: str = "<image>"  # the token that stands for a picture's features
    specials: tuple[str, ...] = ()
    named: Mapping[str, str] = {}
    ids: Mapping[str, str] = {}  # fields of the configuration, and their tokens
    config: str = ""  # in `tiny.CONFIGS`, if it is not the family's name
    size: tuple[int, int] = (96, 64)  # of a picture that takes more than the least


ONE, TWO = {"height": 32, "width": 32}, {"height": 64, "width": 64}
PATCHES: dict[str, Any] = {
    **{"patch_size": 8, "temporal_patch_size": 1, "merge_size": 2},
    "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
}
PADS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GLM = (
    *("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>"),
    *("<|begin_of_video|>", "<|end_of_video|>"),
)
AYA = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
LLAMA4 = (
    *("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
)
TILES = tuple(f"<row_{row}_col_{col}>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4))
IDEFICS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
MOLMO = (
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"),
    *("<im_end>", "<frame_end>", "<im_low>", "<|image|>", "<|video|>"),
)
LFM = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
ROWS = tuple(f"<|img_row_{row}_col_{col}|>" for row in (1, 2, 3) for col in (1, 2, 3))
OVIS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _qwen(kind: str, videos: str = "Qwen2VLVideoProcessor") -> Seeing:
    def build(words: Any) -> Any:
        made = hf.Qwen2VLImageProcessor(**PATCHES), words, getattr(hf, videos)(**PATCHES)
        return getattr(hf, kind)(*made, chat_template=words.chat_template)

    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": PADS[0], "vision_end_token_id": PADS[1]}
    return Seeing(build, "".join((PADS[0], PADS[2], PADS[1])), PADS[2], PADS, named, ids)


def _glm(kind: str) -> Seeing:
    def build(words: Any) -> Any:
        pictures, videos = f"{kind}ImageProcessor", f"{kind}VideoProcessor"
        made = getattr(hf, pictures)(**PATCHES), words, getattr(hf, videos)(**PATCHES)
        return getattr(hf, f"{kind}Processor")(*made, chat_template=words.chat_template)

    ids = {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    ids |= {"image_start_token_id": GLM[0], "image_end_token_id": GLM[1]}
    ids |= {"video_start_token_id": GLM[4], "video_end_token_id": GLM[5]}
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    return Seeing(build, "".join((GLM[0], GLM[2], GLM[1])), GLM[2], GLM, named, ids)


def _plain(
    kind: str, pictures: Callable[[], Any], videos: Callable[[], Any] | None = None, **how: Any
) -> Callable[[Any], Any]:
    """Build a processor from named parts."""

    def build(words: Any) -> Any:
        parts = {"image_processor": pictures(), "tokenizer": words, **how}
        if videos is not None:
            parts["video_processor"] = videos()
        return getattr(hf, kind)(**parts, chat_template=words.chat_template)

    return build


def _tiles() -> Any:
    return hf.GotOcr2ImageProcessor(size=ONE, crop_to_patches=True, max_patches=8)


INDEX = {"image_token_index": "<image>"}
ID = {"image_token_id": "<image>"}
SIZED = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
FAMILIES: dict[str, Seeing] = {
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    ),
    "glm4v": _glm("Glm4v"),
    "glm_ocr": _glm("Glm46V"),
    "paddleocr_vl": Seeing(
        _plain("PaddleOCRVLProcessor", lambda: hf.PaddleOCRVLImageProcessor(**PATCHES)),
        *("".join((PADS[0], PADS[2], PADS[1])), PADS[2], PADS, {"image_token": PADS[2]}),
        {"image_token_id": PADS[2], "vision_start_token_id": PADS[0]},
    ),
    "video_llama_3": Seeing(
        _plain(
            "VideoLlama3Processor",
            lambda: hf.VideoLlama3ImageProcessor(**PATCHES),
            lambda: hf.VideoLlama3VideoProcessor(**PATCHES),
        ),
        *(PADS[2], PADS[2], PADS, {"image_token": PADS[2], "video_token": PADS[3]}),
        {"image_token_id": PADS[2], "video_token_id": PADS[3]},
    ),
    "mistral3": Seeing(
        _plain(
            "PixtralProcessor",
            lambda: hf.PixtralImageProcessor(patch_size=8, size={"longest_edge": 96}),
            **{"patch_size": 8, "spatial_merge_size": 2},
        ),
        *("[IMG]", "[IMG]", PIXTRAL, {}, {"image_token_index": "[IMG]"}),
    ),
    "llava": Seeing(
        _plain(
            "PixtralProcessor",
            lambda: hf.PixtralImageProcessor(patch_size=8, size={"longest_edge": 96}),
            patch_size=8,
        ),
        *("[IMG]", "[IMG]", PIXTRAL, {}, {"image_token_index": "[IMG]"}, "llava-pixtral"),
    ),
    "idefics3": Seeing(
        _plain("Idefics3Processor", lambda: hf.Idefics3ImageProcessor(**SIZED), image_seq_len=4),
        specials=(*IDEFICS, *TILES),
        ids=ID,
    ),
    "smolvlm": Seeing(
        _plain(
            "SmolVLMProcessor",
            lambda: hf.SmolVLMImageProcessor(**SIZED),
            lambda: hf.SmolVLMVideoProcessor(
                **SIZED, video_sampling={"max_frames": 8, "fps": 1, "video_size": SIZED["size"]}
            ),
            image_seq_len=4,
        ),
        specials=(*IDEFICS, *TILES),
        ids=ID,
    ),
    "idefics2": Seeing(
        _plain(
            "Idefics2Processor",
            lambda: hf.Idefics2ImageProcessor(
                size={"longest_edge": 32, "shortest_edge": 8}, do_image_splitting=True
            ),
            image_seq_len=4,
        ),
        specials=IDEFICS,
        named={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        ids=ID,
    ),
    "llava_next": Seeing(
        _plain(
            "LlavaNextProcessor",
            lambda: hf.LlavaNextImageProcessor(
                size={"shortest_edge": 32},
                crop_size=ONE,
                image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            ),
            **{"patch_size": 8, "num_additional_image_tokens": 1},
            vision_feature_select_strategy="default",
        ),
        specials=("<image>",),
        ids=INDEX,
    ),
    "llava_onevision": Seeing(
        _plain(
            "LlavaOnevisionProcessor",
            lambda: hf.LlavaOnevisionImageProcessor(
                size=ONE, image_grid_pinpoints=[[32, 32], [64, 32], [32, 64]]
            ),
            lambda: hf.LlavaOnevisionVideoProcessor(size=ONE),
            **{"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ),
        specials=("<image>", "<video>"),
        ids=INDEX,
    ),
    "internvl": Seeing(
        _plain(
            "InternVLProcessor",
            _tiles,
            lambda: hf.InternVLVideoProcessor(size=ONE),
            image_seq_length=4,
        ),
        *("<IMG_CONTEXT>\n", "<IMG_CONTEXT>", ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")),
        {
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
        *({"image_token_id": "<IMG_CONTEXT>"}, "internvl-qwen2"),
    ),
    "aya_vision": Seeing(
        _plain("AyaVisionProcessor", _tiles, patch_size=8, downsample_factor=2, img_size=32),
        *("<image>", "<|IMG_PATCH|>", ("<image>", *AYA), {}, {"image_token_index": AYA[2]}),
    ),
    "cohere2_vision": Seeing(
        _plain(
            "Cohere2VisionProcessor",
            lambda: hf.Cohere2VisionImageProcessor(size=ONE, patch_size=2, max_patches=8),
        ),
        specials=("<image>", *AYA),
        named={
            **{"boi_token": AYA[0], "eoi_token": AYA[1], "image_token": "<image>"},
            "img_line_break_token": AYA[3],
        },
        ids=ID,
    ),
    "ovis2": Seeing(
        _plain(
            "Ovis2Processor",
            lambda: hf.Ovis2ImageProcessor(size=ONE, crop_to_patches=True, max_patches=8),
            image_seq_length=4,
        ),
        *("<image>", "<IMG_ATOM>", ("<image>", "<IMG_ATOM>", *OVIS)),
        ids={"image_token_id": "<IMG_ATOM>"},
    ),
    "llama4": Seeing(
        _plain(
            "Llama4Processor",
            lambda: hf.Llama4ImageProcessor(size=ONE, max_patches=8),
            patch_size=8,
        ),
        *("<|image|>", "<|patch|>", LLAMA4, {}, {"image_token_index": "<|patch|>"}),
    ),
    "perception_lm": Seeing(
        _plain(
            "PerceptionLMProcessor",
            lambda: hf.PerceptionLMImageProcessor(size=ONE, tile_size=32, max_num_tiles=8),
            lambda: hf.PerceptionLMVideoProcessor(size=ONE),
            **{"patch_size": 8, "pooling_ratio": 1},
        ),
        specials=("<image>", "<video>"),
        named={"image_token": "<image>", "video_token": "<video>"},
        ids={**ID, "video_token_id": "<video>"},
    ),
    "molmo2": Seeing(
        _plain(
            "Molmo2Processor",
            lambda: hf.Molmo2ImageProcessor(
                size=TWO, patch_size=8, max_crops=8, overlap_margins=[1, 1]
            ),
            lambda: hf.Molmo2VideoProcessor(size=TWO, patch_size=8),
        ),
        *("<|image|>", "<im_patch>", MOLMO, {"image_token": "<|image|>"}),
        {
            **{"image_patch_id": "<im_patch>", "image_start_token_id": "<im_start>"},
            **{"image_end_token_id": "<im_end>", "frame_start_token_id": "<frame_start>"},
            **{"low_res_image_start_token_id": MOLMO[3], "frame_end_token_id": "<frame_end>"},
        },
        size=(320, 200),
    ),
    "minicpmv4_6": Seeing(
        _plain(
            "MiniCPMV4_6Processor",
            lambda: hf.MiniCPMV4_6ImageProcessor(scale_resolution=32, patch_size=8),
            lambda: hf.MiniCPMV4_6VideoProcessor(scale_resolution=32, patch_size=8),
        ),
        specials=("<image>", "<video>", "<im>", "</im>", "<slice>", "</slice>", "<id>", "</id>"),
        named={
            **{"image_token": "<image>", "video_token": "<video>", "image_start_token": "<im>"},
            **{"image_end_token": "</im>", "slice_start_token": "<slice>"},
            **{"slice_end_token": "</slice>", "image_id_start_token": "<id>"},
            "image_id_end_token": "</id>",
        },
        ids={**ID, "video_token_id": "<video>"},
    ),
    "lfm2_vl": Seeing(
        _plain(
            "Lfm2VlProcessor",
            lambda: hf.Lfm2VlImageProcessor(
                **{"tile_size": 32, "encoder_patch_size": 8, "min_image_tokens": 1},
                **{"max_image_tokens": 4, "size": ONE, "max_pixels_tolerance": 1.0},
            ),
        ),
        *("<image>", "<image>", (*LFM, *ROWS), {}, ID),
    ),
    "gemma4": Seeing(
        _plain(
            "Gemma4Processor",
            lambda: hf.Gemma4ImageProcessor(
                patch_size=8, pooling_kernel_size=2, max_soft_tokens=280
            ),
            lambda: hf.Gemma4VideoProcessor(patch_size=8, pooling_kernel_size=2),
            feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        ),
        specials=("<image>", "<boi>", "<eoi>", "<audio>", "<|video|>"),
        named={
            **{"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
            **{"audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"},
        },
        ids={**ID, "video_token_id": "<|video|>", "audio_token_id": "<audio>"},
    ),
    "phi4_multimodal": Seeing(
        _plain(
            "Phi4MultimodalProcessor",
            lambda: hf.Phi4MultimodalImageProcessor(patch_size=14, dynamic_hd=6),
            audio_processor=hf.Phi4MultimodalFeatureExtractor(),
        ),
        specials=("<image>", "<audio>"),
        named={"image_token": "<image>", "audio_token": "<audio>"},
        size=(1344, 896),
    ),
}


@cache
def made(name: str) -> tuple[Any, Any]:
    """A family's model and processor."""
    row = FAMILIES[name]
    specials = dict.fromkeys(("<|im_start|>", "<|im_end|>", *row.specials, *row.named.values()))
    words = tokenizer(
        list(specials), adds_bos=False, bos=None, extra_special_tokens=dict(row.named)
    )
    words.chat_template = CHATML % row.shown
    processor, config = row.processor(words), tiny.CONFIGS[row.config or name]()
    text = config.get_text_config()
    for part in {id(each): each for each in (config, text)}.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = VOCAB
    text.max_position_embeddings = 2048
    if name == "phi4_multimodal":  # its processor counts the tokens of tiles of 448 pixels
        vision = config.vision_config
        vision.crop_size = vision.image_size = 448
        vision.patch_size, vision.image_token_id = 14, words.convert_tokens_to_ids("<image>")
    if name == "gemma4":
        text.vocab_size_per_layer_input = config.vision_config.position_embedding_size = VOCAB
    if name == "molmo2":  # tiles overlap, so that small ones take as many tokens as one
        config.vision_config.image_size = [64, 64]
        config.vision_config.num_position_embeddings = 64
    if name == "ovis2":
        config.visual_indicator_token_ids = words.convert_tokens_to_ids(list(OVIS))
    for field, token in row.ids.items():
        setattr(config, field, words.convert_tokens_to_ids(token))
    return tiny.made(config), processor


@cache
def folder(name: str) -> Path:
    """A complete model folder of a family. Tests must not change it."""
    model, processor = made(name)
    path = root() / f"pictures-{name}"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
