"""Layouts in which models are published, and what each should learn of one conversation.

From the chat templates of the models named, without what system turns, tools and videos need. In
a turn `$` stands for its pictures, `@` for its texts. `expected` is written by hand: the whole of
`test_labels.TALK`, with `«` and `»` around what is learnt: from where a reply begins to the token
at which generation ends.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    bos: str | None  # token that begins a text
    eos: str  # the tokenizer's end token
    picture: str  # what the template writes for a picture
    turns: tuple[str, str, str]  # the user's; the assistant's; what asks for the latter
    expected: str
    first: str = ""  # what the template begins with
    last: str = ""  # ... and ends with


GENERATION, END = "{% generation %}", "{% endgeneration %}"
CHATML = (
    *("<|im_start|>user\n$@<|im_end|>\n", "<|im_start|>assistant\n@<|im_end|>\n"),
    "<|im_start|>assistant\n",
)
CHATML_TALK = (
    "<|im_start|>user\n{}What is shown?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>»\n"
    "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n«Grey.<|im_end|>»\n"
)
BOT = "<|START_OF_TURN|><|CHATBOT|><|START_RESPONSE|>"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IDEFICS = "User:$@<end_of_utterance>\n", "Assistant: @<end_of_utterance>\n", "Assistant:"
IDEFICS_TALK = (
    "User:<image>What is shown?<end_of_utterance>\nAssistant:« A cat.<end_of_utterance>»\n"
    "User:Which colour?<end_of_utterance>\nAssistant:« Grey.<end_of_utterance>»\n"
)


def headed(header: str, end: str) -> tuple[str, str, str]:
    roles = header.format("user"), header.format("assistant")
    return f"{roles[0]}$@{end}", f"{roles[1]}@{end}", roles[1]


LAYOUTS = {
    "llava-1.5": Layout(
        *("<s>", "</s>", "<image>\n"),
        ("USER: $@ ", f"ASSISTANT: {GENERATION}@ {END}", "ASSISTANT:"),
        "<s>USER: <image>\nWhat is shown? ASSISTANT:« A cat.</s>» "
        "USER: Which colour? ASSISTANT:« Grey.</s>» ",
    ),
    "llava-1.6-mistral": Layout(  # its template misspells the end token
        *("<s>", "</s>", "<image>\n", ("[INST] $@ [/INST]", " @<\\s> ", "")),
        "<s>[INST] <image>\nWhat is shown? [/INST]« A cat.</s>»<\\s> "
        "[INST] Which colour? [/INST]« Grey.</s>»<\\s> ",
    ),
    "llava-onevision": Layout(
        *(None, "<|im_end|>", "<image>\n"),
        (
            "<|im_start|>user $\n@<|im_end|>",
            f"<|im_start|>assistant {GENERATION}\n@{END}<|im_end|>",
            "<|im_start|>assistant\n",
        ),
        "<|im_start|>user <image>\n\nWhat is shown?<|im_end|><|im_start|>assistant \n"
        "«A cat.<|im_end|>»<|im_start|>user \nWhich colour?<|im_end|><|im_start|>assistant \n"
        "«Grey.<|im_end|>»",
    ),
    "bunny": Layout(
        *(None, "<|endoftext|>", "<image>\n"),
        ("USER: $@ ", "ASSISTANT: @<|endoftext|>", "ASSISTANT:"),
        "USER: <image>\nWhat is shown? ASSISTANT:« A cat.<|endoftext|>»"
        "USER: Which colour? ASSISTANT:« Grey.<|endoftext|>»",
    ),
    "qwen2-vl": Layout(
        *(None, "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>", CHATML),
        SYSTEM + CHATML_TALK.format("<|vision_start|><|image_pad|><|vision_end|>"),
        SYSTEM,
    ),
    "internvl": Layout(
        *(None, "<|im_end|>", "<IMG_CONTEXT>\n", CHATML, CHATML_TALK.format("<IMG_CONTEXT>\n"))
    ),
    "lfm2-vl": Layout(
        *("<|startoftext|>", "<|im_end|>", "<image>", CHATML),
        *("<|startoftext|>" + CHATML_TALK.format("<image>"), "<|startoftext|>"),
    ),
    "idefics2": Layout("<s>", "</s>", "<image>", IDEFICS, "<s>" + IDEFICS_TALK),
    "smolvlm": Layout(
        *("<|im_start|>", "<end_of_utterance>", "<image>", IDEFICS),
        *("<|im_start|>" + IDEFICS_TALK, "<|im_start|>"),
    ),
    "gemma-3": Layout(
        *("<bos>", "<eos>", "<start_of_image>"),
        headed("<start_of_turn>{}\n", "<end_of_turn>\n"),
        "<bos><start_of_turn>user\n<start_of_image>What is shown?<end_of_turn>\n"
        "<start_of_turn>assistant\n«A cat.<end_of_turn>»\n<start_of_turn>user\nWhich colour?"
        "<end_of_turn>\n<start_of_turn>assistant\n«Grey.<end_of_turn>»\n",
        "<bos>",
    ),
    "mllama": Layout(
        *("<|begin_of_text|>", "<|eot_id|>", "<|image|>", headed(LLAMA3, "<|eot_id|>")),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What is shown?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«A cat.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Grey.<|eot_id|>»",
        "<|begin_of_text|>",
    ),
    "pixtral": Layout(
        *("<s>", "</s>", "[IMG]", ("[INST]$@[/INST]", "@</s>", "")),
        "<s>[INST][IMG]What is shown?[/INST]«A cat.</s>»[INST]Which colour?[/INST]«Grey.</s>»",
        "<s>",
    ),
    "phi-4-multimodal": Layout(  # generation ends at either of the two that stand last
        *(None, "<|endoftext|>", "<|image|>", headed("<|{}|>", "<|end|>")),
        "<|user|><|image|>What is shown?<|end|><|assistant|>«A cat.<|end|>»"
        "<|user|>Which colour?<|end|><|assistant|>«Grey.<|end|><|endoftext|>»",
        last="<|endoftext|>",
    ),
    "llava-phi-3": Layout(
        *("<s>", "<|end|>", "<image>\n", headed("<|{}|>\n", "<|end|>\n")),
        "<s><|user|>\n<image>\nWhat is shown?<|end|>\n<|assistant|>\n«A cat.<|end|>»\n"
        "<|user|>\nWhich colour?<|end|>\n<|assistant|>\n«Grey.<|end|>»\n",
    ),
    "molmo": Layout(
        *(None, "<|endoftext|>", "<|image|>", (" User: $@", " Assistant: @", " Assistant:")),
        " User: <|image|>What is shown? Assistant:« A cat.<|endoftext|>»"
        " User: Which colour? Assistant:« Grey.<|endoftext|>»",
    ),
    "phi-3": Layout(  # the user's turn has the assistant's header
        *("<s>", "<|end|>", "<|image|>"),
        ("<|user|>\n$@<|end|>\n<|assistant|>\n", "@<|end|>\n", ""),
        "<s><|user|>\n<|image|>What is shown?<|end|>\n<|assistant|>\n«A cat.<|end|>»\n"
        "<|user|>\nWhich colour?<|end|>\n<|assistant|>\n«Grey.<|end|>»\n",
    ),
    "glm-4v": Layout(  # generation ends where the user's turn would begin, too
        *(None, "<|endoftext|>", "<|begin_of_image|><|image|><|end_of_image|>"),
        ("<|user|>\n$@", "<|assistant|>\n@", "<|assistant|>\n"),
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is shown?"
        "<|assistant|>\n«A cat.<|user|>»\nWhich colour?<|assistant|>\n«Grey.<|endoftext|>»",
        "[gMASK]<sop>",
    ),
    "aya-vision": Layout(
        *("<BOS_TOKEN>", "<|END_OF_TURN|>", "<image>"),
        (
            *(
                "<|START_OF_TURN|><|USER|>$@<|END_OF_TURN|>",
                f"{BOT}@<|END_RESPONSE|><|END_OF_TURN|>",
            ),
            BOT,
        ),
        "<BOS_TOKEN><|START_OF_TURN|><|USER|><image>What is shown?<|END_OF_TURN|>"
        f"{BOT}«A cat.<|END_RESPONSE|><|END_OF_TURN|>»<|START_OF_TURN|><|USER|>Which colour?"
        f"<|END_OF_TURN|>{BOT}«Grey.<|END_RESPONSE|><|END_OF_TURN|>»",
        "<BOS_TOKEN>",
    ),
}
