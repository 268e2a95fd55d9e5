"""Chat templates that write conversations as the originals' own code does."""

from __future__ import annotations

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
"""System message of LLaVA-1.5 (``vicuna_v1``) and of Bunny."""
INTERN_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
"""System message of InternVL 1.5's ``phi3-chat``."""

_TEXT = (
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
)
_TURNS = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}"
    "{%- for message in messages[:1] -%}" + _TEXT + "{%- endfor -%}"
    "{%- else -%}{%- set turns = messages -%}{{- 'SYSTEM' -}}{%- endif -%}"
)


def vicuna_template(end: str, image: str) -> str:
    """``SYSTEM USER: <image> Q ASSISTANT: A</s>USER: ...``; pictures come first in their turn."""
    system = _TURNS.replace("SYSTEM", VICUNA_SYSTEM.replace("'", "\\'"))
    return (
        system + "{{- ' ' -}}{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}"
        "{%- if message['content'] is not string -%}"
        "{%- for part in message['content'] if part['type'] == 'image' -%}"
        "{{- '" + image + "' -}}{%- endfor -%}{%- endif -%}" + _TEXT + "{{- ' ' -}}"
        "{%- else -%}{{- 'ASSISTANT: ' -}}" + _TEXT + "{{- '" + end + "' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
    )


def phi3_template(start: str, image: str) -> str:
    """``<|system|> SYSTEM<|end|><|user|> Q<|end|><|assistant|> A<|end|>``, lines after roles."""
    content = (
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '" + image + "' -}}"
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )
    return (
        "{{- '" + start + "<|system|>\\n' -}}" + _TURNS.replace("SYSTEM", INTERN_SYSTEM) + ""
        "{{- '<|end|>' -}}{%- for message in turns -%}"
        "{{- '<|' + message['role'] + '|>\\n' -}}" + content + "{{- '<|end|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    )
