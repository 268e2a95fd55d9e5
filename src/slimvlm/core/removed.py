"""Name options, verbs and Python names of an earlier version, and what to use instead.

Each stays for one release. An old file that holds a removed option at its old default still loads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig, file_only

_TRAINER = "it is Hugging Face's own; in YAML or Python give trainer:"
_ENGINES = "time engines with their own programs, such as vllm bench and llama-bench"
_LORA = "it is PEFT's own; in YAML or Python give lora:"
_LAYERS = "the loss decides: every kept layer is compared where sft is not in it"
OPTIONS: dict[str, tuple[Any, str]] = {
    "help_all": (False, "--help shows every option"),
    "stages": ([], "one ratio keeps more than two in turns; give --ratio"),
    "pad": (False, "plan equal widths, --allocation uniform or balanced, which load without code"),
    "bench engine": ("transformers", _ENGINES),
    "export run": (False, "serve the checkpoint with the engine's own command and ask it"),
    "recover samples": (None, "--fraction or --max-steps"),
    "group_by_length": (False, "like lengths together kept no more"),
    "hidden_layers": ("auto", _LAYERS),
    "kd_on": ("auto", "the loss decides: answers are compared beside sft, all without it"),
    "teacher_weights": ("auto", "a teacher shares weights wherever these are equal"),
    "student_projector_in_teacher": (False, "--paper-exact does it"),
    "load_best": (False, "measure checkpoints with evaluate --data"),
    "eval_fraction": (0.0, "measure checkpoints with evaluate --data"),
    "eval_steps": (None, "measure checkpoints with evaluate --data"),
    "scheduler": ("cosine", f"{_TRAINER} {{lr_scheduler_type: ...}}"),
    "warmup_ratio": (0.03, f"{_TRAINER} {{warmup_steps: 0.1}}"),
    "weight_decay": (0.0, f"{_TRAINER} {{weight_decay: 0.05}}"),
    "max_grad_norm": (1.0, f"{_TRAINER} {{max_grad_norm: ...}}"),
    "save_steps": (200, f"{_TRAINER} {{save_steps: ...}}"),
    "logging_steps": (10, f"{_TRAINER} {{logging_steps: ...}}"),
    "report_to": ("none", f"{_TRAINER} {{report_to: ...}}"),
    "jsd_beta": (0.5, "jsd mixes teacher and student half and half"),
    "lora_alpha": (128, f"{_LORA} {{lora_alpha: ...}}"),
    "lora_dropout": (0.05, f"{_LORA} {{lora_dropout: ...}}"),
    "lora_targets": (".*", f"{_LORA} {{target_modules: ...}}"),
}
"""Default of each removed option, and what to use instead. One verb's has the verb before it."""
VERBS: dict[str, str] = {
    "cache-teacher": "a teacher in memory shares the model's weights; use recover --teacher MODEL",
    "push": "hf upload OWNER/NAME RUN/checkpoint",
    "verify": "every checkpoint is read back when it is written; sha256sum finds later damage",
}
NAMES: dict[str, str] = {
    "push": "huggingface_hub.upload_folder(repo_id=..., folder_path=...)",
    "verify": "every checkpoint is read back when it is written; sha256sum finds later damage",
}
"""Python names of the package."""
CRITERIA: dict[str, str] = {"kl_greedy": "use block_influence"}


def refuse_removed(words: Sequence[str]) -> None:
    """Refuse a removed verb or option, and name its replacement; ``words`` follow ``slimvlm``."""
    if words and words[0] in VERBS:
        raise ConfigError(f"{words[0]} was removed: {VERBS[words[0]]}")
    verb = next(iter(words), "")
    from_file = {"compress": (CompressConfig, RecoverConfig), "recover": (RecoverConfig,)}
    without_flag = set().union(*map(file_only, from_file.get(verb, ())))
    for flag in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
        name = flag.removeprefix("--").replace("-", "_")
        if name in without_flag:
            raise ConfigError(f"{flag} is no flag of {verb}; give it in a file of --config")
        if (row := OPTIONS.get(name) or OPTIONS.get(f"{verb} {name}")) is not None:
            raise ConfigError(f"{flag} was removed: {row[1]}")


def without_removed(values: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Drop removed options with their old default, also inside ``recover``; refuse other values."""
    found = {}
    for name, value in values.items():
        if name in OPTIONS and name not in allowed:
            default, instead = OPTIONS[name]
            if value != default:
                raise ConfigError(f"{name} {value!r} was removed: {instead}")
            continue
        if name == "recover" and isinstance(value, Mapping):
            value = without_removed(value, [])
        found[name] = value
    return found
